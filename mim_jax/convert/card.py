"""The model card beside an export: what the weights are, and code that loads them, which the tests run as it stands."""

import json
import textwrap

from mim_jax.convert.written import Written

HF_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "README.md")
LIBRARY = {
    "timm": "timm",
    "hf": "Hugging Face transformers",
    "safetensors": "the code released for this method",
    "npz": "any program that reads numpy's files",
}

SHOWN = ("job", "method", "total_epochs", "total_steps", "total_examples", "batch_size", "image_size", "encoder", "optim",
         "seed")  # fmt: skip
LICENCE_IDS = ("mit", "apache-2.0", "cc-by-nc-4.0")  # as Hugging Face writes them


def write(facts: dict[str, str], written: Written, file) -> str:
    """-> markdown. `facts` are those in the file (export.describe), `file` the path of the weights."""
    get = lambda key: json.loads(facts[key])
    to, (height, width), channels = facts["layout"], get("image_size"), get("channels")
    total = sum(x.size for x in written.tensors.values())
    length = f"step {facts['step']}" if facts["step"] else ""
    length += f", {int(facts['examples']):,} images seen" if facts["examples"] else ""
    length += f"; planned: {facts['planned_epochs']} epochs" if facts["planned_epochs"] else ""
    trained = {"pretrain": f"pretrained by {facts['method']}", "finetune": f"pretrained by {facts['method']}, fine-tuned"}
    rows = {
        "Weights": f"`{file.name}`: {len(written.tensors)} tensors, {total:,} numbers, for {LIBRARY[to]}",
        "Training": f"{trained.get(facts['job'], facts['job'])}; {length}",
        "Images": f"{height} x {width} px, {channels} channel{'s' if channels > 1 else ''}; {normalisation(facts)}",
        "Pooling": facts["pooling"],
        "Code": f"mim_jax, commit {facts['git']}" if facts["git"] else "mim_jax",
        "Licence": licence(facts),
    }
    imported = not length
    if imported:
        rows["Training"] = f"released weights: {get('origin')['what']}"
    if facts["weights"] == "average":
        rows["Weights"] += "; the moving average of those trained"
    lines = front_matter(facts) if to == "hf" else []
    lines += [f"# {file.stem if to != 'hf' else file.parent.name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "## Loading", "", "```python", USAGE[to](written, file), "```", "", NOTES[to](facts, written)]
    if left := get("left_out"):
        lines += ["", f"Not in the file: {', '.join(f'`{path}`' for path in tops(left))}."]
    for words, key in {"model" if imported else "training": "config", "pretraining before it": "pretraining_config"}.items():
        if config := get(key):
            said = [name for name in (*SHOWN, config.get("method", "")) if config.get(name)]
            rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(config[name])}" for name in said)
            lines += ["", f"## The {words}", "", "```json", f"{{\n{rows}\n}}", "```"]
    return "\n".join([*lines, "", "The whole config is in the metadata of the file."]) + "\n"


def front_matter(facts) -> list[str]:
    """What Hugging Face's pages read."""
    name = facts["licence"].lower().replace(" ", "-")
    known = [f"license: {name}"] if name in LICENCE_IDS else ["license: other", f"license_name: {json.dumps(facts['licence'])}"]
    return ["---", "library_name: transformers", *known, "tags:", "- masked-image-modelling", "---", ""]


def tops(paths) -> list[str]:
    """The first parts of paths, each once."""
    return sorted({path.split("/")[0] + "/*" if "/" in path else path for path in paths})


def normalisation(facts) -> str:
    if facts["normalise"] == "image":
        return "each image standardised by its own mean and deviation (over pixels and channels)"
    return (
        f"RGB in [0, 1], then (x - {facts['mean']}) / {facts['std']}"
        if facts["channels"] == "3"
        else (f"values in [0, 1], then (x - {facts['mean']}) / {facts['std']}")
    )


def licence(facts) -> str:
    origin = json.loads(facts["origin"])
    if not origin:
        return facts["licence"]
    return (
        f"{facts['licence']}, that of the weights it started from: `{origin['file']}` ({origin['from']}, "
        f"sha256 {origin['sha256'][:12]})"
    )


# -- code that loads the file -----------------------------------------------------------------------------------------


def timm_usage(written: Written, file) -> str:
    m = written.model
    options = [f"{key}={tuple(x) if isinstance(x, list) else x!r}" for key, x in m["options"].items()]
    if "norm_eps" in m:
        options.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={m['norm_eps']:g})")
    lines = ["from functools import partial", ""] if "norm_eps" in m else []
    call = textwrap.wrap(", ".join([f'"{m["name"]}"', *options]), 100, break_on_hyphens=False, break_long_words=False)
    lines += ["import timm", "import torch", "from safetensors.torch import load_file", "",
              "model = timm.create_model(", *(f"    {line}" for line in call), ")",
              f'model.load_state_dict(load_file("{file.name}"), strict=True)']  # fmt: skip
    if "norm2_eps" in m:
        lines += [
            "for name, module in model.named_modules():",
            '    if name.endswith(".norm2"):',
            f"        module.eps = {m['norm2_eps']:g}",
        ]
    if "fc_norm_eps" in m:
        lines.append(f"model.norm.eps = {m['fc_norm_eps']:g}")
    if m.get("norm_after_mean"):
        swap = "model.norm, model.head.fc = torch.nn.Identity(), torch.nn.Sequential(model.norm, model.head.fc)"
        lines += ["# This model was trained with the norm after the mean of the tokens; timm has it before.", swap]
    return "\n".join([*lines, "model.eval()"])


def timm_notes(facts, written: Written) -> str:
    m = written.model
    given = "the logits" if m["options"]["num_classes"] else "pooled features"
    notes = [f"`model(images)` of normalised images [b c h w] are {given}."]
    if facts["job"] == "pretrain" and not m["name"].startswith("swin"):
        mean = "use_fc_norm=False" if m["name"].startswith("beit") else "fc_norm=False"
        notes += [
            f"Here they are the cls token after the final norm; `global_pool='avg', {mean}` in place of "
            "`global_pool='token'` gives the mean of the patch tokens after it."
        ]
    return " ".join([*notes, "`model.forward_features(images)` are all tokens."])


def hf_usage(written: Written, file) -> str:
    kind = written.model["config"]["architectures"][0]
    return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{file.parent.name}").eval()'


def hf_notes(facts, written: Written) -> str:
    if written.model["preprocessor"]:
        return "`AutoImageProcessor.from_pretrained` of the same folder resizes and normalises images."
    return "There is no preprocessor_config.json: the library has none for these images (see the table)."


def safetensors_usage(written: Written, file) -> str:
    return f'from safetensors.numpy import load_file\n\nstate = load_file("{file.name}")'


def safetensors_notes(facts, written: Written) -> str:
    notes = ["Names and layouts are those of the code released for the method; fixed position tables are not in the file."]
    if any(".rpe_k." in name for name in written.tensors):
        notes.append("What iRPE computes, and a reference forward that needs numpy alone: docs/irpe_vit.md of mim_jax.")
    return " ".join(notes)


def npz_usage(written: Written, file) -> str:
    return (
        f'import json\n\nimport numpy as np\n\nwith np.load("{file.name}") as file:\n'
        '    params = {name: file[name] for name in file.files if name != "metadata"}\n'
        '    metadata = json.loads(str(file["metadata"]))'
    )


def npz_notes(facts, written: Written) -> str:
    return (
        "Names are paths in the model's tree; `kernel` [in out] multiplies from the right, and the rows of a patch embedding "
        "are (row, column, channel) of a patch."
    )


USAGE = {"timm": timm_usage, "hf": hf_usage, "safetensors": safetensors_usage, "npz": npz_usage}
NOTES = {"timm": timm_notes, "hf": hf_notes, "safetensors": safetensors_notes, "npz": npz_notes}

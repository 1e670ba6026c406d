"""The model card beside an export: what the weights are, and code that loads them, which the tests run as it stands."""

import json
import textwrap

from mim_jax.convert.writing.written_model import Written

HF_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "README.md")
LIBRARY = dict(timm="timm", hf="Hugging Face transformers", safetensors="the code released for this method")
LIBRARY["npz"] = "any program that reads numpy's files"
SHOWN = "job method total_epochs total_steps total_examples batch_size image_size encoder optim seed".split()
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
    code, words = LOADING[to](facts, written, file)
    lines += ["", "## Loading", "", "```python", code, "```", "", words]
    if left := {path.split("/")[0] + "/*" if "/" in path else path for path in get("left_out")}:
        lines += ["", f"Not in the file: {', '.join(f'`{path}`' for path in sorted(left))}."]
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


def normalisation(facts) -> str:
    if facts["normalise"] == "image":
        return "each image standardised by its own mean and deviation (over pixels and channels)"
    return f"{'RGB' if facts['channels'] == '3' else 'values'} in [0, 1], then (x - {facts['mean']}) / {facts['std']}"


def licence(facts) -> str:
    origin = json.loads(facts["origin"])
    if not origin:
        return facts["licence"]
    return (
        f"{facts['licence']}, that of the weights it started from: `{origin['file']}` ({origin['from']}, "
        f"sha256 {origin['sha256'][:12]})"
    )


# -- code that loads the file, and what is said below it -------------------------------------------------------------


def timm_loading(facts, written: Written, file) -> tuple[str, str]:
    m = written.model
    options = [f"{key}={tuple(x) if isinstance(x, list) else x!r}" for key, x in m["options"].items()]
    if "norm_eps" in m:
        options.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={m['norm_eps']:g})")
    lines = ["from functools import partial", ""] if "norm_eps" in m else []
    call = textwrap.wrap(", ".join([f'"{m["name"]}"', *options]), 100, break_on_hyphens=False, break_long_words=False)
    lines += ["import timm", "import torch", "from safetensors.torch import load_file", ""]
    lines += ["model = timm.create_model(", *(f"    {line}" for line in call), ")"]
    lines.append(f'model.load_state_dict(load_file("{file.name}"), strict=True)')
    if "norm2_eps" in m:
        lines += ["for name, module in model.named_modules():", '    if name.endswith(".norm2"):']
        lines.append(f"        module.eps = {m['norm2_eps']:g}")
    if "fc_norm_eps" in m:
        lines.append(f"model.norm.eps = {m['fc_norm_eps']:g}")
    if m.get("norm_after_mean"):
        swap = "model.norm, model.head.fc = torch.nn.Identity(), torch.nn.Sequential(model.norm, model.head.fc)"
        lines += ["# This model was trained with the norm after the mean of the tokens; timm has it before.", swap]
    given = "the logits" if m["options"]["num_classes"] else "pooled features"
    words = f"`model(images)` of normalised images [b c h w] are {given}. "
    if facts["job"] == "pretrain" and not m["name"].startswith("swin"):
        mean = "use_fc_norm=False" if m["name"].startswith("beit") else "fc_norm=False"
        words += (
            f"Here they are the cls token after the final norm; `global_pool='avg', {mean}` in place of "
            "`global_pool='token'` gives the mean of the patch tokens after it. "
        )
    return "\n".join([*lines, "model.eval()"]), words + "`model.forward_features(images)` are all tokens."


def hf_loading(facts, written: Written, file) -> tuple[str, str]:
    kind = written.model["config"]["architectures"][0]
    code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{file.parent.name}").eval()'
    if written.model["preprocessor"]:
        return code, "`AutoImageProcessor.from_pretrained` of the same folder resizes and normalises images."
    return code, "There is no preprocessor_config.json: the library has none for these images (see the table)."


def safetensors_loading(facts, written: Written, file) -> tuple[str, str]:
    words = "Names and layouts are those of the code released for the method; fixed position tables are not in the file."
    if any(".rpe_k." in name for name in written.tensors):
        words += " What iRPE computes, and a reference forward that needs numpy alone: docs/irpe_vit.md of mim_jax."
    return f'from safetensors.numpy import load_file\n\nstate = load_file("{file.name}")', words


def npz_loading(facts, written: Written, file) -> tuple[str, str]:
    code = f"""import json

import numpy as np

with np.load("{file.name}") as file:
    params = {{name: file[name] for name in file.files if name != "metadata"}}
    metadata = json.loads(str(file["metadata"]))"""
    return code, (
        "Names are paths in the model's tree; `kernel` [in out] multiplies from the right, and the rows of a patch embedding "
        "are (row, column, channel) of a patch."
    )


LOADING = {"timm": timm_loading, "hf": hf_loading, "safetensors": safetensors_loading, "npz": npz_loading}

"""A run's weights as files for other libraries, each with a card that says what they are and how to use them."""

import json
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mim_jax import sharding
from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.convert.writing import model_card
from mim_jax.convert.writing.for_hugging_face import hf
from mim_jax.convert.writing.for_timm import timm
from mim_jax.convert.writing.written_model import Written, npz, safetensors
from mim_jax.paths import at_home
from mim_jax.runs import saved
from mim_jax.runs.saved import CheckpointError, Saved

SUFFIX = {"timm": ".safetensors", "safetensors": ".safetensors", "npz": ".npz"}
OWN_LICENCE = "weights trained by the user"
PLACES = ("path", "data_dir", "init_from", "weights")
POOLING = {
    "mean": "mean of patch tokens, then norm, then head",
    "cls": "cls token after the final norm, then head",
    "normed": "mean of patch tokens after the final norm, then head",
}
TOLD = ("job", "encoder", "image_size", "channels", "pool", "classes")  # the part of an imported config that its tensors tell
# config of the run, {our path: array}, encoder_only -> Written
FORMATS = {"timm": timm, "hf": hf, "safetensors": safetensors, "npz": npz}


def export(run: str, to: str, out: str, encoder_only: bool = False, weights: str = "trained") -> list[pathlib.Path]:
    """Writes the newest checkpoint of a run (or the step folder it names) for `to`, one of FORMATS -> the files.

    timm, safetensors and npz: `out` is a file, and the card lies beside it as NAME.md. hf: `out` is a folder. `encoder_only`
    leaves heads and decoders out. `weights`: trained, or average for their moving average, where the run kept one.

    Files get their names when all of them are complete. Raises ConfigError, before anything is written, for what the format
    has no model for, and for files that are there already.
    """
    choice("--to", to, FORMATS)
    part, source = saved.PARTS[choice("--weights", weights, saved.PARTS)], saved.open(run)
    if "encoder" not in source.config:
        raise ConfigError(f"'{run}': its checkpoint does not say of which encoder it is; give the pretraining run")
    files = places(to, out)
    params = {path: np.asarray(x) for path, x in source.arrays(sharding.make_mesh(), part=part).items()}
    try:
        return write(files, to, params, lineage(source), encoder_only, weights)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out={out} cannot be written ({reason}); choose another") from error


def places(to: str, out: str) -> list[pathlib.Path]:
    """The files that an export writes. Raises ConfigError when one is there, and for a name of another format."""
    place = pathlib.Path(at_home(out))
    if "://" in out:
        raise ConfigError(f"--out={out}: files are written to a folder of this machine; copy them from there")
    if to in SUFFIX and place.suffix != SUFFIX[to]:
        raise ConfigError(f"--out={out}: --to={to} writes a file; let its name end in {SUFFIX[to]}")
    files = [place, place.with_name(place.name + ".md")]
    if to == "hf":
        files = [place.resolve() / name for name in model_card.HF_FILES]
    if there := [str(file) for file in files if file.exists()]:
        raise ConfigError(f"{there[0]} is there already, and nothing is overwritten; choose another --out")
    return files


def write(
    files, to: str, params: dict, runs: list[dict], encoder_only: bool = False, weights: str = "trained"
) -> list[pathlib.Path]:
    """Writes {our path: array} of the first of `runs` (see `lineage`) to `files` (see `places`) -> those that were written."""
    written = FORMATS[to](ConfigDict(runs[0]["config"]), params, encoder_only)
    facts, (model, *others, card) = describe(runs, to, written, encoder_only, weights), files
    save = save_npz if to == "npz" else save_safetensors
    contents = {model: lambda file: save(file, written.tensors, facts)}
    for file in others:  # those of hf, whose stems begin like their parts of `model`
        if said := written.model[file.stem.partition("_")[0]]:
            contents[file] = json.dumps(said, indent=2) + "\n"
    contents[card] = model_card.write(facts, written, model)
    return complete(contents)


def lineage(run: Saved) -> list[dict]:
    """The meta data of a checkpoint, of the one it started from, and so on, while their folders hold them still."""
    runs = [run]
    while ancestor := runs[-1].meta.get("ancestor"):
        try:
            earlier = saved.open(runs[-1].meta["config"]["init_from"])
        except CheckpointError:
            break
        if earlier.digest != ancestor["weights"]:
            break
        runs.append(earlier)
    return [run.meta for run in runs]


def origin_of(meta: dict) -> tuple[str, dict]:
    """-> (the licence of the weights that this training started from, what is known of their file)."""
    config, ancestor = meta["config"], meta.get("ancestor", {})
    if origin := meta.get("origin") or ancestor.get("origin"):
        return origin["licence"], origin
    if config.get("init_from") and not config.get("scratch") and not ancestor:
        return f"unknown: it started from '{pathlib.PurePath(config['init_from']).name}', before runs kept that", {}
    return OWN_LICENCE, {}


def describe(runs: list[dict], to: str, written: Written, encoder_only: bool, weights: str) -> dict[str, str]:
    """What is said in the file and on the card, as text: safetensors holds nothing else.

    Of released weights that were only taken in, nothing is said that they did not bring along.
    """
    meta, config = runs[0], ConfigDict(runs[0]["config"])
    imported, (licence, origin) = bool(meta.get("origin")), origin_of(meta)
    method = origin["from"] if imported else config.get("method") or meta.get("ancestor", {}).get("method", "unknown")
    by = "mean" if config.encoder.kind == "swin" else "mean or cls"
    pooling = POOLING[config.pool] if config.job == "finetune" else f"none: after the final norm, by {by}"
    pooling = "none: maps of a detector" if config.job == "detect" else pooling
    earlier = without_places(runs[1]["config"]) if len(runs) > 1 and not runs[1].get("origin") else {}
    facts = dict(
        format="pt", written_by="mim_jax", layout=to, encoder_only=encoder_only, weights=weights, method=method,
        job=config.job, step="" if imported else meta["step"], examples="" if imported else meta.get("examples", ""),
        planned_epochs="" if imported else config.get("total_epochs") or "", pooling=pooling,
        image_size=list(config.image_size), channels=config.channels, normalise=config.data.normalise,
        mean=list(config.data.mean), std=list(config.data.std), licence=licence, origin=origin, git=meta.get("git", ""),
        config={key: meta["config"][key] for key in TOLD if key in config} if imported else without_places(meta["config"]),
        model=written.model,
        left_out=list(written.left), pretraining_config=earlier,
    )  # fmt: skip
    return {key: x if isinstance(x, str) else json.dumps(x) for key, x in facts.items()}


def without_places(config: dict) -> dict:
    """A config to be published: of the folders that it names only the last part stays."""
    cut = lambda key, x: pathlib.PurePath(x).name if key in PLACES and isinstance(x, str) else x
    return {key: without_places(x) if isinstance(x, dict) else cut(key, x) for key, x in config.items()}


def save_safetensors(file, tensors, facts):
    save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, file, facts)  # it takes the memory as it lies


def save_npz(file, tensors, facts):
    with open(file, "wb") as f:  # a name without .npz would get it
        np.savez(f, **tensors, metadata=np.array(json.dumps(facts)))


def complete(contents: dict) -> list[pathlib.Path]:
    """{file: its text, or what writes it to a path} -> the files, all under other names until the last one is complete."""
    parts = {file: file.with_name(file.name + ".part") for file in contents}
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                parts[file].write_text(content, "utf-8")
            else:
                content(parts[file])
        for file, part in parts.items():
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return list(contents)

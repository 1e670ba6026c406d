"""A run's weights as files for other libraries, each with a card that says what they are and how to use them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from mim_jax import sharding
from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.convert import card
from mim_jax.convert.formats import FORMATS, Written
from mim_jax.train import pretrained
from mim_jax.train.checkpoint import CheckpointError

SUFFIX = {"timm": ".safetensors", "safetensors": ".safetensors", "npz": ".npz"}
OWN_LICENCE = "weights trained by the user"
PLACES = ("path", "data_dir", "init_from", "weights")
POOLING = {
    "mean": "mean of patch tokens, then norm, then head",
    "cls": "cls token after the final norm, then head",
    "normed": "mean of patch tokens after the final norm, then head",
}
METADATA = "metadata"  # the name of a .npz file's array of JSON text


def export(run: str, to: str, out: str, encoder_only: bool = False) -> list[pathlib.Path]:
    """Writes the newest checkpoint of a run (or the step folder it names) for `to`, one of FORMATS -> the files.

    timm, safetensors and npz: `out` is a file, and the card lies beside it as NAME.md. hf: `out` is a folder. `encoder_only`
    leaves heads and decoders out. Files get their names when all of them are complete. Raises ConfigError, before anything
    is written, for what the format has no model for, and for files that are there already.
    """
    choice("--to", to, FORMATS)
    folder = pretrained.find(run)
    runs = lineage(folder)
    config = ConfigDict(runs[0]["config"])
    if "encoder" not in config:
        raise ConfigError(f"'{run}': its checkpoint does not say of which encoder it is; give the pretraining run")
    files = places(to, out)
    params = {path: np.asarray(x) for path, x in pretrained.load_params(folder, sharding.make_mesh()).items()}
    try:
        return write(files, to, params, runs, encoder_only)
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written ({error.strerror}); choose another") from error


def places(to: str, out: str) -> list[pathlib.Path]:
    """The files that an export writes. Raises ConfigError when one is there, and for a name of another format."""
    place = pathlib.Path(out)
    if to in SUFFIX and place.suffix != SUFFIX[to]:
        raise ConfigError(f"--out={out}: --to={to} writes a file; let its name end in {SUFFIX[to]}")
    files = [place / name for name in card.HF_FILES] if to == "hf" else [place, place.with_name(place.name + ".md")]
    if there := [str(file) for file in files if file.exists()]:
        raise ConfigError(f"{there[0]} is there already, and nothing is overwritten; choose another --out")
    return files


def write(files, to: str, params: dict, runs: list[dict], encoder_only: bool = False) -> list[pathlib.Path]:
    """Writes {our path: array} of the first of `runs` (see `lineage`) to `files` (see `places`) -> those that were written."""
    written = FORMATS[to](ConfigDict(runs[0]["config"]), params, encoder_only)
    facts, (model, *others) = describe(runs, to, written, encoder_only), files
    save = save_npz if to == "npz" else save_safetensors
    contents = {model: lambda file: save(file, written.tensors, facts)}
    if to == "hf":
        for file, key in zip(others, ("config", "preprocessor")):
            if written.model[key]:
                contents[file] = as_json(written.model[key])
    contents[files[-1]] = card.write(facts, written, model).encode()
    return complete(contents)


def lineage(folder) -> list[dict]:
    """The meta data of a checkpoint, of the run it started from, and so on, as far as their folders are still there."""
    metas, seen = [pretrained.read_meta(folder)], {str(folder)}
    while source := started_from(metas[-1]):
        try:
            folder = pretrained.find(source)
            if str(folder) in seen:  # a folder was given to another run since
                break
            metas.append(pretrained.read_meta(folder))
        except CheckpointError:
            break
        seen.add(str(folder))
    return metas


def started_from(meta: dict) -> str:
    config = meta["config"]
    return "" if config.get("scratch") or meta.get("origin") else config.get("init_from", "")


def origin_of(runs: list[dict]) -> tuple[str, dict]:
    """-> (the licence of the weights this training started from, what is known of their file)."""
    origin = next((meta["origin"] for meta in runs if meta.get("origin")), None)
    if origin:
        return origin.get("licence") or "unknown", origin
    if gone := started_from(runs[-1]):
        return f"unknown: it started from '{pathlib.PurePath(gone).name}', which is not there as it was", {}
    return OWN_LICENCE, {}


def describe(runs: list[dict], to: str, written: Written, encoder_only: bool) -> dict[str, str]:
    """What is said in the file and on the card, as text: safetensors holds nothing else."""
    meta, config = runs[0], ConfigDict(runs[0]["config"])
    licence, origin = origin_of(runs)
    method = next((m["config"]["method"] for m in runs if "method" in m["config"]), "unknown")
    pooling = "none: after the final norm, by mean" + (" or cls" if "depths" not in config.encoder else "")
    if config.job == "finetune":
        pooling = POOLING[config.pool]
    facts = dict(
        format="pt", written_by="mim_jax", layout=to, encoder_only=encoder_only, method=method, job=config.job,
        step=meta["step"], examples=meta.get("examples", ""), planned_epochs=config.get("total_epochs") or "",
        pooling=pooling, image_size=list(config.image_size), channels=config.channels, normalise=config.data.normalise,
        mean=list(config.data.mean), std=list(config.data.std), licence=licence, origin=origin, git=meta.get("git", ""),
        config=without_places(runs[0]["config"]), model=written.model, left_out=list(written.left),
        pretraining_config=without_places(runs[-1]["config"]) if len(runs) > 1 else {},
    )  # fmt: skip
    return {key: x if isinstance(x, str) else json.dumps(x) for key, x in facts.items()}


def without_places(config: dict) -> dict:
    """A config to be published: of the folders that it names only the last part stays."""
    cut = lambda key, x: pathlib.PurePath(x).name if key in PLACES and isinstance(x, str) else x
    return {key: without_places(x) if isinstance(x, dict) else cut(key, x) for key, x in config.items()}


def as_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def save_safetensors(file, tensors, facts):
    save_file(
        {name: np.asarray(x, order="C") for name, x in tensors.items()}, file, facts
    )  # it takes the memory as it lies


def save_npz(file, tensors, facts):
    with open(file, "wb") as f:  # a name without .npz would get it
        np.savez(f, **tensors, **{METADATA: np.array(json.dumps(facts))})


def complete(contents: dict) -> list[pathlib.Path]:
    """{file: bytes, or what writes it to a path} -> the files, all under other names until the last one is complete."""
    parts = {}
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            parts[file] = file.with_name(file.name + ".part")
            if callable(content):
                content(parts[file])
            else:
                parts[file].write_bytes(content)
        for file, part in parts.items():
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return list(contents)

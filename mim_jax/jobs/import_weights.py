"""The job behind `python -m mim_jax.convert --from`: a file of released weights becomes the folder of a run, which
`init_from`, `job=eval`, visualise and fine-tuning take."""

import dataclasses
import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import clock, paths, provenance, sections, tree
from mim_jax.assemble import methods, weights
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.convert.reading import model_folder, weights_file
from mim_jax.convert.reading.chosen_model import Chosen, choose
from mim_jax.convert.reading.recognition import Options, completed, filled
from mim_jax.convert.reading.released_formats import LICENCES
from mim_jax.convert.reading.released_model import Release, fit_windows, release, require_fit
from mim_jax.convert.reading.sizes_from_shapes import describe
from mim_jax.jobs import finetune, pretrain
from mim_jax.models.layers import LAYER_NORM_EPS
from mim_jax.objectives.objective import Objective
from mim_jax.runs import checkpoint, saved
from mim_jax.runs.workdir import CONFIG, claimed
from mim_jax.train.state import TrainState, divide


def import_weights(src: str, workdir: str, options: Options, tokenizer: str = "") -> str:
    """Writes a run's folder with the weights of a released file -> what was done with every tensor.

    `tokenizer`: the file of DALL-E's encoder, for BEiT's pretraining. Raises ConfigError, before anything is written, for a
    file that does not fit, and for a folder that holds a run.
    """
    if not workdir:
        raise ConfigError("--workdir is empty; name a folder")
    place = paths.expanded(workdir)
    if (place / CONFIG).exists() or saved.has_checkpoint(place):
        raise ConfigError(f"'{workdir}' holds a run already; choose another --workdir")
    state, found = {}, None
    try:
        state, chosen, options = opened(src, options)
        found = release(state, options, chosen)
        made, params = fitted(found, options, tokenizer)
        came_from = origin(src, found, options)
        params |= found.params()
        if broken := [path for path, x in params.items() if not np.isfinite(x).all()]:
            name = found.arrays[broken[0]][0] if broken[0] in found.arrays else broken[0]
            raise ConfigError(f"'{src}': '{name}' has values that are no finite numbers")
    except ConfigError as error:
        words = f"{error}{looks_like(state, options, chosen)}" if state and not found else str(error)
        raise ConfigError(words if src in words else f"'{src}': {words}") from error
    write(workdir, params, made, found.config, came_from)
    return f"{report(src, found, options, came_from)}\nwritten to {workdir}"


def opened(src: str, options: Options) -> tuple[dict, Chosen | None, Options]:
    """A file, or a folder of Hugging Face's -> {name: array} of one model, which one, and the options with what is said there.

    Nothing but the chosen model is read from a training checkpoint.
    """
    files, picked = model_folder.files(src), []
    options = completed(options, weights_file.metadata(files[0]))

    def wanted(names):
        picked.append(choose(names, options.model, options.weights))
        return picked[-1] and picked[-1].names

    state = {}
    for file in files:
        state |= weights_file.read(file, wanted if len(files) == 1 else None)
    return state, picked[0] if picked else None, filled(options, model_folder.settings(model_folder.facts(src)))


def looks_like(state: dict, options: Options, chosen: Chosen | None) -> str:
    """As what else the whole file could be taken, in words: tried, up to the model; empty for nothing."""
    found = (taken(state, source, options, chosen) for source in LICENCES if source != options.source)
    fitting = dict.fromkeys(words for words in found if words)
    return f"; the tensors look like {' or '.join(fitting)}" if fitting else ""


def taken(state: dict, source: str, options: Options, chosen: Chosen | None) -> str:
    """The flag and the words of a source that takes the file, where need be with more flags; empty for one that does not."""
    half = (0.5,) * 3  # any numbers would do
    for heads in dict.fromkeys((options.heads, 1)):
        tried = dataclasses.replace(
            options, source=source, heads=heads, pool="", mean=options.mean or half, std=options.std or half
        )
        try:
            found = release(state, tried, chosen)
            fitted(found, tried, "")
            return f"--from={source} ({found.kind.words})"
        except ConfigError:
            continue
    return ""


def fitted(found: Release, options: Options, tokenizer: str) -> tuple[Objective, dict]:
    """Brings the tensors to the model of their config, every one -> the objective, {our path: array} of its tokenizer."""
    if found.kind.pool:
        made = sections.read(finetune.Finetune, pretrain.saved_keys(found.config), complete=True).classifier(
            found.config.classes
        )
    else:
        made = methods.objective(sections.read(pretrain.Pretrain, found.config, complete=True), complete=True)
    fit_windows(found, made.encoder.tables(), resize=options.size is not None)
    wanted, codes = weights.shapes(made), {}
    if tokenizer:
        if not any(path.startswith("tokenizer/") for path in wanted):
            raise ConfigError(f"--tokenizer is for BEiT's pretraining, and this is {found.kind.words}")
        codes = weights.dalle_tokenizer(tokenizer)
    require_fit(found, {path: leaf for path, leaf in wanted.items() if path not in codes})
    return made, codes


def origin(src: str, found: Release, options: Options) -> dict:
    """What the checkpoint says of where its weights came from. Raises ConfigError where no licence is known."""
    licence = options.said.get("licence") or LICENCES[options.source] or options.licence
    if options.licence not in ("", licence):
        raise ConfigError(f"weights of --from={options.source} are under {licence}; leave --licence={options.licence} out")
    if not licence:
        raise ConfigError(
            f"the licence of weights of --from={options.source} differs from model to model; say it: --licence='apache-2.0'"
        )
    digest = hashlib.sha256()
    for part in model_folder.files(src):
        with open(part, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    origin = {"file": pathlib.Path(src).name, "sha256": digest.hexdigest(), "from": options.source, "what": found.kind.words}
    missing = {row.ours.split("/")[0] for row in found.rows if row.done == "missing"}
    return origin | {"licence": licence, "lacks": sorted(missing)}


def write(workdir: str, params: dict, made: Objective, config: ConfigDict, came_from: dict):
    """Saves {our path: array} of an objective as step 0 of a run. Raises ConfigError, and leaves no half a run,
    where it cannot be written."""
    place = paths.expanded(workdir)
    trained, frozen, teacher = divide(jax.tree.map(jnp.asarray, tree.nest(params)), made)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, trained, frozen, {}, {}, zero, zero, teacher)
    meta = {"step": 0, "examples": 0, "clock": clock.Clock().state(), "config": config.to_dict(), "git": provenance.git_hash()}
    new = not place.exists()
    try:
        with claimed(place, config.to_dict(), {}):
            save(place, state, meta | {"origin": came_from})
    finally:
        if new and place.exists() and not any(place.iterdir()):
            place.rmdir()


def save(place, state: TrainState, meta: dict):
    """Raises ConfigError, with nothing left behind: half a run would be in the way of the next try."""
    try:
        with checkpoint.Checkpoints(place, every=1, keep=1, keep_every=0) as checkpoints:
            checkpoints.save(0, state, meta)
            checkpoints.require_saved(0)
    except BaseException as error:
        (place / "checkpoints").rmtree(missing_ok=True)
        (place / CONFIG).unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f"--workdir={place} cannot be written ({str(error).splitlines()[0][:200]})") from error


def report(src: str, found: Release, options: Options, came_from: dict) -> str:
    """The table of tensors, the model, and what the file lacks or does not tell."""
    d, kind, model = found.config.data, found.kind, describe(found.config)
    lines = [table(found), *found.said]
    lines.append(f"{src}: {kind.words}, {model}; pixels less {tuple(d.mean)} over {tuple(d.std)}; {came_from['licence']}")
    if came_from["lacks"]:
        lines.append(
            f"without {', '.join(came_from['lacks'])}: `init_from` of fine-tuning, probes and features takes the folder, "
            "further pretraining and visualise do not"
        )
    told = kind.section(found.config, {row.released: row.shapes[0] for row in found.rows})
    settings = {} if kind.pool else found.config[found.config.method]
    if assumed := [f"{key}={x}" for key, x in settings.items() if key not in told]:
        where = "what the file says of itself" if options.said.get("config") else "the published recipe"
        lines.append(f"the tensors do not tell, so taken from {where}: {', '.join(assumed)}")
    if kind.pool == "cls" and not options.pool and options.source == "timm":
        lines.append("nor do they tell global_pool: taken as token; of avg say --pool=normed")
    eps = options.said.get("norm_eps")
    if eps and kind.body == "vit" and eps != LAYER_NORM_EPS:
        lines.append(f"its norms have layer_norm_eps={eps:g} there and {LAYER_NORM_EPS:g} here")
    return "\n".join(lines)


def table(found: Release) -> str:
    """Every tensor in a line: what became of it, its names and shapes; and how many of each."""
    kinds = ("mapped", "permuted", "ignored", "missing")
    rows = sorted(found.rows, key=lambda row: kinds.index(row.done))
    called = {id(row): found.called(row.released) for row in rows}
    a, b = (max(map(len, words)) for words in (called.values(), [row.ours for row in rows]))
    lines = []
    for row in rows:
        there, here = ("x".join(map(str, shape)) for shape in row.shapes)
        line = f"  {row.done:<9}{called[id(row)]:<{a}}  {there:<14} {row.ours:<{b}}  {here:<14}{row.words}"
        lines.append(line.rstrip())
    counts = [f"{sum(row.done == kind for row in rows)} {kind}" for kind in kinds]
    scalars = sum(math.prod(row.shapes[1]) for row in rows if row.done in kinds[:2])
    return "\n".join([*lines, f"  {', '.join(counts)}; {scalars:,} numbers"])

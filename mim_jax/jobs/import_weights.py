"""The job behind `python -m mim_jax.convert --from`: a file of released weights becomes the folder of a run, which
`init_from`, `job=eval`, visualise and fine-tuning take."""

import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import clock, paths, provenance, sections, tree
from mim_jax.assemble import methods, weights
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.convert.reading import weights_file
from mim_jax.convert.reading.recognition import Options, completed
from mim_jax.convert.reading.released_formats import LICENCES
from mim_jax.convert.reading.released_model import Release, fit_windows, release, require_fit
from mim_jax.convert.reading.sizes_from_shapes import describe
from mim_jax.jobs import finetune, pretrain
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
    try:
        options = completed(options, weights_file.metadata(src))
        found = release(weights_file.read(src), options)
        made, params = fitted(found, options, tokenizer)
        came_from = origin(src, found, options)
        params |= found.params()
        if broken := [path for path, x in params.items() if not np.isfinite(x).all()]:
            name = found.arrays[broken[0]][0] if broken[0] in found.arrays else broken[0]
            raise ConfigError(f"'{src}': '{name}' has values that are no finite numbers")
    except ConfigError as error:
        raise ConfigError(str(error) if src in str(error) else f"'{src}': {error}") from error
    write(workdir, params, made, found.config, came_from)
    return f"{report(src, found, options, came_from)}\nwritten to {workdir}"


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
    with open(src, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"file": pathlib.Path(src).name, "sha256": digest, "from": options.source, "what": found.kind.words}
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
    lines = [table(found)]
    lines.append(f"{src}: {kind.words}, {model}; pixels less {tuple(d.mean)} over {tuple(d.std)}; {came_from['licence']}")
    if came_from["lacks"]:
        lines.append(
            f"without {', '.join(came_from['lacks'])}: `init_from` of fine-tuning, probes and features takes the folder, "
            "further pretraining and visualise do not"
        )
    told = kind.section(found.config, {row.released: row.shapes[0] for row in found.rows})
    settings = {} if kind.pool else found.config[found.config.method]
    if assumed := [f"{key}={x}" for key, x in settings.items() if key not in told]:
        where = "what the file says of itself" if options.said else "the published recipe"
        lines.append(f"the tensors do not tell, so taken from {where}: {', '.join(assumed)}")
    if kind.pool == "cls" and not options.pool and options.source == "timm":
        lines.append("nor do they tell global_pool: taken as token; of avg say --pool=normed")
    return "\n".join(lines)


def table(found: Release) -> str:
    """Every tensor in a line: what became of it, its names and shapes; and how many of each."""
    kinds = ("mapped", "permuted", "ignored", "missing")
    rows = sorted(found.rows, key=lambda row: kinds.index(row.done))
    a, b = (max(len(getattr(row, key)) for row in rows) for key in ("released", "ours"))
    lines = []
    for row in rows:
        there, here = ("x".join(map(str, shape)) for shape in row.shapes)
        line = f"  {row.done:<9}{row.released:<{a}}  {there:<14} {row.ours:<{b}}  {here:<14}{row.words}"
        lines.append(line.rstrip())
    counts = [f"{sum(row.done == kind for row in rows)} {kind}" for kind in kinds]
    scalars = sum(math.prod(row.shapes[1]) for row in rows if row.done in kinds[:2])
    return "\n".join([*lines, f"  {', '.join(counts)}; {scalars:,} numbers"])

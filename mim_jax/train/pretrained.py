"""Weights of a finished or running run: where they are, what they are, and whether they fit another model."""

import contextlib
import hashlib
import json
import re

import jax
import orbax.checkpoint as ocp
from etils import epath

from mim_jax import sharding, tree
from mim_jax.train.checkpoint import CheckpointError, Damaged, absolute, require_fingerprints
from mim_jax.train.workdir import completed


def find(source) -> epath.Path:
    """A run's folder or one of its step folders -> the step folder; the newest by default.

    Raises CheckpointError when there is none.
    """
    source = absolute(source)
    if source.name.isdigit() and (source / "state").is_dir():
        return source
    folder = source / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "state").is_dir()] if folder.is_dir() else []
    if not steps:
        raise CheckpointError(
            f"no checkpoint in '{source}': give the folder of a run (it holds checkpoints/), or one step of it"
        )
    return folder / str(max(steps))


def has_checkpoint(workdir) -> bool:
    """Whether the run in this folder has saved anything."""
    folder = absolute(workdir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _reader(step_folder):
    """-> orbax manager over the run's checkpoints, for reading, and the step."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(step_folder.parent, item_handlers=handlers, options=options), int(step_folder.name)


def read_meta(step_folder: epath.Path) -> dict:
    """The meta data of one checkpoint: step, clock, config, git hash, fingerprints."""
    manager, step = _reader(step_folder)
    with manager, _named(step_folder):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    return {**meta, "config": completed(meta["config"])}


@contextlib.contextmanager
def _named(step_folder: epath.Path):
    """orbax has no one error for a damaged file: all of them become a CheckpointError that names the folder."""
    try:
        yield
    except Damaged as error:
        raise CheckpointError(f"the checkpoint {step_folder} is damaged: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"the checkpoint {step_folder} cannot be read, it is damaged or incomplete ({reason})") from error


def ancestry(meta: dict) -> dict:
    """What a run that starts from a checkpoint keeps in its own meta data, `meta` being that of the checkpoint.

    method: that of the pretraining; origin: of the released file behind it, {} for weights trained here; weights: a digest.
    """
    earlier, origin = meta.get("ancestor", {}), meta.get("origin", {})
    method = meta["config"].get("method") or earlier.get("method") or origin.get("from", "unknown")
    return {"method": method, "origin": origin or earlier.get("origin", {}), "weights": digest(meta)}


def digest(meta: dict) -> str:
    """One text for all bits of a checkpoint."""
    return hashlib.sha256(json.dumps(meta["fingerprints"], sort_keys=True).encode()).hexdigest()


TRAINED, AVERAGE, STATS = r"^(params|frozen)/", r"^(opt_state/.*/average|frozen)/", "^stats/"
PARTS = {"trained": TRAINED, "average": AVERAGE}


def load_params(step_folder: epath.Path, mesh, pattern: str = "", part: str = TRAINED) -> dict:
    """{path: array} of the parameters of a checkpoint, trained and frozen, whose path matches; bits are verified.

    `part` AVERAGE: their moving average instead; STATS: running statistics.
    """
    expected = read_meta(step_folder)["fingerprints"]
    manager, step = _reader(step_folder)

    def choose(path, leaf):
        if not (hasattr(leaf, "shape") and re.match(part, path) and re.search(pattern, re.sub(part, "", path))):
            return ocp.PLACEHOLDER
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    with manager, _named(step_folder):
        target = tree.map_named(choose, manager.item_metadata(step).state.tree)
        if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(target)):
            what = {AVERAGE: "moving average of a ", STATS: "statistic of a "}.get(part, "")
            raise CheckpointError(f"the checkpoint {step_folder} holds no {what}parameter that matches '{pattern}'")
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        item = ocp.args.PyTreeRestore(target, restore_args=restore_args)
        loaded = tree.flatten(manager.restore(step, args=ocp.args.Composite(state=item)).state)
        loaded = {path: x for path, x in loaded.items() if x is not ocp.PLACEHOLDER}
        require_fingerprints(loaded, expected)
    return {re.sub(part, "", path): x for path, x in loaded.items()}


def match_params(wanted: dict, loaded: dict, allow_missing=(), allow_unexpected=()) -> tuple[dict, str]:
    """Checks loaded {path: array} against the model's {path: shape} -> (what fits, a report in words).

    Raises CheckpointError for a shape that differs, and for any missing or unexpected name that no pattern allows.
    """
    report = tree.shape_conflicts(tree.nest(wanted), tree.nest(loaded))
    if report["shape"]:
        raise CheckpointError("the checkpoint is of another architecture. " + "; ".join(report["shape"][:5]))
    for kind, allowed in (("missing", allow_missing), ("unexpected", allow_unexpected)):
        bad = [path for path in report[kind] if not tree.matches(allowed, path)]
        if bad:
            raise CheckpointError(f"the checkpoint has {kind} parameters: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    fits = {path: x for path, x in loaded.items() if path in wanted}
    words = [f"{len(fits)} loaded"]
    words += [f"{len(report[k])} {k} ({', '.join(report[k][:4])})" for k in ("missing", "unexpected") if report[k]]
    return fits, ", ".join(words)

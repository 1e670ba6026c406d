"""A saved run: where its checkpoint is, what it says of itself, and its weights, every bit verified."""

import contextlib
import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mim_jax import sharding, tree
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.paths import expanded

# Which leaves of a train state are wanted, by patterns of where they lie; what follows is the parameter's own path. Of a path
# that lies in several places, the first counts.
TRAINED, AVERAGE = ("params", "frozen", "teacher"), ("opt_state/.*/average", "frozen", "teacher")
TEACHER, STATS = ("teacher", "params", "frozen"), ("stats",)
PARTS = {"trained": TRAINED, "average": AVERAGE, "teacher": TEACHER}


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or of another shape."""


class Damaged(CheckpointError):
    """Bits that are not those that were saved."""


def find(source) -> epath.Path:
    """A run's folder or one of its step folders -> the step folder; the newest by default.

    Raises CheckpointError when there is none.
    """
    source = expanded(source)
    if source.name.isdigit() and (source / "state").is_dir():
        return source
    folder = source / "checkpoints"
    names = [p.name for p in folder.iterdir() if (p / "state").is_dir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit()]
    if not steps:
        raise CheckpointError(
            f"no checkpoint in '{source}': give the folder of a run (it holds checkpoints/), or one step of it"
        )
    return folder / str(max(steps))


def has_checkpoint(workdir) -> bool:
    """Whether the run in this folder has saved anything."""
    folder = expanded(workdir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def open(place) -> "Saved":
    """The run in a folder, at its newest step, or at the step whose folder is named. Raises CheckpointError for none."""
    folder = find(place)
    with _reading(folder) as (manager, step):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    return Saved(folder, {**meta, "config": modernised(meta["config"])})


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint of a run. `meta`: step, clock, config, git hash, fingerprints, and where its weights came from."""

    folder: epath.Path
    meta: dict

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def config(self) -> ConfigDict:
        """The settings of the run, as they were completed when it started; a copy."""
        return ConfigDict(self.meta["config"])

    @property
    def workdir(self) -> epath.Path:
        return self.folder.parent.parent

    @property
    def finished(self) -> bool:
        """Whether the run has ended, or was taken in from released weights."""
        return "origin" in self.meta or (self.workdir / "result.json").exists()

    @property
    def digest(self) -> str:
        """One text for all bits of the checkpoint."""
        return hashlib.sha256(json.dumps(self.meta["fingerprints"], sort_keys=True).encode()).hexdigest()

    def ancestry(self) -> dict:
        """What a run that starts from here keeps in its own meta data.

        method: that of the pretraining; origin: of the released file behind it, {} for weights trained here; weights: a digest.
        """
        earlier, origin = self.meta.get("ancestor", {}), self.meta.get("origin", {})
        method = self.meta["config"].get("method") or earlier.get("method") or origin.get("from", "unknown")
        return {"method": method, "origin": origin or earlier.get("origin", {}), "weights": self.digest}

    def arrays(self, mesh, pattern: str = "", part: tuple = TRAINED) -> dict:
        """{path: array} of the parameters, the frozen and the teacher's among them, whose path matches; bits are verified.

        `part` AVERAGE: their moving average instead; TEACHER: the teacher's where it has any; STATS: running statistics.
        """

        def place(path):
            """-> which of the places it lies in, and its own path there."""
            return next(((i, found[1]) for i, where in enumerate(part) if (found := re.fullmatch(f"{where}/(.*)", path))), None)

        def choose(path, leaf):
            if not (hasattr(leaf, "shape") and place(path) and re.search(pattern, place(path)[1])):
                return ocp.PLACEHOLDER
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

        with _reading(self.folder) as (manager, step):
            target = tree.map_named(choose, manager.item_metadata(step).state.tree)
            if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(target)):
                what = {AVERAGE: "moving average of a ", STATS: "statistic of a "}.get(part, "")
                raise CheckpointError(f"the checkpoint {self.folder} holds no {what}parameter that matches '{pattern}'")
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            item = ocp.args.PyTreeRestore(target, restore_args=restore_args)
            loaded = tree.flatten(manager.restore(step, args=ocp.args.Composite(state=item)).state)
            loaded = {path: x for path, x in loaded.items() if x is not ocp.PLACEHOLDER}
            require_fingerprints(loaded, self.meta["fingerprints"])
        today, found = modern_keys(self.meta["config"], loaded), {}
        for path in sorted(loaded, key=lambda path: -place(path)[0]):
            found["/".join(today.get(key, key) for key in place(path)[1].split("/"))] = loaded[path]
        return found

    def variables(self, objective, mesh, which: str = "trained") -> dict:
        """What `objective.apply` takes, `which` of PARTS. Raises CheckpointError for what does not fit."""
        wanted = jax.eval_shape(lambda: objective.init(jax.random.key(0), objective.example()))
        params, _ = match_params(tree.flatten(wanted["params"]), self.arrays(mesh, part=PARTS[which]))
        return {"params": tree.nest(params), **self.stats(wanted, mesh)}

    def stats(self, wanted, mesh) -> dict:
        """The running statistics that variables like `wanted` have beside parameters."""
        return tree.nest(self.arrays(mesh, part=STATS)) if "batch_stats" in wanted else {}


@contextlib.contextmanager
def _reading(step_folder: epath.Path):
    """Inside: an orbax manager over the run's checkpoints, and the step. orbax has no one error for a damaged file: all of them
    become a CheckpointError that names the folder."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    try:
        with ocp.CheckpointManager(step_folder.parent, item_handlers=handlers, options=options) as manager:
            yield manager, int(step_folder.name)
    except Damaged as error:
        raise CheckpointError(f"the checkpoint {step_folder} is damaged: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"the checkpoint {step_folder} cannot be read, it is damaged or incomplete ({reason})") from error


def match_params(wanted: dict, loaded: dict, allow_missing=(), allow_unexpected=()) -> tuple[dict, str]:
    """Checks loaded {path: array} against the model's {path: shape} -> (what fits, a report in words).

    Raises CheckpointError for a shape that differs, and for any missing or unexpected name that no pattern allows.
    """
    report = tree.shape_conflicts(wanted, loaded)
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


# -- fingerprints of arrays: a flipped bit in a checkpoint is noticed -------------------------------------------------


@jax.jit
def _fingerprints(leaves):
    def one(x):
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = (x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)).astype(jnp.uint32)
        place = jax.lax.iota(jnp.uint32, max(x.size, 1))[: x.size].reshape(x.shape)
        return (bits * ((place * jnp.uint32(2654435761)) | 1)).sum(dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])


def fingerprints(values) -> dict[str, int]:
    """{path: 32-bit sum of the bits of the array weighted by place}: the same for any sharding, other for any flipped bit.

    orbax restores a flipped byte silently; this is what notices it.
    """
    flat = tree.flatten(values)
    sums = np.asarray(_fingerprints(list(flat.values()))) if flat else []
    return {path: int(s) for path, s in zip(flat, sums, strict=True)}


def require_fingerprints(values, expected: dict):
    found = fingerprints(values)
    wrong = sorted(path for path in found if expected.get(path) != found[path])
    if wrong:
        raise Damaged(f"the bits of {len(wrong)} arrays changed on disk, first {wrong[0]}")


# -- what runs of earlier versions have otherwise: the one place that knows -------------------------------------------


def modernised(config: dict) -> dict:
    """A saved config with what later versions say outright: the kind of an encoder, and the second norms of a Swin.

    Other keys that it lacks take the defaults of their sections.
    """
    if "encoder" not in config or "kind" in config["encoder"]:
        return config
    e = config["encoder"]
    kind = "swin" if "depths" in e else "tokenizer" if "levels" in e else "vit"
    norms = {"norm2_eps": e.get("norm_eps", 1e-6)} if kind == "swin" else {}
    return {**config, "encoder": {"kind": kind, **norms, **e}}


def modern_keys(config: dict, paths) -> dict[str, str]:
    """{part of a path on disk: what it is called today}, where they differ: probes called heads by their learning rates."""
    optim = config.get("optim", {})
    if "more_base_lrs" not in optim:
        return {}
    first = optim["base_lr"] or optim["lr"] * 256 / config["batch_size"]
    place = {f"{lr:g}": i for i, lr in enumerate((first, *optim["more_base_lrs"]))}
    found = (re.fullmatch(r"(head_tap\d+_[a-z]+)_lr(.+)", key) for path in paths for key in path.split("/"))
    return {m[0]: f"{m[1]}_{place[m[2]]}" for m in found if m}


def before_teachers(state, on_disk):
    """The train state as a tree on disk has it: there were no teachers, and a tokenizer lay with what is frozen."""
    if "teacher" in on_disk or isinstance(state, dict):
        return state
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "teacher"}
    return fields | {"frozen": {**state.frozen, **state.teacher}}


def since_teachers(restored, wanted):
    """What was restored, as the train state that is wanted today."""
    if isinstance(wanted, dict) or not isinstance(restored, dict):
        return restored
    teacher = {name: x for name, x in restored["frozen"].items() if name in wanted.teacher}
    frozen = {name: x for name, x in restored["frozen"].items() if name not in teacher}
    return wanted.replace(**restored | {"frozen": frozen, "teacher": teacher})

"""Checkpoints: one orbax composite per save, checked bit by bit on restore, and the encoder for what comes after."""

import json
import os
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mim_jax import config as config_lib
from mim_jax import sharding, tree
from mim_jax.config import ConfigError

# Keys that may differ between the run a workdir holds and the command that continues it: none of them changes a number.
MAY_CHANGE = (r"^log\.", r"^checkpoint\.", r"^evals\.", r"^data\.(path|data_dir)$", r"^(remat|fsdp)$")


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or of another shape."""


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


class Checkpoints:
    """The checkpoints of one workdir: asynchronous saves, newest `keep` and every `keep_every` steps kept."""

    def __init__(self, workdir: str, *, every: int, keep: int, keep_every: int):
        self.every = every
        self.folder = os.path.join(os.path.abspath(workdir), "checkpoints")
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._manager = self._open()
        self._saved = None
        self._asked_to_stop = False

    def _open(self):
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=self._options)

    def stop_on_sigterm(self):
        """From now on SIGTERM lets the current step end, saves, and stops the run; the same command continues it."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked_to_stop", True))

    def should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:  # every process must leave at the same step
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked_to_stop

    def due(self, step: int, first: int) -> bool:
        return step > first and self.every > 0 and step % self.every == 0

    def save(self, step: int, state, meta: dict):
        """Starts a save; `meta` is plain JSON. Raises CheckpointError when orbax declines it."""
        if self._saved == step or step in self._manager.all_steps():
            return
        meta = {**meta, "fingerprints": fingerprints(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        if not self._manager.save(step, args=items, force=True):
            raise CheckpointError(f"the checkpoint of step {step} was not written; {self.folder} holds a later step")
        self._saved = step

    def restore(self, state, shardings):
        """-> (state, meta) of the newest sound checkpoint, or (None, None) when there is none.

        `state` gives structure, shapes and types. A damaged checkpoint is moved aside with a warning and the one before
        is taken. Raises CheckpointError when the shapes differ, or when every checkpoint is damaged.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                _require_same_shapes(target, self._manager.item_metadata(step).state, f"{self.folder}/{step}")
                item = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                restored = self._manager.restore(step, args=item).state
                _require_fingerprints(restored, meta["fingerprints"])
                return restored, meta
            except CheckpointError as error:
                if not isinstance(error, _Damaged):
                    raise
                self._move_aside(step, error)
            except Exception as error:  # orbax has no one error for a truncated or missing file
                self._move_aside(step, error)
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.folder} can be read (steps {steps}); see the warnings above")
        return None, None

    def _move_aside(self, step: int, error: Exception):
        broken = os.path.join(self.folder, f"broken_{step}")
        logging.warning("checkpoint of step %d is damaged (%s); moved to %s", step, str(error)[:300], broken)
        self._manager.close()
        if jax.process_index() == 0:  # left in place it would count as the latest step and block later saves
            os.rename(os.path.join(self.folder, str(step)), broken)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint moved aside")
        self._manager = self._open()

    def close(self):
        """Waits for saves under way. Raises what went wrong in them."""
        self._manager.wait_until_finished()
        self._manager.close()


class _Damaged(CheckpointError):
    pass


def _require_fingerprints(values, expected: dict):
    found = fingerprints(values)
    wrong = sorted(path for path in found if expected.get(path) != found[path])
    if wrong:
        raise _Damaged(f"the bits of {len(wrong)} arrays changed on disk, first {wrong[0]}")


def _arrays(metadata) -> dict:
    """orbax metadata -> {path: leaf with a shape}; empty nodes are left out."""
    return {path: leaf for path, leaf in tree.flatten(metadata.tree).items() if hasattr(leaf, "shape")}


def _require_same_shapes(target, metadata, where: str):
    report = tree.shape_conflicts(tree.nest(tree.flatten(target)), tree.nest(_arrays(metadata)))
    problems = [f"{kind}: {line}" for kind, lines in report.items() for line in lines]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"the checkpoint {where} does not fit this model. {'; '.join(problems[:5])}{more}")


def find(source: str) -> str:
    """A run's folder or one of its step folders -> the step folder; the newest by default.

    Raises CheckpointError when there is none.
    """
    source = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(os.path.join(source, "state")) and os.path.basename(source).isdigit():
        return source
    folder = os.path.join(source, "checkpoints")
    steps = [int(s) for s in os.listdir(folder) if s.isdigit()] if os.path.isdir(folder) else []
    steps = [s for s in steps if os.path.isdir(os.path.join(folder, str(s), "state"))]
    if not steps:
        raise CheckpointError(f"no checkpoint in '{source}': give the folder of a run (it holds checkpoints/), or one step of it")
    return os.path.join(folder, str(max(steps)))


def _reader(step_folder: str):
    """-> orbax manager over the run's checkpoints, for reading, and the step."""
    folder, step = os.path.split(step_folder)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(folder, item_handlers=handlers, options=options), int(step)


def read_meta(step_folder: str) -> dict:
    """The meta data of one checkpoint: step, clock, config, git hash, fingerprints."""
    manager, step = _reader(step_folder)
    with manager:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def load_params(step_folder: str, mesh, pattern: str = "") -> dict:
    """{path: array} of the parameters of a checkpoint, trained and frozen, whose path matches; bits are verified."""
    expected = read_meta(step_folder)["fingerprints"]
    manager, step = _reader(step_folder)
    with manager:
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
            for path, leaf in _arrays(manager.item_metadata(step).state).items()
            if path.split("/")[0] in ("params", "frozen") and tree.matches((pattern,), path.split("/", 1)[1])
        }
        if not wanted:
            raise CheckpointError(f"the checkpoint {step_folder} holds no parameter that matches '{pattern}'")
        target = tree.nest(wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        item = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        loaded = manager.restore(step, args=ocp.args.Composite(state=item)).state
    _require_fingerprints(loaded, expected)
    return {path.split("/", 1)[1]: x for path, x in tree.flatten(loaded).items()}


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


def claim(workdir: str, config: dict):
    """Makes the workdir this run's own: writes config.json, or checks that the one there is of the same run.

    Raises ConfigError when the folder cannot be written, or holds a run of another config (the difference is shown).
    """
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        with open(path) as f:
            changed = config_lib.differences(json.load(f), json.loads(json.dumps(config)))
        changed = [line for line in changed if not tree.matches(MAY_CHANGE, line.split(":")[0])]
        if changed:
            raise ConfigError(
                f"'{workdir}' holds a run of another config; nothing was changed there. Choose another --workdir, or "
                "repeat the settings of that run. Differences (there -> now):\n  " + "\n  ".join(changed)
            )
        return
    try:
        os.makedirs(workdir, exist_ok=True)
        if jax.process_index() == 0:
            with open(path + ".part", "w") as f:
                json.dump(config, f, indent=1)
            os.replace(path + ".part", path)
    except OSError as error:
        raise ConfigError(f"the workdir '{workdir}' cannot be written ({error.strerror}); choose another --workdir") from error


def git_hash() -> str:
    """The commit this code runs from, `+` when the tree differs from it; empty outside a checkout."""
    try:
        here = os.path.dirname(__file__)
        run = lambda *a: subprocess.run(["git", "-C", here, *a], capture_output=True, text=True, check=True).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""

"""Checkpoints of a run: one orbax composite per save, asynchronous, checked bit by bit on restore."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mim_jax import tree
from mim_jax.config import ConfigError


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
        self.folder = absolute(workdir) / "checkpoints"
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._manager = self._open()
        self._saved = None
        self._asked_to_stop = False

    def _open(self):
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=self._options)

    def stop_on_sigterm(self):
        """From now on SIGTERM lets the current step end, saves, and stops the run; the same command continues it.

        With several processes JAX itself listens, so that all of them agree on the step.
        """
        if jax.process_count() == 1:
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

        `state` gives structure, shapes and types. Damaged checkpoints newer than that one are moved aside with a warning.
        Raises CheckpointError when the shapes differ, or when every checkpoint is damaged.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                _require_same_shapes(target, self._manager.item_metadata(step).state, f"{self.folder}/{step}")
                item = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                restored = self._manager.restore(step, args=item).state
                require_fingerprints(restored, meta["fingerprints"])
            except Exception as error:
                if not is_damage(error):
                    raise
                damaged[step] = error
                continue
            self._move_aside(damaged)
            return restored, meta
        if damaged:  # they stay where they are: what cannot be read now may be read later
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read: "
                + "; ".join(f"step {step}: {str(error).splitlines()[0][:200]}" for step, error in damaged.items())
            )
        return None, None

    def _move_aside(self, damaged: dict):
        """Renames the step folders: left in place they would count as the latest step and block later saves."""
        if not damaged:
            return
        self._manager.close()
        for step, error in damaged.items():
            names = [f"broken_{step}", *(f"broken_{step}.{i}" for i in range(1, 100))]
            broken = next(self.folder / name for name in names if not (self.folder / name).exists())
            logging.warning("checkpoint of step %d is damaged (%s); moved to %s", step, str(error)[:300], broken)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("every process has chosen the name")
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(broken)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoint moved aside")
        self._manager = self._open()

    def close(self):
        """Waits for saves under way. Raises what went wrong in them."""
        self._manager.wait_until_finished()
        self._manager.close()


class Damaged(CheckpointError):
    """Bits that are not those that were saved."""


def is_damage(error: Exception) -> bool:
    """Whether a failed restore is the file's fault: not another shape, no memory, no permission, no network."""
    if isinstance(error, CheckpointError):
        return isinstance(error, Damaged)
    passing = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")
    if isinstance(error, PermissionError) or any(word in str(error) for word in passing):
        return False
    return isinstance(error, (ValueError, KeyError, TypeError, AttributeError, OSError))  # what orbax raises for bad files


def absolute(path) -> epath.Path:
    """The path in full; a bucket (gs://...) as it is, which epath would resolve to a local folder."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()


def require_fingerprints(values, expected: dict):
    found = fingerprints(values)
    wrong = sorted(path for path in found if expected.get(path) != found[path])
    if wrong:
        raise Damaged(f"the bits of {len(wrong)} arrays changed on disk, first {wrong[0]}")


def arrays(metadata) -> dict:
    """orbax metadata -> {path: leaf with a shape}; empty nodes are left out."""
    return {path: leaf for path, leaf in tree.flatten(metadata.tree).items() if hasattr(leaf, "shape")}


def _require_same_shapes(target, metadata, where: str):
    report = tree.shape_conflicts(tree.nest(tree.flatten(target)), tree.nest(arrays(metadata)))
    problems = [f"{kind}: {line}" for kind, lines in report.items() for line in lines]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"the checkpoint {where} does not fit this model. {'; '.join(problems[:5])}{more}")

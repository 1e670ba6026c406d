"""Checkpoints of a run: one orbax composite per save, asynchronous, checked bit by bit on restore."""

import contextlib
import errno
import shutil

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mim_jax import durations, paths, tree
from mim_jax.runs import saved
from mim_jax.sections import Count, Natural, Section


class Saving(Section):
    """`checkpoint`: the newest `keep` stay, and those of every `keep_every_steps` (0: no others)."""

    keep: Count
    keep_every_steps: Natural
    every: durations.Duration = durations.stated()


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one workdir: asynchronous saves, newest `keep` and every `keep_every` steps kept."""

    def __init__(self, workdir: str, *, every: int, keep: int, keep_every: int):
        self.every = every
        self.folder = paths.expanded(workdir) / "checkpoints"
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._manager = self._open()
        self._saved = None

    def _open(self):
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=self._options)

    def due(self, step: int, first: int) -> bool:
        return step > first and self.every > 0 and step % self.every == 0

    def save(self, step: int, state, meta: dict):
        """Starts a save; `meta` is plain JSON. A full disk is a warning: training goes on, and earlier saves stay.

        Raises CheckpointError when orbax declines it.
        """
        if self._saved == step or step in self._manager.all_steps():
            return
        meta = {**meta, "fingerprints": saved.fingerprints(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._full_disk_is_a_warning(self._saved):  # what the save before this one ended with
            self._manager.wait_until_finished()
        with self._full_disk_is_a_warning(step):
            require_room(self.folder, sum(x.nbytes for x in jax.tree.leaves(state)))
            if not self._manager.save(step, args=items, force=True):
                raise saved.CheckpointError(f"the checkpoint of step {step} was not written; {self.folder} holds a later step")
            self._saved = step

    @contextlib.contextmanager
    def _full_disk_is_a_warning(self, step):
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0][:200]
            logging.warning("no checkpoint was written at step %s, the disk is full (%s); training goes on", step, reason)

    def restore(self, state, shardings, check=lambda meta: None):
        """-> (state, meta) of the newest sound checkpoint, or (None, None) when there is none.

        `state` gives structure, shapes and types; `check(meta)` may refuse before they are compared. Damaged
        checkpoints newer than that one are moved aside with a warning.
        Raises CheckpointError when the shapes differ, or when every checkpoint is damaged.
        """
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                check(meta)
                there = self._manager.item_metadata(step).state.tree
                on_disk = {path: leaf for path, leaf in tree.flatten(there).items() if hasattr(leaf, "shape")}  # no empty nodes
                today = saved.modern_keys(meta.get("config", {}), on_disk)
                target = with_keys(saved.before_teachers(wanted, there), {new: old for old, new in today.items()})
                _require_same_shapes(target, on_disk, f"{self.folder}/{step}")
                item = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                restored = self._manager.restore(step, args=item).state
                saved.require_fingerprints(restored, meta["fingerprints"])
                restored = with_keys(restored, today)
            except Exception as error:
                if not is_damage(error):
                    raise
                damaged[step] = error
                continue
            self._move_aside(damaged)
            return saved.since_teachers(restored, wanted), meta
        if damaged:  # they stay where they are: what cannot be read now may be read later
            raise saved.CheckpointError(
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
            multihost_utils.sync_global_devices("every process has chosen the name")
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(broken)
            multihost_utils.sync_global_devices("checkpoint moved aside")
        self._manager = self._open()

    def require_saved(self, step: int):
        """Waits for saves under way. Raises CheckpointError unless the one of this step is complete."""
        with self._full_disk_is_a_warning(step):
            self._manager.wait_until_finished()
        if step not in self._manager.all_steps():
            newest = max(self._manager.all_steps(), default=0)
            raise saved.CheckpointError(
                f"the state of step {step} could not be saved in '{self.folder}', where the disk is full; make room and "
                f"start again: the newest is of step {newest}"
            )

    def close(self, *error):
        """Waits for saves under way and lets go of the folder."""
        with self._full_disk_is_a_warning(self._saved):
            self._manager.wait_until_finished()
        self._manager.close()

    __exit__ = close


def require_room(folder, size: int):
    """Raises OSError where a local disk has fewer bytes left: orbax would fail in the background, in many words."""
    alone = jax.process_count() == 1  # several must go on alike, and do not see the same room
    if alone and "://" not in str(folder) and (free := shutil.disk_usage(folder).free) < size:
        raise OSError(errno.ENOSPC, f"it takes {size / 1e6:.1f} MB, and {folder} has {free / 1e6:.1f} MB left")


def is_full(error: Exception) -> bool:
    """Whether it was for want of room, on a disk or within a quota."""
    words = ("No space left", "Disk quota exceeded", "ENOSPC", "EDQUOT")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words)


def is_damage(error: Exception) -> bool:
    """Whether a failed restore is the file's fault: not another shape, no memory, no permission, no network."""
    if isinstance(error, saved.CheckpointError):
        return isinstance(error, saved.Damaged)
    passing = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")
    if isinstance(error, PermissionError) or any(word in str(error) for word in passing):
        return False
    return isinstance(error, (ValueError, KeyError, TypeError, AttributeError, OSError))  # what orbax raises for bad files


def with_keys(values, names: dict[str, str]):
    """A tree with some keys of its dicts called otherwise."""
    change = lambda node: {names.get(k, k): with_keys(x, names) for k, x in node.items()} if isinstance(node, dict) else node
    return jax.tree.map(change, values, is_leaf=lambda node: isinstance(node, dict)) if names else values


def _require_same_shapes(target, on_disk: dict, where: str):
    report = tree.shape_conflicts(target, on_disk)
    problems = [f"{kind}: {line}" for kind, lines in report.items() for line in lines]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise saved.CheckpointError(f"the checkpoint {where} does not fit this model. {'; '.join(problems[:5])}{more}")

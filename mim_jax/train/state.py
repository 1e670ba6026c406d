"""Everything a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mim_jax import prng, sharding, tree


@flax.struct.dataclass
class TrainState:
    """`params` are trained; `frozen` are parameters outside the optimiser; `teacher` are those that teach (objectives/
    teacher.py); `stats` are running statistics."""

    step: jax.Array
    params: Any
    frozen: Any
    stats: Any
    opt_state: Any
    skipped: jax.Array  # steps with a non-finite loss or gradient since the start
    skipped_in_row: jax.Array
    teacher: Any = flax.struct.field(default_factory=dict)

    def variables(self, average: bool = False) -> dict:
        """What `objective.apply` takes; with `average` the moving average of the parameters, which the optimiser keeps."""
        params = optax.tree.get(self.opt_state, "average") if average else self.params
        return {"params": merge(self.teacher, self.frozen, params), **self.stats}

    def teaching(self) -> dict:
        """What `objective.apply` takes for the teacher to answer: its own parameters, and those it shares."""
        return {"params": merge(self.params, self.frozen, self.teacher), **self.stats}


def merge(*trees):
    """Nested trees -> one; of a leaf that stands in several, the last."""
    trees = [x for x in trees if jax.tree.leaves(x)]
    return trees[0] if len(trees) == 1 else tree.nest({path: x for part in trees for path, x in tree.flatten(part).items()})


def split(params, patterns):
    """A nested tree -> (what does not match, what does) by regular expressions on the path."""
    flat = tree.flatten(params)
    matches = {path: tree.matches(patterns, path) for path in flat}
    return tuple(tree.nest({p: x for p, x in flat.items() if matches[p] == side}) for side in (False, True))


def divide(params, objective):
    """All parameters of an objective -> those that are trained, frozen, and the teacher's, which may be both."""
    params, frozen = split(params, objective.frozen)
    if objective.teacher is None:
        return params, frozen, {}
    rest, teacher = split(params, objective.teacher.patterns)
    return (rest if objective.teacher.alone else params), frozen, teacher


def moved(teacher, weights, params, step):
    """The teacher's `weights` after a step of its moving average towards the parameters. `teacher`: objectives/teacher.py."""
    if teacher is None or teacher.alone:
        return weights
    m, flat = teacher.share(step), tree.flatten(params)
    return tree.map_named(lambda path, x: (m * x + (1 - m) * flat[path]).astype(x.dtype), weights)


def init_variables(objective, example, seed: int):
    """Fresh parameters and statistics of an objective; `example` are its inputs, of any batch size."""
    return objective.init({"params": prng.stream(seed, "params")}, example)


def plan(objective, tx, example, *, seed: int, mesh, fsdp: bool = False):
    """-> (fresh() -> state, the shapes of its arrays, their shardings); nothing is computed yet."""

    def fresh():
        variables = init_variables(objective, example, seed)
        params, frozen, teacher = divide(variables["params"], objective)
        stats = {name: value for name, value in variables.items() if name not in ("params", "intermediates")}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, frozen, stats, tx.init(params), zero, zero, copied(teacher))

    shapes = jax.eval_shape(fresh)
    return fresh, shapes, sharding.state_shardings(shapes, mesh, fsdp)


def create(fresh, shardings, replace=None) -> TrainState:
    """A new state, every array created where it will live.

    `replace` is a flat {path: array} of pretrained parameters that take the place of the fresh ones. A teacher and a moving
    average start from what was loaded, in buffers of their own.
    """
    state = jax.jit(fresh, out_shardings=shardings)()
    if replace:

        def put(part, where):
            where = tree.flatten(where)
            pick = lambda path, x: jax.device_put(replace[path].astype(x.dtype), where[path]) if path in replace else x
            return tree.map_named(pick, part)

        parts = {name: put(getattr(state, name), getattr(shardings, name)) for name in ("params", "frozen", "teacher")}
        state = state.replace(**parts | {"teacher": jax.jit(copied, out_shardings=shardings.teacher)(parts["teacher"])})
        if optax.tree.get(state.opt_state, "average") is not None:
            copy = jax.jit(copied, out_shardings=shardings.params)(state.params)
            state = state.replace(opt_state=optax.tree.set(state.opt_state, average=copy))
    return state


def copied(values):
    return jax.tree.map(jnp.copy, values)

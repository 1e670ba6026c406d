"""Everything a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mim_jax import prng, sharding, tree


@flax.struct.dataclass
class TrainState:
    """`params` are trained; `frozen` are parameters outside the optimiser; `stats` are running statistics."""

    step: jax.Array
    params: Any
    frozen: Any
    stats: Any
    opt_state: Any
    skipped: jax.Array  # steps with a non-finite loss or gradient since the start
    skipped_in_row: jax.Array

    def variables(self, average: bool = False) -> dict:
        """What `objective.apply` takes; with `average` the moving average of the parameters, which the optimiser keeps."""
        params = optax.tree.get(self.opt_state, "average") if average else self.params
        return {"params": merge(params, self.frozen), **self.stats}


def merge(params, frozen):
    """Two nested trees with disjoint leaves -> one."""
    return tree.nest({**tree.flatten(params), **tree.flatten(frozen)}) if jax.tree.leaves(frozen) else params


def split(params, frozen_patterns):
    """A nested tree -> (trained, frozen) by regular expressions on the path."""
    flat = tree.flatten(params)
    is_frozen = {path: tree.matches(frozen_patterns, path) for path in flat}
    return tuple(tree.nest({p: x for p, x in flat.items() if is_frozen[p] == side}) for side in (False, True))


def init_variables(objective, example, seed: int):
    """Fresh parameters and statistics of an objective; `example` are its inputs, of any batch size."""
    return objective.init({"params": prng.stream(seed, "params")}, example)


def plan(objective, tx, example, *, seed: int, mesh, fsdp: bool = False, frozen_patterns=()):
    """-> (fresh() -> state, the shapes of its arrays, their shardings); nothing is computed yet."""

    def fresh():
        variables = init_variables(objective, example, seed)
        params = variables["params"]
        params, frozen = split(params, frozen_patterns)
        stats = {name: value for name, value in variables.items() if name not in ("params", "intermediates")}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, frozen, stats, tx.init(params), zero, zero)

    shapes = jax.eval_shape(fresh)
    return fresh, shapes, sharding.state_shardings(shapes, mesh, fsdp)


def create(fresh, shardings, replace=None) -> TrainState:
    """A new state, every array created where it will live.

    `replace` is a flat {path: array} of pretrained parameters that take the place of the fresh ones.
    """
    state = jax.jit(fresh, out_shardings=shardings)()
    if replace:

        def put(part, where):
            where = tree.flatten(where)
            pick = lambda path, x: jax.device_put(replace[path].astype(x.dtype), where[path]) if path in replace else x
            return tree.map_named(pick, part)

        state = state.replace(params=put(state.params, shardings.params), frozen=put(state.frozen, shardings.frozen))
        if optax.tree.get(state.opt_state, "average") is not None:
            # It starts from what was loaded, in buffers of its own.
            copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings.params)(state.params)
            state = state.replace(opt_state=optax.tree.set(state.opt_state, average=copy))
    return state

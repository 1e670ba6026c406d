"""One optimisation step of any objective: jitted once, sharded, donated, with nothing random carried over."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from mim_jax import platforms, prng, sharding, tree
from mim_jax.train.state import TrainState, merge, moved


def make_step(objective, tx, mesh, shardings, *, prepare, seed: int, accumulation: int = 1, lr=None):
    """-> step(state, batch) -> (state, metrics), compiled on the first call.

    `prepare(batch, key)` turns a batch of the pipeline into the inputs of the objective, on the device: normalisation and
    what is hidden. Masks are drawn for the whole batch at once, so that neither the number of devices nor the accumulation
    changes them.
    """
    encoder = getattr(objective, "encoder", None)

    def step(state: TrainState, batch):
        with platforms.compiled_for(mesh):
            return compute(state, batch)

    def compute(state: TrainState, batch):
        with jax.named_scope("prepare"):  # scopes name the parts of a step to who reads its compiled program
            inputs = prepare(batch, prng.stream(seed, "masks", state.step))
            inputs = jax.lax.with_sharding_constraint(inputs, sharding.batch_sharding(mesh))
        kept = state.teacher
        if before := objective.teacher is not None and objective.teacher.before:
            state = state.replace(teacher=moved(objective.teacher, state.teacher, state.params, state.step))
        key = prng.stream(seed, "dropout", state.step)
        gather = gathering(encoder, shardings.params)
        loss, metrics, stats, grads = accumulate(objective, state, inputs, key, accumulation, gather)
        grads = laid_out(grads, shardings.params)
        with jax.named_scope("optimiser"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            taught = state.teacher if before else moved(objective.teacher, state.teacher, params, state.step)
            new = (params, opt_state, stats, taught)
            # By the norm, which one non-finite gradient makes non-finite. Asking every gradient reads more plainly, but XLA
            # copies that chain of answers into the update of every parameter: minutes of compilation for a Swin.
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss + grad_norm)
            old = (state.params, state.opt_state, state.stats, kept)
            params, opt_state, stats, teacher = jax.tree.map(partial(jnp.where, finite), new, old)
        bad = jnp.where(finite, 0, 1)
        in_row = (state.skipped_in_row + 1) * bad
        metrics = {**metrics, "loss": loss, "grad_norm": grad_norm, "skipped_in_row": in_row, "skipped": state.skipped + bad}
        if lr is not None:
            metrics["lr"] = lr(state.step)
        state = TrainState(state.step + 1, params, state.frozen, stats, opt_state, state.skipped + bad, in_row, teacher)
        return state, metrics

    # one sharding for every leaf of the batch: masks that come with it are split over images too
    where = (shardings, sharding.batch_sharding(mesh))
    with platforms.compiled_for(mesh):
        options = platforms.compiler_options(attends_in_products(encoder))
    results = shardings, sharding.replicated(mesh)
    return jax.jit(step, in_shardings=where, out_shardings=results, donate_argnums=0, compiler_options=options)


def laid_out(grads, shardings):
    """On a TPU as parameters and moments lie in the state, row by row: else these three are copied to the layout in which a
    gradient comes out of its product, and back. Not of those that are sharded, which XLA would gather for it."""
    if platforms.current() != "tpu":
        return grads
    whole = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.tree.map(lambda x, where: whole(x) if where.is_fully_replicated else x, grads, shardings)


def attends_in_products(encoder) -> bool:
    """Whether its attention is surely in no kernel, or among the few tokens of a window."""
    bf16 = getattr(encoder, "dtype", None) == jnp.bfloat16
    return getattr(encoder, "small_products", False) or getattr(encoder, "attention", "auto") == "plain" or not bf16


def gathering(encoder, shardings) -> Callable:
    """params -> the same as `gathered` gives them, once for a step. Where memory is to be saved they stay as they are: with
    remat the compiler gathers kernels anew for the backward pass, in a loop those of one block at a time."""
    if getattr(encoder, "remat", False) or getattr(encoder, "scan", False):
        return lambda params: params
    return partial(gathered, shardings=shardings, dtype=getattr(encoder, "dtype", None))


def gathered(params, shardings, dtype):
    """The parameters, of which those that FSDP splits are whole again: kernels of blocks in the `dtype` that their layers cast
    them to anyway, so that half the bytes are sent. A gradient stays as split as its parameter."""

    def of_one(path, x, where):
        if where.is_fully_replicated:
            return x
        cast = dtype if dtype and re.search(r"/block_\d+/.*/kernel$", path) else x.dtype
        constrained = jax.lax.with_sharding_constraint

        @jax.custom_vjp
        def gather(x):
            return constrained(constrained(x.astype(cast), where), sharding.replicated(where.mesh))

        gather.defvjp(lambda x: (gather(x), None), lambda _, g: (constrained(g, where).astype(x.dtype),))
        return gather(x)

    return jax.tree_util.tree_map_with_path(lambda path, *of: of_one(tree.path_name(path), *of), params, shardings)


def accumulate(objective, state, inputs: dict, key, accumulation: int, gather=lambda params: params):
    """Mean loss, metrics and gradients over `accumulation` micro-batches -> loss, metrics, stats, grads. gather: makes whole
    what devices share of the parameters.

    What the teacher says of a micro-batch is one of its inputs: no gradient reaches the teacher, which answers as in
    evaluation.
    """

    def taught(inputs):
        if objective.teacher is None:
            return inputs
        return inputs | {"taught": jax.lax.stop_gradient(objective.apply(state.teaching(), inputs, method="teach"))}

    def loss_fn(params, stats, inputs, key):
        (loss, metrics), updated = objective.apply(
            {"params": merge(gather(params), state.frozen), **stats}, inputs, True, rngs={"dropout": key}, mutable=list(stats)
        )
        return loss, (metrics, dict(updated) or stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulation == 1:
        (loss, (metrics, stats)), grads = grad_fn(state.params, state.stats, taught(inputs), key)
        return loss, metrics, stats, grads

    def micro(carry, x):
        stats, sums = carry
        index, inputs = x
        (loss, (metrics, stats)), grads = grad_fn(state.params, stats, taught(inputs), jax.random.fold_in(key, index))
        return (stats, jax.tree.map(jnp.add, sums, (loss, metrics, grads))), None

    parts = jax.tree.map(partial(micro_batches, accumulation=accumulation), inputs)
    first = jax.tree.map(lambda x: x[0], parts)
    (loss, (metrics, _)), grads = jax.eval_shape(lambda x: grad_fn(state.params, state.stats, taught(x), key), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, metrics, grads))
    (stats, sums), _ = jax.lax.scan(micro, (state.stats, zeros), (jnp.arange(accumulation), parts))
    loss, metrics, grads = jax.tree.map(lambda x: x / accumulation, sums)
    return loss, metrics, stats, grads


def micro_batches(x, accumulation: int):
    """[b ...] -> [a b/a ...]: micro-batch i takes every a-th image, so each device keeps its own images."""
    return jnp.swapaxes(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 0, 1)

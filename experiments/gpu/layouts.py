"""On the card: a transformer block as layers choose it for each platform and with the kernel of attention, beside the plain."""

import concurrent.futures
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import platforms
from mim_jax.jobs.step_costs import timed
from mim_jax.models import irpe, kernel_attention
from mim_jax.models.vit import Block

PLAIN = "cpu"
KERNEL = "kernel"  # encoder.attention=kernel, else as on a GPU
ROUNDS, REPEAT = 5, 20
# name: sequences, side of the grid of tokens, whether cls is before them, width, heads, iRPE
SHAPES = {  # the first two within the limit of the part, on an H100
    "LoMaR-B, 64 images of 4 windows": (256, 7, 768, 12, True),
    "MAE's decoder, 64 images": (64, 14, 512, 16, False),
    "MAE-B's and LocalMIM-B's encoder, 64 images": (64, 7, 768, 12, False),
    "whole images of 224 px with iRPE, 64": (64, 14, 768, 12, True),
    "whole images of 448 px with iRPE, 16": (16, 28, 768, 12, True),
}
TOY = {"toy": (4, 3, 24, 3, True)}


def compare(toy: bool, tell):
    """Forward and backward of one block at the sizes of SHAPES; told after each."""
    found = {}
    for name, shape in (TOY if toy else SHAPES).items():
        found[name] = of_shape(*shape, repeat=2 if toy else REPEAT)
        tell({"current": platforms.current(), "blocks": found})


def for_platform(name: str):
    """What is traced inside is as for this platform, but runs on this device."""
    return platforms.compiled_for(types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=name)])))


def of_shape(rows: int, side: int, width: int, heads: int, relative: bool, repeat: int) -> dict:
    """{platform: seconds of a block's forward and backward pass, relative errors of its value and gradients in bf16 against
    the plain block in float32, whether they are the same bits twice}, or what went wrong where its layers are for chips alone.
    On a GPU without those of TPUs, and with the kernel of attention where it takes so many tokens."""
    buckets = irpe.Grid((side, side)) if relative else None
    x = jax.random.normal(jax.random.key(0), (rows, 1 + side**2, width))
    fresh = Block(heads, relative=relative).init(jax.random.key(1), x[:1], buckets)
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(2), p.shape), fresh)  # no table of zeros
    block = functools.partial(Block, heads, relative=relative)
    of = lambda dtype, way="auto": functools.partial(gradients, block(dtype=dtype, attention=way), buckets)
    with for_platform(PLAIN), jax.default_matmul_precision("highest"):
        exact = jax.jit(of(jnp.float32))(params, x)
    ways = {name: ("plain", name) for name in platforms.LAYOUTS}
    if jax.default_backend() == "gpu":
        del ways["tpu"]  # for chips alone, and a card's time is short
        ways |= {KERNEL: ("kernel", "gpu")} if x.shape[1] <= kernel_attention.LONGEST else {}
    programs, found = {}, {}

    def compiled(name):
        with for_platform(ways[name][1]):
            once = of(jnp.bfloat16, ways[name][0])
            both = once, functools.partial(over_and_over, once, repeat)
            return [jax.jit(f).lower(params, x).compile() for f in both]

    with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
        begun = {name: pool.submit(compiled, name) for name in ways}
    for name, both in begun.items():
        try:
            once, programs[name] = both.result()
            value = once(params, x)
            found[name] = {"errors": [error(a, b) for a, b in zip(value, exact)], "seconds": []}
            found[name]["same_bits"] = all(bool((a == b).all()) for a, b in zip(value, once(params, x)))
        except Exception as failed:  # whatever a compiler may raise: the others are still compared
            found[name] = {"error": f"{type(failed).__name__}: {str(failed)[:300]}"}
            programs.pop(name, None)
    for turn in range(ROUNDS + 1):
        for name, program in programs.items():
            taken = timed(program, params, x)[1] / repeat
            found[name]["seconds"] += [taken] if turn else []
    for name in programs:
        found[name]["seconds"] = float(np.median(found[name]["seconds"]))
    return found


def gradients(block, buckets, params, x):
    """-> what the block gives, and the gradients of its mean square by input and by all parameters, in one vector."""

    def loss(params, x):
        y = block.apply(params, x, buckets).astype(jnp.float32)
        return jnp.square(y).mean(), y

    (_, y), (by_params, by_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, by_x, jnp.concatenate([g.reshape(-1) for g in jax.tree.leaves(by_params)])


def over_and_over(of, repeat: int, params, x):
    """One program, so that no start of a kernel is counted; each pass needs the one before."""

    def body(_, x):
        y, by_x, by_params = of(params, x)
        return x - 1e-3 * by_x - 1e-6 * y - 1e-9 * by_params.sum()

    return jax.lax.fori_loop(0, repeat, body, x)


def error(found, exact) -> float:
    return float(jnp.linalg.norm((found - exact).reshape(-1)) / jnp.linalg.norm(exact.reshape(-1)))

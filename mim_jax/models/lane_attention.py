"""softmax(q k / sqrt(e) + ...) v as a TPU computes it fast: few layouts, few passes, what is kept in the compute type.

The 128 lanes of a TPU hold heads side by side. Short sequences of several heads go through one product, in which the keys of
one head meet zeros in the lanes of the others, [r p n x]: p groups of heads, x the lanes of a group, `group` heads each.
What costs most there is not the products but passes over the logits and transposes between two ways to lay them out, hence
the stated layouts and a gradient of its own: P = e / sum(e) is kept as e, and the row sums of P dP are those of dO O, so that
the gradient of the logits is made as dP is (as in FlashAttention, arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128
NEVER = np.finfo(np.float32).min  # the logit of a pair that is not to be


def heads_of_a_product(heads: int, head_dim: int, tokens: int) -> int:
    """How many heads share one: as many as fill the lanes with their head dims, if their keys fit the lanes too, else 1."""
    group = LANES // head_dim
    return group if group * head_dim == LANES and heads % group == 0 and group * tokens <= LANES else 1


def attention(q, k, v, keys, bias, group: int, apart=None):
    """q, k, v [r p n x] -> [r p n x].

    keys [e n n] or None: q . keys, with the unscaled q, is added to the logits; bias [p n n], [r p n n] or None: added to the
    logits, for which group is 1. apart: bool [m n n], for each m rows in turn, pairs that do not see each other, or None.
    """
    lay = _Lay(group)
    if group == 1 and keys is None and q.shape[2] > q.shape[3]:
        # Tokens on the lanes, of which they fill more than a head does: the compiler at times lays rows there, and copies.
        lay = lambda x: with_layout_constraint(x, Layout((0, 1, 3, 2)))
    q, k, v = map(lay, (q, k, v))
    return lay(_attention(group, q, k, v, None if keys is None else _of_group(keys, group), bias, apart))


def _of_group(keys, group: int):
    """[e n n] -> [x n group*n]: each head's lanes meet its own keys alone."""
    zeros = jnp.zeros_like(keys)
    rows = [jnp.concatenate([keys if i == j else zeros for j in range(group)], 2) for i in range(group)]
    return jnp.concatenate(rows, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(group, q, k, v, keys, bias, apart):
    return _forward(group, q, k, v, keys, bias, apart)[0]


def _forward(group, q, k, v, keys, bias, apart):
    lay, side = _Lay(group), _Side(group, q.shape[3], k.shape[2])
    relation = None
    if keys is not None:
        relation = lay(jnp.einsum("rpix,xij->rpij", q, keys, preferred_element_type=jnp.float32))

    def logits_of(q):
        logits = jnp.einsum("rpix,rpjx->rpij", q, side.apart(k * side.scale), preferred_element_type=jnp.float32)
        logits = logits if relation is None else logits + relation
        logits = lay(logits if bias is None else logits + bias)
        return logits if apart is None else _masked(logits, apart)

    logits = logits_of(q)
    most = side.over_keys(side.of_keys(jnp.max, logits, -jnp.inf))
    if group == 1 and keys is None and k.shape[2] > LANES:  # one product more is faster than to write and read them
        zero, most = jax.lax.optimization_barrier((jnp.zeros((), q.dtype), most))
        logits = logits_of(q + zero)  # which the compiler does not know to be q, and adds where it reads it
    e = jnp.exp(logits - most)
    inverse = [1 / x for x in side.of_keys(jnp.sum, e, 0.0)]
    e = _kept(lay(e.astype(q.dtype)))
    out = jnp.einsum("rpij,rpjx->rpix", e, side.apart(v), preferred_element_type=jnp.float32)
    out = lay((out * side.over_lanes(inverse)).astype(q.dtype))
    return out, (q, k, v, keys, bias, e, inverse, out)


def _backward(group, kept, g):
    q, k, v, keys, bias, e, inverse, out = kept
    lay, side = _Lay(group), _Side(group, q.shape[3], k.shape[2])
    g = lay(g).astype(jnp.float32) * side.over_lanes(inverse)
    sums = side.of_lanes(g * out.astype(jnp.float32))
    g = lay(g.astype(q.dtype))
    dv = side.together(lay(jnp.einsum("rpij,rpix->rpjx", e, g)))
    dp = lay(jnp.einsum("rpix,rpjx->rpij", g, side.apart(v), preferred_element_type=jnp.float32))
    dlogits = _kept(lay((e.astype(jnp.float32) * (dp - side.over_keys(sums))).astype(q.dtype)))
    dq = jnp.einsum("rpij,rpjx->rpix", dlogits, side.apart(k * side.scale))
    dk = side.together(lay(jnp.einsum("rpij,rpix->rpjx", dlogits, q))) * side.scale
    dkeys = dbias = None
    if keys is not None:
        by_query = lay(dlogits, (2, 1, 0, 3))
        dq = lay(dq) + lay(jnp.einsum("rpij,xij->rpix", by_query, keys))
        dkeys = jnp.einsum("rpij,rpix->xij", by_query, q).astype(keys.dtype)
    if bias is not None:
        dbias = dlogits.astype(bias.dtype) if bias.ndim == 4 else dlogits.sum(0, dtype=bias.dtype)
    return lay(dq), lay(dk), lay(dv), dkeys, dbias, None


_attention.defvjp(_forward, _backward)


def _masked(logits, apart):
    """[(b m) p n n], [m n n] -> [(b m) p n n]."""
    in_turn = logits.reshape(-1, apart.shape[0], *logits.shape[1:])
    return jnp.where(apart[:, None], NEVER, in_turn).reshape(logits.shape)


def _kept(x):
    """Computed once: the compiler would else compute it again in each product that reads it."""
    return jax.lax.optimization_barrier(x)


class _Lay:
    """Arrays of groups lie as they are written, or with their axes in another order from the outermost to the lanes."""

    def __init__(self, group: int):
        self.group = group

    def __call__(self, x, order=(0, 1, 2, 3)):
        return x if self.group == 1 else with_layout_constraint(x, Layout(order))


class _Side:
    """What lies side by side: the lanes of the heads of a group in x, their keys in group * n."""

    def __init__(self, group: int, width: int, tokens: int):
        self.group, self.tokens, self.scale = group, tokens, (width // group) ** -0.5
        self.lanes = np.arange(width) * group // width
        self.keys = np.arange(group * tokens) // tokens

    def apart(self, x):
        """[r p n x] -> [r p group*n x]: rows of each head, zero in the lanes of the others."""
        if self.group == 1:
            return x
        return jnp.concatenate([x * jnp.asarray(self.lanes == i, x.dtype) for i in range(self.group)], 2)

    def together(self, x):
        """[r p group*n x] -> [r p n x]: of the rows of each head its own lanes."""
        if self.group == 1:
            return x
        parts = [x[:, :, i * self.tokens : (i + 1) * self.tokens] for i in range(self.group)]
        return sum(part * jnp.asarray(self.lanes == i, x.dtype) for i, part in enumerate(parts))

    def of_keys(self, reduce, x, neutral: float) -> list:
        return self.reduced(reduce, x, self.keys, neutral)

    def of_lanes(self, x) -> list:
        return self.reduced(jnp.sum, x, self.lanes, 0.0)

    def over_keys(self, parts):
        return self.chosen(parts, self.keys)

    def over_lanes(self, parts):
        return self.chosen(parts, self.lanes)

    def reduced(self, reduce, x, heads, neutral: float) -> list:
        """[... m] -> of each head [... 1] over its share of the last axis."""
        if self.group == 1:
            return [reduce(x, -1, keepdims=True)]
        return [reduce(jnp.where(heads == i, x, neutral), -1, keepdims=True) for i in range(self.group)]

    def chosen(self, parts, heads):
        """Of each head [... 1] -> [... m] or what broadcasts to it."""
        found = parts[0]
        for i, part in enumerate(parts[1:], 1):
            found = jnp.where(heads == i, part, found)
        return found

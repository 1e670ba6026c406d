"""Swin's attention inside (shifted) windows of a grid, where tokens may be missing (arXiv 2103.14030, section 3.2)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import lane_attention, row_attention
from mim_jax.models.lane_attention import NEVER
from mim_jax.models.layers import Dense, exact, token_init
from mim_jax.models.relative_bias import bias_matrix, offsets
from mim_jax.models.self_attention import from_heads, to_heads
from mim_jax.models.window_layout import WindowLayout
from mim_jax.tokens import Visible, keep, spread

LONG = 128  # tokens; longer sequences have their biases in the product of queries and keys on a TPU


def split_heads(dense: Dense, x, heads: int, at_once: bool):
    """[r n d] -> queries, keys, values [r h n e], in the layout that suits what is compiled for (see self_attention.py)."""
    if platforms.current() == "tpu":
        return dense(x, functools.partial(to_heads, heads, at_once=at_once))
    return rearrange(dense(x), "r n (three h e) -> three r h n e", three=3, h=heads)


def joined_heads(dense: Dense, x):
    """[r h n e] -> [r n d]."""
    if platforms.current() == "tpu":
        return dense(x, from_heads, x.shape[1] * x.shape[3])
    return dense(rearrange(x, "r h n e -> r n (h e)"))


class WindowAttention(nn.Module):
    """[b u s s d] of the visible units, Visible of the units or None -> [b u s s d].

    A token attends to the visible tokens of its window, with a bias for their offset. Where only visible units are there,
    all tokens of an image are one sequence, masked by "same window", as long as it has few enough pairs: the products are
    large, and nothing stands at its place. Else there are windows of fixed size, to whose places visible tokens are spread;
    the linear layers see visible tokens only.
    """

    heads: int
    layout: WindowLayout
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, visible: Visible | None = None):
        width, layout = x.shape[-1], self.layout
        if width % self.heads:
            raise ConfigError(f"width {width} is not divisible by {self.heads} heads")
        table = self.param("relative_bias", token_init, (offsets(layout.window), self.heads))
        compact = visible is not None and x.shape[1] == visible.ids.shape[1]
        qkv, proj = Dense(3 * width, self.dtype, name="qkv"), Dense(width, self.dtype, name="proj")
        if compact and layout.in_sequence(x.shape[1]):
            tokens = rearrange(x, "b u i j d -> b (u i j) d")
            out = self.of_sequence(*split_heads(qkv, tokens, self.heads, at_once=True), table, visible.ids)
            return joined_heads(proj, out).reshape(x.shape)
        # who looks at weights sees those of single windows
        group = 1 if self.is_mutable_collection("intermediates") else layout.group
        windows = lambda x: rearrange(layout.cut(x, group), "b m n d -> (b m) n d")
        units = lambda x: layout.join(rearrange(x, "(b m) n d -> b m n d", m=layout.windows // group))
        if compact:
            q, k, v = rearrange(windows(spread(qkv(x), visible)), "r n (three h e) -> three r h n e", three=3, h=self.heads)
        else:
            q, k, v = split_heads(qkv, windows(x), self.heads, at_once=layout.windows == 1)
        out = self.of_windows(q, k, v, table, visible, group)
        if compact:
            return proj(keep(units(rearrange(out, "r h n e -> r n (h e)")), visible))
        return units(joined_heads(proj, out))

    def of_windows(self, q, k, v, table, visible, group: int):
        """[r h n e] of r = b x m groups of windows three times -> [r h n e]."""
        bias = jnp.tile(bias_matrix(table, self.layout.window), (1, group, group))
        if platforms.current() == "tpu" and visible is None and not self.is_mutable_collection("intermediates"):
            return lane_attention.attention(q, k, v, None, bias, 1, self.layout.apart(group))
        logits = jnp.einsum("rhie,rhje->rhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32) + bias
        logits = rearrange(logits, "(b m) h i j -> b m h i j", m=self.layout.windows // group)
        logits = jnp.where(self.blocked(visible, group), NEVER, logits)
        weights = jax.nn.softmax(logits, axis=-1)  # a window without visible tokens: no matter what, but finite
        self.sow("intermediates", "weights", weights)
        weights = rearrange(weights.astype(self.dtype), "b m h i j -> (b m) h i j")
        return jnp.einsum("rhij,rhje->rhie", weights, v)

    def of_sequence(self, q, k, v, table, ids):
        """[b h n e] three times, the visible units [b u] -> [b h n e].

        The bias of a pair comes by two products, with the place of the query and with that of the key in their windows,
        each of one 1 and zeros; of long sequences on a TPU the second is part of the product of queries and keys.
        """
        window, place = self.layout.of_tokens(ids)
        matrix = bias_matrix(table, self.layout.window)
        more = -matrix.shape[-1] % (64 if platforms.current() == "gpu" else 1)  # 49 places suit no tile of a GPU's products
        matrix = jnp.pad(matrix, ((0, 0), (0, more), (0, more))).astype(self.dtype)
        places = jax.nn.one_hot(place, matrix.shape[-1], dtype=self.dtype)
        biases = jnp.einsum("bnp,hpq->bhnq", places, matrix, precision=exact(self.dtype))
        same = window[:, None, :, None] == window[:, None, None, :]
        if platforms.current() == "tpu" and q.shape[2] > LONG:  # in float32 its products round the biases as q and k
            queries = jnp.concatenate([q * q.shape[-1] ** -0.5, biases], -1)
            keys = jnp.concatenate([k, jnp.broadcast_to(places[:, None], (*k.shape[:3], places.shape[-1]))], -1)
            return row_attention.attention(queries[None], keys.mT, v, apart=~same)[0]
        bias = jnp.einsum("bhiq,bjq->bhij", biases, places, precision=exact(self.dtype))
        if platforms.current() == "tpu":
            return lane_attention.attention(q, k, v, None, bias, 1, ~same[:, 0])
        logits = jnp.einsum("bhie,bhje->bhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32) + bias
        logits = jnp.where(same, logits, NEVER)
        # Divided after the product: e numbers of a token instead of n.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.einsum("bhij,bhje->bhie", weights.astype(self.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1)[..., None]).astype(self.dtype)

    def blocked(self, visible: Visible | None, group: int = 1):
        """-> bool that broadcasts against [b m h n n]: keys that are hidden, or in another window, or beyond the border of the
        image."""
        apart = self.layout.apart(group)
        blocked = jnp.asarray(False if apart is None else apart[None, :, None])
        if visible is None:
            return blocked
        side = self.layout.side
        hidden = jnp.broadcast_to(visible.hidden[:, :, None, None, None], (*visible.hidden.shape, side, side, 1))
        hidden = rearrange(self.layout.cut(hidden, group), "b m n 1 -> b m 1 1 n")
        return blocked | hidden

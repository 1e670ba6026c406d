"""The Vision Transformer: patches in, tokens out. It knows nothing of masking."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import choice
from mim_jax.models import block_loop, flops, irpe, relative_bias
from mim_jax.models.encoder import Encoder
from mim_jax.models.layers import Dense, DropPath, LayerNorm, Mlp, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.models.self_attention import Attention
from mim_jax.sections import BelowOne, Count, Natural, NotNegative, Positive
from mim_jax.tokens import Visible, keep, patchify

POSITIONS = ("rpe", "absolute", "learned", "shared_bias", "layer_bias", "learned_layer_bias")
LEARNED, OWN_BIAS = ("learned", "learned_layer_bias"), ("layer_bias", "learned_layer_bias")


class Block(nn.Module):
    """[r n d] -> [r n d]: pre-norm attention and MLP, each in a residual branch.

    `layer_scale` other than 0: each branch is multiplied by a vector that starts there (CaiT, arXiv 2103.17239).
    `drop_path`: see DropPath.
    """

    heads: int
    mlp_ratio: float = 4.0
    relative: bool = False
    drop_path: float | jax.Array = 0.0
    own_bias: bool = False
    qkv_bias: str = "all"
    layer_scale: float = 0.0
    attention: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, buckets=None, train: bool = False, bias=None):
        drop = DropPath(self.drop_path)
        x, h = LayerNorm(self.dtype, name="norm1")(x, stream=True)
        way = self.attention
        attend = Attention(self.heads, self.relative, self.own_bias, self.qkv_bias, way, self.dtype, name="attn")
        branch = drop(self.scaled(attend(h, buckets, bias), "gamma_1"), train)
        x, h = LayerNorm(self.dtype, name="norm2")(x, branch, stream=True)
        h = Mlp(round(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(h)
        return x + drop(self.scaled(h, "gamma_2"), train)

    def scaled(self, branch, name: str):
        if not self.layer_scale:
            return branch
        init = nn.initializers.constant(self.layer_scale)
        return branch * self.param(name, init, branch.shape[-1:]).astype(branch.dtype)


class Late(NamedTuple):
    """Tokens that enter on the way: before block `block`, `enter` makes of those at `ids` all of the view, [r 1+n d]."""

    block: int
    enter: Callable[[jax.Array], jax.Array]


class ViT(Encoder):
    """Patch embedding, cls token, blocks, final norm.

    position: "rpe" (iRPE in every block, nothing added to tokens), "absolute" (a fixed sin-cos table is added),
    "learned" (the same table as a trainable parameter, cls row included, as timm fine-tunes it), "shared_bias" (one
    relative-position bias that every block adds to its logits), "layer_bias" (one of each block's own), "learned_layer_bias"
    (both, as released segmentation has it).

    attention: "auto"; "kernel", always in that of GPUs or TPUs (models/kernel_attention.py, mosaic_attention.py); or "plain".

    scan: the blocks between two places where anything else happens run as one loop, for a compiler the work of one block.
    Parameters lie as they do without it, and values are the same but for rounding; which samples `drop_path` drops differs,
    how often does not. Where blocks are to be looked into they run one by one.

    Where a method takes `ids`, the images are parts of larger ones: ids [r n] are the places of their patches in `grid`.
    """

    depth: Natural = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    position: str = "rpe"
    qkv_bias: str = "all"
    layer_scale: NotNegative = 0.0
    attention: str = "auto"
    drop_path: BelowOne = 0.0
    final_norm: bool = True
    scan: bool = False

    kind, has_cls, takes_parts = "vit", True, True

    def setup(self):
        choice("encoder.position", self.position, POSITIONS)
        choice("encoder.qkv_bias", self.qkv_bias, ("all", "qv"))
        choice("encoder.attention", self.attention, ("auto", "kernel", "plain"))
        self.patch_embed = Dense(self.width, self.dtype)
        self.cls_token = self.param("cls_token", token_init, (1, 1, self.width))
        if self.position in LEARNED:
            self.pos_embed = self.param("pos_embed", lambda _: jnp.asarray(sincos_table(self.width, self.grid, cls=True))[None])
        if self.position == "shared_bias":
            shape = (relative_bias.entries(self.grid), self.heads)
            self.relative_bias = self.param("relative_bias", nn.initializers.zeros, shape)
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", block(drop_path=self.rate(i), **self.of_a_block))
        if self.final_norm:
            self.norm = LayerNorm(self.dtype)

    @property
    def of_a_block(self) -> dict:
        """What all blocks have in common."""
        sizes = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, layer_scale=self.layer_scale, dtype=self.dtype)
        positions = dict(relative=self.relative, own_bias=self.position in OWN_BIAS)
        return dict(qkv_bias=self.qkv_bias, attention=self.attention, **positions, **sizes)

    def rate(self, i: int) -> float:
        """How often block i drops a branch: linear in depth, as timm's."""
        return self.drop_path * i / max(self.depth - 1, 1)

    @property
    def relative(self) -> bool:
        return self.position == "rpe"

    @property
    def levels(self) -> int:
        return self.depth

    def tables(self) -> dict[str, tuple[int, int]]:
        own = [f"block_{i:02d}/attn/relative_bias" for i in range(self.depth)]
        paths = {"learned": ["pos_embed"], "shared_bias": ["relative_bias"], "layer_bias": own}
        paths["learned_layer_bias"] = [*paths["learned"], *own]
        return dict.fromkeys(paths.get(self.position, ()), self.grid)

    def fixed_tables(self):
        return {"pos_embed": sincos_table(self.width, self.grid, cls=True)[None]} if self.position == "absolute" else {}

    def flops(self, kept: int | None = None, embedded: float | None = None) -> int:
        """As the contract says; `embedded` is how many patches are embedded, where not as many as are kept."""
        kept = kept or self.grid[0] * self.grid[1]
        embed = flops.dense(embedded or kept, self.patch**2 * self.channels, self.width)
        return embed + self.depth * flops.block(1 + kept, self.width, self.mlp_ratio, self.relative)

    def embed(self, images):
        """[b h w c] -> [b n d]: all tokens of the image, positions added where the model adds them."""
        return self.tokens_of(images) + self.positions()

    def tokens_of(self, images):
        """[r h w c] -> [r n d], nothing added."""
        return rearrange(self.patch_embed(patchify(images, self.patch)), "r y x d -> r (y x) d")

    def positions(self, ids=None):
        """-> [n d], or [r n d] of the places `ids` [r n], or 0 where nothing is added to patch tokens."""
        if self.position == "absolute":
            table = jnp.asarray(sincos_table(self.width, self.grid), self.dtype)
        elif self.position in LEARNED:
            table = self.pos_embed[0, 1:].astype(self.dtype)
        else:
            return 0
        return table if ids is None else jnp.take(table, ids, axis=0)

    def with_cls(self, tokens):
        """[r n d] -> [r 1+n d]: the cls token (with its position, where it has one) comes first."""
        cls = self.cls_token + (self.pos_embed[:, :1] if self.position in LEARNED else 0)
        return jnp.concatenate([jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, self.width)), tokens], 1)

    def encode(self, tokens, taps: Sequence[int] = (), *, view=None, ids=None, late=None, decouple=False, train=False):
        """[r n d] with cls first -> [r n d] after the final norm, and a list of the outputs of the blocks in `taps`.

        The tokens are those of a view of this many (rows, columns), the whole grid by default; or only those at the
        places `ids` [r k] of that view, `late` (a Late) saying whether and where the others enter.
        """
        buckets, bias = self.relations(view or self.grid, ids)
        self.sow("intermediates", "tokens_in", tokens)
        tapped, inner = [], {0, late.block if late else 0, *(i + 1 for i in taps)} & {*range(self.depth)}
        for first, end in pairwise(sorted(inner | {self.depth})):
            if late and first == late.block:
                tokens, (buckets, bias) = late.enter(tokens), self.relations(view or self.grid)
            tokens = self.through(range(first, end), tokens, buckets, bias, train)
            if end - 1 in taps:
                tapped.append(tokens)
                tokens = jax.lax.stop_gradient(tokens) if decouple and end < self.depth else tokens
        return (self.norm(tokens) if self.final_norm else tokens), tapped

    def through(self, blocks: range, tokens, buckets, bias, train: bool):
        """[r n d] -> [r n d]: these blocks in turn."""
        names = [f"block_{i:02d}" for i in blocks]
        looked_into = self.is_initializing() or self.is_mutable_collection("intermediates")
        if not self.scan or len(blocks) < 2 or looked_into:
            for name in names:
                tokens = getattr(self, name)(tokens, buckets, train, bias)
            return tokens
        own = [{"params": block_loop.kernels_as(self.variables["params"][name], self.dtype)} for name in names]
        if drops := train and self.drop_path > 0:
            for i, name, one in zip(blocks, names, own):
                one |= {"rate": self.rate(i), "key": getattr(self, name).make_rng("dropout")}

        def step(tokens, one):
            block = Block(drop_path=one.get("rate", 0.0), **self.of_a_block, parent=None)  # of nobody: it brings its parameters
            rngs = {"dropout": one["key"]} if drops else None
            return block.apply({"params": one["params"]}, tokens, buckets, train, bias, rngs=rngs)

        return block_loop.in_turn(step, tokens, own, self.remat)

    def relations(self, view, ids=None):
        """-> iRPE's buckets, as Attention takes them, and the learned bias that blocks share or how to make their own, or None
        for what is not used."""
        buckets, bias = None, None
        if self.relative and ids is None:
            buckets = irpe.Grid(tuple(view))
        elif self.relative:
            there = jnp.pad(ids + 1, ((0, 0), (1, 0)))  # cls comes first
            buckets = jnp.asarray(irpe.bucket_table(view))[there[:, :, None], there[:, None, :]]
        if self.position in ("shared_bias", *OWN_BIAS):
            bias = relative_bias.RelativeBias(self.grid, view, ids)
            bias = bias.of(self.relative_bias) if self.position == "shared_bias" else bias
        return buckets, bias

    def encode_visible(self, images, visible: Visible, taps: Sequence[int] = (), *, ids=None, decouple=False, train=False):
        """As the contract says, [r 1+k d]: MAE's encoder. Hidden patches are not even embedded."""
        patches = patchify(images, self.patch)
        tokens = self.patch_embed(keep(rearrange(patches, "r y x d -> r (y x) d"), visible))
        places = visible.ids if ids is None else jnp.take_along_axis(ids, visible.ids, 1)
        tokens, view = self.with_cls(tokens + self.positions(places)), patches.shape[1:3]
        return self.encode(tokens, taps, view=view, ids=visible.ids, decouple=decouple, train=train)

    def encode_masked(self, images, hidden, mask_token, *, ids=None, train: bool = False):
        tokens = jnp.where(rearrange(hidden, "r y x -> r (y x) 1"), mask_token.astype(self.dtype), self.tokens_of(images))
        return self.encode(self.with_cls(tokens + self.positions(ids)), view=hidden.shape[1:], train=train)[0]

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        return self.encode(self.with_cls(self.embed(images)), taps, train=train)

    def with_final_norm(self, keep: bool) -> Encoder:
        return self.clone(final_norm=keep)

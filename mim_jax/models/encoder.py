"""What every encoder is: images in, tokens out, and all that the rest of the house asks of it.

A new family writes `encode_tapped` and `flops`, and `encode_masked` or `encode_visible` for the methods that need them; it
says what it is where it is not what the defaults say.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.sections import Count
from mim_jax.tokens import Visible


class Encoder(nn.Module):
    """The contract. Fields are what `config.encoder` holds of a family (under another name where `KEYS` says so), but for
    `grid`, `channels`, `remat` and `dtype`, which the run decides.

    Images are float32 [b h w c], already normalised. A unit is the square that is hidden or visible as one. A tap is the
    number of a place inside, from 0 to levels - 1, whose output can be asked for: a block, or a stage.
    """

    grid: tuple[int, int]  # rows and columns of patches
    patch: Count = 16  # pixels of a side
    channels: int = 3
    width: Count = 768  # of the tokens that patches become
    remat: bool = False  # recompute blocks in the backward pass
    dtype: Any = jnp.float32  # of matrix products

    kind: ClassVar[str]  # the family's name in a config: "vit"
    KEYS: ClassVar[dict[str, str]] = {}  # {key of the config: the field it is}, where the two differ
    STEM: ClassVar[tuple[str, ...]] = ("cls_token", "mask_token", "pos_embed", "patch_embed", "patch_norm")  # layer 0
    place: ClassVar[str] = "block"  # the word for what a tap counts
    has_cls: ClassVar[bool] = False  # whether a cls token leads the tokens
    small_products: ClassVar[bool] = False  # whether most of its attention is among the few tokens of a window
    takes_parts: ClassVar[bool] = False  # whether images may be parts of larger ones, their patches at `ids` of the grid

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def unit(self) -> int:
        """Pixels of a side of what is hidden or visible as one: a patch."""
        return self.patch

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of what is hidden or visible as one."""
        return self.image_size[0] // self.unit, self.image_size[1] // self.unit

    @property
    def levels(self) -> int:
        """How many places a tap can have."""
        return 1

    def tap_shape(self, tap: int) -> tuple[int, int]:
        """-> pixels of a side of one token, and the width, after `tap`."""
        return self.patch, self.width

    @property
    def top_width(self) -> int:
        """Of the tokens that come out."""
        return self.tap_shape(self.levels - 1)[1]

    def tables(self) -> dict[str, tuple[int, int]]:
        """{path of a parameter whose shape depends on the image size: the grid, or window, it is made for}."""
        return {}

    def fixed_tables(self) -> dict[str, np.ndarray]:
        """{path: values} of constants here that another encoder of the family may learn, and then starts from."""
        return {}

    def adopted(self, params: dict) -> dict:
        """{path: array} of another encoder, below `encoder/` -> the same as they lie here, where a table has other entries."""
        return params

    def flops(self, kept: int | None = None) -> int:
        """Forward FLOPs per image, with `kept` units visible or all of them."""
        raise NotImplementedError

    # Layers, for learning rates by depth and for freezing.

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of every stage: `block_00`, or `stage_0/block_00` where a family has stages."""
        return (self.levels,)

    @property
    def layers(self) -> int:
        """How many layers there are, not counting the stem before and what lies after them."""
        return sum(self.blocks)

    def layer_of(self, path: str) -> int:
        """The layer of a parameter of an objective: 0 for the stem; i + 1 for block i; layers + 1 for the rest (MAE, BEiT).

        Blocks are counted over the stages; the merging at the end of a stage goes with the stage's last block. Only the
        encoder has layers: decoders are of the rest.
        """
        if re.match(rf"(encoder/)?({'|'.join(self.STEM)})(/|$)", path):
            return 0
        found = re.match(r"encoder/(?:stage_(\d+)/)?(?:block_(\d+)|merge)/", path)
        if not found:
            return self.layers + 1
        stage, index = int(found.group(1) or 0), found.group(2)
        before, own = sum(self.blocks[:stage]), self.blocks[stage]
        return before + (int(index) + 1 if index else own)

    # Tokens.

    def __call__(self, images, train: bool = False):
        """[b h w c] -> [b n d]: the whole image after the final norm, nothing hidden; cls first where there is one."""
        return self.encode_tapped(images, train=train)[0]

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        """[b h w c] -> what `__call__` gives, and the list of outputs [b n' d'] of the places in `taps`, before any norm."""
        raise NotImplementedError

    def encode_visible(self, images, visible: Visible, taps: Sequence[int] = (), *, ids=None, decouple=False, train=False):
        """[r h w c], Visible of k of the units -> the visible tokens after the final norm, and the tapped ones.

        With `decouple` no gradient passes a tap from above.
        """
        raise ConfigError(
            f"encoder.kind={self.kind} computes hidden places too, which MAE and LocalMIM leave out (encode_visible); use a "
            "ViT or a Swin, or a method with mask tokens, such as SimMIM"
        )

    def encode_masked(self, images, hidden, mask_token, *, ids=None, train: bool = False):
        """[r h w c], bool [r rows columns] of patches, [1 1 d] -> the tokens after the final norm: hidden patches enter as
        the mask token."""
        raise ConfigError(
            f"encoder.kind={self.kind} takes no mask tokens, which SimMIM, MaskFeat and BEiT need (encode_masked); use a ViT "
            "or a Swin"
        )

    def in_rows(self, tokens):
        """[b n d] of a tap -> the same row by row, cls first where there is one."""
        return tokens

    def maps(self, images, taps: Sequence[int], train: bool = False) -> list:
        """[b h w c] -> for each tap [b rows columns d], cls left out: the whole image, nothing hidden, before any norm."""
        found = []
        for tap, tokens in zip(taps, self.encode_tapped(images, taps, train)[1], strict=True):
            rows = images.shape[1] // self.tap_shape(tap)[0]
            found.append(rearrange(self.in_rows(tokens)[:, int(self.has_cls) :], "b (y x) d -> b y x d", y=rows))
        return found

    @property
    def pools(self) -> tuple[str, ...]:
        """How `pool` can make one feature of the tokens."""
        return ("mean", "cls") if self.has_cls else ("mean",)

    def pool(self, tokens, how: str):
        """[b n d] -> [b d], float32: "cls", or the "mean" of the others. Raises ConfigError for a cls token not there."""
        if how not in self.pools:
            raise ConfigError(f"a {type(self).__name__} cannot pool by '{how}'; use pool={' or pool='.join(self.pools)}")
        tokens = tokens.astype(jnp.float32)
        return tokens[:, 0] if how == "cls" else tokens[:, int(self.has_cls) :].mean(1)

    def with_final_norm(self, keep: bool) -> "Encoder":
        """The same encoder with or without the norm of its last tokens, if it has one: what fine-tuning starts from.

        Raises ConfigError for an encoder that is not there to be fine-tuned.
        """
        return self

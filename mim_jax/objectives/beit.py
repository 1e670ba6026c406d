"""BEiT: blocks enter the encoder as mask tokens, which predict the visual tokens of a frozen tokenizer (arXiv 2106.08254)."""

from mim_jax.objectives.one_target import BlockPrediction


class BEiT(BlockPrediction):
    """int(n * mask_ratio) patches are hidden in blocks, 75 of 196; cross-entropy of their codes (section 2.3)."""

    mask_ratio: float = 0.383

    kinds = ("codes",)

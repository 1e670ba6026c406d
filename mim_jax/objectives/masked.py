"""What the methods share: places are hidden, vectors are predicted for cells, hidden ones count.

A method says what it looks at (`view`, of masking/views.py), what it predicts (`outputs`, with targets of targets/), and how
(`predict`). Loss, evaluation and pictures follow from these three.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.masking import random, windows
from mim_jax.masking.random import TokenMask
from mim_jax.masking.views import Views, Whole, Windows
from mim_jax.objectives.objective import Objective
from mim_jax.objectives.teacher import Teacher
from mim_jax.targets.codes import Codes
from mim_jax.targets.hog import Hog
from mim_jax.targets.pixels import Pixels
from mim_jax.targets.target import Target, masked_mean
from mim_jax.tokens import to_cells

TARGETS = {  # the word in a config: from a method to the value
    "pixels": lambda method: method.pixels,
    "hog": lambda method: method.histograms,
    "codes": lambda method: method.codes,
}


class MaskedPrediction(Objective):
    """windows: how many of `window` x `window` patches are looked at in an image; 0: the whole image.

    `tokenizer`: codes(images [b h w c]) -> [b n], one of `classes` for each patch; paint(codes, grid) -> [b h' w' c], a
    picture of them; of methods that predict codes.
    """

    mask_ratio: float = 0.75
    window: int = 7
    windows: int = 0
    tokenizer: nn.Module | None = None
    dtype: Any = jnp.float32

    pairing: ClassVar[str] = "paper"  # of images with windows (masking/windows.py)

    def hide(self, key, batch_size: int) -> TokenMask:
        """What is hidden of the squares of whole images: random ones."""
        return random.draw(key, batch_size, math.prod(self.hidden_grid), self.kept)

    def predict_views(self, views: Views, train: bool = False) -> list:
        """-> [r n t] float32 of each output."""
        raise NotImplementedError

    @property
    def view(self) -> Whole | Windows:
        """What is looked at."""
        e = self.encoder
        return Windows(e.grid, self.window, self.windows, self.pairing) if self.windows else Whole(e.units)

    @property
    def hidden_side(self) -> int:
        """Pixels of a side of what is hidden as one."""
        return self.encoder.unit

    @property
    def hidden_grid(self) -> tuple[int, int]:
        """Rows and columns of what is hidden as one in a view."""
        return tuple(u * self.encoder.unit // self.hidden_side for u in self.view.shape)

    def check(self):
        """Raises ConfigError for settings that cannot be, before any compute."""
        if not 0 <= self.mask_ratio <= 1:  # NaN included
            raise ConfigError(f"mask_ratio={self.mask_ratio} is not a share between 0 and 1")
        if self.windows < 0:
            raise ConfigError(f"windows={self.windows} must be 0, for the whole image, or more")
        if self.windows:
            if not self.encoder.takes_parts:
                raise ConfigError(f"windows need a ViT: a {type(self.encoder).__name__} takes whole images only; use windows=0")
            self.view.check(self.mask_ratio)
        if self.tokenizer is not None and "codes" not in self.kinds:
            raise ConfigError("a section 'tokenizer' is read with target=codes only; leave it out or predict codes")
        if "hog" in self.kinds and self.bins < 1:
            raise ConfigError(f"{type(self).__name__.lower()}.bins={self.bins} must be 1 or more")

    def masks(self, key, batch_size: int):
        """-> TokenMask of the image's squares, or WindowMask where there are windows."""
        self.check()
        return self.view.draw(key, batch_size, self.mask_ratio) if self.windows else self.hide(key, batch_size)

    def __call__(self, inputs: dict, train: bool = False):
        return self.loss(self.predict(inputs, train), self.targets(inputs), self.weights(inputs["masks"]))

    def loss(self, predictions, answers, weights):
        """What is predicted and right [r n t], and where it counts [r n], of each output -> loss [], metrics."""
        losses, metrics = [], {}
        for output, prediction, answer, weight in zip(self.outputs, predictions, answers, weights, strict=True):
            error, own = output.target.error(prediction, answer), output.target.metrics(prediction, answer)
            losses.append(masked_mean(error, weight))
            suffix = "" if output.name == self.view.name else f"_{output.name}"  # of taps
            self.sow("intermediates", f"error{suffix}", error)
            metrics |= {f"loss{suffix}": losses[-1]} if suffix else {}
            metrics |= {name + suffix: masked_mean(x, weight) for name, x in own.items()}
        return sum(losses), metrics

    def views(self, inputs: dict) -> Views:
        images, masks, view = inputs["images"], inputs["masks"], self.view
        return Views(view.cut(images, masks, self.encoder.unit), view.hidden(masks, self.hidden_grid[0]), view.ids(masks))

    def predict(self, inputs: dict, train: bool = False) -> list:
        """-> [r n t] float32 of each output, for the cells of all views."""
        return self.predict_views(self.views(inputs), train)

    def teach(self, inputs: dict) -> dict:
        if self.tokenizer is None:
            return {}
        if self.is_initializing():  # what only pictures need has parameters too
            self.tokenizer.paint(self.tokenizer.codes(inputs["images"]), self.tokenizer.grid)
        with jax.default_matmul_precision("highest"):  # or the hardware's rounding would choose some codes
            codes = self.tokenizer.codes(inputs["images"])
        return {"codes": rearrange(codes, "b (y x) -> b y x 1", y=self.tokenizer.grid[0])}

    @property
    def teacher(self) -> Teacher | None:
        return Teacher((r"^tokenizer/",)) if self.tokenizer else None

    def targets(self, inputs: dict, seen=None) -> list:
        """-> [r n t] of each output: what is to be predicted. Targets of one kind are made at once, in views alone where
        nothing around them matters. `seen` [r h w c] may replace the pixels of the views, each in an image of its own."""
        outputs, unit, answers = self.outputs, self.encoder.unit, {}
        images, masks = inputs["images"], inputs["masks"]
        if seen is None:
            seen = self.view.cut(images, masks, unit)
        elif not all(output.target.local for output in outputs):
            images, masks = self.view.paste(images, masks, seen)
            inputs = {"images": images, "masks": masks}
        inputs = self.taught(inputs)
        for target in dict.fromkeys(output.target for output in outputs):
            names, cells = zip(*((o.name, o.cell) for o in outputs if o.target is target))
            if target.local:
                made = self.made(target, {"images": seen}, cells)
            else:
                whole = self.made(target, inputs, cells)
                made = [self.view.cut(x, masks, max(1, unit // cell)) for x, cell in zip(whole, cells)]
            answers |= dict(zip(names, (rearrange(x, "r y x t -> r (y x) t") for x in made)))
        return [answers[output.name] for output in outputs]

    def made(self, target: Target, inputs: dict, cells) -> list:
        """`target.of`, for a method that has more to give to it."""
        return target.of(inputs, cells)

    def weights(self, masks) -> list:
        """-> [r n] of each output: the hidden share of every cell."""
        hidden = self.view.hidden(masks, self.hidden_grid[0]).astype(jnp.float32)
        return [rearrange(to_cells(hidden, self.hidden_side / o.cell), "r y x -> r (y x)") for o in self.outputs]

    def reconstruct(self, inputs: dict, fill):
        """As the contract says; the baseline are the targets of images whose hidden pixels, or those of one window at a time,
        `fill` completes from what is visible in the view."""
        images, masks, views = inputs["images"], inputs["masks"], self.views(inputs)
        filled = fill(views.images, to_cells(views.hidden, self.hidden_side))
        answers, guesses, found = self.targets(inputs), self.targets(inputs, filled), {}
        parts = self.predict(inputs), answers, guesses, self.weights(masks)
        for output, (*values, weight) in zip(self.outputs, zip(*parts, strict=True), strict=True):
            joined = (
                rearrange(x, "(b m) n ... -> b (m n) ...", b=len(images)) for x in (*output.target.judged(*values), weight)
            )
            found[output.name] = tuple(joined)
        return found

    def pictures(self, inputs: dict):
        inputs = inputs | {"masks": self.view.first(inputs["masks"])}
        views, answers, weights = self.views(inputs), self.targets(inputs), self.weights(inputs["masks"])
        painted = {}
        for o, prediction, answer, weight in zip(self.outputs, self.predict(inputs), answers, weights, strict=True):
            painted[o.name] = o.target.paint(prediction, answer, weight > 0, views.images, o.cell)
        masked = jnp.where(to_cells(views.hidden, self.hidden_side)[..., None], 0.0, views.images)
        return self.view.corner(inputs["masks"], self.encoder.unit), views.images, masked, painted

    @property
    def hidden_count(self) -> int:
        """Hidden squares of a view."""
        if self.windows:
            return windows.hidden_count(self.window, self.mask_ratio)
        return self.hidden_of(math.prod(self.hidden_grid))

    def hidden_of(self, n: int) -> int:
        """How many of the n squares of a whole image are hidden."""
        return n - random.kept_count(n, self.mask_ratio)

    @property
    def kept(self) -> int:
        """Visible squares of a view."""
        return math.prod(self.hidden_grid) - self.hidden_count

    @property
    def kinds(self) -> tuple[str, ...]:
        """The word for the target of each output: "pixels", "hog" or "codes"."""
        raise NotImplementedError

    def target_of(self, kind: str) -> Target:
        """Raises ConfigError for a word that names no target, and for codes without a tokenizer."""
        return TARGETS[choice(f"{type(self).__name__.lower()}.target", kind, TARGETS)](self)

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.norm_pix)

    @property
    def histograms(self) -> Hog:
        return Hog(self.bins)

    @property
    def codes(self) -> Codes:
        if self.tokenizer is None:
            raise ConfigError(
                "codes as a target need a section 'tokenizer', of which they are; as an argument target=codes brings it along: "
                "--config=configs/NAME.py:target=codes"
            )
        return Codes(self.tokenizer)

    def training_flops(self) -> int:
        return super().training_flops() + (self.tokenizer.flops() if self.tokenizer else 0)  # it only runs forward

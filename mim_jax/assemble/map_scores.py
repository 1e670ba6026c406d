"""The section of an evaluator of segmentation."""

import functools
from typing import Annotated

import jax

from mim_jax.assemble.judged import Evaluation, Judged
from mim_jax.config import ConfigError
from mim_jax.evaluators.mean_iou import Judge, Look
from mim_jax.sections import Bound, Natural


class MapScores(Evaluation):
    """mIoU of `split`, or of `examples` images of it. Images are brought to `short` px of the shorter side, at most `long` of
    the other (0: as they are), times each of `scales`, and are seen through windows of `window` px, `stride` apart, or whole
    (0); with `flip` mirrored too. The first `pictures` of them are drawn.
    """

    split: str
    examples: Natural
    window: Natural
    stride: Natural
    short: Natural
    long: Natural
    scales: Annotated[tuple[float, ...], Bound(lambda x: len(x) and min(x) > 0, "are no scales above 0")]
    flip: bool
    pictures: Natural

    def check(self):
        self.require(not self.window or 0 < self.stride <= self.window, "stride", f"is not 1 to window={self.window}")
        self.require(self.long >= self.short, "long", f"is below short={self.short}")

    def made(self, judged: Judged):
        from mim_jax.data.whole_images import whole_images

        made, config = judged.objective, judged.config
        if made.encoder.kind == "vit" and (self.window, self.window) != tuple(config.image_size):
            h, w = config.image_size
            raise ConfigError(f"{self.prefix}window={self.window}: a ViT sees windows of image_size, {h}x{w}, and no others")
        source = self.opened(judged, "split")
        source.require_maps(self.type)
        if source.class_names != judged.class_names:
            raise ConfigError(f"the {source.num_classes} classes of '{self.split}' are not those of the training")
        source.require_sound(self.examples)
        fn = lambda variables, batch: made.apply(variables, judged.normalise(batch["image"], batch["shown"]), method="logits")[
            ""
        ]
        process = jax.process_index(), jax.process_count()
        options = dict(short=self.short, long=self.long, limit=self.examples, process=process, reading=config.data.reading())
        count = min(source.num_examples, self.examples or source.num_examples)
        look = Look(self.window, self.stride, self.flip)
        images = functools.partial(whole_images, source, self.scales, **options)
        names = dict(title=self.split, names=source.class_names, colours=source.colours, shown=self.pictures)
        return Judge(jax.jit(fn), images, count, look, self.batch_size, **names)

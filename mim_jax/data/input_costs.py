"""What training images cost before they reach the device: the job behind `python -m mim_jax.benchmark --input`.

Every part and the whole path run over the same encoded images, held in memory, in turn within one run. Costs are CPU seconds of
the process, so images/s are those of one core; medians over the rounds. The floor is libjpeg-turbo (TensorFlow's) that decodes
the same bytes whole and does nothing else.
"""

import dataclasses
import io
import time

import numpy as np
import tensorflow as tf

from mim_jax.data import augment, crops, decoding
from mim_jax.data.augment import RandomCrop
from mim_jax.data.pipeline import TrainBatches
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.source import Source
from mim_jax.data.sources import open_source

IMAGES, BATCH, ROUNDS = 256, 64, 5
WARM, STEPS = 6, 10  # of a path
MADE = (500, 375)  # width, height: ImageNet's most frequent size
_plain = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True, eq=False)
class Held(Source):
    """Encoded images in memory."""

    images: tf.Tensor = None  # string [n]

    def load(self, item):
        return {"image": self.images[item], "label": tf.constant(-1)}


def made(count: int, sides: tuple[int, int] = MADE) -> list[bytes]:
    """JPEGs of quality 90 of the photographs that scikit-image bundles, each cut and resized to `sides` (width, height)."""
    from PIL import Image
    from skimage import data

    photos, rng, found = [data.coffee(), data.astronaut(), data.chelsea(), data.rocket()], np.random.default_rng(0), []
    for i in range(count):
        photo = Image.fromarray(photos[i % len(photos)])
        width = min(photo.width, photo.height * sides[0] // sides[1]) * rng.uniform(0.6, 1)
        height = width * sides[1] / sides[0]
        x, y = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        stream = io.BytesIO()
        photo.resize(sides, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height)).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def encoded(source: str, path: str, split: str) -> list[bytes]:
    """IMAGES encoded images of a source, spread evenly, or made ones without a source. Raises DataError."""
    if not source:
        return made(IMAGES)
    there = open_source(source, split, path=path)
    if not there.random_access:
        raise augment.DataError(f"--source={source}: its images cannot be picked; prepare it as array_record.")
    ids = np.linspace(0, there.num_examples - 1, min(IMAGES, there.num_examples)).astype(np.int64)
    items = there.lookup(tf.constant(ids)) if there.bulk else ids
    found = [there.load(item)["image"] for item in items]
    if any(image.dtype != tf.string for image in found):
        raise augment.DataError(f"--source={source}: its images are not encoded; give one of files.")
    jpegs = [image.numpy() for image in found if decoding.jpeg_sides(image.numpy())]
    if not jpegs:
        raise augment.DataError(f"--source={source}: none of {len(found)} images is a JPEG, of which alone there is a floor.")
    return jpegs


def report(size: int, source: str = "", path: str = "", split: str = "train") -> tuple[dict, dict]:
    """-> numbers, settings. size: pixels of a side of the crops' results; `source`, `path`, `split`: see data.sources."""
    data = encoded(source, path, split)
    held = Held("held", split, len(data), (), 3, images=tf.constant(data))
    results = in_turn({**_parts(held, size), **_paths(held, size)}, ROUNDS)
    facts = {"images": len(data), "mean_bytes": float(np.mean([len(image) for image in data])), "size": size}
    return {**facts, "results": results}, {"source": source, "split": split, "size": size, "rounds": ROUNDS}


def in_turn(ways: dict, rounds: int) -> list[dict]:
    """{name: () -> CPU seconds per image}, the floor first -> what each costs, the median over the rounds."""
    seconds = {name: [] for name in ways}
    for i in range(rounds + 1):  # the first, which builds the graphs, does not count
        for name, way in ways.items():
            cost = way()
            if i:
                seconds[name].append(cost)
    costs = {name: float(np.median(each)) for name, each in seconds.items()}
    floor = costs["decode_whole"]
    return [
        {"part": name, "cpu_ms_per_image": 1e3 * cost, "images_per_second_per_core": 1 / cost, "share_of_floor": floor / cost}
        for name, cost in costs.items()
    ]


def _settle():
    """Until what was begun ahead of the reader has ended, which would be charged to what is measured next."""
    before = -1.0
    while time.process_time() - before > 0.01:
        before = time.process_time()
        time.sleep(0.2)


def _cost(run, images: int) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) / images


def timed_part(held: Held, part):
    """part: int64 [] -> anything of that image -> () -> CPU seconds per image, in one thread."""
    ds = tf.data.Dataset.range(held.num_examples).map(_plain(part), num_parallel_calls=1).batch(BATCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size, options.autotune.enabled = 1, False
    ds = ds.with_options(options)
    return lambda: _cost(lambda: list(ds), held.num_examples)


def timed_path(opened, batch_size: int, warm: int, steps: int):
    """opened: () -> TrainBatches. -> () -> CPU seconds per image of whole batches, in as many threads as tf.data likes; the
    first `warm`, until it is as far ahead of its reader as it will be, do not count."""

    def cost():
        batches = opened()
        run = lambda first, last: [batches.batch(step) for step in range(first, last)]
        run(0, warm)
        found = _cost(lambda: run(warm, warm + steps), steps * batch_size)
        batches.close()
        _settle()
        return found

    return cost


def whole(held: Held):
    """The floor: libjpeg-turbo's decoding and nothing else."""
    return lambda i: tf.io.decode_jpeg(held.images[i], channels=3, dct_method="INTEGER_ACCURATE")[0, 0]


def _parts(held: Held, size: int) -> dict:
    """{name: () -> CPU seconds per image} of what the path is made of, one thread; all but the floor with what is before it."""
    crop, out = RandomCrop(), (size, size)
    drawn = lambda i: tf.random.stateless_uniform([augment.UNIFORMS], [i, 0])
    recipe = RandAugment(layers=2, magnitude=9.0, std=0.5, fill=(124, 116, 104))
    seen = lambda i: crops.train_example(held.load(i), [i, 0], crop, out, held.channels)

    def augmented(i):
        return recipe({"image": seen(i)["image"][None]}, tf.cast(tf.stack([i, 0]), tf.uint32)[None])

    def cut(i):
        def see(data, uniforms):
            choose = lambda h, w: augment.crop_box(crop, h, w, uniforms)
            return np.ascontiguousarray(augment.cut_image(data, 3, choose, size=out)[0])

        return tf.numpy_function(see, [held.images[i], drawn(i)], tf.uint8, stateful=False)

    def by_tensorflow(i):
        smooth = tf.image.resize(tf.ensure_shape(cut(i), [None, None, 3]), out, method="bicubic", antialias=True)
        return tf.saturate_cast(tf.round(smooth), tf.uint8)

    parts = {
        "decode_whole": whole(held),
        "crop": lambda i: cut(i)[0, 0],
        "crop_resize": lambda i: seen(i)["image"][0, 0],
        "crop_resize_by_tensorflow": lambda i: by_tensorflow(i)[0, 0],
        "crop_resize_randaugment": lambda i: augmented(i)["image"][0, 0, 0],
    }

    return {name: timed_part(held, part) for name, part in parts.items()}


def _paths(held: Held, size: int) -> dict:
    """{name: () -> CPU seconds per image} of whole training batches, in as many threads as tf.data likes."""
    ways = {"path": {}, "path_resize_on_device": {"unsized": True}, "path_repeat_4": {"repeat": 4}}

    def opened(options):
        return lambda: TrainBatches(held, batch_size=BATCH, size=(size, size), crop=RandomCrop(), seed=0, **options)

    return {name: timed_path(opened(options), BATCH, WARM, STEPS) for name, options in ways.items()}

"""Crops of several training images in one call from TensorFlow into Python, which costs more than what is ours in it.

Examples come as batches, s of them, and each image is seen r times; nothing but the images is touched by Python.
"""

import numpy as np
import tensorflow as tf

from mim_jax.data import augment, pil_bicubic, placed
from mim_jax.data.decoding import PLAIN

ALIGNED = 64  # bytes: an array that begins at a multiple is taken over by TensorFlow as it is, any other copied
CANVAS = 2  # times the size of the result: what is sent to a device that resizes


def aligned(shape) -> np.ndarray:
    """-> uint8 of a shape, not filled."""
    count = int(np.prod(shape))
    room = np.empty(count + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + count].reshape(shape)


def cut(batch, uniforms, crop, size, channels, how=PLAIN, unsized=False):
    """Examples, [s r UNIFORMS] -> what else they have; their crops uint8 [s*r size c], mirrored if they are to be; and
    float32 [s*r 10]: the box that the device is to resize, the (h, w) of the whole image, the box of the crop.

    Crops that are `unsized` are left for the device to resize: see `on_canvas`.
    """
    (count, repeat), images = uniforms.shape[:2], batch["image"]
    shape = [count * repeat, *(CANVAS * side if unsized else side for side in size), channels]
    if images.dtype == tf.uint8:
        images = tf.ensure_shape(images, [count, None, None, channels])

    def one(image, draws, out):
        choose = lambda h, w: augment.crop_box(crop, h, w, draws)
        pixels, of, sides, box = augment.cut_image(image, channels, choose, how, size)
        if unsized:
            of = on_canvas(pixels, of, out)
        else:
            pil_bicubic.bicubic(pixels, size, of, mirror=crop.flip and draws[-1] < 0.5, out=out)
        return *of, *sides, *box

    def see(images, uniforms):
        crops, places = aligned(shape), np.empty([count, repeat, 10], np.float32)
        for i, (image, draws) in enumerate(zip(images, uniforms)):
            if repeat > 1:  # decoded once, so all of it
                image = augment.pixels_of(image, channels, how)
            for k in range(repeat):
                places[i, k] = one(image, draws[k], crops[i * repeat + k])
        return crops, places.reshape(-1, 10)

    crops, places = tf.numpy_function(see, [images, uniforms], [tf.uint8, tf.float32], stateful=False)
    rest = {key: values for key, values in batch.items() if key != "image"}
    return rest, tf.ensure_shape(crops, shape), tf.ensure_shape(places, [count * repeat, 10])


def on_canvas(pixels, of, canvas):
    """uint8 [h w c], a box in it, uint8 [CANVAS * size c] to write to -> the box there: for the device to resize.

    The pixels are in the upper left corner; what is larger is brought to fit first.
    """
    height, width = sides = [min(pair) for pair in zip(pixels.shape, canvas.shape[:2])]
    if pixels.shape[:2] != (height, width):
        of = np.array(of) * np.tile(np.array(sides) / pixels.shape[:2], 2)
        pixels = pil_bicubic.bicubic(pixels, sides)
    canvas[:height, :width] = pixels
    canvas[height:], canvas[:height, width:] = 0, 0
    return of


def followed(rest, crops, places, uniforms, crop, size, unsized=False):
    """What `cut` gives, and the uniforms -> examples: all that has a place is where the image now has it."""
    count, repeat = uniforms.shape[:2]
    rest = {key: tf.repeat(values, repeat, axis=0) if repeat > 1 else values for key, values in rest.items()}
    mirror, whole = tf.reshape(uniforms, [count * repeat, -1])[:, -1] < 0.5, tf.cast(places[:, 4:], tf.int32)
    there = {key: values for key, values in rest.items() if key in placed.PLACED}
    if there:
        alone = lambda i: {key: values[i] for key, values in there.items()}
        moved = [_moved(alone(i), whole[i], mirror[i], crop, size) for i in range(count * repeat)]
        rest |= {key: tf.stack([example[key] for example in moved]) for key in there}
    sent = {"crop": places[:, :4], "mirror": mirror if crop.flip else tf.zeros_like(mirror)} if unsized else {}
    return {"image": crops, **rest, **sent}


def _moved(example, places, mirror, crop, size):
    """Of one example what has a place -> where the crop of its image has it. Raises for what does not lie on the image."""
    sides, box = places[:2], tuple(tf.unstack(places[2:]))
    placed.check(example, sides)
    seen = placed.moved(example, lambda kind, values: kind.resize(kind.cut(values, box), box[2:], size))
    if not crop.flip:
        return seen
    return tf.cond(mirror, lambda: placed.moved(seen, lambda kind, values: kind.mirror(values, size)), lambda: seen)


def train_example(example, seed, crop, size, channels, how=PLAIN):
    """Example, seed [2] -> example of the given size, the image uint8: a random crop, resized, perhaps mirrored."""
    batch = {key: tf.convert_to_tensor(values)[None] for key, values in example.items()}
    uniforms = tf.random.stateless_uniform([augment.UNIFORMS], seed)[None, None]
    seen = followed(*cut(batch, uniforms, crop, size, channels, how), uniforms, crop, size)
    return {key: values[0] for key, values in seen.items()}

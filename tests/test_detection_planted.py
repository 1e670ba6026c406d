"""A detector whose weights are written by hand, so that it must find objects of two kinds to the pixel.

Its images hold rectangles without their upper left quarter: red ones, wide, and green ones, tall, the patch at whose centre is
blue too. LayerNorms are made to do nothing: beside every value stands its negative, and two channels are so large that they
alone decide the deviation.
"""

import jax
import numpy as np
import pytest

from mim_jax import tree
from mim_jax.boxes import paste
from mim_jax.models.vitdet import ViTDet
from mim_jax.objectives.mask_rcnn import MaskRCNN

LARGE, WIDTH, D = 1e3, 32, 64
R, G, B, MORE, LESS = range(5)  # channels of the pyramid; LESS + 1 + i is the negative of i
KINDS = {"red": (96, 40), "green": (48, 80)}  # width, height
ANCHOR = 64.0
OBJECTS = (("red", 80, 48), ("green", 176, 96), ("red", 64, 160))  # centre x, y
SIZE = (176, 240)  # of the image, inside 192 x 256
MODEL = MaskRCNN(
    ViTDet(grid=(12, 16), width=D, depth=1, heads=2, position="rpe", window=4, global_blocks=()),
    classes=2,
    objects=1,
    width=WIDTH,
    hidden=8,
    anchor_sizes=(8.0, 8.0, ANCHOR, 8.0, 8.0),
    after=(3, 3),
    most=5,
)


def identity(width_in: int) -> np.ndarray:
    """[width_in, WIDTH]: values and the large channel as they are; negatives made of them, which an activation may have
    taken away."""
    kernel = np.zeros((width_in, WIDTH))
    for i in (R, G, B):
        kernel[i, i], kernel[i, LESS + 1 + i] = 1, -1
    kernel[MORE, MORE], kernel[MORE, LESS] = 1, -1
    return kernel


def neutral(width: int) -> float:
    """The scale that undoes a LayerNorm over so many channels, two of which are +-LARGE."""
    return LARGE * (2 / width) ** 0.5


def planted() -> dict:
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), MODEL.example()))["params"]
    p = {path: np.zeros(x.shape) for path, x in tree.flatten(shapes).items()}
    for path, x in p.items():
        if path.endswith("norm/scale") or "/norm_" in path and path.endswith("scale"):
            x[:] = neutral(len(x))
        if "/convs/conv_" in path or "region_proposals/conv" in path or path.endswith("output/kernel"):
            if path.endswith("kernel"):
                x[1, 1] = identity(x.shape[2])
    plant_encoder(p)
    plant_pyramid(p)
    plant_heads(p)
    return tree.nest({path: x.astype(np.float32) for path, x in p.items()})


def plant_encoder(p):
    """Tokens: red and green of the 4 x 4 parts of a patch (0-15, 16-31), blue of the whole, +LARGE."""
    pixels = p["encoder/patch_embed/kernel"].reshape(16, 16, 3, D)
    for y in range(16):
        for x in range(16):
            part = y // 4 * 4 + x // 4
            pixels[y, x, 0, part] = pixels[y, x, 1, 16 + part] = 1 / 16
    pixels[:, :, 2, 32] = 1 / 256
    p["encoder/patch_embed/bias"][33] = LARGE


def plant_pyramid(p):
    mean = p["pyramid/p4_lateral/kernel"]  # stride 16: means of the patch
    for value, channels in ((R, range(16)), (G, range(16, 32)), (B, [32])):
        mean[list(channels), value], mean[list(channels), LESS + 1 + value] = 1 / len(channels), -1 / len(channels)
    mean[33, MORE], mean[33, LESS] = 1, -1
    quarter = p["pyramid/p2_up_0/kernel"].reshape(D, 2, 2, D // 2)  # its parts: red 0-3, green 4-7, their negatives, LARGE
    for part in range(16):
        (y, i), (x, j) = divmod(part // 4, 2), divmod(part % 4, 2)
        for colour in range(2):
            own = 4 * colour + 2 * i + j
            quarter[16 * colour + part, y, x, own], quarter[16 * colour + part, y, x, 8 + own] = 1, -1
    quarter[33, :, :, 16], quarter[33, :, :, 17] = 1, -1
    p["pyramid/p2_up_norm/scale"][:] = 10 * neutral(D // 2)  # far from 0 GELU does nothing to what is positive
    single = p["pyramid/p2_up_1/kernel"].reshape(D // 2, 2, 2, D // 4)
    for part in range(8):
        colour, y, x = part // 4, part % 4 // 2, part % 2
        single[part, y, x, colour] = 0.1
    single[16, :, :, MORE] = 0.1
    p["pyramid/p2_lateral/kernel"][:] = identity(D // 4)


def plant_heads(p):
    a = 20.0
    objectness = p["region_proposals/objectness/kernel"]
    objectness[B, [0, 2]] = objectness[R, 0] = objectness[G, 2] = a  # wide anchors of red and blue, tall of green and blue
    p["region_proposals/objectness/bias"][:] = (-1.5 * a, -100, -1.5 * a)
    deltas = p["region_proposals/deltas/bias"].reshape(3, 4)
    for index, (kind, ratio) in ((0, ("red", 0.5)), (2, ("green", 2.0))):
        sides = ANCHOR / ratio**0.5, ANCHOR * ratio**0.5
        deltas[index, 2:] = np.log(np.divide(KINDS[kind], sides))
    colours = p["box_head/fc/kernel"].reshape(49, WIDTH, 8)
    for i in (R, G):
        colours[:, i, i] = 1 / 49
        p["box_head/classes_out/kernel"][i, i] = 40
        p["mask_head/up/kernel"].reshape(WIDTH, 4, WIDTH)[i, :, i] = 1
        p["mask_head/pred/kernel"][i, i] = 20
    p["box_head/classes_out/bias"][:2] = p["mask_head/pred/bias"][:] = -10


def scene(objects):
    """-> image [192 256 3], boxes [n 4], masks bool [n 192 256]."""
    image, boxes, masks = np.zeros((192, 256, 3), np.float32), [], []
    for kind, x, y in objects:
        w, h = KINDS[kind]
        x0, y0 = x - w // 2, y - h // 2
        mask = np.zeros((192, 256), bool)
        mask[y0 : y0 + h, x0 : x0 + w] = True
        mask[y0:y, x0:x] = False
        image[mask, list(KINDS).index(kind)] = 1
        image[y : y + 16, x : x + 16, 2] = 1
        boxes.append((x0, y0, x0 + w, y0 + h))
        masks.append(mask)
    return image, np.float32(boxes), np.stack(masks)


@pytest.fixture(scope="module")
def detected():
    """What is found in the scene, and what is in it, in an order of their own: by the left edge."""
    image, boxes, masks = scene(OBJECTS)
    found = jax.jit(lambda p, x, size: MODEL.apply({"params": p}, x, size, method="detect"))
    found = found(planted(), image[None], np.int32([SIZE]))
    found = {key: np.asarray(x[0]) for key, x in found.items()}
    order = np.argsort(np.where(found["found"], found["boxes"][:, 0], np.inf))[: len(boxes)]
    true = np.argsort(boxes[:, 0])
    classes = np.array([list(KINDS).index(kind) for kind, *_ in OBJECTS])
    return found, {key: x[order] for key, x in found.items()}, (boxes[true], classes[true], masks[true])


def test_planted_objects_are_found_to_the_pixel(detected):
    found, sorted_by_edge, (boxes, classes, _) = detected
    assert found["found"].sum() == len(OBJECTS) and sorted_by_edge["found"].all()
    boxes = np.clip(boxes, 0, SIZE[1::-1] * 2)  # one reaches beyond the lower edge of the image itself
    np.testing.assert_allclose(sorted_by_edge["boxes"], boxes, atol=0.05)
    np.testing.assert_array_equal(sorted_by_edge["classes"], classes)
    assert sorted_by_edge["scores"].min() > 0.99
    assert not found["boxes"][~found["found"]].any()


def test_boxes_and_masks_of_the_file_s_own_size(detected):
    """Height and width scaled apart, as rounding does to sizes."""
    _, found, (boxes, _, masks) = detected
    h, w = original = (2 * SIZE[0], 3 * SIZE[1])
    ours, real = paste.rescaled(found["boxes"], SIZE, original)
    assert real.all()
    np.testing.assert_allclose(ours, np.clip(boxes * (3, 2, 3, 2), 0, (w, h, w, h)), atol=0.2)
    pasted = paste.pasted(1 / (1 + np.exp(-found["mask_logits"])), ours, original)
    true = masks[:, : SIZE[0], : SIZE[1]].repeat(2, 1).repeat(3, 2)
    overlap = (pasted & true).sum((1, 2)) / (pasted | true).sum((1, 2))
    assert overlap.min() > 0.85, overlap
    mirrored = (pasted & true[:, :, ::-1]).sum((1, 2)) / (pasted | true).sum((1, 2))
    assert mirrored.max() < 0.75

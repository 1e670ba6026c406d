"""DALL-E's encoder against its published definition in plain numpy, and its converter by round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from PIL import Image

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import names
from mim_jax.convert.reading import dalle_weights
from mim_jax.models.dalle import DalleEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(0)
TINY = dict(mean=MEAN, std=STD, width=4, classes=11)


def shapes(**options):
    model = DalleEncoder(**{"grid": (2, 3), "mean": MEAN, "std": STD, **options})
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))["params"]


def random_params(**options):
    """Kernels of variance 2 / fan-in, for ReLUs, and biases that are not zero."""
    draw = lambda s: RNG.normal(size=s.shape) * (np.sqrt(2 / np.prod(s.shape[:-1])) if len(s.shape) > 1 else 0.1)
    return jax.tree.map(lambda s: draw(s).astype(np.float32), shapes(**options))


# the model


def test_the_full_size_is_the_published_one():
    conv = lambda size, width_in, width_out: size * size * width_in * width_out + width_out
    total, width_in = conv(7, 3, 256), 256
    for width in (256, 512, 1024, 2048):
        hidden = width // 4
        for _ in range(2):
            total += conv(1, width_in, width) if width_in != width else 0
            total += conv(3, width_in, hidden) + 2 * conv(3, hidden, hidden) + conv(1, hidden, width)
            width_in = width
    total += conv(1, 2048, 8192)
    params = shapes()
    assert tree.count(params) == total == 53_786_240
    flat = tree.flatten(params)
    assert flat["input/kernel"].shape == (7, 7, 3, 256) and flat["output/kernel"].shape == (1, 1, 2048, 8192)
    assert flat["group_2/block_1/id_path/kernel"].shape == (1, 1, 256, 512)
    assert flat["group_4/block_2/res_1/kernel"].shape == (3, 3, 2048, 512)
    assert len(flat) == 2 * (2 + 8 * 4 + 3)


@pytest.mark.parametrize(
    "size, patch, grid", [((112, 112), 8, (14, 14)), ((224, 224), 16, (14, 14)), ((224, 112), 16, (14, 7))]
)
def test_a_code_for_every_patch(size, patch, grid):
    model = DalleEncoder((14, 14), MEAN, STD, patch)  # whatever the grid of the images
    images, pixels = jnp.zeros((2, *size, 3)), jnp.zeros((2, 8 * grid[0], 8 * grid[1], 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    codes = jax.eval_shape(model.apply, params, images)
    assert codes.shape == (2, grid[0] * grid[1]) and codes.dtype == jnp.int32
    assert jax.eval_shape(lambda x: model.apply({}, x, method="pixels"), images).shape == pixels.shape
    logits = jax.eval_shape(lambda p, x: model.apply(p, x, method="logits"), params, pixels)
    assert logits.shape == (2, *grid, 8192) and logits.dtype == jnp.float32


def numpy_conv(x, layer):
    kernel = np.float64(layer["kernel"])
    size, (b, h, w, _) = kernel.shape[0], x.shape
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    y = np.zeros((b, h, w, kernel.shape[-1])) + layer["bias"]
    for i, j in np.ndindex(size, size):
        y += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return y


def numpy_logits(params, x):
    relu = lambda x: np.maximum(x, 0)
    x = numpy_conv(np.float64(x), params["input"])
    for g in (1, 2, 3, 4):
        for block in (params[f"group_{g}"]["block_1"], params[f"group_{g}"]["block_2"]):
            kept, y = numpy_conv(x, block["id_path"]) if "id_path" in block else x, x
            for i in (1, 2, 3, 4):
                y = numpy_conv(relu(y), block[f"res_{i}"])
            x = kept + y / 64
        if g < 4:
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    return numpy_conv(relu(x), params["output"])


def test_logits_and_codes_are_numpys():
    model, params = DalleEncoder((2, 3), patch=8, **TINY), random_params(**TINY)
    pixels = RNG.uniform(0.1, 0.9, (2, 16, 24, 3)).astype(np.float32)
    want = numpy_logits(params, pixels)
    found = jit(lambda p, x: model.apply({"params": p}, x, method="logits"))(params, pixels)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    images = ((pixels - 0.1) / 0.8 - MEAN) / STD  # patches of 8 px: nothing is resized
    codes = jit(lambda p, x: model.apply({"params": p}, x))(params, np.float32(images))
    np.testing.assert_array_equal(codes, want.argmax(-1).reshape(2, 6))
    assert len(np.unique(codes)) > 2


def test_bfloat16_multiplies_and_sums_stay_float32():
    options, pixels = dict(TINY, width=16, classes=64), RNG.uniform(0.1, 0.9, (2, 16, 24, 3)).astype(np.float32)
    params = random_params(**options)
    logits = lambda dtype: DalleEncoder((2, 3), **options, dtype=dtype).apply({"params": params}, pixels, method="logits")
    want, found = (np.asarray(jit(logits, static_argnums=0)(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert found.dtype == np.float32 and (jnp.asarray(found).astype(jnp.bfloat16) != found).mean() > 0.9
    assert 0 < np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)


def test_pixels_are_those_of_pil():
    """Un-normalised, Lanczos along rows and then columns, each kept in [0, 1], then .8x + .1; PIL rounds to bytes too."""
    tile = np.kron(RNG.integers(0, 2, (6, 8, 3)), np.ones((8, 8, 1))) * 255  # edges: Lanczos overshoots
    tile[:24] = RNG.integers(0, 256, (24, 64, 3))
    small = Image.fromarray(tile.astype(np.uint8)).resize((32, 24), Image.Resampling.LANCZOS)
    model = DalleEncoder((3, 4), **TINY)
    normalised = np.float32((tile / 255 - MEAN) / STD)[None]
    found = np.asarray(jit(lambda x: model.apply({}, x, method="pixels"))(normalised))
    assert found.shape == (1, 24, 32, 3)
    np.testing.assert_allclose(found[0], 0.8 * np.asarray(small) / 255 + 0.1, rtol=0, atol=0.8 * 1.5 / 255)
    assert found.min() == pytest.approx(0.1, abs=1e-6) and found.max() == pytest.approx(0.9, abs=1e-6)


def test_images_without_codes_are_refused():
    model = DalleEncoder((1, 1), **TINY)
    with pytest.raises(ConfigError, match="channels=1"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    with pytest.raises(ConfigError, match="16x24.*16"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)))
    with pytest.raises(ConfigError, match=r"data.mean=\(0.5,\)"):
        DalleEncoder((1, 1), mean=(0.5,), std=(0.25,))
    with pytest.raises(ConfigError, match="width=6"):
        DalleEncoder((1, 1), MEAN, STD, width=6)


def test_every_code_has_its_colour():
    picture = DalleEncoder((64, 128), MEAN, STD, patch=2).paint(jnp.arange(8192)[None])
    assert picture.shape == (1, 128, 256, 3)
    colours = np.asarray(picture)[0] * STD + MEAN
    flat = colours[::2, ::2].reshape(-1, 3)  # row by row
    np.testing.assert_array_equal(colours, np.kron(flat.reshape(64, 128, 3), np.ones((2, 2, 1))))
    assert flat.min() > -1e-6 and flat.max() < 1 + 1e-6
    assert len(np.unique(np.round(flat * 255), axis=0)) == 8192  # apart in a PNG too
    assert np.linalg.norm(np.diff(flat, axis=0), axis=1).min() > 0.3  # neighbours are told apart by eye
    eighths = np.histogramdd(flat, (2, 2, 2), [(-0.01, 1.01)] * 3)[0]
    np.testing.assert_allclose(eighths, 1024, rtol=0.05)  # no part of the cube is empty
    window = DalleEncoder((64, 128), MEAN, STD, patch=2).paint(jnp.arange(6)[None], (2, 3))
    np.testing.assert_array_equal(window[0, ::2, ::2].reshape(6, 3), picture[0, 0, :12:2])


def test_flops_are_the_compilers():
    options = dict(grid=(3, 5), mean=MEAN, std=STD, width=32, classes=512)
    model, params = DalleEncoder(**options), shapes(**options)
    pixels = jax.ShapeDtypeStruct((1, 24, 40, 3), jnp.float32)
    lowered = jax.jit(lambda p, x: model.apply({"params": p}, x, method="logits")).lower(params, pixels)
    assert lowered.cost_analysis()["flops"] == pytest.approx(model.flops(), rel=0.02)  # it counts ReLUs and sums too


# the converter


def released_shapes(width, classes):
    """{released name: shape}, in the order of the network."""
    found = {}

    def conv(name, size, width_in, width_out):
        found[name + ".w"], found[name + ".b"] = (width_out, width_in, size, size), (width_out,)

    conv("blocks.input", 7, 3, width)
    width_in = width
    for g, width_out in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
        for b in (1, 2):
            name, hidden = f"blocks.group_{g}.block_{b}", width_out // 4
            if width_in != width_out:
                conv(f"{name}.id_path", 1, width_in, width_out)
            conv(f"{name}.res_path.conv_1", 3, width_in, hidden)
            conv(f"{name}.res_path.conv_2", 3, hidden, hidden)
            conv(f"{name}.res_path.conv_3", 3, hidden, hidden)
            conv(f"{name}.res_path.conv_4", 1, hidden, width_out)
            width_in = width_out
    conv("blocks.output.conv", 1, width_in, classes)
    return found


@pytest.fixture
def released():
    return {name: RNG.normal(size=s).astype(np.float32) for name, s in released_shapes(4, 11).items()}


@pytest.mark.parametrize("prefix", ["", "encoder.", "tokenizer.encoder."])
def test_released_weights_come_in_and_go_out_unchanged(tmp_path, released, prefix):
    path = tmp_path / "encoder.npz"
    np.savez(path, **{prefix + name: array for name, array in released.items()})
    params = dalle_weights.dalle_params(path, width=4, classes=11)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes(**TINY))
    back = names.to_released_state(tree.flatten(params), names.DALLE_RULES)
    assert back.keys() == released.keys()
    for name, array in released.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    kernel = released["blocks.group_3.block_2.res_path.conv_1.w"]
    for o, i, k, l in ((0, 0, 0, 0), (3, 15, 1, 2), (2, 7, 2, 0)):
        assert params["group_3"]["block_2"]["res_1"]["kernel"][k, l, i, o] == kernel[o, i, k, l]
    np.testing.assert_array_equal(params["group_2"]["block_1"]["id_path"]["bias"], released["blocks.group_2.block_1.id_path.b"])


def test_the_released_size_has_the_released_names():
    wanted = dalle_weights.released_shapes(256, 8192)
    assert {name: shape for name, (shape, _) in wanted.items()} == released_shapes(256, 8192)
    assert sorted(path for _, path in wanted.values()) == sorted(tree.flatten(shapes()))


def test_half_precision_becomes_float32(tmp_path, released):
    np.savez(tmp_path / "half.npz", **{name: array.astype(np.float16) for name, array in released.items()})
    params = dalle_weights.dalle_params(tmp_path / "half.npz", width=4, classes=11)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("blocks.group_2.block_1.id_path.w"),
            r"has no 'blocks.group_2.block_1.id_path.w' of shape \(8, 4, 1, 1\)",
        ),
        (lambda s: s.pop("blocks.input.w"), r"has no 'blocks.input.w' of shape \(4, 3, 7, 7\)"),
        (
            lambda s: s.update({"blocks.output.conv.b": np.zeros(12)}),
            r"width 4 with 11 classes: 'blocks.output.conv.b' has shape "
            r"\(12,\) instead of \(11,\)",
        ),
        (lambda s: s.update({"blocks.input.w": np.zeros((7, 7, 3, 4))}), r"\(7, 7, 3, 4\) instead of \(4, 3, 7, 7\)"),
        (lambda s: s.update({"decoder.w": np.zeros(2)}), r"'decoder.w' of shape \(2,\) is no part"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, released, change, message):
    change(released)
    np.savez(tmp_path / "encoder.npz", **released)
    with pytest.raises(ConfigError, match=f"encoder.npz' is not DALL-E's encoder.*{message}"):
        dalle_weights.dalle_params(tmp_path / "encoder.npz", width=4, classes=11)

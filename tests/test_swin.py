"""The sparse Swin = the dense one = attention over all tokens under a mask, written out; hidden units change nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models.relative_bias import bias_matrix
from mim_jax.models.swin import Merge, Swin
from mim_jax.models.window_layout import WindowLayout
from mim_jax.tokens import patchify, unpatchify, visible
from mim_jax.tree import flatten, nest

BATCH, PATCH = 2, 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """Units of an image, depths of the stages, window; and by how much the shifted windows of each stage must shift."""

    units: tuple[int, int]
    depths: tuple[int, ...]
    window: int
    shifts: tuple[tuple[int, int], ...]

    def swin(self, **options) -> Swin:
        side = 2 ** (len(self.depths) - 1)
        grid = (self.units[0] * side, self.units[1] * side)
        return Swin(
            grid=grid,
            patch=PATCH,
            width=8,
            depths=self.depths,
            heads=(1, 2, 2, 4)[: len(self.depths)],
            window=self.window,
            **options,
        )


SHAPES = {
    "four stages, window 4": Shape((2, 2), (2, 1, 2, 1), 4, ((2, 2), (2, 2), (0, 0), (0, 0))),
    "wide image, window 3": Shape((3, 6), (2, 2), 3, ((1, 1), (0, 1))),
    "tall image, window 6 cut to its width": Shape((6, 2), (2, 1), 6, ((3, 0), (0, 0))),
}


def pictures(swin, seed=0):
    size = [g * PATCH for g in swin.grid]
    return jax.random.normal(jax.random.key(seed), (BATCH, *size, 3))


def parameters(swin, images):
    """Every parameter random: the bias tables start near zero, and zeros hide mistakes."""
    shapes = jax.eval_shape(lambda: swin.init(jax.random.key(0), images))["params"]
    rng = np.random.default_rng(0)
    return nest({path: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype) for path, s in flatten(shapes).items()})


def random_masks(n: int, kept: int, seed=0):
    """-> hidden [b n], every row another."""
    rng = np.random.default_rng(seed)
    hidden = np.ones((BATCH, n), bool)
    for row in hidden:
        row[rng.permutation(n)[:kept]] = False
    assert (hidden[0] != hidden[1]).any()
    return jnp.asarray(hidden)


# the reference: all tokens of the grid, one dense attention


def norm(x, p, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def pairs(grid, window, shifted):
    """-> bool [n n]: whether two places share a window that begins at -shift; int [n n]: their row of the bias table."""
    rows, columns = np.meshgrid(*map(np.arange, grid), indexing="ij")
    together, index = np.ones((grid[0] * grid[1],) * 2, bool), 0
    for place, g in zip((rows.ravel(), columns.ravel()), grid):
        w = min(window, g)
        number = (place - (w // 2 if shifted and g > w else 0)) // w  # floor: the first window may be a part
        together &= number[:, None] == number[None]
        offset = np.clip(place[:, None] - place[None], 1 - w, w - 1)
        index = index * (2 * w - 1) + offset + w - 1
    return together, index


def reference(swin: Swin, params, images, hidden):
    """hidden [b n] -> [b n d'] of every stage after its merging, unit by unit, and of the final norm."""
    b, grid = images.shape[0], swin.grid
    x = norm(linear(patchify(images, swin.patch), params["patch_embed"]), params["patch_norm"])
    taps = []
    for i, depth in enumerate(swin.depths):
        side = swin.side >> i
        shown = jnp.repeat(jnp.repeat(~hidden.reshape(b, *swin.units), side, 1), side, 2).reshape(b, 1, 1, -1)
        p = params[f"stage_{i}"]
        x = x.reshape(b, grid[0] * grid[1], -1)
        for j in range(depth):
            block = p[f"block_{j:02d}"]
            together, index = pairs(grid, swin.window, shifted=j % 2 == 1)
            heads = swin.heads[i]
            split = lambda t, heads=heads: t.reshape(b, -1, heads, t.shape[-1] // heads).swapaxes(1, 2)
            q, k, v = map(split, jnp.split(linear(norm(x, block["norm1"]), block["attn"]["qkv"]), 3, -1))
            logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + block["attn"]["relative_bias"][index].transpose(2, 0, 1)
            weights = jax.nn.softmax(jnp.where(together & shown, logits, -1e9))
            x = x + linear((weights @ v).swapaxes(1, 2).reshape(x.shape), block["attn"]["proj"])
            h = linear(norm(x, block["norm2"]), block["mlp"]["fc1"])
            x = x + linear(h * 0.5 * (1 + jax.scipy.special.erf(h / np.sqrt(2))), block["mlp"]["fc2"])
        x = x.reshape(b, *grid, -1)
        if i < len(swin.depths) - 1:
            x = jnp.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = linear(norm(x, p["merge"]["norm"]), p["merge"]["reduction"])
            grid = grid[0] // 2, grid[1] // 2
        s = grid[0] // swin.units[0]
        units = x.reshape(b, swin.units[0], s, swin.units[1], s, -1).swapaxes(2, 3)
        taps.append(units.reshape(b, swin.units[0] * swin.units[1], s * s, -1))
    return [*taps, norm(taps[-1], params["norm"])]


def shown_only(outputs, hidden, kept: int):
    """[b n s d] -> [b k s d]: those of the visible units, in order."""
    ids = jnp.argsort(hidden, axis=1, stable=True)[:, :kept]
    return [jnp.take_along_axis(x, ids[..., None, None], 1) for x in outputs]


def cotangent(x, k):
    """A fixed weight for every entry, by its image, unit and channel."""
    return jnp.sin(jnp.arange(x.size).reshape(x.shape) * 0.7 + k)


def look(run):
    """run(params, images, hidden) -> outputs; -> a compiled function to {name: output or gradient}."""

    def loss(params, images, hidden):
        outputs = run(params, images, hidden)
        return sum((x * cotangent(x, k)).sum() for k, x in enumerate(outputs)), outputs

    @jax.jit
    def looked(params, images, hidden):
        (_, outputs), (p, x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, images, hidden)
        found = {f"output {k}": x for k, x in enumerate(outputs)}
        return {**found, **{f"d {path}": g for path, g in flatten(p).items()}, "d images": x}

    return lambda *args: jax.tree.map(np.asarray, looked(*args))


class Case:
    """A shape, its parameters, and one compiled function per way to compute it."""

    def __init__(self, shape: Shape):
        self.shape, self.swin = shape, shape.swin()
        self.images = pictures(self.swin)
        self.params = parameters(self.swin, self.images)
        self.units = shape.units[0] * shape.units[1]
        self.kept = max(2, self.units // 3)
        self.hidden = random_masks(self.units, self.kept)
        self.nothing = jnp.zeros((BATCH, self.units), bool)
        self.taps = tuple(range(len(shape.depths)))
        self.sparse = self.visible_only(self.swin, self.kept)

    def by_unit(self, outputs, units):
        return [x.reshape(BATCH, units, -1, x.shape[-1]) for x in outputs]

    def visible_only(self, swin, kept):
        def run(params, images, hidden):
            which = visible(hidden, kept)
            top, tapped = swin.apply({"params": params}, images, which, self.taps, method="encode_visible")
            return self.by_unit([*tapped, top], kept)

        return look(run)

    def everything(self):
        def run(params, images, hidden):
            encode = lambda m, x: m.encode(m.embed(x), self.taps)
            top, tapped = self.swin.apply({"params": params}, images, method=encode)
            return self.by_unit([*tapped, top], self.units)

        return look(run)

    def written_out(self, kept):
        return look(lambda params, images, hidden: shown_only(reference(self.swin, params, images, hidden), hidden, kept))


@pytest.fixture(scope="module", params=SHAPES)
def case(request):
    return Case(SHAPES[request.param])


def same(found, expected):
    """Outputs to 5e-6 and gradients, which cancel more, to 1e-4 of their tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert np.isfinite(want).all() and np.abs(want).max() > 0, name
        tol = 5e-6 if name.startswith("output") else 1e-4
        np.testing.assert_allclose(found[name], want, rtol=0, atol=tol * np.abs(want).max(), err_msg=name)


def test_the_cases_shift_where_they_say(case):
    for i, shift in enumerate(case.shape.shifts):
        layout = WindowLayout.of(case.swin.units, case.swin.side >> i, case.swin.window, shifted=True)
        assert layout.shift == shift


def test_nothing_hidden_is_the_dense_swin(case):
    dense = case.everything()(case.params, case.images, case.nothing)
    same(case.visible_only(case.swin, case.units)(case.params, case.images, case.nothing), dense)
    same(case.written_out(case.units)(case.params, case.images, case.nothing), dense)


def test_hidden_units_are_masked_attention(case):
    sparse = case.sparse(case.params, case.images, case.hidden)
    same(case.visible_only(case.swin.clone(sparse=False), case.kept)(case.params, case.images, case.hidden), sparse)
    same(case.written_out(case.kept)(case.params, case.images, case.hidden), sparse)


def with_units(swin, images, where, value):
    """The images with the units at `where` [b n] replaced."""
    units = np.array(patchify(images, swin.unit))
    where = np.asarray(where).reshape(BATCH, *swin.units)
    units[where] = value[where] if np.ndim(value) else value
    return unpatchify(jnp.asarray(units), swin.unit)


def test_hidden_units_change_nothing_at_all(case):
    """Outputs and the gradients of all parameters, bit for bit; at hidden pixels the gradient is 0."""
    want = case.sparse(case.params, case.images, case.hidden)
    other = np.asarray(patchify(pictures(case.swin, seed=7), case.swin.unit))
    for value in (1e30, np.nan, other):
        images = with_units(case.swin, case.images, case.hidden, value)
        found = case.sparse(case.params, images, case.hidden)
        for name in want:
            np.testing.assert_array_equal(found[name], want[name], err_msg=name)
    size = np.abs(np.asarray(patchify(want["d images"], case.swin.unit))).sum(-1).reshape(BATCH, -1)
    assert (size[case.hidden] == 0).all() and (size[~case.hidden] > 0).all()


def test_images_do_not_see_each_other(case):
    want = case.sparse(case.params, case.images, case.hidden)
    found = case.sparse(case.params, case.images.at[1].set(1e3), case.hidden)
    for name in (name for name in want if name.startswith("output")):
        np.testing.assert_array_equal(found[name][0], want[name][0])
        assert (found[name][1] != want[name][1]).any()


@pytest.fixture(scope="module")
def main_case():
    return Case(SHAPES["four stages, window 4"])


def test_recomputation_changes_no_gradient(main_case):
    c = main_case
    same(c.visible_only(c.swin.clone(remat=True), c.kept)(c.params, c.images, c.hidden), c.sparse(c.params, c.images, c.hidden))


def test_bfloat16_is_close(main_case):
    c = main_case
    found = c.visible_only(c.swin.clone(dtype=jnp.bfloat16), c.kept)(c.params, c.images, c.hidden)
    want = c.sparse(c.params, c.images, c.hidden)
    for name, x in want.items():
        assert np.isfinite(np.float32(found[name])).all(), name
        if name.startswith("output"):
            assert found[name].dtype == jnp.bfloat16
            error = np.linalg.norm(np.float32(found[name]) - x) / np.linalg.norm(x)
            assert 0 < error < 0.05, (name, error)
        else:
            assert found[name].dtype == np.float32, name


def test_training_mode_drops_branches(main_case):
    c = main_case
    swin = c.swin.clone(drop_path=0.5)
    run = jax.jit(lambda key, train: swin.apply({"params": c.params}, c.images, train, rngs={"dropout": key}), static_argnums=1)
    first, again, other = (np.asarray(run(jax.random.key(k), True)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


# merging


def test_merging_takes_four_neighbours_column_by_column():
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4, 3)).astype(np.float32)
    four = np.stack([x[..., i::2, j::2, :] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -2).reshape(1, 2, 2, 2, 12)
    four = (four - four.mean(-1, keepdims=True)) / np.sqrt(four.var(-1, keepdims=True) + 1e-6)
    merge = Merge()
    for start in (0, 6):
        params = {
            "norm": {"scale": jnp.ones(12), "bias": jnp.zeros(12)},
            "reduction": {"kernel": jnp.eye(12)[:, start : start + 6]},
        }
        found = merge.apply({"params": params}, x)
        np.testing.assert_allclose(found, four[..., start : start + 6], atol=1e-5)


# windows


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # slices; products with ones and zeros
@pytest.mark.parametrize("window", [(4, 4), (2, 3), (3, 1), (1, 1), (5, 2)])
def test_the_bias_matrix_is_a_gather_by_offset(window, platform):
    r, c = window
    table = jax.random.normal(jax.random.key(0), ((2 * r - 1) * (2 * c - 1), 3))
    with platforms.compiled_for(mesh_of(platform)):
        found = np.asarray(bias_matrix(table, window))
    assert found.shape == (3, r * c, r * c)
    places = list(itertools.product(range(r), range(c)))
    for (q, (qr, qc)), (k, (kr, kc)) in itertools.product(enumerate(places), repeat=2):
        row = (qr - kr + r - 1) * (2 * c - 1) + qc - kc + c - 1
        np.testing.assert_array_equal(found[:, q, k], table[row])


LAYOUTS = [
    ((2, 2), 8, 4, True),
    ((3, 6), 2, 3, True),
    ((3, 6), 1, 3, True),
    ((6, 2), 2, 6, True),
    ((2, 4), 2, 4, False),
    ((4, 6), 1, 2, True),
    ((7, 7), 1, 7, True),
    ((3, 5), 2, 2, True),
]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # copies; products with ones and zeros
@pytest.mark.parametrize("arguments", LAYOUTS)
def test_windows_are_cut_where_they_stand_and_joined_again(arguments, platform):
    with platforms.compiled_for(mesh_of(platform)):
        check_windows(WindowLayout.of(*arguments))


def check_windows(layout):
    (rows, columns), (h, w), (dy, dx) = layout.grid, layout.window, layout.shift
    # every token carries its row and column; units one after the other
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    s = layout.side
    units = place.reshape(layout.units[0], s, layout.units[1], s, 2).swapaxes(1, 2).reshape(1, -1, s, s, 2)
    units = jnp.asarray(units, jnp.bfloat16)
    assert layout.picks(units) == (platforms.current() == "tpu")
    cut = layout.cut(units)
    windows = [(y, x) for y in range(rows // h) for x in range(columns // w)]
    assert cut.shape == (1, len(windows), h * w, 2)
    for m, (y, x) in enumerate(windows):
        want = [((y * h + i + dy) % rows, (x * w + j + dx) % columns) for i in range(h) for j in range(w)]
        assert [tuple(p) for p in cut[0, m]] == want
    np.testing.assert_array_equal(layout.join(cut), units)
    group = 2 - len(windows) % 2
    grouped = layout.cut(units, group)
    np.testing.assert_array_equal(grouped, cut.reshape(1, len(windows) // group, -1, 2))
    np.testing.assert_array_equal(layout.join(grouped), units)


def test_large_grids_are_cut_by_copies_on_a_tpu_too():
    with platforms.compiled_for(mesh_of("tpu")):
        of = lambda side, dtype: WindowLayout.of((7, 7), side, 7, shifted=True).picks(jnp.zeros((), dtype))
        assert of(4, jnp.bfloat16) and not of(8, jnp.bfloat16) and not of(4, bool)


@pytest.mark.parametrize("arguments", LAYOUTS)
def test_pairs_across_the_border_are_apart(arguments):
    layout = WindowLayout.of(*arguments)
    apart, (rows, columns), (h, w), (dy, dx) = layout.apart(), layout.grid, layout.window, layout.shift
    if not dy and not dx:
        assert apart is None
        return
    assert apart.shape == (rows // h * (columns // w), h * w, h * w) and apart.any()
    for m, (y, x) in enumerate(itertools.product(range(rows // h), range(columns // w))):
        # beyond the border, a row that was rolled in from the other side has left the image
        beyond = [(y * h + i + dy >= rows, x * w + j + dx >= columns) for i in range(h) for j in range(w)]
        want = [[a != b for b in beyond] for a in beyond]
        np.testing.assert_array_equal(apart[m], want)


@pytest.mark.parametrize("units, side, window", [((7, 7), 1, 7), ((2, 2), 2, 7), ((1, 3), 1, 14), ((7, 7), 2, 14)])
def test_a_grid_no_larger_than_the_window_is_one_window(units, side, window):
    layout = WindowLayout.of(units, side, window, shifted=True)
    assert layout.window == layout.grid and layout.shift == (0, 0) and layout.apart() is None


@pytest.mark.parametrize("window, windows, shifts", [(7, (7, 7, 7, 7), (3, 3, 3, 0)), (14, (14, 14, 14, 7), (7, 7, 0, 0))])
def test_windows_of_the_published_models_at_224_px(window, windows, shifts):
    layouts = [WindowLayout.of((7, 7), 8 >> i, window, shifted=True) for i in range(4)]
    assert [layout.grid[0] for layout in layouts] == [56, 28, 14, 7]
    assert [layout.window for layout in layouts] == [(w, w) for w in windows]
    assert [layout.shift for layout in layouts] == [(s, s) for s in shifts]
    assert all(WindowLayout.of((7, 7), 8 >> i, window, shifted=False).shift == (0, 0) for i in range(4))


def test_windows_that_do_not_tile_are_refused():
    with pytest.raises(ConfigError, match="5x5.*56x56"):
        WindowLayout.of((7, 7), 8, 5, shifted=False)

"""What models/encoder.py promises, of every family; and a family of convolutions that writes no more than it must."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from small_conv import SmallConv

from mim_jax.assemble.encoders import ENCODERS
from mim_jax.config import ConfigDict, ConfigError, load
from mim_jax.convert.writing.export import export
from mim_jax.jobs.run import run
from mim_jax.models.codebook import Tokenizer
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.models.vitdet import ViTDet
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.classify import Classify
from mim_jax.objectives.localmim import LocalMIM
from mim_jax.objectives.lomar import LoMaR
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.maskfeat import MaskFeat
from mim_jax.objectives.probe import Probe
from mim_jax.objectives.simmim import SimMIM
from mim_jax.runs import saved
from mim_jax.runs.stopping import Stopping
from mim_jax.tree import flatten

REPO = pathlib.Path(__file__).resolve().parent.parent
SIZES = dict(channels=2, width=8)
MADE = {
    "vit": ViT((4, 6), patch=4, depth=3, heads=2, position="absolute", **SIZES),
    "swin": Swin((8, 12), patch=2, depths=(2, 1), heads=(1, 2), window=2, **SIZES),
    "tokenizer": Tokenizer((4, 6), patch=4, depth=3, quantiser_levels=(4, 4), **SIZES),
    "vitdet": ViTDet((4, 6), patch=4, depth=3, heads=2, window=3, global_blocks=(2,), table=(2, 2), **SIZES),
    "small_conv": SmallConv((4, 6), patch=4, depth=2, **SIZES),
}
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 24, 2))


def started(made, *inputs):
    variables = jit(made.init)(jax.random.key(1), *inputs)
    draw = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    return jax.tree.map(draw, variables)


@pytest.mark.parametrize("kind", MADE)
def test_shapes_are_what_an_encoder_says(kind):
    e = MADE[kind]
    assert e.kind == kind and e.image_size == (16, 24) and e.units == (16 // e.unit, 24 // e.unit)
    taps = tuple(range(e.levels))
    found = jax.eval_shape(lambda: e.bind(e.init(jax.random.key(0), IMAGES)).encode_tapped(IMAGES, taps))
    width, tapped = found[0].shape[-1], found[1]
    assert (width, len(tapped)) == (e.tap_shape(e.levels - 1)[1], e.levels)
    maps = jax.eval_shape(lambda: e.bind(e.init(jax.random.key(0), IMAGES)).maps(IMAGES, taps))
    for tap, tokens, grid in zip(taps, tapped, maps, strict=True):
        side, width = e.tap_shape(tap)
        assert grid.shape == (2, 16 // side, 24 // side, width)
        assert tokens.shape == (2, int(e.has_cls) + grid.shape[1] * grid.shape[2], width)
    assert e.pools == (("mean", "cls") if kind == "vit" else ("mean",))
    assert e.flops() > 0


@pytest.mark.parametrize("kind", MADE)
def test_maps_lie_as_the_image_does(kind):
    """A change in one corner of the image changes the map most in that corner."""
    e = MADE[kind]
    variables = started(e, IMAGES)
    apply = jit(lambda images: e.apply(variables, images, (0,), method="maps")[0])
    for rows, columns in ((slice(0, 4), slice(20, 24)), (slice(12, 16), slice(0, 4))):
        change = np.abs(apply(IMAGES.at[:, rows, columns].add(1.0)) - apply(IMAGES)).mean((0, 3))
        side, _ = e.tap_shape(0)
        inside = change[rows.start // side : rows.stop // side, columns.start // side : columns.stop // side]
        assert inside.min() > 0 and inside.max() == change.max()


@pytest.mark.parametrize("kind", ["tokenizer", "small_conv"])
def test_the_last_tap_of_an_encoder_without_final_norm_is_what_it_returns(kind):
    e = MADE[kind]
    variables = started(e, IMAGES)
    top, tapped = e.apply(variables, IMAGES, tuple(range(e.levels)), method="encode_tapped")
    np.testing.assert_array_equal(top, tapped[-1])
    np.testing.assert_array_equal(top, e.apply(variables, IMAGES))
    assert np.abs(tapped[0] - tapped[1]).max() > 0.01


@pytest.mark.parametrize("kind", MADE)
def test_every_parameter_belongs_to_a_layer(kind):
    e = MADE[kind]
    paths = [f"encoder/{path}" for path in flatten(jax.eval_shape(lambda: e.init(jax.random.key(0), IMAGES))["params"])]
    layers = {path: e.layer_of(path) for path in [*paths, "head/kernel", "fc_norm/scale", "decoder/block_00/mlp/fc1/kernel"]}
    assert set(layers.values()) == set(range(e.layers + 2)) and layers["head/kernel"] == e.layers + 1
    assert layers["decoder/block_00/mlp/fc1/kernel"] == e.layers + 1, "decoders have no layers of their own"
    for path, layer in layers.items():
        if "painter" in path or "latent_head" in path:
            assert layer == e.layers + 1, path
        elif "patch_embed" in path or "stem/embed" in path:
            assert layer == 0, path


def test_what_an_encoder_has_not_is_refused_in_one_line():
    for kind in ("swin", "tokenizer", "small_conv"):
        with pytest.raises(ConfigError, match="cannot pool by 'cls'; use pool=mean"):
            MADE[kind].pool(jnp.zeros((1, 4, 8)), "cls")
    with pytest.raises(ConfigError, match="Tokenizer has no blocks to fine-tune"):
        MADE["tokenizer"].with_final_norm(False)
    assert not MADE["vit"].with_final_norm(False).final_norm and MADE["swin"].with_final_norm(True).final_norm
    refused = [
        (MAE(MADE["small_conv"]), "encoder.kind=small_conv .*MAE and LocalMIM"),
        (LocalMIM(MADE["small_conv"], taps=(0, 1), scales=(1, 1), decoder_width=8, decoder_heads=2), "MAE and LocalMIM"),
        (MAE(MADE["small_conv"], windows=2, window=3), "windows need a ViT: a SmallConv"),
        (LoMaR(MADE["swin"]), "lomar needs a ViT: a Swin"),
        (SimMIM(MADE["tokenizer"], mask_size=4), "encoder.kind=tokenizer .*SimMIM, MaskFeat and BEiT"),
        (MaskFeat(MADE["swin"]), "MaskFeat .* here for a ViT"),
    ]
    for made, words in refused:
        with pytest.raises(ConfigError, match=words):
            jax.eval_shape(lambda made=made: made.init(jax.random.key(0), made.example()))


@pytest.mark.parametrize(
    "kind, options",
    [
        (SimMIM, dict(mask_size=4)),
        (MaskFeat, dict(hog_cell=4, min_block=4)),
        (BEiT, dict(tokenizer=MADE["tokenizer"], min_block=4)),
        (Classify, dict(classes=3, pool="normed")),
        (Probe, dict(classes=3, pool="mean", taps=(0, 1), kinds=("linear", "attentive"), queries=2)),
    ],
)
def test_a_small_family_serves_every_method_with_mask_tokens_and_every_head(kind, options):
    made = kind(MADE["small_conv"], **options)
    variables = jit(made.init)(jax.random.key(0), made.example())
    inputs = {**made.example(), "images": IMAGES}

    def loss_fn(params):
        return made.apply({**variables, "params": params}, inputs, True, mutable=["batch_stats"])[0][0]

    loss, gradients = jit(jax.value_and_grad(loss_fn))(variables["params"])
    assert np.isfinite(loss) and made.flops() >= made.encoder.flops()
    moved = {path.split("/")[0] for path, g in flatten(gradients).items() if np.abs(g).max() > 0}
    assert "encoder" in moved or kind is Probe


def test_a_family_is_one_file_and_one_row(monkeypatch, tmp_path):
    """It trains, resumes, is probed and fine-tuned, gives features and is exported, with nothing else changed."""
    monkeypatch.setitem(ENCODERS, "small_conv", SmallConv)

    def toy(name, arguments="toy", encoder=None, **changes):
        config = load(f"{REPO}/configs/{name}.py:{arguments}")
        config.update(changes)
        if encoder:
            config.encoder = ConfigDict(encoder)
        return config

    def pretraining():
        config = toy("simmim_vitb", encoder=dict(kind="small_conv", patch=4, width=12, depth=2), total_steps=3)
        config.log.tensorboard = config.evals.nmi.on = False  # it has no attention
        return config

    workdir, others = str(tmp_path / "run"), iter(range(9))
    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "asked", lambda self, step: step == 2)
        with pytest.raises(SystemExit):
            run(pretraining(), workdir)
    results = run(pretraining(), workdir)
    assert results["steps"] == 3 and saved.open(workdir).step == 3 and results["knn/accuracy"] > 0

    def started(name, arguments="toy", **changes):
        return run(toy(name, arguments, init_from=workdir, **changes), str(tmp_path / f"{next(others)}"))

    assert 0 < started("linprobe", "toy,taps=0")["probe_tap0_test"] < 1
    assert "validation/top1" in started("linprobe", "toy,features=streamed")
    assert started("features", "toy,tap=0")["shape"][1] == 12
    with pytest.raises(ConfigError, match="drop_path=0.1: encoder.kind=small_conv"):
        started("finetune", "preset=sample,toy")
    assert "validation/top1" in started("finetune", "preset=sample,toy", drop_path=0.0)
    with pytest.raises(ConfigError, match="nothing reads: encoder.heads"):
        started("simmim_vitb", encoder=dict(kind="small_conv", patch=4, width=12, depth=2, heads=3))
    (file, card) = export(workdir, "npz", str(tmp_path / "conv.npz"))
    assert "encoder/block_01/kernel" in np.load(file).files and "simmim" in card.read_text()

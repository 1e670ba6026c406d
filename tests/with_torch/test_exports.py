"""What timm and transformers compute from an exported file is what this project computes, by the code on its card."""

import json
import pathlib
import re

import built
import jax
import numpy as np
import pytest
from jax import jit

from mim_jax import tree
from mim_jax.config import load
from mim_jax.convert.reading import weights_file
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_model import release
from mim_jax.convert.writing import export as export_lib

torch = pytest.importorskip("torch", reason="make test-torch has PyTorch's libraries")
pytestmark = pytest.mark.torch

REPO = pathlib.Path(__file__).resolve().parents[2]
CLASSES = 5
CLOSE = dict(rtol=0, atol=1e-5)


def model(spec: str, size=None, pool: str = "", **encoder):
    """-> the config of a run, its objective (a classifier with `pool`), random parameters without zeros and ones."""
    config = load(f"{REPO}/configs/{spec}")
    config.image_size = size or config.image_size
    if pool:
        config.update(dict(job="finetune", pool=pool))
    if pool and config.encoder.get("position") == "absolute":
        config.encoder.position = "learned"
    config.encoder.update(encoder)
    made = built.classifier(config, CLASSES) if pool else built.objective(config)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        return x * leaf.shape[0] ** -0.5 if path.endswith("kernel") else path.endswith("scale") + 0.2 * x

    return config, made, tree.map_named(draw, shapes)


def images_of(config, count: int = 2):
    return np.random.default_rng(1).normal(size=(count, *config.image_size, config.channels)).astype(np.float32)


def loaded(config, params, to: str, folder, monkeypatch, encoder_only: bool = False):
    """Exports to the folder and runs the code on the card there -> the model it makes."""
    out = folder / ("exported" if to == "hf" else "exported.safetensors")
    runs = [{"config": json.loads(json.dumps(config.to_dict())), "step": 1}]
    *_, card = export_lib.write(export_lib.places(to, str(out)), to, tree.flatten(params), runs, encoder_only)
    monkeypatch.chdir(folder)
    program = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", card.read_text(), re.S)), program)
    return program["model"]


def theirs(function, images, **options):
    with torch.inference_mode():
        found = function(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), **options)
    return found.numpy() if isinstance(found, torch.Tensor) else found


SIMMIM = dict(spec="simmim_vitb.py:toy", size=(24, 40))
PRETRAINED = {
    "mae": dict(spec="mae_vitb.py:toy", size=(24, 40)),
    "mae, scaled layers, no bias on keys": dict(spec="mae_vitb.py:toy", layer_scale=0.1, qkv_bias="qv"),
    "localmim": dict(spec="localmim_vitb.py:toy"),
    "simmim": SIMMIM,
    "simmim, a bias of each layer's own": dict(SIMMIM, position="layer_bias"),
    "simmim, a bias on keys": dict(SIMMIM, qkv_bias="all", layer_scale=0.0),
    "localmim swin": dict(spec="localmim_swinb.py:toy", size=(32, 64)),
    "simmim swin": dict(spec="simmim_swinb.py:toy"),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_features_are_those_of_timm(name, tmp_path, monkeypatch):
    config, made, params = model(**PRETRAINED[name])
    images, encoder = images_of(config), {"params": params["encoder"]}
    want = jit(made.encoder.apply)(encoder, images)
    other = loaded(config, params, "timm", tmp_path, monkeypatch)
    tokens = theirs(other.forward_features, images)
    np.testing.assert_allclose(tokens.reshape(want.shape), want, **CLOSE)
    pool = "cls" if made.encoder.has_cls else "mean"
    np.testing.assert_allclose(theirs(other, images), made.encoder.pool(want, pool), **CLOSE)


TUNED = {
    "mean": dict(spec="mae_vitb.py:toy", size=(24, 40), pool="mean"),
    "cls": dict(spec="mae_vitb.py:toy", pool="cls"),
    "mean, relative": dict(SIMMIM, pool="mean"),
    "normed": dict(spec="mae_vitb.py:toy", pool="normed"),
    "normed, relative": dict(SIMMIM, pool="normed"),
    "swin, normed": dict(spec="localmim_swinb.py:toy", pool="normed", norm_eps=1e-3),
    "cls, relative": dict(SIMMIM, pool="cls", position="layer_bias"),
    "swin": dict(spec="localmim_swinb.py:toy", pool="mean"),
    "swin, eps of its own": dict(spec="simmim_swinb.py:toy", pool="mean", norm_eps=1e-3, norm2_eps=1e-2),
}


@pytest.mark.parametrize("encoder_only", [False, True])
@pytest.mark.parametrize("name", TUNED)
def test_logits_are_those_of_timm(name, encoder_only, tmp_path, monkeypatch):
    """Without its head a classifier gives the features that the head would see."""
    compare_classifier(tmp_path, monkeypatch, encoder_only, **TUNED[name])


def compare_classifier(tmp_path, monkeypatch, encoder_only=False, count=2, **options):
    config, made, params = model(**options)
    images, method = images_of(config, count), "features" if encoder_only else "logits"
    want = jit(lambda p: made.apply({"params": p}, images, method=method))(params)
    if not encoder_only:
        (want,) = want.values()  # by head, and a fine-tuned classifier has one
    other = loaded(config, params, "timm", tmp_path, monkeypatch, encoder_only)
    np.testing.assert_allclose(theirs(other, images), want, **CLOSE)


@pytest.mark.parametrize("spec", ["mae_vitb.py", "localmim_swinb.py"])
def test_logits_of_full_size_are_those_of_timm(spec, tmp_path, monkeypatch):
    compare_classifier(tmp_path, monkeypatch, count=1, spec=spec, pool="mean")


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_is_that_of_transformers(norm_pix, tmp_path, monkeypatch):
    """The same hidden patches, the same predictions and loss; and the encoder alone the same tokens."""
    config, made, params = model("mae_vitb.py:toy")
    config.mae.norm_pix = norm_pix
    made = made.clone(norm_pix=norm_pix)
    images = images_of(config)
    masks = made.masks(jax.random.key(0), len(images))
    run = lambda p: (
        made.apply({"params": p}, dict(images=images, masks=masks)),
        made.apply({"params": p}, dict(images=images, masks=masks), method="predict")[0],
    )
    (loss, _), prediction = jit(run)(params)
    other = loaded(config, params, "hf", tmp_path, monkeypatch)
    found = theirs(other, images, noise=torch.from_numpy(np.asarray(masks.hidden, np.float32)))
    np.testing.assert_array_equal(found.mask.numpy(), masks.hidden)
    np.testing.assert_allclose(found.logits.numpy(), prediction, **CLOSE)
    np.testing.assert_allclose(found.loss.item(), loss, rtol=1e-5)


def test_mae_encoder_is_that_of_transformers(tmp_path, monkeypatch):
    config, made, params = model("mae_vitb.py:toy")
    images = images_of(config)
    want = jit(made.encoder.apply)({"params": params["encoder"]}, images)
    other = loaded(config, params, "hf", tmp_path, monkeypatch, encoder_only=True)
    other.config.mask_ratio = other.embeddings.config.mask_ratio = 0.0
    ordered = torch.arange(64.0).expand(2, -1)  # nothing hidden, nothing shuffled
    np.testing.assert_allclose(theirs(other, images, noise=ordered).last_hidden_state.numpy(), want, **CLOSE)


def test_other_readers_of_safetensors_see_the_same(tmp_path, monkeypatch):
    from safetensors import safe_open

    config, _, params = model("mae_vitb.py:toy")
    loaded(config, params, "timm", tmp_path, monkeypatch)
    with safe_open("exported.safetensors", "np") as file:
        assert file.metadata()["method"] == "mae" and file.metadata()["format"] == "pt"
        for name, x in weights_file.read("exported.safetensors").items():
            np.testing.assert_array_equal(file.get_tensor(name), x)


SMALL_VIT = dict(model_name="vit_tiny_patch16_224", img_size=(48, 80), depth=2)
SMALL_SWIN = dict(model_name="swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), embed_dim=24)
TIMM = {
    "cls": SMALL_VIT | dict(num_classes=5),
    "mean": SMALL_VIT | dict(num_classes=5, global_pool="avg", init_values=0.1),
    "mean after the norm": SMALL_VIT | dict(num_classes=5, global_pool="avg", fc_norm=False),
    "no head": SMALL_VIT | dict(num_classes=0),
    "swin": SMALL_SWIN | dict(num_classes=5),
    "swin, no head": SMALL_SWIN | dict(num_classes=0),
    "swin, window 12": SMALL_SWIN | dict(num_classes=5, window_size=12, img_size=384),
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm_compute_the_same_here(name):
    import timm

    torch.manual_seed(0)
    other = timm.create_model(**TIMM[name]).eval()
    state = {key: x.numpy() for key, x in other.state_dict().items()}
    rng = np.random.default_rng(0)
    state = {key: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32) for key, x in state.items()}  # no zeros, no ones
    other.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()})
    half = (0.5,) * 3
    said = dict(size=None if "swin" in name else SMALL_VIT["img_size"], pool="normed" if "after" in name else "")
    found = release(state, Options("timm", mean=half, std=half, licence="mit", **said))
    made = built.classifier(found.config, CLASSES) if found.kind.pool else built.objective(found.config)
    params, images = tree.nest(found.params()), images_of(found.config, 1)
    if found.kind.pool:
        want = jit(lambda p, x: made.apply({"params": p}, x, method="logits")[""])(params, images)
        return np.testing.assert_allclose(theirs(other, images), want, **CLOSE)
    want = jit(made.encoder.apply)({"params": params["encoder"]}, images)
    np.testing.assert_allclose(theirs(other.forward_features, images).reshape(want.shape), want, **CLOSE)

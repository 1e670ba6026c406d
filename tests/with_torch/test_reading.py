"""Models of transformers and torchvision compute the same here: folders as they save them, and names as they are in memory."""

import json

import built
import numpy as np
import pytest
from jax import jit
from test_weight_formats import google_file

from mim_jax import tree
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_model import release
from mim_jax.jobs.import_weights import opened
from mim_jax.models.posembed import sincos_table

torch = pytest.importorskip("torch", reason="make test-torch has PyTorch's libraries")
pytestmark = pytest.mark.torch

CLOSE = dict(rtol=0, atol=2e-5)
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3, licence="mit")
VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
VIT |= dict(layer_norm_eps=1e-6)
MAE = VIT | dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_intermediate_size=128)
MAE |= dict(decoder_num_attention_heads=4, norm_pix_loss=True, mask_ratio=0.5)
SWIN = dict(embed_dim=12, depths=[1, 2, 1, 1], num_heads=[2, 2, 2, 4], window_size=4, image_size=128, patch_size=4)
BIAS = dict(VIT, layer_scale_init_value=0.1)
MODELS = {  # class: (its config's class, options)
    "ViTModel": ("ViTConfig", VIT),
    "ViTForImageClassification": ("ViTConfig", VIT | dict(num_labels=5)),
    "ViTMAEModel": ("ViTMAEConfig", MAE),
    "ViTMAEForPreTraining": ("ViTMAEConfig", MAE),
    "Dinov2Model": ("Dinov2Config", dict(VIT, mlp_ratio=2)),
    "BeitForMaskedImageModeling": ("BeitConfig", BIAS | dict(use_shared_relative_position_bias=True, use_mask_token=True)),
    "BeitModel": ("BeitConfig", BIAS | dict(use_relative_position_bias=True, use_mean_pooling=False)),
    "BeitForImageClassification": ("BeitConfig", BIAS | dict(use_relative_position_bias=True, num_labels=5)),
    "SwinModel": ("SwinConfig", SWIN),
    "SwinForImageClassification": ("SwinConfig", SWIN | dict(num_labels=5)),
    "SwinForMaskedImageModeling": ("SwinConfig", SWIN | dict(encoder_stride=32)),
}


def shaken(model):
    """The model with no parameter zero or one; fixed tables stay."""
    torch.manual_seed(0)
    with torch.no_grad():
        for x in (x for x in model.parameters() if x.requires_grad):
            x.add_(0.1 * torch.randn_like(x))
    return model.eval()


def compare(other, found):
    """Logits of a classifier, all tokens of an encoder; `other(images)` gives theirs."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, *found.config.image_size, 3)).astype(np.float32)
    with torch.inference_mode():
        theirs = other(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    params = tree.nest(found.params())
    if found.kind.pool:
        made = built.classifier(found.config, theirs.shape[-1])
        ours = jit(lambda p: made.apply({"params": p}, images, method="logits")[""])(params)
    else:
        ours = jit(built.encoder(found.config).apply)({"params": params["encoder"]}, images)
    np.testing.assert_allclose(theirs.reshape(ours.shape), ours, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_compute_the_same_here(name, tmp_path):
    import transformers

    kind, options = MODELS[name]
    other = shaken(getattr(transformers, name)(getattr(transformers, kind)(**options)))
    if name == "ViTMAEForPreTraining":  # a new one of transformers 5 has zeros there
        table = sincos_table(MAE["decoder_hidden_size"], (4, 4), cls=True)[None]
        other.decoder.decoder_pos_embed.copy_(torch.from_numpy(np.asarray(table)))
    other.save_pretrained(tmp_path / "folder")
    there = Options("hf", **HALF)
    state, chosen, told = opened(str(tmp_path / "folder"), there)
    found = release(state, told, chosen)
    in_memory = {key: x.numpy() for key, x in other.state_dict().items()}
    again = release(in_memory, told).params()
    for path, array in found.params().items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)
    if found.config.get("method") == "mae" and name == "ViTMAEForPreTraining":
        m = found.config.mae
        assert (m.decoder_width, m.decoder_depth, m.decoder_heads, m.mask_ratio, m.norm_pix) == (32, 1, 4, 0.5, True)
    assert found.config.encoder.heads == (3 if "Swin" not in name else (2, 2, 2, 4))
    top = getattr(other, other.base_model_prefix, other) if not found.kind.pool else other

    def run(x):
        if found.kind.pool:
            return top(x).logits
        ordered = dict(noise=torch.arange(16.0).expand(2, -1)) if "MAE" in name else {}
        if ordered:
            top.config.mask_ratio = top.embeddings.config.mask_ratio = 0.0
        hidden = top(x, **ordered).last_hidden_state
        return other.layernorm(hidden) if name == "BeitForMaskedImageModeling" else hidden

    compare(run, found)


def test_a_vit_of_torchvision_computes_the_same_here():
    from torchvision.models.vision_transformer import VisionTransformer

    other = shaken(VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5))
    state = {f"model.{key}": x.numpy() for key, x in other.state_dict().items()}
    compare(other, release(state, Options("timm", heads=3, **HALF)))


def test_googles_names_are_what_timm_reads(tmp_path):
    """The same file into timm's model, by timm, and into ours."""
    import timm

    other = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5).eval()
    np.savez(tmp_path / "google.npz", **google_file(depth=2, d=192, heads=3, places=10, classes=5))
    other.load_pretrained(str(tmp_path / "google.npz"))
    state, chosen, told = opened(str(tmp_path / "google.npz"), Options("google", licence="apache-2.0"))
    compare(other, release(state, told, chosen))


def test_shards_are_read_as_one_file(tmp_path):
    import transformers

    other = shaken(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state, chosen, told = opened(str(tmp_path), Options("hf", **HALF))
    want = release({key: x.numpy() for key, x in other.state_dict().items()}, told).params()
    found = release(state, told, chosen).params()
    assert found.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(found[path], array)

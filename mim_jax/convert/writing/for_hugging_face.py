"""Hugging Face's ViTMAE: names, tables and config.json."""

from mim_jax.config import ConfigError
from mim_jax.convert import tables
from mim_jax.convert.names import linear, norm
from mim_jax.convert.writing.written_model import ANY, ENCODER, Written, choose, released, split
from mim_jax.models.layers import LAYER_NORM_EPS


def hf_block(released_prefix: str, ours: str) -> tuple:
    """The rules of blocks in the names of Hugging Face's ViT: queries, keys and values apart."""
    return (
        *linear(released_prefix + r"attention\.attention\.(query|key|value)", ours + "attn/{}"),
        *linear(released_prefix + r"attention\.output\.dense", ours + "attn/proj"),
        *linear(released_prefix + r"intermediate\.dense", ours + "mlp/fc1"),
        *linear(released_prefix + r"output\.dense", ours + "mlp/fc2"),
        *norm(released_prefix + r"layernorm_before", ours + "norm1"),
        *norm(released_prefix + r"layernorm_after", ours + "norm2"),
    )


HF_RULES = (
    (r"^vit\.embeddings\.cls_token$", "encoder/cls_token", "same"),
    (r"^vit\.embeddings\.position_embeddings$", "encoder/pos_embed", "same"),
    *linear(r"^vit\.embeddings\.patch_embeddings\.projection", "encoder/patch_embed", "patch"),
    *hf_block(r"^vit\.encoder\.layer\.(\d+)\.", "encoder/block_{:02d}/"),
    *norm(r"^vit\.layernorm", "encoder/norm"),
    (r"^decoder\.mask_token$", "decoder/mask_token", "same"),
    (r"^decoder\.decoder_pos_embed$", "decoder/pos_embed", "same"),
    *linear(r"^decoder\.decoder_(embed|pred)", "decoder/{}"),
    *hf_block(r"^decoder\.decoder_layers\.(\d+)\.", "decoder/block_{:02d}/"),
    *norm(r"^decoder\.decoder_norm", "decoder/norm"),
)
HF_BICUBIC = 3


def hf(config, params: dict, encoder_only: bool = False) -> Written:
    """ViTMAEForPreTraining, or with `encoder_only` ViTMAEModel; `model` holds config.json and preprocessor_config.json."""
    e, m = config.encoder, config.get("mae")
    if config.job != "pretrain" or config.method != "mae" or e.kind == "swin":
        what = config.get("method", "") if config.job == "pretrain" else f"job={config.job}"
        raise ConfigError(f"--to=hf is for a ViT pretrained by MAE, and this is {what}; use --to=timm, or npz")
    height, width = config.image_size
    wrong = [f"{key}={value}" for key, value, has in (
        ("image_size", (height, width), (height, height)), ("encoder.position", e.position, "absolute"),
        ("encoder.layer_scale", e.layer_scale, 0.0), ("encoder.qkv_bias", e.qkv_bias, "all"), ("mae.windows", m.windows, 0),
    ) if value != has]  # fmt: skip
    if wrong:
        raise ConfigError(f"--to=hf: Hugging Face's ViTMAE has no {', '.join(wrong)}; {ANY}")
    if not encoder_only and "decoder/mask_token" not in params:
        raise ConfigError("--to=hf: these weights came without a decoder; add --encoder_only")
    taken, left = choose(params, ENCODER if encoder_only else "")
    taken = split(taken, "/qkv/", ("/query/", "/key/", "/value/"))
    fixed = tables.tables(config, ())
    taken["encoder/pos_embed"] = fixed["pos_embed"]
    if not encoder_only:
        taken["decoder/pos_embed"] = fixed["decoder_pos_embed"]
    settings = dict(
        architectures=["ViTMAEModel" if encoder_only else "ViTMAEForPreTraining"], model_type="vit_mae", dtype="float32",
        hidden_size=e.width, num_hidden_layers=e.depth, num_attention_heads=e.heads, qkv_bias=True,
        intermediate_size=round(e.width * e.mlp_ratio), hidden_act="gelu", layer_norm_eps=LAYER_NORM_EPS, image_size=height,
        patch_size=e.patch, num_channels=config.channels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.02, decoder_hidden_size=m.decoder_width,
        decoder_num_hidden_layers=m.decoder_depth, decoder_num_attention_heads=m.decoder_heads,
        decoder_intermediate_size=4 * m.decoder_width, mask_ratio=m.mask_ratio, norm_pix_loss=m.norm_pix,
    )  # fmt: skip
    d, ready = config.data, {}
    if d.normalise == "dataset" and config.channels == 3:  # images standardised one by one have no preprocessor there
        ready = dict(
            image_processor_type="ViTImageProcessor", do_resize=True, size=dict(height=height, width=width),
            resample=HF_BICUBIC, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(d.mean),
            image_std=list(d.std),
        )  # fmt: skip
    return Written(released(taken, HF_RULES, e.patch, "hf"), left, {"config": settings, "preprocessor": ready})

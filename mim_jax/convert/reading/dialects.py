"""Names of other libraries -> those of a format that is read here: Hugging Face's, torchvision's, OpenMMLab's and Google's.

A dialect is a list of substitutions on names, and what becomes of the few arrays that lie otherwise. Queries, keys and values
that stand apart are put together. What results is a state dict as timm, MAE, SimMIM or BEiT write one.
"""

import dataclasses
import re

import numpy as np

PASSING = r"^(?:vit|vit_mae|beit|swin|deit|dinov2|data2vec_vision)\."  # before the encoder's names in a model with a head
HUGGING_FACE = (
    (PASSING, ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),  # `layers` in memory since transformers 5
    (r"^encoder\.layers\.", "layers."),
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_\w+|mask_token)", r"\1"),
    (r"\.attention\.(?:attention|self)\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:attention\.)*(?:self\.)?(?:relative_position_bias\.)?(relative_position_(?:bias_table|index))$", r".attn.\1"),
    (r"^rel_pos_bias\.attn\.", "rel_pos_bias."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
OPEN_MMLAB = (  # of mmpretrain, and of mmsegmentation, whose attention is torch's own
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:ln|norm)([12])\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^(?:ln|norm)1\.", "norm."),
)
GOOGLE = (  # slashes are dots by now
    (r"^cls$", "cls_token"),
    (r"^embedding\.", "patch_embed.proj."),
    (r"^Transformer\.posembed_input\.pos_embedding$", "pos_embed"),
    (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
    (r"\.MultiHeadDotProductAttention_1\.(query|key|value)\.", r".attn.\1."),
    (r"\.MultiHeadDotProductAttention_1\.out\.", ".attn.proj."),
    (r"\.MlpBlock_3\.Dense_0\.", ".mlp.fc1."),
    (r"\.MlpBlock_3\.Dense_1\.", ".mlp.fc2."),
    (r"\.LayerNorm_0\.", ".norm1."),
    (r"\.LayerNorm_2\.", ".norm2."),
    (r"^Transformer\.encoder_norm\.", "norm."),
    (r"\.(?:kernel|scale)$", ".weight"),
)
# tensors that have no place here, by the names that the dialect gives them
POOLER = (r"^pooler\.dense\.", "of a pooler of its own, which no image task uses")
HEAD_BEHIND = (r"^(pre_logits|head)\.", "a head behind a hidden layer (pre_logits), which is not here")
MASKED = (r"^(mask_token|decoder\.0\..*)$", "of a SimMIM on a ViT with positions, which is not here")


@dataclasses.dataclass(frozen=True)
class Translated:
    """`state` has the names of a format of `sources`; `theirs`: {name there: how the file calls it}; `left`: as Kind.unused."""

    state: dict
    theirs: dict
    dialect: str = ""  # hf, google, torchvision, open_mmlab, or none: the names are a format's own
    sources: tuple = ()
    left: tuple = ()
    heads: int = 0


def translate(state: dict, mae: bool = False) -> Translated:
    """{name: array} of one model -> Translated; a state in no other library's names comes back as it is.

    `mae`: its encoder is MAE's, where the names do not tell (ViTMAEModel).
    """
    if any(re.search(r"(^|\.)patch_embeddings\.projection\.weight$", name) for name in state):
        found, theirs = fused(*renamed(state, HUGGING_FACE))
        return hugging_face(found, theirs, mae)
    if "conv_proj.weight" in state:
        return Translated(*renamed(state, TORCHVISION), "torchvision", ("timm",))
    if "patch_embed.projection.weight" in state:
        return Translated(*renamed(state, OPEN_MMLAB), "open_mmlab", ("timm",))
    if "embedding.kernel" in state:
        return google(state)
    return Translated(state, {})


def renamed(state: dict, substitutions) -> tuple[dict, dict]:
    found, theirs = {}, {}
    for name, array in state.items():
        new = name
        for pattern, words in substitutions:
            new = re.sub(pattern, words, new)
        found[new], theirs[new] = array, name
    return found, theirs


def fused(state: dict, theirs: dict) -> tuple[dict, dict]:
    """Queries, keys and values as one tensor; biases without one of the keys become q_bias and v_bias, as BEiT has them."""
    done, names = {}, {}
    for name, array in state.items():
        found = re.fullmatch(r"(.*\.attn\.)(query|key|value)\.(weight|bias)", name)
        parts = [f"{found[1]}{part}.{found[3]}" for part in ("query", "key", "value")] if found else []
        if parts and all(part in state for part in parts):
            new = f"{found[1]}qkv.{found[3]}"
            if new not in done:
                done[new] = np.concatenate([np.asarray(state[part]) for part in parts])
                names[new] = theirs[parts[0]].replace("query", "{query,key,value}").replace("q_proj", "{q,k,v}_proj")
        else:
            bias = found and found[3] == "bias" and found[2] != "key"
            new = f"{found[1]}{found[2][0]}_bias" if bias else name
            done[new], names[new] = array, theirs[name]
    return done, names


def hugging_face(state: dict, theirs: dict, mae: bool) -> Translated:
    """Which of its models it is: Swin's masked one has SimMIM's names below `encoder.`."""
    if "decoder_embed.weight" in state or mae:
        return Translated(state, theirs, "hf", ("mae",))
    if any("relative_position_bias_table" in name and name.startswith(("blocks", "rel_pos")) for name in state):
        return Translated(state, theirs, "hf", ("beit",))
    if any(name.startswith("layers.0.blocks.") for name in state):
        if "decoder.0.weight" not in state:
            return Translated(state, theirs, "hf", ("timm",), left=((r"^mask_token$", "without its decoder"),))
        below = lambda names: {name if name.startswith("decoder") else f"encoder.{name}": x for name, x in names.items()}
        return Translated(below(state), below(theirs), "hf", ("simmim",))
    return Translated(state, theirs, "hf", ("timm",), (POOLER, MASKED))


def google(state: dict) -> Translated:
    """Flax lays arrays out otherwise: [p p c d] of patches, [in out] of layers, with an axis of the heads."""
    names, theirs = renamed(state, GOOGLE)
    heads = next((x.shape[1] for name, x in names.items() if name.endswith("attn.query.weight") and x.ndim == 3), 0)
    laid = {}
    for name, array in names.items():
        if name == "patch_embed.proj.weight" and array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif name.endswith("attn.proj.weight") and array.ndim == 3:
            array = array.reshape(-1, array.shape[-1]).T
        elif re.search(r"attn\.(query|key|value)\.weight$", name) and array.ndim == 3:
            array = array.reshape(len(array), -1).T
        elif re.search(r"attn\.(query|key|value)\.bias$", name):
            array = array.reshape(-1)
        elif array.ndim == 2:
            array = array.T
        laid[name] = array
    left = (HEAD_BEHIND,) if "pre_logits.weight" in laid else ()
    return Translated(*fused(laid, theirs), "google", ("timm",), left, heads)

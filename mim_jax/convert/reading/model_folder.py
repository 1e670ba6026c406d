"""A folder as Hugging Face's libraries, timm among them, write one: config.json, weights in a file or in shards."""

import json
import pathlib
import re

from mim_jax.config import ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or in shards, listed by NAME.index.json
ARCHITECTURES = ("vit", "vit_mae", "beit", "swin", "dinov2", "deit", "data2vec-vision")


def files(src: str) -> list[pathlib.Path]:
    """The file, or those of the folder, that hold weights. Raises ConfigError for a folder without, or with missing shards."""
    place = pathlib.Path(src)
    if not place.is_dir():
        return [place]
    for name in WEIGHTS:
        index = place / f"{name}.index.json"
        if (place / name).exists():
            return [place / name]
        if index.exists():
            shards = [place / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if lost := [shard.name for shard in shards if not shard.exists()]:
                raise ConfigError(f"'{index}' names {lost[0]}, which is not there")
            return shards
    raise ConfigError(f"'{src}' is a folder without {' or '.join(WEIGHTS)}, or their .index.json; give the file of weights")


def read_json(file: pathlib.Path) -> dict:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"'{file}' is not what Hugging Face writes: it holds no object")
    return found


def facts(src: str) -> dict:
    """What the folder says: its config.json, `preprocessor` (that of images) and `licence`; {} for a file."""
    place = pathlib.Path(src)
    if not (place / "config.json").exists():
        return {}
    config, ready, card = read_json(place / "config.json"), place / "preprocessor_config.json", place / "README.md"
    if "pretrained_cfg" in config:  # timm's
        return config | {"licence": config["pretrained_cfg"].get("license") or ""}
    if (kind := config.get("model_type")) not in ARCHITECTURES:
        raise ConfigError(f"'{place / 'config.json'}' is of model_type {kind!r}; read here: {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"'{place / 'config.json'}': hidden_act={config['hidden_act']!r}; here it is gelu")
    head = re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.S) if card.exists() else None
    lines = dict(line.split(":", 1) for line in head[1].splitlines() if re.match(r"license(_name)?:", line)) if head else {}
    licence = lines.get("license_name") or lines.get("license", "")
    config["preprocessor"] = read_json(ready) if ready.exists() else {}
    return config | {"licence": licence.strip().strip("\"'")}


def settings(found: dict) -> dict:
    """`facts` -> the fields of Options that they fill."""
    if not found:
        return {}
    if timm := found.get("pretrained_cfg"):
        said = dict(licence=found["licence"], global_pool=found.get("global_pool"))
        return dict(said=said, **{key: tuple(timm.get(key) or ()) for key in ("mean", "std")})
    side, ready, swin = found.get("image_size", 224), found["preprocessor"], found["model_type"] == "swin"
    size = tuple(side) if isinstance(side, list) else (side, side)
    keys = {"mask_ratio": "mask_ratio", "norm_pix_loss": "norm_pix", "decoder_num_attention_heads": "decoder_heads"}
    method = {ours: found[key] for key, ours in keys.items() if key in found}
    config = dict(method="mae", mae=method) if found["model_type"] == "vit_mae" else {}
    said = dict(config=config, licence=found["licence"], norm_eps=found.get("layer_norm_eps"))
    given = {key: tuple(ready.get(f"image_{key}", ())) for key in ("mean", "std")}
    if not ready.get("do_normalize", True):
        given = {key: (float(key == "std"),) * found.get("num_channels", 3) for key in given}
    return dict(heads=0 if swin else found.get("num_attention_heads", 0), size=size, said=said, **given)

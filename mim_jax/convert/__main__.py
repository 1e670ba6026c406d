"""Released weights to a run's folder, and a run's weights to other libraries.

    python -m mim_jax.convert --from=lomar --src=mae-lomar.pth --workdir=runs/lomar_released
    python -m mim_jax.convert --to=timm --workdir=runs/lomar_vitb --out=vit.safetensors --encoder_only

In: --from is one of lomar, localmim, mae, simmim, greenmim, beit, timm, hf (Hugging Face's ViT, ViTMAE, BEiT, Swin), google
(its ViTs' .npz); --src a .pth, .safetensors or .npz, of which nothing is executed, or a folder with config.json. Of several
models in a file --model names one (teacher), and --weights=average takes a moving average. Sizes are read off the tensors;
--heads, --size, --mean and --std say what tensors do not tell. The folder is what `init_from`, `job=eval`, `visualise` and
fine-tuning take. Out: --to is one of timm, hf, safetensors, npz (see export.py).
"""

import argparse
import sys

from mim_jax.config import ConfigError
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_formats import LICENCES
from mim_jax.convert.writing.export import export
from mim_jax.jobs.import_weights import import_weights
from mim_jax.logs import fail
from mim_jax.paths import at_home


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def image_size(text: str) -> tuple[int, int]:
    """`224` or `160x224`."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m mim_jax.convert", None, __doc__, formatter_class=as_written, allow_abbrev=False)
    p.add_argument("--workdir", required=True, help="folder of the run: made with --from, read with --to")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=LICENCES, help="whose released weights to take in")
    way.add_argument("--to", help="for whom to write the run's weights: timm, hf, safetensors or npz")
    p.add_argument("--src", default="", help="file of released weights, or a folder of Hugging Face's")
    p.add_argument("--model", default="", help="which of several models in the file, such as teacher or base_encoder")
    p.add_argument("--heads", type=int, default=0, help="attention heads of a ViT, where no tensor tells")
    p.add_argument("--size", type=image_size, help="image size, where no tensor tells: 224 or HEIGHTxWIDTH")
    words = "of its images in [0, 1]; default ImageNet's, .5 for google, but for beit, timm and hf"
    p.add_argument("--mean", type=numbers, default=(), help=words)
    p.add_argument("--std", type=numbers, default=())
    p.add_argument("--pool", default="", help="of timm's ViT classifiers without fc_norm: cls, or normed (global_pool='avg')")
    p.add_argument("--licence", default="", help="of the weights, where --from does not tell")
    p.add_argument("--tokenizer", default="", help="for BEiT's pretraining: the encoder of DALL-E's dVAE")
    p.add_argument("--out", default="", help="with --to: the file to write, or the folder of hf")
    p.add_argument("--encoder_only", action="store_true", help="with --to: leave heads and decoders out")
    words = "trained, or average for their moving average, which a run or a file may hold; default trained"
    p.add_argument("--weights", default="", help=words)
    return p


ONLY_TO = ("out", "encoder_only")
ONLY_FROM = ("src", "model", "heads", "size", "mean", "std", "pool", "licence", "tokenizer")


def main(argv):
    a = parser().parse_args(argv)
    try:
        if strange := [name for name in (ONLY_FROM if a.to else ONLY_TO) if vars(a)[name]]:
            raise ConfigError(f"--{strange[0]} is for {'--from' if a.to else '--to'}; leave it out")
        if a.to:
            if not a.out:
                raise ConfigError("--to needs the file to write: --out=...")
            print(*export(a.workdir, a.to, a.out, a.encoder_only, a.weights or "trained"), sep="\n")
        else:
            if not a.src:
                raise ConfigError("--from needs the file of released weights: --src=...")
            options = Options(a.source, a.heads, a.size, a.mean, a.std, a.licence, a.pool, a.model, a.weights)
            print(import_weights(at_home(a.src), a.workdir, options, at_home(a.tokenizer)))
    except ConfigError as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Released weights to a run's folder, and a run's weights to other libraries.

    python -m mim_jax.convert --from=lomar --src=mae-lomar.pth --workdir=runs/lomar_released
    python -m mim_jax.convert --to=timm --workdir=runs/lomar_vitb --out=vit.safetensors --encoder_only

In: --from is one of lomar, localmim, mae, simmim, greenmim, beit, timm; --src a .pth, .safetensors or .npz, of which nothing is
executed. Sizes are read off the tensors; --heads, --size, --mean and --std say what tensors do not tell. The folder is what
`init_from`, `job=eval`, `visualise` and fine-tuning take. Out: --to is one of timm, hf, safetensors, npz (see export.py).
"""

import argparse
import contextlib
import os
import sys

from mim_jax.config import ConfigError, TrackedConfig
from mim_jax.convert.released import LICENCES
from mim_jax.logs import fail


def import_weights(src: str, workdir: str, options, tokenizer: str = "") -> str:
    """Writes a run's folder with the weights of a released file -> what was done with every tensor.

    Raises ConfigError, before anything is written, for a file that does not fit, and for a folder that holds a run.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mim_jax import build, supervised, tree
    from mim_jax.clock import Clock
    from mim_jax.convert import importing, report, torch_file
    from mim_jax.convert.tokenizer import dalle_params
    from mim_jax.provenance import git_hash
    from mim_jax.train.checkpoint import Checkpoints, absolute
    from mim_jax.train.pretrained import has_checkpoint
    from mim_jax.train.state import TrainState, split
    from mim_jax.train.workdir import claim

    if not workdir:
        raise ConfigError("--workdir is empty; name a folder")
    place = absolute(workdir)
    if (place / "config.json").exists() or has_checkpoint(place):
        raise ConfigError(f"'{workdir}' holds a run already; choose another --workdir")
    try:
        if (said := torch_file.metadata(src)).get("written_by") == "mim_jax":
            options = importing.completed(options, said)
        found = importing.release(torch_file.read(src), options)
        plain, config = found.config, TrackedConfig(found.config)
        importing.fit_windows(found, build.encoder(config).tables(), resize=options.size is not None)
        made = supervised.classifier(config, plain.classes) if found.kind.pool else build.objective(config)
        shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), *build.example(config, made)))["params"]
        wanted = tree.flatten(shapes)
        params = {}
        if tokenizer:
            if not any(path.startswith("tokenizer/") for path in wanted):
                raise ConfigError(f"--tokenizer is for BEiT's pretraining, and this is {found.kind.words}")
            params = {f"tokenizer/{path}": x for path, x in tree.flatten(dalle_params(tokenizer)).items()}
        importing.require_fit(found, {path: leaf for path, leaf in wanted.items() if path not in params})
        came_from = importing.origin(src, found, options)
    except ConfigError as error:
        raise ConfigError(str(error) if src in str(error) else f"'{src}': {error}") from error
    params |= found.params()
    if broken := [path for path, x in params.items() if not np.isfinite(x).all()]:
        name = found.arrays[broken[0]][0] if broken[0] in found.arrays else broken[0]
        raise ConfigError(f"'{src}': '{name}' has values that are no finite numbers")

    trained, frozen = split(jax.tree.map(jnp.asarray, tree.nest(params)), made.frozen)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, trained, frozen, {}, {}, zero, zero)
    made_here = place if not place.exists() else place / "checkpoints"
    try:
        with contextlib.closing(Checkpoints(str(place), every=1, keep=1, keep_every=0)) as checkpoints:
            checkpoints.save(0, state, {"step": 0, "examples": 0, "clock": Clock().state(), "config": plain.to_dict(),
                                        "git": git_hash(), "origin": came_from})  # fmt: skip
        claim(place, plain.to_dict())
    except BaseException as error:
        # A full disk has many names in orbax, and half a run would be in the way of the next try.
        made_here.rmtree(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f"--workdir={workdir} cannot be written ({str(error).splitlines()[0][:200]})") from error
    lines = [
        report.table(found),
        f"{src}: {found.kind.words}, {report.describe(plain)}; pixels less "
        f"{tuple(plain.data.mean)} over {tuple(plain.data.std)}; {came_from['licence']}",
    ]
    if came_from["lacks"]:
        lines.append(
            f"without {', '.join(came_from['lacks'])}: `init_from` of fine-tuning, probes and features takes the folder, "
            "further pretraining and visualise do not"
        )
    if assumed := report.assumed(found):
        where = "what the file says of itself" if options.said else "the published recipe"
        lines.append(f"the tensors do not tell, so taken from {where}: {assumed}")
    if found.kind.pool == "cls" and not options.pool and options.source == "timm":
        lines.append("nor do they tell global_pool: taken as token; of avg say --pool=normed")
    return "\n".join([*lines, f"written to {workdir}"])


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def image_size(text: str) -> tuple[int, int]:
    """`224` or `160x224`."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m mim_jax.convert",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--workdir", required=True, help="folder of the run: made with --from, read with --to")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=LICENCES, help="whose released weights to take in")
    way.add_argument("--to", help="for whom to write the run's weights: timm, hf, safetensors or npz")
    p.add_argument("--src", default="", help="file of released weights")
    p.add_argument("--heads", type=int, default=0, help="attention heads of a ViT, where no tensor tells")
    p.add_argument("--size", type=image_size, help="image size, where no tensor tells: 224 or HEIGHTxWIDTH")
    p.add_argument(
        "--mean", type=numbers, default=(), help="of its images in [0, 1]; default ImageNet's, but for beit and timm"
    )
    p.add_argument("--std", type=numbers, default=())
    p.add_argument("--pool", default="", help="of timm's ViT classifiers without fc_norm: cls, or normed (global_pool='avg')")
    p.add_argument("--licence", default="", help="of the weights, where --from does not tell")
    p.add_argument("--tokenizer", default="", help="for BEiT's pretraining: the encoder of DALL-E's dVAE")
    p.add_argument("--out", default="", help="with --to: the file to write, or the folder of hf")
    p.add_argument("--encoder_only", action="store_true", help="with --to: leave heads and decoders out")
    p.add_argument("--weights", default="", help="with --to: trained, or average for the moving average; default trained")
    return p


ONLY_TO = ("out", "encoder_only", "weights")
ONLY_FROM = ("src", "heads", "size", "mean", "std", "pool", "licence", "tokenizer")


def main(argv):
    a = parser().parse_args(argv)
    try:
        if strange := [name for name in (ONLY_FROM if a.to else ONLY_TO) if getattr(a, name)]:
            raise ConfigError(f"--{strange[0]} is for {'--from' if a.to else '--to'}; leave it out")
        if a.to:
            from mim_jax.convert.export import export

            if not a.out:
                raise ConfigError("--to needs the file to write: --out=...")
            print(*export(a.workdir, a.to, a.out, a.encoder_only, a.weights or "trained"), sep="\n")
            return
        from mim_jax.convert.importing import Options

        if not a.src:
            raise ConfigError("--from needs the file of released weights: --src=...")
        options = Options(a.source, a.heads, a.size, a.mean, a.std, a.licence, a.pool)
        print(import_weights(os.path.expanduser(a.src), a.workdir, options, a.tokenizer))
    except ConfigError as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])

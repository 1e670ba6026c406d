"""`python -m mim_jax.attention --workdir=runs/lomar --workdir=runs/localmim`: attention NMI per layer, as PNG and JSON.

One line per run, and a dashed one per architecture at its random initialisation. Each run is measured on its own
pictures (`data.picture_split`), whole, nothing hidden.

NMI inside Swin's windows and over a ViT's whole grid are numbers of different kinds. Shifted windows, Swin's every
second block, hold pairs that may not attend, which alone lifts their NMI: compare a Swin with its random encoder.
"""

import dataclasses
import os
import time

import jax
import numpy as np
from absl import app, flags, logging

from mim_jax.config import ConfigDict, ConfigError, TrackedConfig
from mim_jax.logs import fail
from mim_jax.provenance import this_run, write_result

WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "folder of a pretraining run, or one step of it; may be given several times", required=True
)
OUT = flags.DEFINE_string("out", "", "the PNG; default <first workdir>/figures/attention_nmi.png; the JSON lies beside")
SPLIT = flags.DEFINE_string("split", "", "split to draw from; default each run's data.picture_split")
SOURCE = flags.DEFINE_string("source", "", "other data than the runs': folder, imagenet2012, sample")
PATH = flags.DEFINE_string("path", "", "folder of the images, with --source=folder, or where they moved to")
DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of TFDS, where it is another one than the runs'")
EXAMPLES = flags.DEFINE_integer("examples", 256, "images, spread over the split; 0: all of it")
BATCH = flags.DEFINE_integer("batch_size", 32, "images at a time")

# Okabe and Ito's colours, told apart by the colour-blind too; markers besides, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, GRAY = "osD^vPX", "#666666"
# Fields of an encoder that the attention to a whole image does not depend on.
APART = ("name", "parent", "drop_path", "final_norm", "sparse", "remat", "dtype")


@dataclasses.dataclass
class Run:
    """A checkpoint of a pretraining run."""

    workdir: str
    folder: os.PathLike
    meta: dict

    @property
    def config(self) -> TrackedConfig:
        return TrackedConfig(ConfigDict(self.meta["config"]))

    @property
    def step(self) -> int:
        return self.meta["step"]


def read_run(workdir: str, place=("", "", "")) -> Run:
    """`place`: source, path and data_dir of other images than the run's, where not empty.

    Raises ConfigError for a folder without a checkpoint, or of another kind of run.
    """
    from mim_jax import transfer
    from mim_jax.train import pretrained

    folder = pretrained.find(workdir)
    meta = pretrained.read_meta(folder)
    moved = transfer.with_other_data(ConfigDict(meta["config"]), *place)
    run = Run(workdir, folder, {**meta, "config": moved.to_dict()})
    if run.config.job != "pretrain":
        raise ConfigError(
            f"'{workdir}' holds a {run.config.job} run; attention is compared between pretraining runs, whose folders "
            "--workdir names"
        )
    return run


def names_of(runs) -> list[str]:
    """`method: folder` of each run, with as many parent folders as it takes to tell the runs apart."""
    steps = [run.folder for run in runs]
    twice = sorted({str(step) for step in steps if steps.count(step) > 1})
    if twice:
        raise ConfigError(f"the checkpoint {twice[0]} is given twice; --workdir takes each once")
    parts = [step.parent.parent.parts for step in steps]
    enough = (n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    shown = next(enough)
    return [f"{run.config.method}: {'/'.join(p[-shown:])}" for run, p in zip(runs, parts)]


def measure(run: Run, name: str, split: str, examples: int, batch_size: int, seen: set) -> list[dict]:
    """-> the curve of the run, and that of its encoder at the start unless `seen` has this encoder and these pictures."""
    from mim_jax import build, sharding
    from mim_jax.evaluators.attention import layer_means, nmi_runner
    from mim_jax.train import pretrained
    from mim_jax.train.state import init_variables
    from mim_jax.tree import flatten, nest

    config, mesh = run.config, sharding.make_mesh()
    made, normalise = build.objective(config), build.normaliser(config)
    random = jax.jit(lambda: init_variables(made, build.example(config, made), config.seed))()
    loaded = pretrained.load_params(run.folder, mesh)
    loaded, _ = pretrained.match_params(flatten(random["params"]), loaded)
    split = split or build.picture_split(config)
    source = build.sources(config)(split)
    runner = nmi_runner(made, normalise, mesh, *build.split_batches(config, source, batch_size, examples))
    facts = dict(
        method=config.method,
        workdir=str(run.workdir),
        checkpoint=str(run.folder),
        seed=config.seed,
        source=source.name,
        split=split,
        examples=runner.num_examples,
    )

    def curve(variables, **more):
        layers = layer_means(runner(variables))
        return {**more, **facts, "mean": float(np.mean(list(layers.values()))), "layers": layers}

    trained = {**random, "params": nest(loaded)}
    curves = [curve(trained, label=f"{name}, step {run.step}", random=False, step=run.step, trained_by=run.meta["git"])]
    shape = {f.name: getattr(made.encoder, f.name) for f in dataclasses.fields(made.encoder)}
    shape = {name: value for name, value in shape.items() if name not in APART}
    data = config.data
    pictures = (data.source, data.path, data.data_dir, split, config.image_size, normalise)
    key = repr((type(made.encoder).__name__, shape, pictures))
    if key not in seen:
        seen.add(key)
        curves.append(curve(random, label=f"{name}, random", random=True, step=0, trained_by=""))
    return curves


def compare(workdirs, out: str = "", split: str = "", examples: int = 256, batch_size: int = 32, place=("", "", "")):
    """Measures the runs, prints a table, writes the chart and its numbers -> their two paths.

    Raises ConfigError before any compute for a folder that holds no pretraining run.
    """
    from mim_jax.train.checkpoint import absolute

    if examples < 0 or batch_size < 1:
        raise ConfigError(f"examples={examples} must be 0 (all) or more, batch_size={batch_size} 1 or more")
    if out and not out.endswith(".png"):
        raise ConfigError(f"--out='{out}' must end in .png; the numbers go into a .json beside it")
    began = time.perf_counter()
    runs = [read_run(workdir, place) for workdir in workdirs]
    curves, seen = [], set()
    for run, name in zip(runs, names_of(runs)):
        curves += measure(run, name, split, examples, batch_size, seen)
    drawn = [curve for curve in curves if curve["random"]]
    if len(drawn) == 1:
        drawn[0]["label"] = "random encoder"
    curves = [curve for curve in curves if not curve["random"]] + drawn
    print(table(curves), flush=True)
    png = absolute(out) if out else runs[0].folder.parent.parent / "figures" / "attention_nmi.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    numbers = png.with_suffix(".json")
    asked = dict(zip(("source", "path", "data_dir"), place), split=split, examples=examples, batch_size=batch_size)
    asked["workdirs"] = [str(workdir) for workdir in workdirs]
    write_result(numbers, {"curves": curves}, this_run(asked, time.perf_counter() - began))
    with png.open("wb") as file:
        draw(curves, file)
    print(f"{png}\n{numbers}", flush=True)
    return png, numbers


def table(curves) -> str:
    """Curves by number, then one row per layer."""
    depth = max(len(curve["layers"]) for curve in curves)
    lines = [f"{i:>3}  {curve['label']}" for i, curve in enumerate(curves, 1)]
    lines.append("layer " + "".join(f"{i:>8}" for i in range(1, len(curves) + 1)))
    columns = [[*curve["layers"].values()] for curve in curves]
    for layer in range(depth):
        values = (f"{column[layer]:8.4f}" if layer < len(column) else " " * 8 for column in columns)
        lines.append(f"{layer:>5} " + "".join(values))
    return "\n".join(lines + [" mean " + "".join(f"{curve['mean']:8.4f}" for curve in curves)])


def draw(curves, file):
    """Layer against NMI as PNG: runs as solid lines, random encoders dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.4 + 0.2 * len(curves)), dpi=150, layout="constrained")  # the legend lies below
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    style, alone = {}, sum(curve["random"] for curve in curves) == 1
    for i, curve in enumerate(curves):
        values = [*curve["layers"].values()]
        if curve["random"]:
            colour = GRAY if alone else style[curve["checkpoint"]]
            axes.plot(values, "--", color=colour, linewidth=1.2, label=curve["label"])
        else:
            colour = style[curve["checkpoint"]] = COLOURS[i % len(COLOURS)]
            axes.plot(values, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=curve["label"])
    shown = {(curve["examples"], curve["split"]) for curve in curves}
    where = "".join(f", {n} images of '{split}'" for n, split in shown) if len(shown) == 1 else ""
    axes.set_title(f"Attention of each layer, mean over heads{where}", fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("normalised mutual information\nof query and key")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(file, format="png")


def main(_):
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        place = SOURCE.value, PATH.value, DATA_DIR.value
        compare(WORKDIR.value, OUT.value, SPLIT.value, EXAMPLES.value, BATCH.value, place)
    except ConfigError as error:
        fail(str(error))


if __name__ == "__main__":
    app.run(main)

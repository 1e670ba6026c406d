"""Attention NMI per layer of pretraining runs and their random encoders, as PNG and JSON."""

import dataclasses
import time

import jax
import numpy as np

from mim_jax import sharding
from mim_jax.assemble.inheritance import PLACE
from mim_jax.config import ConfigError
from mim_jax.evaluators.nmi import layer_means, nmi_runner
from mim_jax.figures.curves import draw_curves
from mim_jax.jobs import pretrain
from mim_jax.objectives.objective import Objective
from mim_jax.paths import expanded
from mim_jax.provenance import this_run, write_result
from mim_jax.runs import saved
from mim_jax.train.state import init_variables

# Fields of an encoder that the attention to a whole image does not depend on.
APART = ("name", "parent", "drop_path", "final_norm", "sparse", "remat", "attention", "scan", "dtype")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run to be measured."""

    workdir: str
    run: saved.Saved
    config: pretrain.Pretrain
    objective: Objective
    name: str = ""


def subjects(workdirs, place=("", "", "")) -> list[Subject]:
    """The runs of these folders, named `method: folder` with as many parent folders as it takes to tell them apart.

    `place`: source, path and data_dir of other images than the runs', where not empty. Raises ConfigError for a folder without
    a checkpoint, or of another kind of run, and for one that is given twice.
    """
    found = []
    for workdir in workdirs:
        run = saved.open(workdir)
        if run.folder in [subject.run.folder for subject in found]:
            raise ConfigError(f"the checkpoint {run.folder} is given twice; --workdir takes each once")
        words = "attention is compared between runs of which each is"
        found.append(Subject(workdir, run, *pretrain.reopened(run, words, place)))
    parts = [subject.run.workdir.parts for subject in found]
    enough = (n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    shown = next(enough)
    return [dataclasses.replace(s, name=f"{s.config.method}: {'/'.join(p[-shown:])}") for s, p in zip(found, parts)]


def measure(subject: Subject, split: str, examples: int, batch_size: int, seen: set) -> list[dict]:
    """-> the curve of the run, and that of its encoder at the start unless `seen` has this encoder and these pictures."""
    config, made, run, mesh = subject.config, subject.objective, subject.run, sharding.make_mesh()
    data, normalise = config.data, config.normaliser()
    trained = run.variables(made, mesh)
    split = split or data.picture_split
    source = config.opened(split)
    batches = config.batches(source, batch_size, examples)
    runner = nmi_runner(made, normalise, mesh, *batches)
    facts = dict(
        method=config.method, workdir=str(subject.workdir), checkpoint=str(run.folder), seed=config.seed,
        source=source.name, split=split, examples=runner.num_examples,
    )  # fmt: skip

    def curve(variables, **more):
        layers = layer_means(runner(variables))
        return {**more, **facts, "mean": float(np.mean(list(layers.values()))), "layers": layers}

    label = f"{subject.name}, step {run.step}"
    curves = [curve(trained, label=label, random=False, step=run.step, trained_by=run.meta["git"])]
    shape = {f.name: getattr(made.encoder, f.name) for f in dataclasses.fields(made.encoder) if f.name not in APART}
    pictures = (data.source, data.path, data.data_dir, split, config.image_size, normalise)
    key = repr((made.encoder.kind, shape, pictures))
    if key not in seen:
        seen.add(key)
        random = jax.jit(lambda: init_variables(made, made.example(), config.seed))()
        curves.append(curve(random, label=f"{subject.name}, random", random=True, step=0, trained_by=""))
    return curves


def compare(workdirs, out: str = "", split: str = "", examples: int = 256, batch_size: int = 32, place=("", "", "")):
    """Measures the runs, prints a table, writes the chart and its numbers -> their two paths.

    Raises ConfigError before any compute for a folder that holds no pretraining run.
    """
    began = time.perf_counter()
    if examples < 0 or batch_size < 1:
        raise ConfigError(f"examples={examples} must be 0 (all) or more, batch_size={batch_size} 1 or more")
    if out and not out.endswith(".png"):
        raise ConfigError(f"--out='{out}' must end in .png; the numbers go into a .json beside it")
    found, curves, seen = subjects(workdirs, place), [], set()
    for subject in found:
        curves += measure(subject, split, examples, batch_size, seen)
    drawn = [curve for curve in curves if curve["random"]]
    if len(drawn) == 1:
        drawn[0]["label"] = "random encoder"
    curves = [curve for curve in curves if not curve["random"]] + drawn
    print(table(curves), flush=True)
    png = expanded(out) if out else found[0].run.workdir / "figures" / "attention_nmi.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    numbers = png.with_suffix(".json")
    asked = dict(zip(PLACE, place), split=split, examples=examples, batch_size=batch_size)
    asked["workdirs"] = [str(workdir) for workdir in workdirs]
    write_result(numbers, {"curves": curves}, this_run(asked, time.perf_counter() - began))
    with png.open("wb") as file:
        draw_curves(curves, file)
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

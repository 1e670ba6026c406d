"""`job=eval`: a finished classifier or detector on every split that its config names."""

import dataclasses
import time

import jax
from etils import epath

from mim_jax import sections, sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, judges, weights
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.jobs import detect, finetune, pretrain, streamed_probe
from mim_jax.jobs.recorded import recorded
from mim_jax.objectives.objective import Objective
from mim_jax.runs import saved
from mim_jax.train.loop import report


class Evaluate(encoders.WithEncoder):
    data: datasets.Data = sections.nested(datasets.Data)
    evals: dict = sections.each("type", {"classify": judges.Classify})


class EvaluateDetector(encoders.WithEncoder):
    data: datasets.ObjectData = sections.nested(datasets.ObjectData)
    evals: dict = sections.each("type", {"detections": judges.Detections})


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights of a checkpoint, as evaluators ask a state for them."""

    kinds: dict  # "trained", "average" -> variables

    def variables(self, average: bool = False) -> dict:
        return self.kinds["average" if average else "trained"]


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """Top-1 and top-5 of the classifier at `init_from`, or AP of the detector -> the numbers, also in result.json."""
    began = time.perf_counter()
    source, typed = inheritance.source_of(settings, workdir), settings.to_dict()
    if source.config.job not in ("finetune", "linprobe", "detect"):
        words = f"and {source.folder} is a {source.config.job} run; fine-tune or probe it first"
        raise ConfigError(f"job=eval judges a classifier or a detector, {words}")
    detects = source.config.job == "detect"
    if detects != any(e["type"] == "detections" for e in settings.evals.values()):
        words = "a detector: use configs/eval.py:detect" if detects else "no detector: use configs/eval.py"
        raise ConfigError(f"{source.folder} is of {words}")
    kind, completed = EvaluateDetector if detects else Evaluate, inheritance.inherit(settings, source.config)
    config = sections.read(kind, completed)
    judged = detector(config, source, workdir) if detects else trained(config, source)
    evaluators = judges.evaluators(config.evals, judged, steps=lambda duration: 0)
    if not evaluators:
        raise ConfigError(f"none of the splits {', '.join(sorted(config.evals))} is there and on: nothing to judge")
    loaded, words = load(config, source, judged.objective, judged.mesh)
    data = {key: getattr(config.data, key) for key in inheritance.PLACE}
    origin = dict(
        run=str(source.folder), step=source.step, image_size=list(config.image_size), splits=typed["evals"], data=data
    )

    def judge(logger):
        for evaluator in evaluators:
            scalars, images = evaluator.run(loaded)
            report(logger, 0, evaluator.name, scalars, images)
            yield scalars

    return recorded(workdir, typed, sections.defaults(kind, completed), origin, began, words, judge)


def trained(config: Evaluate, source: saved.Saved) -> judges.Judged:
    """The classifier, or the probe, that the run trained, for images of the size here."""
    there, encoder = source.config, config.made()
    if tuned := there.job == "finetune":
        past = sections.read(finetune.Finetune, pretrain.saved_keys(there), complete=True)
        made = finetune.classifier(encoder, there.classes, there.pool)
    else:
        past = sections.read(streamed_probe.StreamedProbe, pretrain.saved_keys(there), complete=True)
        made = past.probe(encoder, there.classes, past.optim.base_lrs(past.batch_size))
    names, averaged = tuple(there.get("class_names", ())), tuned and past.optim.average > 0
    return judges.Judged(made, config, sharding.make_mesh(), class_names=names, averaged=averaged)


def detector(config: EvaluateDetector, source: saved.Saved, workdir: epath.Path) -> judges.Judged:
    """The detector that the run trained, for images of the size here; results go to the workdir."""
    made, names = detect.trained(source, config), tuple(source.config.class_names)
    return judges.Judged(made, config, sharding.make_mesh(), class_names=names, folder=workdir)


def load(config: Evaluate, source: saved.Saved, made: Objective, mesh) -> tuple[Loaded, str]:
    """The weights that the splits ask for, trained or averaged, and what is said of them."""
    stats = source.stats(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example())), mesh)
    kinds, reports = {}, []
    for kind in sorted({getattr(e, "weights", "trained") for e in config.evals.values() if e.on}):
        params, words = weights.taken_over(source, made, config.encoder, mesh, weights.ALL, saved.PARTS[kind])
        kinds[kind] = {"params": tree.nest(params), **stats}
        reports.append(f"{kind}: {words}")
    return Loaded(kinds), "; ".join(reports)

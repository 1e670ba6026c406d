"""Evaluation alone: a finished classifier on every split that its config names."""

import dataclasses
import time

import jax
from etils import epath

from mim_jax import build, evaluation, supervised, tree
from mim_jax.config import ConfigError
from mim_jax.logs import Logger
from mim_jax.provenance import this_run, write_result
from mim_jax.train import pretrained
from mim_jax.train.loop import report as report_scalars
from mim_jax.train.workdir import RESULT, claim, finished
from mim_jax.transfer import pretrained_params


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights of a checkpoint, as evaluators ask a state for them."""

    kinds: dict  # "trained", "average" -> variables

    def variables(self, average: bool = False) -> dict:
        return self.kinds["average" if average else "trained"]


def evaluate(config, plain: dict, workdir: epath.Path, mesh) -> dict:
    """Top-1 and top-5 of the classifier at `init_from` -> the numbers, also in result.json.

    `config` is completed by the classifier's own (transfer.inherit). Raises CheckpointError when the weights do not fit.
    """
    began = time.perf_counter()
    make = build.probe_objective if config.trained_by == "linprobe" else supervised.classifier
    made = make(config, config.classes)
    evaluators = evaluation.evaluators(
        config, made, build.normaliser(config), mesh, build.sources(config), total=0, examples_per_epoch=1
    )
    if not evaluators:
        raise ConfigError(f"none of the splits {', '.join(config.evals.keys())} is there and on: nothing to judge")
    example = build.example(config, made)
    folder = pretrained.find(config.init_from)
    fresh = jax.eval_shape(lambda: made.init(jax.random.key(0), *example))
    stats = tree.nest(pretrained.load_params(folder, mesh, part=pretrained.STATS)) if "batch_stats" in fresh else {}
    kinds, reports = {}, []
    for kind in sorted({e["weights"] for e in plain["evals"].values() if e["on"]}):
        params, report = pretrained_params(config, made, example, mesh, pretrained.PARTS[kind])
        kinds[kind] = {"params": tree.nest(params), **stats}
        reports.append(f"{kind}: {report}")
    config.require_all_read()

    origin = dict(
        run=str(folder),
        step=int(folder.name),
        image_size=list(config.image_size),
        splits=plain["evals"],
        data={key: config.data[key] for key in ("source", "path", "data_dir")},
    )
    claim(workdir, plain)
    already = finished(workdir, origin)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=False)
    logger.say(f"workdir      {workdir}\nweights      {'; '.join(reports)}")
    if already:
        logger.say(f"this evaluation is finished: {workdir / RESULT}")
        logger.close()
        return already
    results = {}
    for evaluator in evaluators:
        scalars, images = evaluator.run(Loaded(kinds))
        report_scalars(logger, 0, evaluator.name, scalars, images)
        results.update(scalars)
    results.update(origin, seconds=time.perf_counter() - began)
    logger.close()
    return write_result(workdir / RESULT, results, this_run(plain, results["seconds"]))

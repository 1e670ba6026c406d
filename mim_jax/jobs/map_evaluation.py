"""`job=segment_eval`: a finished segmentation on splits that its config names, at several scales and mirrored if asked."""

import time

import jax
from etils import epath

from mim_jax import sections, sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.assemble.judged import Judged
from mim_jax.assemble.map_scores import MapScores
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.durations import Duration
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import pretrain
from mim_jax.jobs.evaluate import Loaded
from mim_jax.jobs.recorded import recorded
from mim_jax.jobs.segmentation import Segmentation
from mim_jax.sections import Count, Natural
from mim_jax.train.loop import report

AS_TRAINED = ("window", "stride", "short", "long")  # how images are seen, unless it is said


class MapEvaluation(encoders.WithEncoder):
    """splits: which; whole: images are seen whole, otherwise as in the run's own evaluation. The rest as of MapScores."""

    splits: tuple[str, ...]
    examples: Natural
    batch_size: Count
    pictures: Natural
    scales: tuple[float, ...]
    flip: bool
    whole: bool
    data: datasets.MappedData = sections.nested(datasets.MappedData)

    def check(self):
        super().check()
        self.require(len(self.splits) > 0, "splits", "names none")

    def scores(self, split: str, trained: ConfigDict) -> MapScores:
        """Raises ConfigError for a run that says nowhere how images are seen."""
        own = next((e for e in trained.evals.values() if e.type == "segment"), None)
        if own is None:
            raise ConfigError(f"the run at {self.init_from} has no evaluation of segmentation that says how images are seen")
        seen = {key: own[key] for key in AS_TRAINED} | (dict(window=0, stride=0) if self.whole else {})
        asked = {key: getattr(self, key) for key in ("examples", "batch_size", "pictures", "scales", "flip")}
        return MapScores(type="segment", on=True, every=Duration("every"), split=split, **seen, **asked)


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the scores of each split, also in result.json; predictions_SPLIT.png has its first images."""
    began = time.perf_counter()
    source, typed = inheritance.source_of(settings, workdir), settings.to_dict()
    if source.config.job != "segment":
        words = f"{source.folder} is a {source.config.job} run; configs/segment.py trains one, configs/eval.py judges others"
        raise ConfigError(f"job=segment_eval judges a segmentation, and {words}")
    completed = inheritance.inherit(settings, source.config)
    config, trained = sections.read(MapEvaluation, completed), pretrain.saved_keys(source.config)
    names = tuple(source.config.class_names)
    here = encoders.computed_as(trained, config)
    made = sections.read(Segmentation, here, complete=True).objective(len(names))
    mesh = sharding.make_mesh()
    judged = Judged(made, config, mesh, class_names=names)
    judges = {split: config.scores(split, trained).made(judged) for split in config.splits}
    params, words = weights.taken_over(source, made, config.encoder, mesh)
    stats = source.stats(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example())), mesh)
    data = {key: getattr(config.data, key) for key in inheritance.PLACE}
    asked = {key: typed[key] for key in ("splits", "scales", "flip", "whole")}
    origin = dict(run=str(source.folder), step=source.step, asked=asked, data=data)
    loaded = Loaded({"trained": {"params": tree.nest(params), **stats}})

    def judge(logger):
        for split, of_split in judges.items():
            scores, pictures = of_split(loaded)
            report(logger, 0, split, scores, {})
            for name, picture in pictures.items() if logger.write else ():
                write_png(picture, workdir / f"{name.partition('/')[2]}_{split}.png")
            yield scores

    return recorded(workdir, typed, sections.defaults(MapEvaluation, completed), origin, began, words, judge)

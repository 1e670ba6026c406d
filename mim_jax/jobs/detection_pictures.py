"""Figures of a finished detector: what it finds in the images of a split, or of any other, beside what is annotated."""

from etils import epath

from mim_jax import sharding
from mim_jax.assemble import inheritance
from mim_jax.evaluators import object_results
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.figures.detections import best, draw_detections
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import detect
from mim_jax.jobs.pretrain import saved_keys
from mim_jax.paths import expanded
from mim_jax.runs import saved
from mim_jax.sections import read

BATCH = 8  # images at a time


def visualise(run: saved.Saved, out: str, images: int, split: str, place=("", "", "")) -> list[epath.Path]:
    """Writes a figure of some images, spread evenly over a split ("": validation, or train of other images) -> its path.

    out, place: as in jobs/pictures.py. Raises ConfigError (DataError) for images that are not there.
    """
    from mim_jax.data.unreadable import image_of

    settings = saved_keys(inheritance.with_other_data(run.config, *place))
    config, names = read(detect.Detection, settings, complete=True), tuple(run.config.class_names)
    made, mesh = config.detector_of(len(names), complete=True), sharding.make_mesh()
    source = config.data.images(split or ("train" if place[0] else "validation"), config.channels)
    batches, count = config.batches(source, BATCH, images)
    runner = SplitRunner(object_results.finder(made, config.normaliser()), mesh, batches, count)

    def examples():
        for part in runner.stream(run.variables(made, mesh)):
            for k, i in enumerate(part["id"].tolist()):
                truth = object_results.known(source, i) if hasattr(source, "objects_of") else None
                image = image_of(source, i, config.data.reading().decoding)
                yield image, truth, object_results.on_the_original(part, k, best)

    out = expanded(out) if out else run.workdir / "figures"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"detections_step{run.step}.png"
    write_png(draw_detections(examples(), names, f"{source.name}, {source.split}: objects found"), path)
    print(path, flush=True)
    return [path]

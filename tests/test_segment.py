"""Segmentation: decay and learning rates by the recorded tables, the schedule, the loss, BatchNorm over all devices."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import tree
from mim_jax.assemble import encoders, inheritance
from mim_jax.config import ConfigError, load
from mim_jax.convert import names
from mim_jax.jobs.map_evaluation import MapEvaluation
from mim_jax.jobs.segmentation import Segmentation, adapt
from mim_jax.objectives.segment import pixel_cross_entropy
from mim_jax.sections import read
from mim_jax.targets.pixels import Normaliser
from mim_jax.train.optimizer import decays

REPO = pathlib.Path(__file__).resolve().parent.parent
FACTS = json.loads((REPO / "tests/golden/opt_facts_dense_mm.json").read_text())
# case: preset, config of the pretraining, rules
RECIPES = {
    "upernet_vit_b": ("localmim_b", "localmim_vitb", names.UPERNET_VIT_RULES),
    "upernet_swin_b": ("localmim_swin_b", "localmim_swinb", names.UPERNET_SWIN_RULES),
}


def settings(arguments: str, pretraining: str, **changes) -> Segmentation:
    """The job's sections, completed by the config of a pretraining, as by its run."""
    config, there = load(f"{REPO}/configs/segment.py:{arguments}"), load(f"{REPO}/configs/{pretraining}.py")
    config.encoder, config.channels = there.encoder, there.channels
    config.data.update(dict(normalise="dataset", mean=there.data.mean, std=there.data.std))
    config.update(changes)
    return read(Segmentation, adapt(config))


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    """-> case, the job, its rules, {path: shape} of its parameters."""
    preset, pretraining, rules = RECIPES[request.param]
    config = settings(f"preset={preset}", pretraining)
    made = config.objective(150)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), made.example(1)))
    return request.param, config, rules, made, tree.flatten(variables["params"])


def test_parameters_decay_and_rates_are_those_recorded(recipe):
    case, config, rules, made, params = recipe
    assert sum(np.prod(x.shape) for x in params.values()) == FACTS[f"{case}/parameters"]
    facts, scale, optim = FACTS[f"{case}/param_groups"], config.optim.scales(made.encoder), config.optim
    assert f"lr {'4' if 'vit' in case else '6'}e" in FACTS[f"{case}/optimizer"] and optim.lr in (4e-4, 6e-5)
    paths = {name: names.our_name(name, rules)[0] for name in facts}
    assert sorted(paths.values()) == sorted(params)
    for name, fact in facts.items():
        path = paths[name]
        assert scale(path) == pytest.approx(fact["lr_scale"], rel=1e-6), name
        decayed = optim.weight_decay * decays(path, params[path], optim.no_decay, optim.decay_vectors)
        assert decayed == pytest.approx(fact["weight_decay"]), name


def test_the_schedule_is_the_recorded_one():
    config, facts = settings("preset=localmim_b", "localmim_vitb"), FACTS["poly_160k"]
    lr = jax.jit(config.optim.schedule(1.0, 160_000, facts["warmup_iters"]))
    for step, expected in facts["iteration_multiplier"]:
        assert float(lr(step)) == pytest.approx(expected, rel=2e-4 if step == 1 else 1e-5), step


def test_ignored_pixels_are_counted_in_the_mean_and_learn_nothing():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.integers(0, 5, (2, 3, 4))
    labels[0, 1] = 255
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    there = np.argwhere(labels != 255)
    own = np.array([-np.log(shares[(*at, labels[tuple(at)])]) for at in there])
    loss = lambda x, weights=(): pixel_cross_entropy(x, jnp.asarray(labels), weights)
    assert float(loss(logits)) == pytest.approx(own.sum() / 24, rel=1e-5)
    weights = (1.0, 2.0, 0.0, 1.0, 0.5)
    weighted = (own * np.array(weights)[labels[labels != 255]]).sum() / 24
    assert float(loss(logits, weights)) == pytest.approx(weighted, rel=1e-5)
    assert not np.asarray(jax.grad(loss)(logits))[0, 1].any()


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(taps=(1, 3, 12, 11)), r"taps=\(1, 3, 12, 11\): four blocks from 0 to 11 are meant"),
        (dict(taps=(0, 1, 2, 3)), r"taps=\(0, 1, 2, 3\) end below the last block, 11, .*use \(2, 5, 8, 11\)"),
        (dict(image_size=(496, 512)), "UPerNet needs even ones"),
        (dict(class_weights=(1.0, 2.0)), "class_weights has 2 numbers, the data 150 classes"),
    ],
)
def test_what_cannot_be_is_said(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings("preset=localmim_b", "localmim_vitb", **changes).objective(150)


def test_recipes_are_of_twelve_blocks():
    deeper = lambda arguments, **more: settings(arguments, "localmim_vitb", **more).made().clone(depth=24)
    linear = settings("preset=localmim_b,head=linear", "localmim_vitb")
    assert linear.places(deeper("preset=localmim_b"))[-1] == 23 and linear.objective(150).tap == 11
    for preset, taps in (("localmim_b", r"\(3, 7, 19, 23\)"), ("mae_b", r"\(7, 11, 15, 23\)")):
        with pytest.raises(ConfigError, match=f"end below the last block, 23, .*; use {taps}, .*or taps=\\(\\)"):
            settings(f"preset={preset}", "localmim_vitb").places(deeper("preset=localmim_b"))


def test_what_is_no_vit_or_swin_is_refused():
    there = load(f"{REPO}/configs/localmim_vitb.py").encoder
    backbone = dict(kind="vitdet", **{key: there[key] for key in ("patch", "width", "depth", "heads", "mlp_ratio")})
    with pytest.raises(ConfigError, match="job=segment takes a ViT or a Swin; encoder.kind=vitdet is no such encoder"):
        settings("preset=localmim_b", "localmim_vitb", encoder=backbone)


@pytest.mark.parametrize("name", ["segment", "segment_eval"])
def test_photos_with_label_maps_are_never_turned(name):
    config, there = load(f"{REPO}/configs/{name}.py"), load(f"{REPO}/configs/localmim_vitb.py")
    there.data.exif = "apply"
    kind, keep = (Segmentation, adapt) if name == "segment" else (MapEvaluation, lambda config: config)
    assert read(kind, keep(inheritance.inherit(config, there))).data.exif == "ignore"
    config.data.exif = "apply"
    with pytest.raises(ConfigError, match="data.exif=apply would turn images and not their label maps; use ignore"):
        read(kind, keep(inheritance.inherit(config, there)))


def test_compute_type_is_of_the_job_that_computes():
    config, there = load(f"{REPO}/configs/segment_eval.py"), load(f"{REPO}/configs/localmim_vitb.py")
    config.update(dict(compute_dtype="bfloat16", remat=True))
    here = read(MapEvaluation, inheritance.inherit(config, there))
    trained = load(f"{REPO}/configs/segment.py")
    trained.update(dict(encoder=there.encoder, channels=3, compute_dtype="float32"))
    found = encoders.computed_as(trained, here)
    assert (found.compute_dtype, found.remat, trained.compute_dtype) == ("bfloat16", True, "float32")
    assert found.image_size == here.image_size and found.taps == trained.taps


def test_padding_is_in_no_statistics():
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    images[0, 4:], images[0, :, 5:] = 0, 0
    normalise, shown = Normaliser((0.5,) * 3, (0.2,) * 3, per_image=True), jnp.array([[4, 5], [6, 8]])
    found = np.asarray(normalise(jnp.asarray(images), shown))
    alone = np.asarray(normalise(jnp.asarray(images[:1, :4, :5])))
    np.testing.assert_allclose(found[:1, :4, :5], alone, atol=1e-5)
    assert not found[0, 4:].any() and not found[0, :, 5:].any()
    back = np.asarray(normalise.undo(found, jnp.asarray(images), shown))
    np.testing.assert_allclose(back[0, :4, :5], images[0, :4, :5] / 255, atol=1e-6)


def test_a_swin_gives_maps_of_its_stages_at_any_size():
    made = encoders.for_maps(settings("preset=localmim_swin_b", "localmim_swinb").made())
    images = jax.ShapeDtypeStruct((1, 70, 100, 3), np.float32)
    maps = jax.eval_shape(lambda x: made.init_with_output(jax.random.key(0), x, (0, 1, 2, 3), method="maps")[0], images)
    assert [x.shape[1:] for x in maps] == [(18, 25, 128), (9, 13, 256), (5, 7, 512), (3, 4, 1024)]


def test_batch_norm_sees_the_batch_of_all_devices():
    """Loss, gradients and statistics on 8 devices are those on one."""
    program = textwrap.dedent("""
        import jax, jax.numpy as jnp, numpy as np
        from mim_jax import sharding
        from mim_jax.models.vit import ViT
        from mim_jax.objectives.segment import Segment
        made = Segment(encoder=ViT((2, 2), patch=4, width=8, depth=1, heads=1, final_norm=False), classes=3, taps=(0, 0, 0, 0),
                       channels=4, auxiliary_channels=4, dropout=0.0)
        key = jax.random.key(0)
        inputs = {"images": jax.random.normal(key, (8, 8, 8, 3)), "labels": jax.random.randint(key, (8, 8, 8), 0, 3)}
        variables = made.init(key, inputs)
        def loss(params, stats, inputs):
            (loss, _), new = made.apply({"params": params, "batch_stats": stats}, inputs, True, mutable=["batch_stats"])
            return loss, new
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        mesh = sharding.make_mesh()
        assert mesh.size == 8
        one = run(variables["params"], variables["batch_stats"], inputs)
        split = jax.device_put(inputs, sharding.batch_sharding(mesh))
        eight = run(*jax.device_put((variables["params"], variables["batch_stats"]), sharding.replicated(mesh)), split)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, eight)
    """)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO, env={**os.environ, "XLA_FLAGS": flags})

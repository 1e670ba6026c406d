"""A file of recorded tensors, and the report of what this project makes of them."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import tree
from mim_jax.convert import names, tables
from mim_jax.convert.layouts import to_ours
from mim_jax.models.vit import ViT

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
# Not the packing of windows into groups on the host (`plan_`), of which this project has none: any packing says the same.
COMPARED = (
    r"(out|target|loss|grad|derived|final|fixcoords|fixorder)/(?!.*\.plan_)|pred_grad$|gaussian_window|"
    r"nbins\w+/(pool\d+|bin)$"
)
# The released decoder of GreenMIM puts the visible tokens in each other's places, and all that follows from it is not ours to
# repeat. Such a case has the same keys once more below this prefix, made with every token in its own place: of the two,
# these are compared.
IN_PLACE = "fixorder/"
# `NAME_strideK`: every K-th element of the last axis of NAME.
PART = re.compile(r"((?:fix\w+/)?(?:out|target|loss)/.+)_stride(\d+)")
TOLERANCE = {
    "fixorder/loss/": 1e-5,
    "fixorder/out/": 1e-4,
    "fixorder/grad/": 1e-4,
    "fixcoords/loss/": 1e-5,
    "fixcoords/out/": 1e-4,
    "loss/": 1e-5,
    "out/": 1e-4,
    "grad/": 1e-4,
    "target/": 1e-4,
    "pred_grad": 1e-5,
    "gaussian_window": 1e-6,
    "derived/abs_pos": 2e-6,
    "derived/rel_pos": 2e-6,
    "derived/normalised": 1e-6,
    "derived/rpn/iou_max": 1e-6,
    "derived/stage": 1e-6,
    "derived/test_stage": 1e-6,
    "derived/": 0.0,
    "group/": 1e-6,
    "f64/lr": 1e-6,
    "f64/loss": 5e-6,
    "f64/grad_norm": 1e-4,
    "final/": 3e-6,
    "nbins": 1e-5,
}

# The limit of a tensor of which `CASE.tol.json` says what float32 cost the released code (largest value, largest difference
# to float64): so many times that, and at least as many roundings of its largest value.
FEW = 10
MEASURED = r"(fix\w+/)?(out|target|loss|grad)/"


class Case:
    """One recorded file: arrays by key, `meta`, and the sizes that follow from both.

    What was recorded in part is found by its plain name; `parts` has {name: (recorded name, K)}. `gaps`: what float32 cost
    the released code, {recorded name: relative to the largest value}.
    """

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}
            self.meta = json.loads(str(archive["meta"]))
        found = filter(None, (PART.fullmatch(key) for key in self.arrays))
        self.parts = {m.group(1): (m.group(0), int(m.group(2))) for m in found if m.group(1) not in self.arrays}
        for name, (recorded, _) in self.parts.items():
            self.arrays[name] = self.arrays.pop(recorded)
        measured = self.path.with_suffix(".tol.json")
        found = json.loads(measured.read_text()).get("tol", {}) if measured.exists() else {}
        self.gaps = {key: x[1] / x[0] for key, x in found.items() if re.match(MEASURED, key) and x[0]}

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        return self.arrays[key]

    def get(self, key):
        """The recorded tensor, or None where the case has none of that name."""
        return self.arrays.get(key)

    def under(self, prefix: str) -> dict:
        return {key[len(prefix) :]: x for key, x in self.arrays.items() if key.startswith(prefix)}

    @functools.cached_property
    def released_images(self):
        """[... b c h w], from the file that `meta` names (beside the case or in tests/golden) where it has none itself."""
        if "input/images" in self:
            return self["input/images"]
        named = self.meta.get("images")
        if not isinstance(named, str):
            raise KeyError(f"{self.path.name} has neither input/images nor the name of a file with them in its meta")
        places = [folder / named.split()[0] for folder in (self.path.parent, GOLDEN)]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{self.path.name} needs the images of {' or '.join(map(str, places))}: neither exists")
        with np.load(found, allow_pickle=False) as archive:
            return archive["input/images"]

    def images(self):
        """[... b c h w] -> [... b h w c]."""
        return jnp.asarray(np.moveaxis(self.released_images, -3, -1), jnp.float32)

    def encoder(self, prefix: str = "", **options) -> ViT:
        """The ViT of a case, by the shapes of its parameters, whose names begin with `prefix`."""
        width, channels, patch, _ = self[f"param/{prefix}patch_embed.proj.weight"].shape
        blocks = re.compile(rf"param/{re.escape(prefix)}blocks\.(\d+)\.")
        depth = 1 + max(int(m.group(1)) for m in map(blocks.match, self.arrays) if m)
        heads = self.meta.get("heads", width // 16)  # the recorded cases use heads of 16 where meta is silent
        h, w = self.released_images.shape[-2:]
        mlp = self[f"param/{prefix}blocks.0.mlp.fc1.weight"].shape[0] / width
        return ViT(
            grid=(h // patch, w // patch),
            patch=patch,
            channels=channels,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp,
            **options,
        )


FIXED_TABLES = tuple(pattern for pattern, *_ in tables.FIXED)  # released names of what is constant here


def from_released(state: dict, rules, ignore=FIXED_TABLES) -> dict:
    """{released name: array} -> our nested tree. Raises KeyError for a name that no rule and no ignore pattern explains."""
    flat = {}
    for name, array in state.items():
        named = names.our_name(name, rules)
        if named is not None:
            flat[named[0]] = to_ours(np.asarray(array), named[1])
        elif not tree.matches(ignore, name):
            raise KeyError(f"released parameter '{name}' {np.shape(array)} has no counterpart here")
    return tree.nest(flat)


@dataclasses.dataclass
class Report:
    """{recorded key: error}; `failed` lists what is beyond its tolerance. `parts`, `gaps`: those of the case."""

    parts: dict = dataclasses.field(default_factory=dict)
    gaps: dict = dataclasses.field(default_factory=dict)
    errors: dict = dataclasses.field(default_factory=dict)

    def add(self, key: str, ours, recorded, absolute: bool = False, floor: float = 1e-30):
        """The largest error, relative to the recorded tensor's largest value (at least `floor`) unless `absolute`."""
        if recorded is None:
            return
        name, step = self.parts.get(key, (key, None))
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        ours = ours[..., ::step] if step else ours
        if ours.shape != recorded.shape:
            raise ValueError(f"{name}: ours {ours.shape}, recorded {recorded.shape}")
        scale = 1.0 if absolute else max(np.abs(recorded).max(), floor)
        self.errors[name] = float(np.abs(ours - recorded).max() / scale) if ours.size else 0.0

    def failed(self) -> list[str]:
        return [key for key, error in self.errors.items() if not error <= self.limit(key)]

    def limit(self, key: str) -> float:
        by_kind = next(t for prefix, t in TOLERANCE.items() if key.startswith(prefix))
        return min(by_kind, FEW * max(self.gaps[key], np.finfo(np.float32).eps)) if key in self.gaps else by_kind

    def missed(self, case: Case) -> list[str]:
        """Recorded tensors of a kind that is compared which nobody compared."""
        wanted = (key for key in case.arrays if re.match(COMPARED, key) and IN_PLACE + key not in case)
        names = (self.parts.get(key, (key, None))[0] for key in wanted)
        return [name for name in names if name not in self.errors]


def run_and_look(made, variables, inputs):
    """-> loss, every submodule's output."""
    (loss, _), seen = made.apply(variables, inputs, capture_intermediates=True, mutable=["intermediates"])
    return loss, seen["intermediates"]


def capture(seen, path: str):
    """What the module gave, of a LayerNorm the normed tokens."""
    for part in path.split("/"):
        seen = seen[part]
    given = seen["__call__"][0]
    return np.asarray(given[-1] if isinstance(given, tuple) else given)


def look_at_encoder(report: Report, case: Case, seen, rows):
    """Every recorded `out/blockI[.part]`, `out/norm`, `out/tokens_in` of the encoder."""
    parts = {"rpe": "attn/rpe_k"}
    for key in case.under("out/"):
        block = re.fullmatch(r"block(\d+)(?:\.(\w+))?", key)
        if block and f"block_{int(block.group(1)):02d}" in seen["encoder"]:
            part = block.group(2)
            path = f"encoder/block_{int(block.group(1)):02d}" + (f"/{parts.get(part, part)}" if part else "")
            report.add(f"out/{key}", capture(seen, path)[rows], case[f"out/{key}"])
        elif key == "tokens_in":
            report.add("out/tokens_in", np.asarray(seen["encoder"]["tokens_in"][0])[rows], case.get("out/tokens_in"))
        elif key == "norm":
            report.add("out/norm", capture(seen, "encoder/norm")[rows], case.get("out/norm"))


def compare_gradients(report: Report, case: Case, made, params, rules, inputs, prefix: str = "grad/"):
    """Every gradient that is recorded below the prefix; a case may have none."""
    recorded = case.under(prefix)
    if not recorded:
        return
    flat = tree.flatten(jax.jit(jax.grad(lambda p: made.apply({"params": p}, inputs)[0]))(params))
    largest = max(float(np.abs(x).max()) for x in recorded.values())
    for name, expected in recorded.items():
        path, layout = names.our_name(name, rules) or ("", "")
        if path not in flat:  # carried unused by the released model: it has no gradient there either
            report.errors[prefix + name] = float(np.abs(expected).max())
            continue
        # A true gradient of zero is rounding noise in both: the cls bucket of the last block, when only cls is pooled.
        noise = np.abs(expected).max() < 1e-6 * largest
        report.add(prefix + name, flat[path], to_ours(expected, layout), floor=largest if noise else 1e-30)

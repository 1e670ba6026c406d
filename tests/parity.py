"""Recorded tensors of the released code against this project: `python tests/parity.py CASE.npz ...` prints JSON.

Sizes come from a case's `meta` (or its parameters), randomness from its recorded draws. For every recorded output, loss
and gradient: the largest error relative to the tensor's largest value. Exits with 1 when any is beyond its tolerance,
or when a recorded tensor of a kind listed in tests/recorded.py was not compared.
"""

import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import jax
from ports.beit import BeitPort
from ports.classifiers import ClassifierPort
from ports.coco_ap import CocoApPort
from ports.detection import BackbonePort, DetectionsPort, HeadsPort, ProposalsPort, PyramidPort, RoiAlignPort
from ports.detectors import CascadePort, DetectorPort, VitaePort
from ports.greenmim import GreenmimPort
from ports.hog import HogPort, MaskfeatHogPort
from ports.localmim import LocalSwinPort, LocalVitPort
from ports.lomar import LomarPort
from ports.mae import MaePort
from ports.maskfeat import MaskfeatPort
from ports.scale_jitter import ScaleJitterPort
from ports.simmim import SimmimPort
from ports.swin_classifier import SwinClassifierPort
from ports.upernet import UPerNetSwinPort, UPerNetVitPort
from recorded import Case, Report
from recorded_run import compare_run


def has(*keys):
    """-> whether a case has all these recorded tensors."""
    return lambda case: all(key in case for key in keys)


# (name, test on the case, port); the first test that holds decides
PORTS = (
    ("LoMaR", has("param/encoder_pred.weight", "param/mask_token"), LomarPort),
    ("ViT classifiers", has("param/head.weight", "param/blocks.0.attn.qkv.weight"), ClassifierPort),
    ("GreenMIM", has("param/decoder_embed.weight", "param/encoder.layers.0.blocks.0.attn.qkv.weight"), GreenmimPort),
    ("MAE", has("param/decoder_embed.weight", "param/decoder_blocks.0.attn.qkv.weight"), MaePort),
    ("SimMIM", has("param/encoder.mask_token", "param/decoder.0.bias"), SimmimPort),
    ("BEiT", has("param/lm_head.weight", "param/mask_token"), BeitPort),
    ("MaskFeat", has("param/pred_head.projections.0.weight", "param/mask_token"), MaskfeatPort),
    ("LocalMIM on a ViT", has("param/decoder.0.embed.weight", "param/blocks.0.attn.qkv.weight"), LocalVitPort),
    ("LocalMIM on a Swin", has("param/decoder.0.embed.weight", "param/encoder.patch_embed.norm.weight"), LocalSwinPort),
    ("Swin classifiers", has("param/head.weight", "param/layers.0.blocks.0.attn.qkv.weight"), SwinClassifierPort),
    ("large-scale jitter", has("input/polygons_0", "out/kept_polygon_0"), ScaleJitterPort),
    ("COCO's AP", has("out/bbox/stats", "out/segm/stats"), CocoApPort),
    ("UPerNet on a ViT", has("param/decode_head.conv_seg.weight", "param/backbone.pos_embed"), UPerNetVitPort),
    ("UPerNet on a Swin", has("param/decode_head.conv_seg.weight", "param/backbone.norm0.weight"), UPerNetSwinPort),
    ("MaskFeat's HOG", lambda case: any(key.startswith("ambiguous/") for key in case.arrays), MaskfeatHogPort),
    ("detectors on a ViT", has("param/backbone.net.patch_embed.proj.weight"), DetectorPort),
    ("ViTAE's detector on a ViT", has("param/backbone.fpn1.1.ln.weight", "param/rpn_conv.0.ln.weight"), VitaePort),
    ("a detector's cascade", has("param/box_head.0.conv1.weight"), CascadePort),
    ("a detector's heads", has("param/box_head.conv1.weight", "input/roi7"), HeadsPort),
    ("a detector's proposals", has("param/objectness_logits.weight", "input/p2"), ProposalsPort),
    ("a detector's pyramid", has("param/simfp_2.0.weight", "input/last_feat"), PyramidPort),
    ("a detector's ViT", has("param/blocks.0.attn.qkv.weight", "out/last_feat"), BackbonePort),
    ("RoIAlign", has("out/roi7", "input/p2"), RoiAlignPort),
    ("detections", has("input/mask_probs", "input/deltas"), DetectionsPort),
    ("HOG", lambda case: any(key.startswith("nbins") for key in case.arrays), HogPort),
)


def port_of(case: Case):
    """The counterpart of a recorded model, by the tensors it has. Raises ValueError for one that is not here."""
    for _, is_one, port in PORTS:
        if is_one(case):
            return port(case)
    known = ", ".join(name for name, _, _ in PORTS)
    raise ValueError(f"the model '{case.meta.get('model')}' has no counterpart here; known: {known}")


def compare(path: str) -> dict:
    """-> {"errors": {key: error}, "failed": [...], "not_compared": [...], "passed": bool}."""
    case = Case(path)
    report = Report(case.parts, case.gaps)
    with jax.default_matmul_precision("highest"):
        port = port_of(case)
        if "lr_sched" in case.meta:
            compare_run(report, case, port)
        else:
            port.compare(report)
    missed, failed = report.missed(case), report.failed()
    jax.clear_caches()  # the programs of all cases together take 4 GB
    return {
        "model": case.meta.get("model"),
        "passed": not failed and not missed,
        "failed": failed,
        "not_compared": missed,
        "errors": report.errors,
    }


def main(paths):
    results = {}
    for path in paths:
        try:
            results[os.path.basename(path)] = compare(path)
        except Exception as error:  # one case that cannot be compared must not hide the others
            results[os.path.basename(path)] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results, indent=1))
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1:]))

"""Where two implementations of ViTDet (arXiv 2203.16527) differ: detectron2's, whose numbers its authors report, and that of
github.com/ViTAE-Transformer/ViTDet in mmdetection, which the baselines of LoMaR's table 2 are of."""

import dataclasses

from mim_jax.models.layers import LAYER_NORM_EPS


@dataclasses.dataclass(frozen=True)
class Framework:
    """Of the encoder: `final_norm`, of the tokens before the pyramid; `scaled_query`, the relative positions per axis are
    multiplied by the scaled q; `own_table`, positions are resized once, when weights are loaded, not in every forward pass.

    Of the detector: `halving`, an upsampling halves the width; `eps` of the LayerNorms after convolutions, except between the
    pyramid's upsamplings; `proposal_norms`, such norms in the region proposals too; `claim`: see boxes/matching.py.
    """

    final_norm: bool = False
    scaled_query: bool = False
    own_table: bool = False
    halving: bool = True
    eps: float = LAYER_NORM_EPS
    proposal_norms: bool = False
    claim: float = 0.0


FRAMEWORKS = {
    "detectron2": Framework(),
    "vitae": Framework(True, True, True, halving=False, eps=1e-5, proposal_norms=True, claim=0.3),
}

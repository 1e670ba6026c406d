"""What the papers say of their methods' cost, and what an image costs here: a sentence for each, from the files of
experiments/efficiency.py."""

from typing import NamedTuple

from experiments import efficiency

HERE = (
    "here a step of as many images costs {flops} times the FLOPs, by estimate {tpu-v3-8} times the time on a TPU v3 and {a100} "
    "on an A100, and {cpu} as measured on a CPU"
)


class Claim(NamedTuple):
    """words: the paper's, to which the sentence adds ours. figure: one of efficiency.COMPARISONS. of: (group, config); each
    is compared with the first of its group."""

    words: str
    figure: str
    of: tuple[tuple[str, str], ...]


def at(sizes, config: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{size}px", f"configs/{config}:size={size}") for size in sizes)


CLAIMS = (
    Claim("MAE takes 2.5 and 3.1 times LoMaR's hours at 384 and 448 px", "resolution", at((384, 448), "mae_vitb.py")),
    Claim("MAE takes .88 of LoMaR's hours at 224 px", "resolution", at((224,), "mae_vitb.py")),
    Claim("BEiT takes 5.0 and 5.3 times LoMaR's hours at 384 and 448 px", "resolution", at((384, 448), "beit_vitb.py")),
    Claim(
        "To one accuracy MAE takes 3.1 and MaskFeat 5.6 times LocalMIM's hours on ViT-B",
        "localmim",
        (("vitb", "configs/mae_vitb.py"), ("vitb", "configs/maskfeat_vitb.py")),
    ),
    Claim(
        "To one accuracy SimMIM at 192 px takes 3.6 and GreenMIM 6.4 times LocalMIM's hours on Swin-B",
        "localmim",
        (("swinb", "configs/simmim_swinb.py"), ("swinb", "configs/greenmim_swinb.py")),
    ),
)


def sentence(claim: Claim) -> str | None:
    """None where something that it says is not recorded."""
    costs, groups = efficiency.recorded(claim.figure), efficiency.COMPARISONS[claim.figure].groups
    said = {}
    for measure in efficiency.COMPARISONS[claim.figure].measures:
        known = costs.get(measure, {})
        pairs = [(known.get(config), known.get(groups[group][0].config)) for group, config in claim.of]
        if None in sum(pairs, ()):
            return None
        said[measure] = " and ".join(f"{cost / first:.2f}" for cost, first in pairs)
    return f"- {claim.words}, says the paper: {HERE.format(**said)}."

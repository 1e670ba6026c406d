"""`python -m experiments.against_torch --torch_python=.venv-torch/bin/python`: our steps beside twins in PyTorch, in turn.

ViT-B/16, float32, forward + backward + AdamW: LoMaR, MAE and LocalMIM beside ViTs of the same sequences, parameters and
products (experiments/twins/), in processes of their own that wait for each other on the same cores; the rate of a plain matrix
product in both; what iRPE is of LoMaR's step, by the step without it; what HOG is of LocalMIM's; and 9 windows at 448 px
against 4 at 224. Writes results/against_torch_cpu.json. `make test-torch` makes such an environment.
"""

import argparse
import pathlib
import sys
import time

import numpy as np

from experiments.in_turn import Waiting, serve

LOMAR, MAE, LOCALMIM = (f"configs/{name}_vitb.py" for name in ("lomar", "mae", "localmim"))
WITHOUT_IRPE, LARGE = f"{LOMAR}:pos=absolute", f"{LOMAR}:size=448"
# (ours, those with a twin beside) of what is measured in turn: few at a time, as each holds a state.
ROUNDS = (((LOMAR, WITHOUT_IRPE), (LOMAR,)), ((MAE,), (MAE,)), ((LOCALMIM,), (LOCALMIM,)), ((LOMAR, LARGE), ()))
PRODUCT, TARGETS = "matrix product", " targets"  # turns beside those of configs; of targets: alone


def serve_jax(asked):
    """This project's steps."""
    import jax

    from mim_jax.jobs.step_costs import Subject, timed, yardstick_of
    from mim_jax.jobs.step_program import Setting

    jax.config.update("jax_platforms", "cpu")
    setting = Setting(asked.batch_size, "float32")
    subjects = {spec: Subject(spec, setting) for spec in asked.specs}
    product = yardstick_of(subjects.values())
    turns = {spec: subject.run for spec, subject in subjects.items()}
    for spec, s in subjects.items():
        if s.targets:
            turns[spec + TARGETS] = lambda s=s: timed(s.targets, s.state, s.images)[1]
    facts = {"flops": {spec: s.made.training_flops() for spec, s in subjects.items()}, "product_flops": product.flops}
    serve(facts | {"shape": product.shape, "turns": list(turns)}, turns | {PRODUCT: product.run})


def serve_torch(asked):
    """Their twins."""
    import torch

    from experiments.twins.methods import Step

    torch.set_num_threads(asked.cores)
    turns = {spec: Step(spec, asked.batch_size).run for spec in asked.specs}
    product, flops = torch_product(torch, *asked.shape)
    serve({"torch": torch.__version__, "product_flops": flops, "turns": list(turns)}, turns | {PRODUCT: product})


def torch_product(torch, tokens: int, width: int):
    """-> the two products of an MLP, over and over, as MatrixProduct of jobs/step_costs.py has them, and their FLOPs."""
    x, a, b = torch.randn(tokens, width), torch.randn(width, 4 * width), torch.randn(4 * width, width)
    a, b, between = a * width**-0.5, b * (4 * width) ** -0.5, torch.empty(tokens, 4 * width)
    pair = 16 * tokens * width**2
    repeat = max(1, int((1e11 if width > 256 else 1e9) / pair))

    def product():
        for _ in range(repeat):
            torch.matmul(x, a, out=between)
            torch.matmul(between, b, out=x)

    return product, repeat * pair


def measured(ours, twins, asked) -> dict:
    """One of ROUNDS -> {"jax", "torch": {turn: {"clock", "cpu": seconds, in order}}}, and "facts" of both."""
    flags = [f"--batch_size={asked.batch_size}", f"--cores={asked.cores}"]
    start = lambda who, python, *more: Waiting(
        [python, "-m", "experiments.against_torch", f"--serve={who}", *flags, *more], asked.cores
    )
    with start("jax", sys.executable, *ours) as jax:
        shape = [f"--shape={n}" for n in jax.facts["shape"]]
        with start("torch", asked.torch_python, *shape, *twins) as torch:
            both = {"jax": jax, "torch": torch}
            turns = sorted(((who, turn) for who, one in both.items() for turn in one.facts["turns"]), key=lambda x: x[1])
            turns += [("jax", PRODUCT), ("torch", PRODUCT)]  # and of a config its two steps one after the other
            found = {who: {turn: {"clock": [], "cpu": []} for name, turn in turns if name == who} for who in both}
            for step in range(asked.steps + 1):
                for who, turn in turns:
                    for kind, seconds in both[who].turn(turn).items():
                        found[who][turn][kind] += [seconds] if step else []  # the first also allocates
            return found | {"facts": {who: one.facts for who, one in both.items()}}


def ratio(a, b) -> float:
    """The median of the ratios between neighbours in time."""
    return float(np.median(np.divide(a, b)))


def compared(spec: str, one: dict, batch_size: int, kind: str) -> dict:
    """The numbers of a config and its twin from their round, by the clock or by CPU seconds."""
    seconds = {who: one[who][spec][kind] for who in ("jax", "torch")}
    flops = one["facts"]["jax"]["flops"][spec] * batch_size
    found = {"config": spec, "seconds": kind, "jax_of_torch": ratio(seconds["jax"], seconds["torch"])}
    for who in seconds:
        share = flops / one["facts"][who]["product_flops"]
        found[f"{who}_median_s"] = float(np.median(seconds[who]))
        found[f"{who}_share_of_matmul_rate"] = share * ratio(one[who][PRODUCT][kind], seconds[who])
    found["targets_share_of_step"] = ratio(one["jax"][spec + TARGETS][kind], seconds["jax"])
    return found


def report(asked) -> dict:
    named = lambda spec: f"{spec}{',' if ':' in spec else ':'}toy" if asked.toy else spec
    rounds = [measured([*map(named, ours)], [*map(named, twins)], asked) for ours, twins in ROUNDS]
    twins = [(named(spec), one) for one, (_, twins) in zip(rounds, ROUNDS) for spec in twins]
    first, last, kinds = rounds[0]["jax"], rounds[-1]["jax"], ("clock", "cpu")
    of = lambda one, a, b: {kind: ratio(one[named(a)][kind], one[named(b)][kind]) for kind in kinds}
    rate = lambda who: [one["facts"][who]["product_flops"] / s for one in rounds for s in one[who][PRODUCT]["clock"]]
    return {
        "results": [compared(spec, one, asked.batch_size, kind) for spec, one in twins for kind in kinds],
        "step_without_irpe": of(first, WITHOUT_IRPE, LOMAR),
        "step_448px_of_224px": of(last, LARGE, LOMAR),
        "matmul_flops_per_second": {who: float(np.median(rate(who))) for who in ("jax", "torch")},
        "torch": rounds[0]["facts"]["torch"]["torch"],
        "rounds": rounds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", default=sys.executable, help="the interpreter of an environment with PyTorch")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="measured rounds, after one that is not")
    parser.add_argument("--toy", action="store_true", help="tiny models: a smoke test")
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile, for the record")
    parser.add_argument("--out", default="results/against_torch_cpu.json")
    parser.add_argument("--serve", choices=("jax", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, action="append", help=argparse.SUPPRESS)
    parser.add_argument("specs", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return {"jax": serve_jax, "torch": serve_torch}[asked.serve](asked)
    begun, settings = time.perf_counter(), {name: getattr(asked, name) for name in ("batch_size", "cores", "steps", "beside")}
    found = report(asked)
    from mim_jax.provenance import this_run, write_result  # wakes JAX, and nothing else is to run beside

    settings |= {"compute_dtype": "float32", "toy": asked.toy}
    write_result(pathlib.Path(asked.out), found, this_run(settings, time.perf_counter() - begun))


if __name__ == "__main__":
    main()

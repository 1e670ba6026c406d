"""On the card: torch.compile'd twins of the steps, in bf16."""

import importlib.util
import time

import numpy as np

from experiments.gpu.steps import BASE, LARGE

WITHOUT = "PyTorch is not installed: nothing is compared with it"


def measure(toy: bool, tell):
    """Each told as it is there; the JAX of this process has the CPU alone, and its memory of the card is PyTorch's."""
    if importlib.util.find_spec("torch") is None:
        return tell({"skipped": WITHOUT})
    import torch

    if not toy and not torch.cuda.is_available():
        return tell({"skipped": f"PyTorch {torch.__version__} sees no GPU: nothing is compared with it"})

    from experiments.twins.methods import Step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    specs = [BASE[0] + ":toy"] if toy else [spec for spec in (*BASE, *LARGE) if "_vitb" in spec]
    found = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "results": []}
    torch.set_float32_matmul_precision("high")
    for spec in specs:
        begun, step = time.perf_counter(), None
        try:
            step = Step(spec, 8 if toy else 64, device, compiled=not toy)
            found["results"].append({"config": spec, **of_step(step, begun)})
        except Exception as error:  # whatever a compiler may raise: the others are still measured
            found["results"].append({"config": spec, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        finally:
            del step  # with what it has of the card's memory
        tell(found)
        torch.compiler.reset()  # or its cache keeps the model


def of_step(step, begun: float, steps: int = 20) -> dict:
    for _ in range(3):  # compiles, and allocates
        step.run()
    first = time.perf_counter() - begun
    seconds = [step.run() for _ in range(steps)]
    median, p90, queued = float(np.median(seconds)), float(np.percentile(seconds, 90)), step.run(steps)
    rate = len(step.images) / queued
    return {"step_median_s": median, "step_p90_s": p90, "queued_s": queued, "images_per_second": rate, "first_steps_s": first}

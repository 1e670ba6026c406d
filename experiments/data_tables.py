"""The tables of results/README.md about data, cards and PyTorch: HEAD and rows of each, from the reports."""

WORDS = {
    "decode_whole": "decoding alone, the floor",
    "crop": "the crop decoded",
    "crop_resize": "and resized",
    "crop_resize_by_tensorflow": "and resized by TensorFlow instead, as before, not mirrored",
    "crop_resize_randaugment": "and resized, then RandAugment (2, 9, .5)",
    "path": "training batches",
    "path_resize_on_device": "training batches, `data.resize=device`",
    "path_repeat_4": "training batches, `data.repeat=4`",
    "path_objects": "training batches of detection",
}
INPUT = ("of one image", "CPU ms", "images/s of a core", "of the floor")
STARTS = ("data", "images", "first start, s", "second start, s", "its peak, MB", "of that imports, MB")
TORCH = (
    "config",
    "seconds",
    "our step, s",
    "PyTorch's, s",
    "ours / PyTorch's",
    "of the matrix rate, ours",
    "PyTorch's",
    "targets",
)
STEPS = ("base", "large", "at_448")  # parts of experiments/check_gpu.py
CARDS = (
    "config",
    "images",
    "a step in a queue, ms",
    "alone, ms",
    "PyTorch's alone, ms",
    "images/s",
    "of the peak",
    "of the matrix rate",
    "estimate, ms",
    "kernels",
    "busy, ms",
    "where",
    "memory, GB",
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce")
SENT = (
    "config",
    "compiled for",
    "devices",
    "images a device",
    *(f"{kind}: MB in how many" for kind in KINDS),
    "of them asynchronous",
)


def of_torch(run: dict) -> list[list[str]]:
    """Of experiments/against_torch.py."""
    found = []
    for r in run["results"]:
        shares = [f"{r[f'{who}_share_of_matmul_rate']:.0%}" for who in ("jax", "torch")]
        seconds = [f"{r[f'{who}_median_s']:.2f}" for who in ("jax", "torch")]
        name = f"`{r['config'].removeprefix('configs/')}`"
        kind = {"clock": "by the clock", "cpu": "of the CPU"}[r["seconds"]]
        found.append([name, kind, *seconds, f"{r['jax_of_torch']:.2f}", *shares, f"{r['targets_share_of_step']:.1%}"])
    return found


def of_cards(run: dict) -> list[list[str]]:
    """Of experiments/check_gpu.py: steps of parts that measured some."""
    found, twins = [], {r["config"]: r.get("step_median_s") for r in run.get("torch", {}).get("results", [])}
    for part in STEPS:
        for r in run.get(part, {}).get("results", []):
            batch, queued, profile = run[part]["batch_size"], r["queued_s"], r.get("profile", {})
            known = r.get("model_flops_share"), r["share_of_matmul_rate"]  # the peak of some cards is not known
            shares = [f"{x * r['step_median_s'] / queued:.0%}" if x else "–" for x in known]
            parts = ", ".join(f"{name} {x:.0%}" for name, x in profile.get("shares_of_busy", {}).items() if x >= 0.02)
            ms = lambda seconds: f"{1e3 * seconds:.1f}" if seconds else "–"
            seconds = [ms(queued), ms(r["step_median_s"]), ms(twins.get(r["config"]))]
            told = [f"{profile['kernels']:.0f}" if "kernels" in profile else "–", ms(profile.get("busy_s")), parts or "–"]
            rate, memory = f"{batch / queued:.0f}", f"{r['step_memory_bytes'] / 1e9:.1f}"
            name = f"`{r['config'].removeprefix('configs/')}`"
            found.append([name, str(batch), *seconds, rate, *shares, ms(r.get("estimate", {}).get("step_s")), *told, memory])
    return found


def of_communication(run: dict) -> list[list[str]]:
    """Of `benchmark --compile_only --fsdp`."""
    found, asked = [], run["provenance"]["settings"]
    for r in run["results"]:
        devices = r.get("devices", run["provenance"]["device"]["count"])
        images = r.get("per_device") or asked["batch_size"] // devices
        sent = {kind: r["communication"].get(kind, {"count": 0, "bytes": 0, "asynchronous": 0}) for kind in KINDS}
        numbers = [f"{x['bytes'] / 1e6:.0f} in {x['count']:.0f}" if x["count"] else "–" for x in sent.values()]
        begun, total = (sum(x[key] for x in r["communication"].values()) for key in ("asynchronous", "count"))
        name = f"`{r['config'].removeprefix('configs/')}`"
        target = run.get("target", run["provenance"]["device"]["kind"])
        found.append([name, target, str(devices), str(images), *numbers, f"{begun:.0f} of {total:.0f}"])
    return found


def of_input(run: dict) -> list[list[str]]:
    """Of `benchmark --input`."""
    cost, rate, share = "{cpu_ms_per_image:.2f}", "{images_per_second_per_core:.0f}", "{share_of_floor:.0%}"
    return [[WORDS[r["part"]], *(words.format(**r) for words in (cost, rate, share))] for r in run["results"]]


def of_starts(run: dict) -> list[list[str]]:
    """Of experiments/start_at_scale.py. Made-up lists are there before the first start, which is then none."""
    found = []
    for name, starts in run.items():
        if name == "provenance":
            continue
        first, *later = starts if "made up" not in name else (None, *starts)
        seconds = sorted(start["seconds"] for start in later)
        span = " to ".join(dict.fromkeys(f"{second:.1f}" for second in (seconds[0], seconds[-1])))
        peak, imports = (max(start[key] for start in later) for key in ("mb_peak", "mb_imports"))
        begun = f"{first['seconds']:.1f}" if first else "–"
        found.append([name, f"{later[0]['examples']:,}", begun, span, str(peak), str(imports)])
    return found

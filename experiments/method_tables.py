"""Tables of what methods reach: the quickstart, variants, all methods side by side, fine-tuning."""

import statistics

from experiments.tables import commits, load, percent, table


def quickstart() -> str:
    runs = load("quickstart_seed*.json")
    column = lambda key: [run[key] for run in runs]
    gains = [run["probe_test"] - run["random_encoder_test"] for run in runs]
    rows = [
        [
            "linear probe, test accuracy %",
            percent(column("probe_test")),
            percent(column("random_encoder_test")),
            percent(column("raw_pixel_test")),
        ],
        ["kNN, test accuracy %", percent(column("knn_test")), percent(column("knn_random")), ""],
    ]
    errors = [
        [
            "held-out hidden patches, squared error",
            *(f"{statistics.mean(column(key)):.3f}" for key in ("masked_mse", "inpainting_mse", "zero_mse")),
        ]
    ]
    first, seconds = runs[0], ", ".join(f"{run['seconds']:.0f}" for run in runs)
    note = (
        f"{len(runs)} seeds, {first['test_examples']} test tiles of 16 photographs, {first['steps']} steps; gain of the "
        f"probe over the random encoder in each: {', '.join(f'{100 * gain:+.1f}' for gain in gains)} points. "
        f"Seconds of pretraining and probe: {seconds} on two CPU cores, the longer ones while "
        "other work ran beside. "
        f"Commits: {commits(runs)}."
    )
    return "\n\n".join(
        [
            table(["", "LoMaR", "random encoder", "raw pixels"], rows),
            table(["", "LoMaR", "harmonic inpainting", "each patch's mean"], errors),
            note,
        ]
    )


COMPARED = {
    "LoMaR": "quickstart_seed*.json",
    "LoMaR, predicting after blocks 1 and 3, decoupled": "compare_lomar_decoupled_seed*.json",
    "LocalMIM, HOG after blocks 1 and 3": "compare_localmim_seed*.json",
    "the same, decoupled": "compare_localmim_decoupled_seed*.json",
    "the same, top layer only": "compare_localmim_top_seed*.json",
}


def compare() -> str:
    rows, every = [], []
    for label, pattern in COMPARED.items():
        runs = load(pattern)
        every += runs
        gains = [run["probe_test"] - run["random_encoder_test"] for run in runs]
        rows.append(
            [
                label,
                percent([run["probe_test"] for run in runs]),
                percent(gains),
                percent([run["knn_test"] for run in runs]),
                f"{statistics.median(run['seconds_pretrain'] for run in runs):.0f}",
                str(len(runs)),
            ]
        )
    head = ["", "linear probe, test %", "gain over its random encoder, points", "kNN, test %", "pretraining, s", "seeds"]
    steps = {run["steps"] for run in every}
    note = (
        f"{', '.join(map(str, steps))} steps of 16 images. Seconds: median, on two CPU cores that other work "
        f"shared. Commits: {commits(every)}."
    )
    return table(head, rows) + "\n\n" + note


METHODS = {
    "lomar": "LoMaR",
    "localmim": "LocalMIM",
    "mae": "MAE",
    "simmim": "SimMIM",
    "maskfeat": "MaskFeat",
    "beit": "BEiT",
    "beit_windows": "BEiT with LoMaR's windows",
    "greenmim": "GreenMIM",
}


JOINED = {"lomar": "LoMaR", "localmim": "LocalMIM", "lomar_localmim": "joined: LocalMIM in LoMaR's windows"}
LATE = {"lomar": "LoMaR, mask tokens from the first block", "mae": "MAE"}
LATE |= {f"lomar_from{i}": f"LoMaR, mask tokens from block {i}" for i in (1, 2, 3)}
ALREADY = {"lomar": "quickstart_seed*.json", "localmim": "compare_localmim_seed*.json"}  # at this number of images


def baselines() -> str | None:
    return methods_compared(METHODS, {m: f"baseline_images_{m}_seed*.json" for m in METHODS}, "baseline")


def joined() -> str | None:
    return methods_compared(JOINED, {m: ALREADY.get(m, f"joined_images_{m}_seed*.json") for m in JOINED}, "joined")


def late() -> str | None:
    return methods_compared(
        LATE, {m: "quickstart_seed*.json" if m == "lomar" else f"late_images_{m}_seed*.json" for m in LATE}, "late"
    )


def methods_compared(methods: dict, same_images: dict, name: str) -> str | None:
    """Methods at one number of images, whose files are named, and in one wall time. None: nothing recorded."""
    runs = {("images", m): load(same_images[m]) for m in methods}
    runs |= {("time", m): load(f"{name}_time_{m}_seed*.json") for m in methods}
    if not load(f"{name}_images_*.json"):
        return None
    every = [run for found in runs.values() for run in found]
    column = lambda found, key: [run[key] for run in found if key in run]
    accuracy = lambda found, key: percent(column(found, key)) if found else "–"
    median = lambda found, key, form, scale=1: (
        format(statistics.median(column(found, key)) / scale, form) if column(found, key) else "–"
    )
    rows = []
    for method, title in methods.items():
        images, time = runs["images", method], runs["time", method]
        rows.append(
            [
                title,
                median(images + time, "images_per_second", ".0f"),
                median(images + time, "flops_per_image", ".2f", 1e9),
                median(images + time, "parameters", ".2f", 1e6),
                accuracy(images or time, "random_encoder_test"),
                accuracy(images, "probe_test"),
                accuracy(images, "knn_test"),
                median(time, "steps", ".0f"),
                accuracy(time, "probe_test"),
                accuracy(time, "knn_test"),
            ]
        )
    head = [
        "",
        "images/s",
        "GFLOP/image",
        "parameters, M",
        "random encoder: probe, test %",
        "same images: probe, test %",
        "kNN, test %",
        "same time: steps",
        "probe, test %",
        "kNN, test %",
    ]

    def span(runs, key, scale=1, form=".0f"):
        low, high = (format(f(column(runs, key)) * scale, form) for f in (min, max))
        return low if low == high else f"{low} to {high}"

    by = {b: [run for (budget, _), found in runs.items() if budget == b for run in found] for b in ("images", "time")}
    parts = [f"Same images: {span(by['images'], 'steps')} steps."] if by["images"] else []
    parts += [f"Same time: {span(by['time'], 'train_seconds')} s of training."] if by["time"] else []
    parts += [
        f"kNN of random encoders: {span(every, 'knn_random', 100, '.1f')} %.",
        f"Seeds: {', '.join(map(str, sorted({run['seed'] for run in every})))}.",
        f"Commits: {commits(every)}.",
    ]
    return table(head, rows) + "\n\n" + " ".join(parts)


def dense() -> str | None:
    """One linear layer on the frozen maps of the methods. None: nothing recorded."""
    found = {method: load(f"dense_{method}_seed*.json") for method in METHODS}
    of_lomar = lambda run: run | {"pretrained": run["linear"], "random": run["linear_scratch"]}
    found["lomar"] = [of_lomar(run) for run in load("segment_seed*.json")]
    every = [run for runs in found.values() for run in runs]
    if not every:
        return None
    rows = []
    for method, runs in found.items():
        pretrained, random = ([run[name]["test/miou"] for run in runs] for name in ("pretrained", "random"))
        if runs:
            gains = [a - b for a, b in zip(pretrained, random)]
            rows.append([METHODS[method], *map(percent, (pretrained, random, gains)), str(len(runs))])
    head = ["", "pretrained: mIoU, test %", "random weights", "gain, points", "seeds"]
    return table(head, rows) + f"\n\n{every[0]['pretrained']['steps']} steps of the layer. Commits: {commits(every)}."


def segmentation() -> str | None:
    """`make segment`. None: nothing recorded."""
    runs = load("segment_seed*.json")
    if not runs:
        return None
    rows = []
    for head, title in (("upernet", "UPerNet, all trained"), ("linear", "one linear layer, encoder frozen")):
        column = lambda name, key: [run[name][key] for run in runs]
        for name, start in ((head, "pretrained"), (f"{head}_scratch", "random weights")):
            cells = [percent(column(name, f"test/{key}")) for key in ("miou", "pixel_accuracy")]
            rows.append([title, start, *cells, f"{statistics.median(column(name, 'steps')):.0f}"])
    head = ["", "encoder", "mIoU, test %", "pixel accuracy, test %", "steps"]
    return table(head, rows) + f"\n\n{len(runs)} seeds. Commits: {commits(runs)}."


SHOWN_AP = ("AP", "AP50", "AP75", "AP_small", "AP_medium")


def detection() -> str | None:
    """`make detect`. None: nothing recorded."""
    runs = load("detect_seed*.json")
    if not runs:
        return None
    rows = []
    for name, start in (("detect", "pretrained"), ("detect_scratch", "random weights")):
        for kind in ("box", "mask"):
            rows.append([kind, start, *(percent([run[name][f"{kind}/{key}"] for run in runs]) for key in SHOWN_AP)])
    steps = runs[0]["detect"]["steps"]
    return table(["", "encoder", *SHOWN_AP], rows) + f"\n\n{len(runs)} seeds, {steps} steps. Commits: {commits(runs)}."


FINETUNED = {"lomar": "LoMaR", "localmim": "LocalMIM", "mae": "MAE"}


def finetune() -> str | None:
    """Fine-tuning from pretrained and from random weights. None: nothing recorded."""
    rows, every = [], load("finetune_*.json")
    if not every:
        return None
    for method, title in FINETUNED.items():
        runs = {kind: load(f"finetune_{method}_{kind}_seed*.json") for kind in ("pretrained", "scratch", "scratch_long")}
        top1 = {kind: {run["seed"]: run["test_top1"] for run in found} for kind, found in runs.items()}
        gains = [top1["pretrained"][seed] - top1["scratch"][seed] for seed in top1["pretrained"] if seed in top1["scratch"]]
        shown = {kind: percent(list(found.values())) if found else "–" for kind, found in top1.items()}
        steps = sorted(run["steps"] for run in runs["scratch_long"])
        rows.append(
            [
                title,
                shown["pretrained"],
                shown["scratch"],
                percent(gains) if gains else "–",
                shown["scratch_long"],
                " to ".join(map(str, sorted({*steps[:1], *steps[-1:]}))) if steps else "–",
                str(len(gains)),
            ]
        )
    head = [
        "",
        "pretrained, test top-1 %",
        "from scratch, same steps",
        "gain, points",
        "from scratch, same FLOPs in all",
        "its steps",
        "seeds",
    ]
    first = every[0]
    short = {run["steps"] for run in every if run["kind"] != "scratch_long"}
    note = (
        f"{', '.join(map(str, sorted(short)))} steps of {first['batch_size']} images after "
        f"{', '.join(map(str, sorted({run['pretrain_steps'] for run in every})))} of pretraining; {first['test_examples']} "
        "test tiles, looked at once per run. LocalMIM and MAE have the same encoder and seeds, so their runs from "
        f"scratch differ in length only. Commits: {commits(every)}."
    )
    return table(head, rows) + "\n\n" + note

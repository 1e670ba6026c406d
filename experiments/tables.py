"""What every table of results/ is made with: the files, their commits, lines of Markdown."""

import json
import pathlib
import statistics

from mim_jax import provenance

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"


def load(pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def commits(runs) -> str:
    """Of everything the results were made of, as far as it is known."""
    known = {part["git"][:9] for run in runs for part in provenance.parts(run) if part["git"] != provenance.UNKNOWN}
    return ", ".join(sorted(known))


def setting(run: dict) -> str:
    """`float32, batch 8` of a benchmark."""
    asked = run["provenance"]["settings"]
    return f"{asked['compute_dtype']}, batch {asked['batch_size']}"


def table(head, rows) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def percent(values) -> str:
    """Mean and, for several seeds, the standard deviation between them."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"

"""`python -m experiments.make_tables`: the tables of README.md and results/README.md, between markers, from results/*.json.

`--check` writes nothing and exits with 1 when a page is not what the files say.
"""

import functools
import re
import sys

from experiments import cost_tables, efficiency, method_tables
from experiments.tables import REPO, RESULTS

PAGES = (REPO / "README.md", RESULTS / "README.md")
TABLES = {
    "quickstart": method_tables.quickstart,
    "compare": method_tables.compare,
    "speed": cost_tables.speed,
    "costs": cost_tables.costs,
    "claims": cost_tables.claimed,
    "estimates": cost_tables.estimates,
    "cards": cost_tables.on_cards,
    "communication": cost_tables.communication,
    "against_torch": cost_tables.against_torch,
    "input": cost_tables.input_path,
    "input_objects": cost_tables.input_of_objects,
    "starts": cost_tables.starts,
    "baselines": method_tables.baselines,
    "joined": method_tables.joined,
    "late": method_tables.late,
    "dense": method_tables.dense,
    "detection": method_tables.detection,
    "segmentation": method_tables.segmentation,
    **{f"efficiency_{figure}": functools.partial(cost_tables.cost_by, figure) for figure in efficiency.COMPARISONS},
    "finetune": method_tables.finetune,
}


def fill(text: str, page) -> str:
    """The page with its tables made anew. Raises SystemExit for a marker without its end, or of a table that is not there."""
    for name in re.findall(r"<!-- (\w+) -->", text):
        made = TABLES[name]() if name in TABLES else None
        if name not in TABLES:
            raise SystemExit(f"{page}: there is no table '{name}'")
        if made is None:  # nothing recorded yet
            continue
        block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{page} has no one place for the table '{name}'")
    return text


def main(check: bool):
    for page in PAGES:
        old = page.read_text()
        new = fill(old, page)
        if check and new != old:
            raise SystemExit(f"{page} is not what results/*.json say: python -m experiments.make_tables")
        if not check:
            page.write_text(new)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    main("--check" in sys.argv)

"""The cycles of a kernel on a TPU, from the schedule that its compiler can be asked to write (`--xla_jf_dump_llo_text`).

The compiler's own estimates leave kernels out, but it schedules every instruction of theirs: a line is a bundle, which takes a
cycle and what is waited for in it, and marks say how deep in loops it lies.
"""

import collections
import re

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:> ?)*)")
WAITS = re.compile(r"vdelay (\d+)")


def cycles_by_depth(text: str) -> collections.Counter:
    """{depth of the loop: cycles}, each loop gone through once. Inside a loop of a loop a line without marks lies where the one
    before it does."""
    found, depth = collections.Counter(), 0
    for line in text.splitlines():
        if bundle := BUNDLE.match(line):
            marks = bundle[1].count(">")
            depth = marks if marks or depth < 2 else depth
            found[depth] += 1 + sum(map(int, WAITS.findall(line)))
    return found


def cycles(text: str, programs: int, turns: int) -> int:
    """Of a kernel of so many programs, each with loops of so many turns. What is done in some programs only counts in all."""
    of = cycles_by_depth(text)
    if programs == 1:  # no loop of programs is left
        return of[0] + turns * sum(n for depth, n in of.items() if depth)
    return of[0] + programs * (of[1] + turns * sum(n for depth, n in of.items() if depth > 1))

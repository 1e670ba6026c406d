"""To which part of a training step an instruction of its compiled program belongs, by where it says it comes from."""

import re

from mim_jax.chips.hlo import Instruction, Program

# First match on the path that flax and train/step.py give an operation.
PLACES = (
    ("optimiser", r"/optimiser/|/while/body/closed_call/add/$"),  # the sum of the gradients of micro-batches
    ("target", r"\.targets/|\.teach/|/teacher/"),
    ("inputs", r"/prepare/|\.inputs/|\.masks/"),
    ("loss", r"\.(loss|weights|by_cells)/"),
    ("decoder", r"/(decoder\w*|heads?(_\w+)?|\w+_head|predict_views/norm_\d+)/"),
    ("attention", r"/attn/|encoder\.relations/"),
    ("mlp", r"/mlp/"),
    ("embedding", r"patch_embed/|patch_norm/|\.with_cls/|\.tokens_of/|encoder\.embed/|encoder\.positions/|/merge/"),
    ("norms", r"/(norm\d?|fc_norm)/"),
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
MOVES = ("copy", "copy-start", "transpose", "reshape", "bitcast", "slice", "parameter", "tuple", "get-tuple-element")
PARTS = (*(name for name, _ in PLACES), "collectives", "copies", "other")


def is_collective(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


def is_copy(program: Program, one: Instruction) -> bool:
    """Whether it only moves values to another place or layout."""
    if one.opcode == "fusion":
        return all(x.opcode in MOVES for x in program.inner(one).values())
    return one.opcode in ("copy", "copy-start", "transpose", "reshape", "slice")


def place(program: Program, one: Instruction) -> str:
    """The part that an instruction works for: "other" where nothing is said, of a fusion neither by what is fused."""
    names = [one.op_name, *(x.op_name for x in reversed(program.inner(one).values()))]
    path = next(filter(None, names), "") + "/"
    return next((name for name, pattern in PLACES if re.search(pattern, path)), "other")


def part(program: Program, one: Instruction) -> str:
    """As `place`, with what is sent between devices, and mere copies, as parts of their own."""
    if is_collective(one):
        return "collectives"
    return "copies" if is_copy(program, one) else place(program, one)

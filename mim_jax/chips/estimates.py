"""How long a compiled step would take, by instruction: estimates, and none of them a measurement.

On a TPU the cycles that its compiler expects of an instruction, divided by the clock, and of a kernel those that it scheduled
(bundles.py), if they take longer than moving its bytes. On a GPU, whose compiler says nothing of time, a roofline: the longer
of moving its bytes at the memory's full bandwidth and of its matrix products at the peak, so that the sum is a lower bound.
Communication: bytes over all links of a device, nothing of it hidden behind computation.
"""

import collections
import dataclasses
import re

from mim_jax.chips import parts
from mim_jax.chips.chip import Gpu, Tpu
from mim_jax.chips.hlo import Instruction, Program, size
from mim_jax.chips.parts import PARTS


@dataclasses.dataclass(frozen=True)
class Row:
    """One instruction, all its repetitions together; `seconds` and `bytes` of one device."""

    part: str
    place: str
    attention: bool
    seconds: float
    bytes: float
    stated: bool  # whether the compiler said how long it takes


def rows(text: str, chip: Tpu | Gpu, devices: int, kernels: dict[str, int] | None = None) -> list[Row]:
    """The text of a compiled program -> what it runs on one device, in order. kernels: cycles of a TPU's, as
    jobs/kernel_costs.py finds them."""
    program = Program(text)
    return [row(program, *found, chip, devices, kernels or {}) for found in program.run()]


def row(program: Program, where: str, one: Instruction, times: float, chip: Tpu | Gpu, devices: int, kernels: dict) -> Row:
    here, moved, scheduled = program.computations[where], 0.0, kernels.get(program.kernel(where, one))
    if parts.is_collective(one):
        seconds, flops = sent(one, sum(size(here[x].shape, on_chip=True) for x in one.operands), devices) / chip.link, {}
    elif one.opcode.endswith(("-start", "-done", "-update")):
        seconds, flops = 0.0, {}  # runs beside the rest
    else:
        # a TPU's products are convolutions with windows that say little of their cost; their cycles do
        moved, flops = program.moved(where, one), program.flops(where, one) if isinstance(chip, Gpu) else {}
        seconds = max(moved / chip.bandwidth, sum(n / peak(chip, kind) for kind, n in flops.items()))
        if one.cycles is not None:
            seconds = one.cycles / chip.clock
        elif scheduled is not None:
            seconds = max(moved / chip.bandwidth, scheduled / chip.clock)
    attention = re.search(r"/attn/|\.relations/", one.op_name + "/") is not None
    named = parts.part(program, one), parts.place(program, one), attention
    return Row(*named, times * seconds, times * moved, one.cycles is not None or scheduled is not None)


def sent(one: Instruction, operands: float, devices: int) -> float:
    """Bytes that a device sends in a collective on rings; `operands`: bytes that it brings."""
    share = (devices - 1) / devices
    each = {"all-reduce": 2 * share, "all-gather": devices - 1, "reduce-scatter": share, "all-to-all": share}
    return operands * each.get(one.opcode.removesuffix("-start"), 1.0)


def communication(text: str, devices: int) -> dict[str, dict]:
    """The text of a compiled program -> {"all-gather": {"count", "bytes", "asynchronous"}, ...} of a step.

    bytes: of the whole arrays that are gathered, summed or scattered, whatever way they take; asynchronous: how many are begun
    before they are waited for, so that computation may hide them.
    """
    program, found = Program(text), {}
    for where, one, times in program.run():
        if not parts.is_collective(one):
            continue
        kind, begun = one.opcode.removesuffix("-start"), one.opcode.endswith("-start")
        here = program.computations[where]
        whole = sum(size(here[x].shape, on_chip=True) for x in one.operands) * (devices if kind == "all-gather" else 1)
        of_kind = found.setdefault(kind, {"count": 0.0, "bytes": 0.0, "asynchronous": 0.0})
        for name, number in (("count", 1), ("bytes", whole), ("asynchronous", begun)):
            of_kind[name] += times * number
    return found


def peak(chip: Gpu, kind: str) -> float:
    """FLOP/s; float32 products run as TF32, at half the rate of bf16."""
    return chip.peak / 2 if kind in ("f32", "f64") else chip.peak


def summed(found: list[Row]) -> dict:
    """Seconds and bytes of one device's step, and the share of each part, copies and collectives as parts of their own.

    attention_share: in encoder and decoder, with the copies it causes. copies_share_by_place: for which part copies are made.
    stated_share: of the time, what the compiler itself stated.
    """
    seconds = sum(x.seconds for x in found) or 1.0
    by_part, copies = collections.Counter(), collections.Counter()
    for x in found:
        by_part[x.part] += x.seconds
        if x.part == "copies":
            copies[x.place] += x.seconds
    return {
        "step_s": seconds,
        "bytes_moved": sum(x.bytes for x in found),
        "shares": {name: by_part[name] / seconds for name in PARTS},
        "copies_share_by_place": {name: n / seconds for name, n in copies.most_common()},
        "attention_share": sum(x.seconds for x in found if x.attention) / seconds,
        "stated_share": sum(x.seconds for x in found if x.stated) / seconds,
    }

"""A compiled program as text (HLO) -> its instructions, and how often each is run."""

import dataclasses
import functools
import math
import re

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0}  # of others, the number in the name is that of bits
SLICES = ("slice", "dynamic-slice", "gather")  # read no more than they give
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota")
RESERVES = 'custom_call_target="AllocateBuffer"'  # memory for what a loop collects; nothing is written yet


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shape: of the result, as text. arguments: what stands in parentheses; attributes: the rest of the line."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the program it comes from; of several places the first; empty where nothing is said."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].split(";")[0] if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        return tuple(name for group in CALLED.findall(self.attributes) for name in re.findall(r"%([\w.\-]+)", group))

    @property
    def cycles(self) -> int | None:
        """What a TPU's compiler estimates; None where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """`"(f32[2,3]{1,0}, s32[])"` -> [(type, sizes, layout)]."""
    return [(kind, tuple(map(int, filter(None, sizes.split(",")))), layout) for kind, sizes, layout in ARRAY.findall(shape)]


def size(shape: str, on_chip: bool = False) -> float:
    """Bytes in the device's main memory, and with `on_chip` those in a TPU's own memories, which are marked `S(n)`."""
    each = lambda kind: BYTES[kind] if kind in BYTES else int(re.sub(r"\D.*", "", kind.lstrip("fsuce")) or 32) / 8
    return sum(each(kind) * math.prod(sizes) for kind, sizes, layout in arrays(shape) if on_chip or "S(" not in layout)


class Program:
    """computations: {name: {instruction's name: instruction}}; entry: the name of the one that is run."""

    def __init__(self, text: str):
        self.computations, self.entry, here = {}, "", None
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                here = self.computations[found[2]] = {}
                self.entry = found[2] if found[1] else self.entry
            elif here is not None and (found := INSTRUCTION.match(line)):
                here[found[1]] = Instruction(*found.groups())

    def run(self, computation: str = "", times: float = 1.0):
        """Yields (computation, instruction, how often) through calls and loops; a fusion is one instruction.

        A loop whose length is not to be seen counts once, and of a conditional each branch in equal shares.
        """
        computation = computation or self.entry
        for one in self.computations[computation].values():
            if one.opcode == "while":
                yield from self.run(*one.called, times * self.trips(one))
            elif one.opcode in ("call", "conditional", "async-start"):
                for name in one.called:
                    yield from self.run(name, times / len(one.called))
            elif one.opcode not in FREE and RESERVES not in one.attributes:
                yield computation, one, times

    def trips(self, loop: Instruction) -> int:
        """As the compiler states it, or as the loop's condition does, which counts from 0 up to a constant."""
        if stated := TRIPS.search(loop.attributes):
            return int(stated[1])
        condition = self.computations[re.search(r"condition=%([\w.\-]+)", loop.attributes)[1]]
        ends = [
            condition[x]
            for one in condition.values()
            if "direction=LT" in one.attributes
            for x in one.operands
            if x in condition
        ]
        return next((int(x.arguments) for x in ends if x.opcode == "constant" and x.arguments.isdigit()), 1)

    def inner(self, one: Instruction) -> dict[str, Instruction]:
        """The instructions of a fusion; of an instruction that calls nothing: none."""
        return self.computations[one.called[0]] if one.opcode == "fusion" and one.called else {}

    def kernel(self, computation: str, one: Instruction) -> str:
        """Of a TPU's kernel of attention, of whose cost its compiler says nothing: its name and the type and sizes of its first
        operand; of other instructions nothing."""
        if one.opcode != "custom-call" or '"tpu_custom_call"' not in one.attributes:
            return ""
        found = re.search(r"attention_(?:forward|backward)_of_\w+", one.op_name)
        return f"{found[0]} {self.computations[computation][one.operands[0]].shape.split('{')[0]}" if found else ""

    def moved(self, computation: str, one: Instruction) -> float:
        """Bytes that an instruction reads and writes, nothing kept on the chip between instructions.

        Of an operand that is only cut from, what is cut; of an array that is updated in place, the update twice; nothing of
        the room that cuBLAS is given to work in.
        """
        here, inside = self.computations[computation], self.inner(one) or {one.name: one}
        updates = [x for x in inside.values() if x.opcode == "dynamic-update-slice"]
        if updates:
            shapes = here if one.name in inside else inside
            whole = {x.shape.split("{")[0] for x in updates}
            written = sum(2 * size(shapes[x.operands[1]].shape) for x in updates if x.operands[1] in shapes)
            others = [(i, here[x]) for i, x in enumerate(one.operands) if here[x].shape.split("{")[0] not in whole]
            return written + sum(self.read(operand, i, one, inside) for i, operand in others)
        written = re.sub(r", s8\[\d+\]\S*\)$", ")", one.shape) if is_blas(one) else one.shape
        return size(written) + sum(self.read(here[x], i, one, inside) for i, x in enumerate(one.operands) if x in here)

    def read(self, operand: Instruction, index: int, one: Instruction, inside: dict) -> float:
        """Bytes of an operand that an instruction reads; `inside`: what is fused into it."""
        if one.opcode in SLICES:
            return size(one.shape) if index == 0 else size(operand.shape)
        name = next((x.name for x in inside.values() if x.opcode == "parameter" and x.arguments == str(index)), None)
        users = [x for x in inside.values() if name in x.operands]
        if users and all(x.opcode in SLICES and x.operands[0] == name for x in users):
            return sum(size(x.shape) for x in users)
        return size(operand.shape)

    def flops(self, computation: str, one: Instruction) -> dict[str, float]:
        """{type of the operands: FLOPs} of the matrix products and convolutions in an instruction."""
        if one.opcode == "fusion":
            parts = [self.flops(one.called[0], x) for x in self.inner(one).values()]
            return {kind: sum(part.get(kind, 0) for part in parts) for part in parts for kind in part}
        return dict(filter(None, [products(self.computations[computation], one)]))


def is_blas(one: Instruction) -> bool:
    return one.opcode == "custom-call" and "__cublas" in one.attributes


def products(here: dict[str, Instruction], one: Instruction) -> tuple[str, float] | None:
    """(type, FLOPs) of a dot, a convolution, or a call of cuBLAS; None for others."""
    gemm = is_blas(one)
    if one.opcode not in ("dot", "convolution") and not gemm:
        return None
    (kind, left, _), *_ = arrays(here[one.operands[0]].shape)
    out = math.prod(arrays(one.shape)[0][1])
    if one.opcode == "convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)[1]
        right = arrays(here[one.operands[1]].shape)[0][1]
        return kind, 2 * out * math.prod(right) / right[labels.index("o")]
    pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]' if gemm else r"lhs_contracting_dims=\{([\d,]*)\}"
    summed = re.findall(r"\d+", re.search(pattern, one.attributes)[1])
    return kind, 2 * out * math.prod(left[int(axis)] for axis in summed)

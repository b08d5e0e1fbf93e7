"""PTX text as data: the kernels of a module, their parameters, registers, shared memory and instructions, cut into
basic blocks. executor.py runs them; nothing here knows what an instruction means.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32x2": 8}
BYTES |= {f"{letter}{bits}": bits // 8 for letter in "us" for bits in (8, 16, 32, 64)} | {"f32": 4, "f64": 8}

BRANCHES = {"bra", "ret", "exit", "trap"}
BARRIERS = {"bar.sync", "barrier.sync"}
COLLECTIVES = {"shfl", "vote", "redux", "stmatrix", "ldmatrix", "bar.warp"}  # what the threads of a warp do together


class Parameter(NamedTuple):
    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`, the opcode split at its dots."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False

    @functools.cached_property
    def text(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}".strip()

    @property
    def name(self) -> str:
        return self.opcode[0]

    @property
    def is_barrier(self) -> bool:
        return ".".join(self.opcode[:2]) in BARRIERS

    @property
    def is_collective(self) -> bool:
        return self.name in COLLECTIVES or ".".join(self.opcode[:2]) in COLLECTIVES

    @property
    def ends_a_block(self) -> bool:
        return self.name in BRANCHES or self.is_barrier


@dataclass
class BasicBlock:
    """Instructions that run from the first to the last. The last one alone may branch, end threads or be a barrier."""

    instructions: list[Instruction] = field(default_factory=list)
    spins: bool = False  # whether it ends a loop that may wait for other threads

    @property
    def has_collectives(self) -> bool:
        return any(instruction.is_collective for instruction in self.instructions)


class Body(NamedTuple):
    registers: dict[str, str]  # type by name
    shared: dict[str, int]  # offset by name
    shared_bytes: int
    blocks: list[BasicBlock]
    labels: dict[str, int]  # number of the basic block


class Entry:
    """One kernel. The body is read when it is first asked for its instructions."""

    def __init__(self, name: str, parameters: str, attributes: str, body: str, shared: list[str]):
        self.name = name
        self.body = body
        self._shared = shared
        self.parameters = _parameters(parameters)
        required = re.search(r"\.reqntid\s+([\d,\s]+)", attributes)
        self.required_threads = [int(n) for n in required[1].split(",")] if required else None
        largest = re.search(r"\.maxntid\s+([\d,\s]+)", attributes)
        self.most_threads = [int(n) for n in largest[1].split(",")] if largest else None

    @functools.cached_property
    def code(self) -> Body:
        return _parsed(self._shared, self.body)


class Module:
    """The kernels of a PTX text by name, and what the module declares outside of them."""

    def __init__(self, text: str):
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
        self.dynamic_shared = set(re.findall(r"\.extern\s+\.shared\b[^;]*?([\w$]+)\s*\[\s*\]", text))
        found = re.findall(r"^[ \t]*(?:\.visible\s+|\.weak\s+)?(\.shared\b[^;{]*);", _outside(text), re.M)
        self.entries: dict[str, Entry] = {}
        for head in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S):
            body = text[head.end() : _closing(text, head.end())]
            shared = [declared for declared in found if _declared_name(declared) in body]
            self.entries[head[1]] = Entry(head[1], head[2], head[3], body, shared)


def split_operands(text: str) -> tuple[str, ...]:
    """`{%r1, %r2}, [%rd1 + 4], 7` at the commas that are outside of brackets."""
    if "{" not in text:
        return tuple(part.strip() for part in text.split(",")) if text else ()
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if part.strip())


def split_vector(operand: str) -> tuple[str, ...]:
    """The registers of `{%r1, %r2}`, or the one that is no vector."""
    return tuple(part.strip() for part in operand.strip("{} ").split(","))


def _outside(text: str) -> str:
    """The text without what is between braces."""
    parts, end = [], 0
    while (start := text.find("{", end)) >= 0:
        parts.append(text[end:start])
        end = _closing(text, start + 1) + 1
    return "".join([*parts, text[end:]])


def _declared_name(statement: str) -> str:
    return re.search(r"([\w$]+)\s*(?:\[\d*\])?\s*$", statement)[1]


def _closing(text: str, start: int) -> int:
    """Where the brace closes that was opened before `start`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("a kernel in this PTX has no end")


def _parameters(text: str) -> list[Parameter]:
    found: list[Parameter] = []
    end = 0
    for declared in filter(None, (part.strip() for part in text.split(","))):
        kind = re.search(r"\.(b8|[usbf]\d+)\b", declared)[1]
        name, count = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", declared).groups()
        aligned = re.match(r"\.param\s+\.align\s+(\d+)", declared)
        alignment = int(aligned[1]) if aligned else BYTES[kind]
        offset = -(-end // alignment) * alignment
        size = BYTES[kind] * int(count or 1)
        found.append(Parameter(name, offset, size))
        end = offset + size
    return found


def _parsed(shared_outside: list[str], body: str) -> Body:
    registers: dict[str, str] = {}
    shared: dict[str, int] = {}
    shared_bytes = 0
    instructions: list[Instruction] = []
    places: dict[str, int] = {}
    for statement in [*shared_outside, *body.split(";")]:
        statement = _without_labels(statement, places, len(instructions))
        if statement.startswith(".reg"):
            registers |= _registers(statement)
        elif statement.startswith(".shared"):
            shared_bytes = _declare_shared(statement, shared, shared_bytes)
        elif statement and not statement.startswith((".pragma", ".local")):  # a use of local memory is refused
            instructions.append(_instruction(statement))
    blocks, labels = _basic_blocks(instructions, places)
    return Body(registers, shared, shared_bytes, blocks, labels)


def _without_labels(statement: str, places: dict[str, int], place: int) -> str:
    """The statement without what is written before it: labels, which are noted, and braces of a scope."""
    while True:
        statement = statement.strip()
        label = re.match(r"([\w$]+):(?!:)", statement)
        if label:
            places[label[1]] = place
            statement = statement[label.end() :]
        elif statement[:1] in ("{", "}"):
            statement = statement[1:]
        else:
            return statement


def _registers(statement: str) -> dict[str, str]:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    found = {}
    for name in (name.strip() for name in names.split(",")):
        numbered = re.match(r"(%?[\w$]+)<(\d+)>", name)
        if numbered:
            found |= {f"{numbered[1]}{i}": kind for i in range(int(numbered[2]))}
        else:
            found[name] = kind
    return found


def _declare_shared(statement: str, shared: dict[str, int], end: int) -> int:
    pattern = r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?$"
    aligned, kind, name, count = re.match(pattern, statement).groups()
    alignment = int(aligned or BYTES[kind])
    shared[name] = -(-end // alignment) * alignment
    return shared[name] + BYTES[kind] * int(count or 1)


def _instruction(statement: str) -> Instruction:
    guard, negated = None, False
    if statement[0] == "@":
        predicate, statement = statement[1:].split(None, 1)
        guard, negated = predicate.lstrip("!"), predicate[0] == "!"
    opcode, _, operands = " ".join(statement.split()).partition(" ")
    opcode = opcode.replace("shared::cta", "shared")
    return Instruction(tuple(opcode.split(".")), split_operands(operands), guard, negated)


def _basic_blocks(instructions: list[Instruction], places: dict[str, int]) -> tuple[list[BasicBlock], dict[str, int]]:
    targets = {instruction.operands[-1] for instruction in instructions if instruction.name == "bra"}
    starts = {place for label, place in places.items() if label in targets}
    blocks: list[BasicBlock] = []
    number_of: dict[int, int] = {}  # basic block by the place of its first instruction
    open_block = False
    for place, instruction in enumerate(instructions):
        if not open_block or place in starts:
            number_of[place] = len(blocks)
            blocks.append(BasicBlock())
        blocks[-1].instructions.append(instruction)
        open_block = not instruction.ends_a_block
    labels = {label: number_of.get(places[label], len(blocks)) for label in targets if label in places}
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.name == "bra" and labels.get(last.operands[-1], number + 1) <= number:
            loop = blocks[labels[last.operands[-1]] : number + 1]
            block.spins = any(_may_wait(instruction) for part in loop for instruction in part.instructions)
    return blocks, labels


def _may_wait(instruction: Instruction) -> bool:
    """A load or an atomic operation through which a thread learns of what other threads do meanwhile."""
    return instruction.name == "atom" or (
        instruction.name == "ld" and bool({"acquire", "relaxed", "volatile"} & set(instruction.opcode))
    )

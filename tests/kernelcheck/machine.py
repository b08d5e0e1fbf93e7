"""The registers of all resident threads, and the basic blocks of a kernel as lists of functions bound to them: decoding
is done once a launch, when a block is first run, so that running it is calls of numpy and nothing else.
"""

from __future__ import annotations

import re
import struct

import numpy as np
from kernelcheck.collectives import COLLECTIVES
from kernelcheck.faults import ExecutionError, Unsupported
from kernelcheck.instructions import DTYPES, operation
from kernelcheck.memory import ATOMIC, SharedMemory
from kernelcheck.ptx import BasicBlock, Instruction
from kernelcheck.transfers import TRANSFERS, applied

_NUMBER = re.compile(r"-?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?)$")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")


class Site:
    """An instruction in a launch: what the memory remembers of it and what errors say of it."""

    def __init__(self, machine: Machine, instruction: Instruction):
        self._machine = machine
        self.instruction = instruction
        self.text = instruction.text
        self.opcode = instruction.opcode
        self.region = None  # the tensor that it accessed last
        self.atomic_kind = ATOMIC if {"acquire", "release", "relaxed", "volatile"} & set(self.opcode) else None

    def message(self, lanes, text: str, first: int = 0) -> str:
        """What went wrong, with the kernel and the first thread of it."""
        layout = self._machine.layout
        return f"{self._machine.kernel.name}, {layout.name(layout.numbers[lanes][first])}, `{self.text}`: {text}"


class Bound:
    """A basic block of one machine."""

    def __init__(self, machine: Machine, number: int, block: BasicBlock):
        sites = [Site(machine, instruction) for instruction in block.instructions]
        self.last = sites[-1]
        self.length = len(sites)
        self.has_collectives = block.has_collectives
        body = sites[:-1] if self.last.instruction.ends_a_block else sites
        self.steps = [machine.bind(site) for site in body]
        self.leave = _exit(machine, self.last, block.spins) if len(body) < len(sites) else _fall_through


class Machine:
    def __init__(self, module, kernel, layout, parameters, memory, clocks, dynamic_shared, shared_log):
        self.kernel, self.layout, self.parameters = kernel, layout, parameters
        self.memory, self.clocks = memory, clocks
        self.grid_barrier = 0
        self.ended = np.zeros(layout.count, bool)
        self._code = kernel.code
        self._blocks: list[Bound | None] = [None] * len(self._code.blocks)
        start = -(-self._code.shared_bytes // 16) * 16 if dynamic_shared else self._code.shared_bytes
        self.shared = SharedMemory(len(layout.blocks), start + dynamic_shared, layout.place, shared_log)
        self._symbols = {**self._code.shared, **dict.fromkeys(module.dynamic_shared, start)}
        self._symbols |= {parameter.name: parameter.offset for parameter in kernel.parameters}
        self._logs = (memory.log, shared_log)
        self._registers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple, np.ndarray] = {}
        self._set_intervals(np.zeros(layout.count, np.int64))
        self.segments = layout.block
        self._set_segments()

    def block(self, number: int) -> Bound:
        bound = self._blocks[number] if number < len(self._blocks) else None
        if bound is None:
            if number >= len(self._blocks):
                raise ExecutionError(f"{self.kernel.name} runs past its last instruction")
            bound = self._blocks[number] = Bound(self, number, self._code.blocks[number])
        return bound

    # ---- threads ------------------------------------------------------------------------------------------------

    def end(self, group):
        self.ended[group.lanes] = True

    def others_have_ended(self, group) -> bool:
        if not self.ended.any():
            return False
        warp = self.layout.warp
        count = warp[-1] + 1
        alive = np.bincount(warp[~self.ended], minlength=count)
        present = np.bincount(warp[group.lanes], minlength=count)
        return bool(((present == 0) | (present == alive)).all())

    def pass_barrier(self, group):
        intervals = self._intervals.copy()
        intervals[group.lanes] = ((intervals[group.lanes] >> 32) + 1) << 32
        self._set_intervals(intervals)

    def pass_warp_barrier(self, lanes):
        intervals = self._intervals.copy()
        intervals[lanes] += 1
        self._set_intervals(intervals)

    def _set_intervals(self, intervals):
        self._intervals = intervals
        for log in self._logs:
            log.intervals = intervals

    def start_segments(self, blocks):
        """After these blocks have released or acquired."""
        segments = self.segments.copy()
        for block in blocks:
            segments[self.layout.block == block] = self.clocks.new_segment(block)
        self.segments = segments
        self._set_segments()

    def _set_segments(self):
        for log in self._logs:
            log.segments = self.segments

    # ---- operands -----------------------------------------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        if name not in self._registers:
            if name not in self._code.registers:
                raise Unsupported(f"{self.kernel.name}: unknown register or symbol {name}")
            kind = DTYPES[self._code.registers[name]]
            raw = kind if kind == np.bool_ else np.dtype(f"u{kind.itemsize}")
            self._registers[name] = np.zeros(self.layout.count, raw)
        return self._registers[name]

    def source(self, operand: str, kind: str) -> np.ndarray:
        """An array of every thread's value, that of an instruction's type."""
        dtype = DTYPES[kind]
        if operand in self._code.registers:
            values = self.register(operand)
        elif operand.startswith("%"):
            values = self._special(operand)
        else:
            return self._constant(operand, kind)
        if values.dtype == np.bool_ or dtype == np.bool_:
            if values.dtype != dtype:
                raise Unsupported(f"{self.kernel.name}: {operand} as {kind}")
            return values
        if dtype.itemsize > values.itemsize:
            raise Unsupported(f"{self.kernel.name}: {operand} is narrower than {kind}")
        return values.view(dtype)[:: values.itemsize // dtype.itemsize]

    def destination(self, name: str, kind: str) -> np.ndarray:
        """Where to assign results of a type; narrow ones are extended by their sign or by zeros."""
        dtype = DTYPES[kind]
        if name == "_":
            return np.empty(self.layout.count, dtype)
        register = self.register(name)
        if dtype == np.bool_ or dtype.itemsize == register.itemsize:
            return register.view(dtype)
        return register.view(f"{'i' if dtype.kind == 'i' else 'u'}{register.itemsize}")

    def _constant(self, operand: str, kind: str) -> np.ndarray:
        key = (operand, kind)
        if key not in self._constants:
            value = np.array(self._number(operand, DTYPES[kind]))
            self._constants[key] = np.full(self.layout.count, value)
        return self._constants[key]

    def _number(self, text: str, dtype: np.dtype):
        """A literal or the address of a symbol, in the type's own bits."""
        if text in self._symbols:
            bits = self._symbols[text]
        elif not _NUMBER.match(text):
            raise Unsupported(f"{self.kernel.name}: unknown operand {text}")
        elif text[:2] in ("0f", "0F", "0d", "0D"):
            if dtype.kind == "f" and dtype.itemsize != (4 if text[1] in "fF" else 8):
                raise Unsupported(f"{self.kernel.name}: {text} as {dtype}")
            bits = int(text[2:], 16)
        else:
            bits = int(text.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.bool_(bits != 0)
        return np.array(bits % 256**dtype.itemsize, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)

    def _special(self, name: str) -> np.ndarray:
        if name in ("%envreg1", "%envreg2"):  # halves of the address that cooperative groups keep
            low, high = struct.unpack("<II", struct.pack("<Q", self.grid_barrier))
            return np.full(self.layout.count, high if name == "%envreg1" else low, np.uint32)
        try:
            return self.layout.special(name)
        except KeyError:
            raise Unsupported(f"{self.kernel.name}: special register {name}") from None

    def address(self, operand: str):
        """The function that gives the addresses of some threads."""
        found = _ADDRESS.match(operand)
        if found is None:
            raise Unsupported(f"{self.kernel.name}: address {operand}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base not in self._code.registers:
            fixed = np.full(self.layout.count, int(self._number(base, np.dtype(np.int64))) + offset)
            return lambda lanes: fixed[lanes]
        register = self.register(base)
        if register.itemsize == 8:
            register = register.view(np.int64)
            return lambda lanes: register[lanes] + offset
        wrapped = np.uint32(offset % 2**32)
        return lambda lanes: (register[lanes] + wrapped).astype(np.int64)

    # ---- instructions -------------------------------------------------------------------------------------------

    def bind(self, site: Site):
        """The function that executes an instruction for the threads of its argument."""
        instruction = site.instruction
        step = self._unguarded(site)
        if instruction.guard is None:
            return step
        return self._guarded(step, self.register(instruction.guard), instruction.negated)

    def _guarded(self, step, predicate, negated):
        numbers = self.layout.numbers

        def run(lanes):
            chosen = predicate[lanes]
            if negated:
                chosen = ~chosen
            if chosen.all():
                step(lanes)
            elif chosen.any():
                step(numbers[lanes][chosen])

        return run

    def _unguarded(self, site: Site):
        instruction = site.instruction
        found = operation(instruction.opcode, len(instruction.operands) - 1)
        if found is not None:
            step = self._arithmetic(instruction, found)
        elif instruction.is_collective:
            step = COLLECTIVES[instruction.name](self, site)
        else:
            bind = TRANSFERS.get(instruction.name)
            step = bind(self, site) if bind else None
        if step is None:
            raise Unsupported(f"{self.kernel.name}: `{site.text}`")
        return step

    def _arithmetic(self, instruction, found):
        target, *operands = instruction.operands
        sources = [self.source(operand, kind) for operand, kind in zip(operands, found.sources, strict=True)]
        targets = [self.destination(name, found.result) for name in target.split("|")]
        if len(targets) == 2:
            return _pair(found.function, targets, sources, instruction.opcode)
        return applied(found.function, targets[0], sources)


def _pair(function, targets, sources, opcode):
    """setp with two predicates: those of a pair of numbers, or a comparison and its opposite."""
    pairs = opcode[-1] in ("f16x2", "bf16x2")

    def run(lanes):
        result = function(*(source[lanes] for source in sources))
        targets[0][lanes], targets[1][lanes] = result if pairs else (result, ~result)

    return run


# ---- ends of basic blocks -------------------------------------------------------------------------------------------


def _fall_through(cohort, number, group):
    return number + 1


def _exit(machine: Machine, site: Site, spins: bool):
    instruction = site.instruction
    if instruction.name == "bra":
        target = machine._code.labels.get(instruction.operands[-1])
        if target is None:
            raise Unsupported(f"{machine.kernel.name}: `{site.text}`")
        return _branch(machine, instruction, target, spins)
    if instruction.guard is not None and instruction.name not in ("ret", "exit"):
        raise Unsupported(f"{machine.kernel.name}: `{site.text}`")
    if instruction.is_barrier:
        return _barrier(machine, site)
    if instruction.name == "trap":
        return _trap(site)
    return _end(machine, instruction)


def _branch(machine, instruction, target, spins):
    def go(cohort, number, group):
        if spins:
            cohort.rest(target, group)
            return None
        return target

    if instruction.guard is None:
        return go
    predicate, negated = machine.register(instruction.guard), instruction.negated

    def leave(cohort, number, group):
        chosen = predicate[group.lanes]
        count = int(np.count_nonzero(chosen))
        if negated:
            count = len(chosen) - count
        if count == len(chosen):
            return go(cohort, number, group)
        if count == 0:
            return number + 1
        taking, staying = group.split(~chosen if negated else chosen)
        if spins:
            cohort.rest(target, taking)
        else:
            cohort.push(target, taking)
        cohort.push(number + 1, staying)
        return None

    return leave


def _barrier(machine, site):
    operands = site.instruction.operands
    whole = len(operands) == 1 or operands[1] == str(machine.layout.per_block)
    if not whole or operands[0] != "0":
        raise Unsupported(f"{machine.kernel.name}: `{site.text}`, a barrier of some threads")
    return lambda cohort, number, group: cohort.arrive(number, group)


def _trap(site):
    def leave(cohort, number, group):
        raise ExecutionError(site.message(group.lanes, "the kernel gives up, as a grid barrier does without a grid"))

    return leave


def _end(machine, instruction):
    if instruction.guard is None:
        return lambda cohort, number, group: cohort.end(group)
    predicate, negated = machine.register(instruction.guard), instruction.negated

    def leave(cohort, number, group):
        chosen = predicate[group.lanes] != negated
        ending, staying = group.split(chosen)
        if len(ending):
            cohort.end(ending)
        if len(staying):
            cohort.push(number + 1, staying)

    return leave

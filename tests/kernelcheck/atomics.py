"""Atomic operations of PTX, one thread after the other, and what they tell other blocks."""

from __future__ import annotations

import numpy as np
from kernelcheck.instructions import DTYPES

_FUNCTIONS = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "exch": lambda old, value: value,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "inc": lambda old, value: old.dtype.type(0) if old >= value else old + old.dtype.type(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - old.dtype.type(1),
    "cas": lambda old, expected, value: value if old == expected else old,
}
_SEMANTICS = ("relaxed", "acquire", "release", "acq_rel")
_SCOPES = {"gpu", "sys", "cta"}


def atomic(machine, site):
    """atom, which gives the old value, and red, which does not; None for what is not known."""
    *modifiers, kind = site.opcode[1:]
    names = [part for part in modifiers if part in _FUNCTIONS]
    spaces = [part for part in modifiers if part in ("global", "shared")]
    semantics = [part for part in modifiers if part in _SEMANTICS]
    if len(names) != 1 or set(modifiers) - {*names, *spaces, *semantics, *_SCOPES} or kind not in DTYPES:
        return None
    operands = list(site.instruction.operands)
    target = None if site.opcode[0] == "red" else machine.destination(operands.pop(0), kind)
    address = machine.address(operands.pop(0))
    sources = [machine.source(operand, kind) for operand in operands]
    function, dtype = _FUNCTIONS[names[0]], DTYPES[kind]
    shared = spaces == ["shared"]
    memory = machine.shared if shared else machine.memory
    told = None if shared else Told(machine, semantics[0] if semantics else "relaxed")

    def run(lanes):
        addresses = address(lanes)
        values = [source[lanes] for source in sources]
        blocks = machine.layout.block[lanes]

        def change(thread, old):
            if told:
                told.tell(int(blocks[thread]), int(addresses[thread]))
            return function(old, *(value[thread] for value in values))

        old = memory.update(addresses, dtype, change, lanes, site)
        if target is not None:
            target[lanes] = old
        if told:
            told.start_segments(blocks)

    return run


class Told:
    """Releases and acquires through the addresses of what reads, writes or does both."""

    def __init__(self, machine, semantics: str, *, reads: bool = True, writes: bool = True):
        self._machine = machine
        self._releases = semantics in ("release", "acq_rel")
        self._acquires = semantics in ("acquire", "acq_rel")
        # what a fence may make acquire or release
        self._relaxed = {"reads": reads and not self._acquires, "writes": writes and not self._releases}

    def tell(self, block: int, address: int):
        clocks = self._machine.clocks
        if self._releases:
            clocks.release(block, address)
        if self._acquires:
            clocks.acquire(block, address)
        clocks.relaxed(block, address, **self._relaxed)

    def start_segments(self, blocks: np.ndarray):
        if self._releases or self._acquires:
            self._machine.start_segments(np.unique(blocks).tolist())

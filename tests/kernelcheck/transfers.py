"""Moves, loads, stores and fences of PTX, bound to the registers and the memory of one machine.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from kernelcheck.atomics import Told, atomic
from kernelcheck.faults import ExecutionError
from kernelcheck.instructions import DTYPES
from kernelcheck.ptx import split_vector

if TYPE_CHECKING:
    from kernelcheck.machine import Machine, Site

# Modifiers of loads and stores that change nothing here.
_IGNORED = {"nc", "ca", "cg", "cs", "lu", "wb", "wt", "gpu", "sys", "cta", "weak", "v2", "v4", "L1::evict_first"}
_IGNORED |= {"L1::evict_last", "L1::no_allocate", "L1::evict_normal", "L2::evict_first", "L2::evict_last"}


def applied(function, target, sources):
    """target = function(sources), for the threads given. One of every length, because this is most of the time."""
    if len(sources) == 1:
        (a,) = sources

        def run(lanes):
            target[lanes] = function(a[lanes])
    elif len(sources) == 2:
        a, b = sources

        def run(lanes):
            target[lanes] = function(a[lanes], b[lanes])
    elif len(sources) == 3:
        a, b, c = sources

        def run(lanes):
            target[lanes] = function(a[lanes], b[lanes], c[lanes])
    else:

        def run(lanes):
            target[lanes] = function(*(source[lanes] for source in sources))

    return run


def _move(machine: Machine, site: Site):
    target, source = site.instruction.operands
    kind = site.opcode[-1]
    if target.startswith("{"):
        return _unpacked(machine, split_vector(target), source, kind)
    if source.startswith("{"):
        return _packed(machine, target, split_vector(source), kind)
    return applied(lambda a: a, machine.destination(target, kind), [machine.source(source, kind)])


def _part(kind: str, count: int) -> str:
    return f"b{8 * DTYPES[kind].itemsize // count}"


def _unpacked(machine, names, source, kind):
    part = _part(kind, len(names))
    whole = machine.source(source, kind)
    targets = [(i, machine.destination(name, part)) for i, name in enumerate(names) if name != "_"]
    parts = [(target, whole.view(DTYPES[part])[i :: len(names)]) for i, target in targets]

    def run(lanes):
        for target, values in parts:
            target[lanes] = values[lanes]

    return run


def _packed(machine, target, names, kind):
    part = _part(kind, len(names))
    whole = machine.destination(target, kind).view(DTYPES[part])
    parts = [(whole[i :: len(names)], machine.source(name, part)) for i, name in enumerate(names)]

    def run(lanes):
        values = [source[lanes] for _, source in parts]
        for (place, _), value in zip(parts, values, strict=True):
            place[lanes] = value

    return run


def _to_global(machine, site):
    """Addresses of global memory are the same in generic form, and nothing else is accessed by generic addresses."""
    if "global" not in site.opcode:
        return None
    target, source = site.instruction.operands
    return applied(lambda a: a, machine.destination(target, "u64"), [machine.source(source, "u64")])


def _space(site, allowed):
    """The memory that an instruction is about; None where it asks for something unknown."""
    *modifiers, _ = site.opcode[1:]
    spaces = [part for part in modifiers if part in ("global", "shared", "param")]
    unknown = set(modifiers) - {*spaces, *_IGNORED, *allowed}
    return None if unknown else (spaces or ["global"])[0]


def _load(machine: Machine, site: Site):
    space = _space(site, ("acquire", "relaxed", "volatile"))
    if space is None:
        return None
    target, pointer = site.instruction.operands
    kind = site.opcode[-1]
    dtype, names = DTYPES[kind], split_vector(target)
    targets = [machine.destination(name, kind) for name in names]
    address, count = machine.address(pointer), len(names)
    memory = {"param": Parameters(machine), "global": machine.memory, "shared": machine.shared}[space]

    def run(lanes):
        for place, values in zip(targets, memory.load(address(lanes), dtype, count, lanes, site), strict=True):
            place[lanes] = values

    if space == "global" and site.atomic_kind:
        return _telling(machine, site, address, run, writes=False)
    return run


def _telling(machine, site, address, access, **ways):
    """A load or store that other blocks may hear of or tell of."""
    semantics = {"acquire", "release"} & set(site.opcode)
    told = Told(machine, semantics.pop() if semantics else "relaxed", **ways)

    def run(lanes):
        addresses = address(lanes)  # which a load may overwrite
        access(lanes)
        blocks = machine.layout.block[lanes]
        for block, place in sorted(set(zip(blocks.tolist(), addresses.tolist(), strict=True))):
            told.tell(block, place)
        told.start_segments(blocks)

    return run


def _store(machine: Machine, site: Site):
    space = _space(site, ("release", "relaxed", "volatile"))
    if space not in ("global", "shared"):
        return None
    pointer, values = site.instruction.operands
    kind = site.opcode[-1]
    sources = [machine.source(name, kind) for name in split_vector(values)]
    address, dtype = machine.address(pointer), DTYPES[kind]
    memory = machine.memory if space == "global" else machine.shared

    def run(lanes):
        memory.store(address(lanes), dtype, [source[lanes] for source in sources], lanes, site)

    if space == "global" and site.atomic_kind:
        return _telling(machine, site, address, run, reads=False)
    return run


class Parameters:
    """The parameters of the kernel as memory to load from."""

    def __init__(self, machine: Machine):
        self._bytes = machine.parameters

    def load(self, addresses, dtype, count, lanes, site):
        size = dtype.itemsize * count
        if (addresses < 0).any() or (addresses > len(self._bytes) - size).any():
            raise ExecutionError(site.message(lanes, "reads past the parameters of the kernel"))
        raw = self._bytes[addresses[:, None] + np.arange(size)]
        values = np.ascontiguousarray(raw).view(dtype)
        return [values[:, i] for i in range(count)]


def _fence(machine: Machine, site: Site):
    """A fence of the grid; one of the block or of a thread orders nothing that is looked at here."""
    if not {"gl", "gpu", "sys"} & set(site.opcode):
        return lambda lanes: None

    def run(lanes):
        blocks = np.unique(machine.layout.block[lanes]).tolist()
        for block in blocks:
            machine.clocks.fence(block)
        machine.start_segments(blocks)

    return run


TRANSFERS = {
    "mov": _move,
    "cvta": _to_global,
    "ld": _load,
    "st": _store,
    "atom": atomic,
    "red": atomic,
    "fence": _fence,
    "membar": _fence,
}

"""What the threads of a warp do together: shuffles, votes, reductions, barriers of a warp and stores of matrices. All
threads that the mask names must be there, and no value may come from one that is not.
"""

from __future__ import annotations

import numpy as np
from kernelcheck.faults import Divergence
from kernelcheck.instructions import DTYPES
from kernelcheck.ptx import split_vector
from kernelcheck.threads import WARP


def _present(machine, site, lanes, mask) -> np.ndarray | None:
    """The threads of every warp that are here as bits, by warp; None if that is all of them. `mask` has one word a
    thread, the threads that must be here."""
    layout = machine.layout
    whole = isinstance(lanes, slice) and layout.whole_warps and lanes.start % WARP == lanes.stop % WARP == 0
    if whole and (mask == 0xFFFFFFFF).all():
        return None
    warp, bit = layout.warp[lanes], np.uint32(1) << layout.lane[lanes].astype(np.uint32)
    present = np.zeros(layout.warp[-1] + 1, np.uint32)
    np.bitwise_or.at(present, warp, bit)
    absent = mask & ~present[warp]
    if absent.any():
        first = np.flatnonzero(absent)[0]
        lane = int(absent[first]).bit_length() - 1
        raise Divergence(site.message(lanes, f"the mask names lane {lane}, which is not here", first))
    unnamed = (mask & bit) == 0
    if unnamed.any():
        raise Divergence(site.message(lanes, "the mask leaves out this thread", np.flatnonzero(unnamed)[0]))
    return present


def _shuffle(machine, site):
    """shfl.sync: the value of the lane that mode, b and c of the PTX manual name, or the thread's own."""
    if len(site.opcode) != 4 or site.opcode[1] != "sync" or len(site.instruction.operands) != 5:
        return None
    mode = site.opcode[2]
    target, source, *control = site.instruction.operands
    target, _, flag = target.partition("|")
    result, values = machine.destination(target, "b32"), machine.source(source, "b32")
    valid = machine.destination(flag, "pred") if flag else None
    distance, clamp, mask = (machine.source(operand, "u32") for operand in control)
    layout = machine.layout

    def run(lanes):
        lane = layout.lane[lanes]
        by, bounds = distance[lanes].astype(np.int64) & 31, clamp[lanes].astype(np.int64)
        segment, limit = bounds >> 8 & 31, bounds & 31
        last, first = lane & segment | limit & ~segment, lane & segment
        start = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[mode]
        inside = start >= last if mode == "up" else start <= last
        start = np.where(inside, start, lane)
        present = _present(machine, site, lanes, mask[lanes])
        if present is not None:
            missing = present[layout.warp[lanes]] >> start.astype(np.uint32) & 1 == 0
            if missing.any():
                at = np.flatnonzero(missing)[0]
                raise Divergence(site.message(lanes, f"reads from lane {start[at]}, which is not here", at))
        result[lanes] = values[layout.numbers[lanes] - lane + start]
        if valid is not None:
            valid[lanes] = inside

    return run


def _vote(machine, site):
    mode, kind = site.opcode[-2:]
    if site.opcode[1] != "sync" or mode not in ("all", "any", "ballot") or len(site.opcode) != 4:
        return None
    target, source, mask = site.instruction.operands
    result = machine.destination(target, kind)
    predicate, mask = machine.source(source.lstrip("!"), "pred"), machine.source(mask, "u32")
    negated = source.startswith("!")
    layout = machine.layout

    def run(lanes):
        _present(machine, site, lanes, mask[lanes])
        warp, votes = layout.warp[lanes], predicate[lanes] != negated
        yes = np.zeros(layout.warp[-1] + 1, np.uint32)
        no = np.zeros_like(yes)
        bit = np.uint32(1) << layout.lane[lanes].astype(np.uint32)
        np.bitwise_or.at(yes, warp[votes], bit[votes])
        np.bitwise_or.at(no, warp[~votes], bit[~votes])
        result[lanes] = {"ballot": yes, "any": yes != 0, "all": no == 0}[mode][warp]

    return run


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _reduce(machine, site):
    name, kind = site.opcode[2], site.opcode[-1]
    function = {"min": np.fmin, "max": np.fmax}.get(name) if kind == "f32" else _REDUCTIONS.get(name)
    if site.opcode[1] != "sync" or len(site.opcode) != 4 or function is None:
        return None
    target, source, mask = site.instruction.operands
    result, values = machine.destination(target, kind), machine.source(source, kind)
    mask, dtype, layout = machine.source(mask, "u32"), DTYPES[kind], machine.layout

    def run(lanes):
        _present(machine, site, lanes, mask[lanes])
        warp, given = layout.warp[lanes], values[lanes]
        starts = np.flatnonzero(np.append(True, warp[1:] != warp[:-1]))
        totals = np.zeros(layout.warp[-1] + 1, dtype)
        totals[warp[starts]] = function.reduceat(given, starts)
        result[lanes] = totals[warp]

    return run


def _warp_barrier(machine, site):
    if site.opcode != ("bar", "warp", "sync"):
        return None
    mask = machine.source(site.instruction.operands[0], "u32")

    def run(lanes):
        _present(machine, site, lanes, mask[lanes])
        machine.pass_warp_barrier(lanes)

    return run


def _matrix(machine, site):
    """stmatrix and ldmatrix, of up to four matrices of 8x8 16-bit numbers: thread 8 j + i has the address of row i of
    matrix j, and every thread two neighbouring numbers of each."""
    name, *modifiers = site.opcode
    pattern = ["sync", "aligned", "m8n8", "count", "shared", "b16"]
    counted = modifiers[3] if len(modifiers) == len(pattern) else ""
    if counted not in ("x1", "x2", "x4") or modifiers != [counted if part == "count" else part for part in pattern]:
        return None
    stores = name == "stmatrix"
    pointer, vector = site.instruction.operands if stores else site.instruction.operands[::-1]
    names = split_vector(vector)
    registers = [machine.source(each, "b32") if stores else machine.destination(each, "b32") for each in names]
    address, layout, dtype = machine.address(pointer), machine.layout, DTYPES["b32"]
    everyone = np.full(layout.count, 0xFFFFFFFF, np.uint32)

    def run(lanes):
        _present(machine, site, lanes, everyone[lanes])
        lane = layout.lane[lanes]
        rows = address(slice(0, layout.count))
        first = layout.numbers[lanes] - lane
        for j, register in enumerate(registers):
            places = rows[first + 8 * j + lane // 4] + lane % 4 * 4
            if stores:
                machine.shared.store(places, dtype, [register[lanes]], lanes, site)
            else:
                (register[lanes],) = machine.shared.load(places, dtype, 1, lanes, site)

    return run


COLLECTIVES = {
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "bar": _warp_barrier,
    "stmatrix": _matrix,
    "ldmatrix": _matrix,
}

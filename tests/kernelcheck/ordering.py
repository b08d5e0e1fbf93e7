"""Which accesses of a log race: those of two threads to one place, at least one of them a write and not both atomic,
that nothing orders. Barriers order the threads of a block, and barriers of a warp those of a warp. Blocks are ordered
by release and acquire, of which grid barriers are made too, with one vector clock a block.
"""

from __future__ import annotations

import numpy as np
from kernelcheck.memory import ATOMIC, READ, WRITE, Accesses, AccessLog

_LATE = 1 << 32


class Clocks:
    """Vector clocks of the blocks of a launch. A block starts a new segment wherever it releases or acquires; what it
    does within one segment has the same place in the order."""

    def __init__(self, blocks: int):
        self.synchronised = False
        self._blocks = blocks
        self._clock: dict[int, np.ndarray] = {}  # what a block knows of all blocks, itself included
        self._fenced: dict[int, np.ndarray] = {}  # what it knew at its last fence
        self._heard: dict[int, np.ndarray] = {}  # what relaxed loads have seen since
        self._released: dict[int, np.ndarray] = {}  # what was released through an address
        self.segments: list[tuple[int, np.ndarray | None]] = [(block, None) for block in range(blocks)]

    def _known(self, block: int) -> np.ndarray:
        if block not in self._clock:
            self._clock[block] = np.zeros(self._blocks, np.int64)
            self._clock[block][block] = 1
        return self._clock[block]

    def release(self, block: int, address: int):
        self._join(self._released, address, self._known(block))
        self._known(block)[block] += 1

    def acquire(self, block: int, address: int):
        if address in self._released:
            np.maximum(self._known(block), self._released[address], out=self._known(block))

    def fence(self, block: int):
        if block in self._heard:
            np.maximum(self._known(block), self._heard.pop(block), out=self._known(block))
        self._fenced[block] = self._known(block).copy()
        self._known(block)[block] += 1

    def relaxed(self, block: int, address: int, reads: bool, writes: bool):
        if reads and address in self._released:
            self._join(self._heard, block, self._released[address])
        if writes and block in self._fenced:
            self._join(self._released, address, self._fenced[block])

    def new_segment(self, block: int) -> int:
        self.synchronised = True
        self.segments.append((block, self._known(block).copy()))
        return len(self.segments) - 1

    def ordered(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether what happened in one segment comes before what happened in the other, or after."""
        return self._before(first, second) | self._before(second, first)

    def _before(self, first, second):
        blocks = np.array([self.segments[s][0] for s in first])
        own = np.array([1 if vector is None else vector[b] for b, vector in (self.segments[s] for s in first)])
        nothing = np.zeros(self._blocks, np.int64)
        known = np.stack([nothing if self.segments[s][1] is None else self.segments[s][1] for s in second])
        return known[np.arange(len(second)), blocks] >= own

    @staticmethod
    def _join(clocks, key, other):
        clocks[key] = np.maximum(clocks[key], other) if key in clocks else other.copy()


def first_race(log: AccessLog, threads_per_block: int, clocks: Clocks | None = None) -> tuple | None:
    """(address, (thread, site), (thread, site)) of two accesses that race. Between blocks only with their clocks."""
    columns = log.columns()
    if columns is None:
        return None
    accesses, unit = _expanded(columns, clocks is not None)
    if accesses is None:
        return None
    order = np.argsort(accesses.granule, kind="stable")
    accesses = accesses.rows(order)
    pair = _within_blocks(accesses, threads_per_block)
    if pair is None and clocks is not None:
        pair = _between_blocks(accesses, threads_per_block, clocks)
    if pair is None:
        return None
    found = sorted(pair, key=lambda i: accesses.entry[i])
    return int(accesses.granule[pair[0]]) * unit, *(
        (int(accesses.thread[i]), log.sites[accesses.entry[i]]) for i in found
    )


def _expanded(columns, by_segment) -> tuple[Accesses | None, int]:
    """One row for every granule of an access, a granule being the smallest access there is. Places that nobody writes
    are left out."""
    address, thread, interval, segment, size, kind, entry = columns
    if (kind == READ).all():
        return None, 1
    unit = int(size.min())
    repeat = size // unit
    rows = np.repeat(np.arange(len(address)), repeat)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    granule = address[rows] // unit + within
    writes = np.unique(granule[kind[rows] != READ])
    kept = np.searchsorted(writes, granule)
    kept = (kept < len(writes)) & (writes[np.minimum(kept, len(writes) - 1)] == granule)
    rows, granule = rows[kept], granule[kept]
    return Accesses(granule, thread[rows], interval[rows], segment[rows], kind[rows], entry[rows]), unit


def _conflicts(keys: tuple, actors: np.ndarray, kinds: np.ndarray, entries=None) -> list[np.ndarray]:
    """Groups of rows with equal keys in which two actors conflict. With entries, these must be several: threads that
    store the same value in one instruction, as Triton has it for data that several threads hold, do no harm."""
    order = np.lexsort((actors, *reversed(keys)))
    starts = np.zeros(len(order), bool)
    starts[0] = True
    for key in keys:
        starts[1:] |= key[order][1:] != key[order][:-1]
    starts = np.flatnonzero(starts)
    ends = np.append(starts[1:], len(order))

    def any_of(kind):
        return np.logical_or.reduceat((kinds == kind)[order], starts)

    several = actors[order][starts] != actors[order][ends - 1]
    if entries is not None:
        ordered = entries[order]
        several &= np.minimum.reduceat(ordered, starts) != np.maximum.reduceat(ordered, starts)
    bad = several & (any_of(WRITE) | any_of(ATOMIC) & any_of(READ))
    return [order[starts[i] : ends[i]] for i in np.flatnonzero(bad)]


def _pair(group: np.ndarray, actors: np.ndarray, kinds: np.ndarray) -> tuple[int, int]:
    """Two rows of a group that conflict."""
    for kind in (WRITE, ATOMIC):
        for i in group[kinds[group] == kind]:
            others = group[(actors[group] != actors[i]) & ((kinds[group] != ATOMIC) | (kind == WRITE))]
            if len(others):
                return int(i), int(others[0])
    raise AssertionError("no conflict in this group")


def _within_blocks(rows: Accesses, threads_per_block: int) -> tuple[int, int] | None:
    block = rows.thread // threads_per_block
    warp = rows.thread % threads_per_block // 32
    of_warps = _conflicts((rows.granule, block, rows.interval // _LATE), warp, rows.kind, rows.entry)
    if of_warps:
        return _pair(of_warps[0], warp, rows.kind)
    of_threads = _conflicts((rows.granule, block, warp, rows.interval), rows.thread, rows.kind, rows.entry)
    return _pair(of_threads[0], rows.thread, rows.kind) if of_threads else None


def _between_blocks(rows: Accesses, threads_per_block: int, clocks: Clocks) -> tuple[int, int] | None:
    block = rows.thread // threads_per_block
    groups = _conflicts((rows.granule,), block, rows.kind)
    if groups and not clocks.synchronised:
        return _pair(groups[0], block, rows.kind)
    seen = set()
    for group in groups:
        segments, kinds = rows.segment[group], rows.kind[group]
        distinct, firsts = np.unique(np.stack([segments, kinds]), axis=1, return_index=True)
        if distinct.tobytes() in seen:
            continue
        seen.add(distinct.tobytes())
        left, right = np.triu_indices(len(firsts), 1)
        i, j = group[firsts[left]], group[firsts[right]]
        harmless = (block[i] == block[j]) | ((rows.kind[i] == rows.kind[j]) & (rows.kind[i] != WRITE))
        i, j = i[~harmless], j[~harmless]
        if len(i):
            racing = ~clocks.ordered(rows.segment[i], rows.segment[j])
            if racing.any():
                at = np.flatnonzero(racing)[0]
                return int(i[at]), int(j[at])
    return None

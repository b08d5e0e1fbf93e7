"""Threads that execute the same instruction together, and how the PTX executor names them. Threads of all resident
blocks are numbered one after the other; `lanes` are a slice of these numbers or a sorted array of them, whichever
numpy indexes with.
"""

from __future__ import annotations

import functools

import numpy as np

WARP = 32


class Layout:
    """The threads of the blocks that are resident together, in the order in which the blocks are to run."""

    def __init__(self, grid: tuple, threads: tuple, blocks: list[int]):
        self.grid, self.shape = grid, threads
        self.per_block = threads[0] * threads[1] * threads[2]
        self.blocks = np.asarray(blocks, np.int64)
        self.count = len(blocks) * self.per_block
        self.numbers = np.arange(self.count)
        self.place = np.repeat(np.arange(len(blocks)), self.per_block)  # of the block among the resident ones
        self.block = self.blocks[self.place]
        self.thread = self.numbers % self.per_block
        self.lane = self.thread % WARP
        self.warps_per_block = -(-self.per_block // WARP)
        self.warp = self.place * self.warps_per_block + self.thread // WARP
        self.global_thread = self.block * self.per_block + self.thread
        self.whole_warps = self.per_block % WARP == 0

    def name(self, number: int) -> str:
        return thread_name(self.grid, self.shape, int(self.global_thread[number]))

    def special(self, name: str) -> np.ndarray:
        """A special register of every thread, without those that only the launch knows."""
        base, _, axis = name.partition(".")
        i = "xyz".find(axis)
        if base in ("%tid", "%ctaid"):
            index, shape = (self.thread, self.shape) if base == "%tid" else (self.block, self.grid)
            values = _axis(index, shape, i)
        elif base in ("%ntid", "%nctaid"):
            values = np.full(self.count, (self.shape if base == "%ntid" else self.grid)[i])
        elif name == "%laneid":
            values = self.lane
        else:
            raise KeyError(name)
        return values.astype(np.uint32)


def _axis(index, shape, i):
    for extent in shape[:i]:
        index = index // extent
    return index % shape[i]


def thread_name(grid: tuple, shape: tuple, number: int) -> str:
    """`block 3 thread 17`, with three coordinates where a launch has them."""
    size = shape[0] * shape[1] * shape[2]
    parts = []
    for name, extents, index in (("block", grid, number // size), ("thread", shape, number % size)):
        coordinates = [str(_axis(index, extents, i)) for i in range(3)]
        flat = extents[1] == extents[2] == 1
        parts.append(f"{name} {coordinates[0] if flat else '(' + ', '.join(coordinates) + ')'}")
    return " ".join(parts)


class Group:
    """Threads that go through the same basic blocks."""

    def __init__(self, lanes, layout: Layout):
        if not isinstance(lanes, slice) and len(lanes) and lanes[-1] - lanes[0] + 1 == len(lanes):
            lanes = slice(int(lanes[0]), int(lanes[-1]) + 1)
        self.lanes = lanes
        self.layout = layout

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        return self.layout.numbers[self.lanes]

    def __len__(self) -> int:
        return self.lanes.stop - self.lanes.start if isinstance(self.lanes, slice) else len(self.lanes)

    @functools.cached_property
    def has_whole_warps(self) -> bool:
        """Whether there is nobody else in these warps; of threads that have ended this cannot be said."""
        if isinstance(self.lanes, slice) and self.layout.whole_warps:
            return self.lanes.start % WARP == 0 and self.lanes.stop % WARP == 0
        return self._has_whole(self.layout.warp)

    @functools.cached_property
    def has_whole_blocks(self) -> bool:
        if isinstance(self.lanes, slice):
            return self.lanes.start % self.layout.per_block == 0 and self.lanes.stop % self.layout.per_block == 0
        return self._has_whole(self.layout.place)

    def _has_whole(self, units: np.ndarray) -> bool:
        present = np.bincount(units[self.lanes], minlength=units[-1] + 1)
        return bool(((present == 0) | (present == np.bincount(units))).all())

    @functools.cached_property
    def warps(self) -> int:
        warps = self.layout.warp[self.lanes]
        return 1 + int(np.count_nonzero(np.diff(warps)))

    def split(self, chosen: np.ndarray) -> tuple[Group, Group]:
        """Those that are chosen, and the others."""
        return Group(self.numbers[chosen], self.layout), Group(self.numbers[~chosen], self.layout)

    def merged(self, other: Group) -> Group:
        return Group(np.sort(np.concatenate([self.numbers, other.numbers])), self.layout)

"""The memory of a launch in the PTX executor: tensors of the host as global memory, the shared memory of blocks, and a
log of every access, in which races are looked for once the threads have run.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from kernelcheck.faults import Misaligned, OutOfBounds, Race, Uninitialised

READ, WRITE, ATOMIC = 0, 1, 2
SECTOR = 32  # bytes that global memory moves at once


class Region:
    """The bytes of one tensor, or of several that overlap."""

    def __init__(self, name: str, start: int, end: int):
        self.name, self.start, self.end = name, start, end
        self._base = start & -16
        size = -(-(end - self._base) // 16) * 16
        self._bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self._base), np.uint8)
        self._views: dict[np.dtype, np.ndarray] = {}

    def at(self, addresses: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The memory in a type, and the places of these addresses in it."""
        if dtype not in self._views:
            self._views[dtype] = self._bytes.view(dtype)
        return self._views[dtype], (addresses - self._base) >> (dtype.itemsize.bit_length() - 1)


class GlobalMemory:
    """Reads and writes of several threads at once. `lanes` are the threads, `site` is what they execute."""

    def __init__(self, tensors: list[tuple[str, int, int]], log: AccessLog):
        self.regions = _merged(tensors)
        self.log = log
        self.changes = 0  # how often anything was written
        self._starts = np.array([region.start for region in self.regions], np.int64)

    def load(self, addresses, dtype, count, lanes, site):
        size = dtype.itemsize * count
        values = [np.empty(addresses.shape, dtype) for _ in range(count)]
        for region, chosen in self._regions(addresses, size, lanes, site):
            view, places = region.at(addresses[chosen], dtype)
            for i, value in enumerate(values):
                value[chosen] = view[places + i]
        self.log.add(addresses, size, site.atomic_kind or READ, lanes, site)
        return values

    def store(self, addresses, dtype, values, lanes, site):
        size = dtype.itemsize * len(values)
        for region, chosen in self._regions(addresses, size, lanes, site):
            view, places = region.at(addresses[chosen], dtype)
            for i, value in enumerate(values):
                view[places + i] = value[chosen]
                if not _same(view[places + i], value[chosen]):
                    raise Race(site.message(lanes, f"threads write different values to one place of {region.name}"))
        self.changes += 1
        self.log.add(addresses, size, site.atomic_kind or WRITE, lanes, site)

    def update(self, addresses, dtype, function, lanes, site):
        """An atomic operation, thread after thread: `function(number of the thread, old)` is the new value."""
        old = np.empty(addresses.shape, dtype)
        for region, chosen in self._regions(addresses, dtype.itemsize, lanes, site):
            view, places = region.at(addresses[chosen], dtype)
            for thread, place in zip(np.arange(len(addresses))[chosen], places, strict=True):
                old[thread] = view[place]
                view[place] = function(thread, old[thread])
                self.changes += int(view[place] != old[thread])
        self.log.add(addresses, dtype.itemsize, ATOMIC, lanes, site)
        return old

    def _regions(self, addresses, size, lanes, site):
        """Pairs of a region and which of the accesses are in it."""
        if size > 1 and (addresses & (size - 1)).any():
            first = np.flatnonzero(addresses & (size - 1))[0]
            text = f"address {self._place(int(addresses[first]))} is no multiple of {size}"
            raise Misaligned(site.message(lanes, text, first))
        region = site.region
        if region is None or not _inside(addresses, region, size):
            numbers = np.searchsorted(self._starts, addresses, "right") - 1
            found = np.unique(numbers).tolist()
            for number in found:
                self._check(number, addresses, numbers == number, size, lanes, site)
            if len(found) > 1:
                return [(self.regions[number], numbers == number) for number in found]
            region = site.region = self.regions[found[0]]
        return ((region, slice(None)),)

    def _check(self, number, addresses, chosen, size, lanes, site):
        region = self.regions[number] if number >= 0 else None
        outside = chosen if region is None else chosen & (addresses > region.end - size)
        if outside.any():
            first = np.flatnonzero(outside)[0]
            text = f"{size} bytes at {self._place(int(addresses[first]))} are outside of the tensors"
            raise OutOfBounds(site.message(lanes, text, first))

    def _place(self, address: int) -> str:
        """An address as a distance from the tensor that is nearest."""
        if not self.regions:
            return hex(address)
        near = min(self.regions, key=lambda region: max(region.start - address, address - region.end))
        return f"byte {address - near.start} of {near.name} ({near.end - near.start} bytes)"

    def name_of(self, address: int) -> str:
        return self._place(address)


def _same(left, right) -> bool:
    """Whether these are the same bits, any NaN being like another, as on a GPU. 64 bits may be two float32."""
    left, right = (np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (left, right))
    different = left != right
    if not different.any():
        return True
    if left.itemsize < 4:
        return False
    left, right = left[different], right[different]
    if all(np.isnan(x.view(f"f{x.itemsize}")).all() for x in (left, right)):
        return True
    return left.itemsize == 8 and _same(left.view("u4"), right.view("u4"))


def _inside(addresses, region, size) -> bool:
    offsets = addresses - region.start
    return region.end - region.start >= size and bool(
        (offsets.view(np.uint64) <= region.end - region.start - size).all()
    )


def _merged(tensors: list[tuple[str, int, int]]) -> list[Region]:
    """Regions in the order of their addresses."""
    found: list[tuple[str, int, int]] = []
    for name, start, end in sorted((tensor for tensor in tensors if tensor[1] < tensor[2]), key=lambda t: t[1:]):
        if found and start < found[-1][2]:
            last = found.pop()
            found.append((last[0] if name in last[0].split("=") else f"{last[0]}={name}", last[1], max(end, last[2])))
        else:
            found.append((name, start, end))
    return [Region(*region) for region in found]


class SharedMemory:
    """What the blocks that are resident share, each for itself."""

    def __init__(self, blocks: int, size: int, block_of: np.ndarray, log: AccessLog):
        self.size, self.log = size, log
        self._pitch = -(-size // 16) * 16
        self._start = block_of * self._pitch
        self._bytes = np.zeros(blocks * self._pitch, np.uint8)
        self._written = np.zeros(blocks * self._pitch, np.uint8)  # all ones where a byte was written

    def load(self, addresses, dtype, count, lanes, site):
        places = self._places(addresses, dtype, count, lanes, site)
        view, written = self._bytes.view(dtype), self._written.view(_bits(dtype))
        for i in range(count):
            if not (written[places + i] == written.dtype.type(-1 % 256**dtype.itemsize)).all():
                first = np.flatnonzero(written[places + i] != written.dtype.type(-1 % 256**dtype.itemsize))[0]
                text = f"shared byte {addresses[first] + i * dtype.itemsize} was never written"
                raise Uninitialised(site.message(lanes, text, first))
        return [view[places + i] for i in range(count)]

    def store(self, addresses, dtype, values, lanes, site):
        places = self._places(addresses, dtype, len(values), lanes, site, WRITE)
        view, written = self._bytes.view(dtype), self._written.view(_bits(dtype))
        for i, value in enumerate(values):
            view[places + i] = value
            written[places + i] = -1 % 256**dtype.itemsize
            if not _same(view[places + i], value):
                raise Race(site.message(lanes, "threads write different values to one place of shared memory"))

    def update(self, addresses, dtype, function, lanes, site):
        places = self._places(addresses, dtype, 1, lanes, site, ATOMIC)
        view = self._bytes.view(dtype)
        old = np.empty(addresses.shape, dtype)
        for thread, place in enumerate(places):
            old[thread] = view[place]
            view[place] = function(thread, old[thread])
        return old

    def _places(self, addresses, dtype, count, lanes, site, kind=READ):
        size = dtype.itemsize * count
        if size > 1 and (addresses & (size - 1)).any():
            first = np.flatnonzero(addresses & (size - 1))[0]
            raise Misaligned(site.message(lanes, f"shared byte {addresses[first]} is no multiple of {size}", first))
        outside = (addresses < 0) | (addresses > self.size - size)
        if outside.any():
            first = np.flatnonzero(outside)[0]
            text = f"{size} bytes at shared byte {addresses[first]} are outside of {self.size}"
            raise OutOfBounds(site.message(lanes, text, first))
        absolute = addresses + self._start[lanes]
        self.log.add(absolute, size, kind, lanes, site)
        return absolute >> (dtype.itemsize.bit_length() - 1)

    def name_of(self, address: int) -> str:
        return f"shared byte {address % self._pitch}"


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


class Accesses(NamedTuple):
    """Columns of a log: who accessed which granule, and when."""

    granule: np.ndarray
    thread: np.ndarray
    interval: np.ndarray  # barriers of the block so far << 32 | those of the warp since
    segment: np.ndarray  # of the block's synchronisation with others (ordering.py)
    kind: np.ndarray
    entry: np.ndarray  # of the log

    def rows(self, chosen: np.ndarray) -> Accesses:
        return Accesses(*(column[chosen] for column in self))


class AccessLog:
    """Accesses to global memory, or to shared memory. The threads' `intervals` and `segments` are arrays that the
    executor replaces, never changes, so that a reference to them is enough here."""

    def __init__(self):
        self.intervals = self.segments = None
        self._pending: list[tuple] = []
        self._chunks: list[tuple] = []
        self.sites: list = []

    def add(self, addresses, size, kind, lanes, site):
        self._pending.append((addresses, size, kind, lanes, site, self.intervals, self.segments))

    def settle(self, threads: np.ndarray):
        """Turns what the threads of these numbers in the grid did into columns."""
        if not self._pending:
            return
        columns = []
        for addresses, size, kind, lanes, site, intervals, segments in self._pending:
            entry = np.int32(len(self.sites))
            self.sites.append(site)
            shape = addresses.shape
            tags = (np.broadcast_to(np.int32(value), shape) for value in (size, kind, entry))
            columns.append((addresses, threads[lanes], intervals[lanes], segments[lanes], *tags))
        self._pending.clear()
        self._chunks.append(tuple(np.concatenate(parts) for parts in zip(*columns, strict=True)))

    def columns(self):
        """Address, thread, interval, segment, size, kind and entry of every access; None where there is none."""
        if not self._chunks:
            return None
        if len(self._chunks) > 1:
            self._chunks = [tuple(np.concatenate(parts) for parts in zip(*self._chunks, strict=True))]
        return self._chunks[0]

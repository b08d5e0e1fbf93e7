"""Runs compiled kernels on a CPU: PTX, as Triton or nvcc makes it, on CPU tensors at their own addresses. Threads of
all resident blocks run together in numpy, a basic block at a time, as many as are at the same place; those furthest
behind go first. What a GPU would do in silence is an error here: accesses outside of the given tensors or misaligned,
reads of shared memory that nobody wrote, races, barriers and shuffles that not all threads reach, and waiting for ever.

Not modelled: time, caches, local memory, calls, asynchronous copies and tensor cores. Memory is sequentially
consistent; that a kernel does not rely on it is what the search for races says (ordering.py).
"""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

import numpy as np
import torch
from kernelcheck.faults import (
    Deadlock,
    Divergence,
    ExecutionError,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    Unsupported,
)
from kernelcheck.machine import Machine
from kernelcheck.memory import READ, SECTOR, AccessLog, GlobalMemory
from kernelcheck.ordering import Clocks, first_race
from kernelcheck.ptx import Entry, Module
from kernelcheck.scheduler import Scheduler
from kernelcheck.threads import WARP, Layout, thread_name

__all__ = [
    "Counters",
    "Deadlock",
    "Divergence",
    "ExecutionError",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "Race",
    "Uninitialised",
    "Unsupported",
    "launch",
]

RESIDENT = 8192  # threads that run together where they need not all be resident


class Counters(NamedTuple):
    """What a launch did. A request is a load or store of one warp; it takes as many sectors of 32 bytes as its threads
    touch. The bytes are counted once, however often they are read or written."""

    warp_instructions: int
    load_requests: int
    load_sectors: int
    store_requests: int
    store_sectors: int
    bytes_read: int
    bytes_written: int


def launch(
    module: Module,
    entry: str,
    grid: tuple,
    threads: int | tuple,
    arguments: list,
    *,
    memory=(),
    shared: int = 0,
    cooperative: bool = False,
    order: str = "forward",
    seed: int = 0,
) -> Counters:
    """Runs one kernel to its end.

    `arguments` has one element a parameter: a tensor, None for a null pointer, a number, or the bytes of an aggregate.
    `memory` are tensors that the kernel finds inside of aggregates. `shared` are bytes of dynamic shared memory.
    `cooperative` keeps all blocks resident and gives them a grid barrier. Blocks run in the order "forward", "reverse"
    or "random" by `seed`; those that are resident together run in step, unless the order is random.
    """
    kernel = module.entries[entry]
    grid, threads = _three(grid), _three(threads)
    if min(*grid, *threads) < 1:
        raise ValueError(f"a grid of {grid} blocks of {threads} threads is empty")
    _check_threads(kernel, threads)
    log = AccessLog()
    barrier = torch.zeros(4, dtype=torch.int32)  # what cooperative groups keep of a grid
    tensors = [*_tensors(kernel, arguments, memory), *([_named("the grid barrier", barrier)] if cooperative else [])]
    global_memory = GlobalMemory(tensors, log)
    shared_log = AccessLog()
    clocks = Clocks(grid[0] * grid[1] * grid[2])
    warp_instructions = 0
    blocks = _ordered_blocks(grid, order, seed)
    per_block = threads[0] * threads[1] * threads[2]
    resident = len(blocks) if cooperative else max(1, RESIDENT // per_block)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), resident):
            layout = Layout(grid, threads, blocks[first : first + resident])
            machine = Machine(
                module, kernel, layout, _packed(kernel, arguments), global_memory, clocks, shared, shared_log
            )
            machine.grid_barrier = barrier.data_ptr() if cooperative else 0
            scheduler = Scheduler(machine, random.Random(seed) if order == "random" else None)
            warp_instructions += scheduler.run()
            for each in (log, shared_log):
                each.settle(layout.global_thread)
        _raise_race(kernel, grid, threads, first_race(shared_log, per_block), machine.shared.name_of)
        _raise_race(kernel, grid, threads, first_race(log, per_block, clocks), global_memory.name_of)
        return Counters(warp_instructions, *_traffic(log, global_memory))


def _three(extent) -> tuple[int, int, int]:
    extent = (extent,) if isinstance(extent, int) else tuple(extent)
    return (*extent, 1, 1)[:3]


def _check_threads(kernel: Entry, threads: tuple):
    count = threads[0] * threads[1] * threads[2]
    if kernel.required_threads and kernel.required_threads != list(threads)[: len(kernel.required_threads)]:
        raise ExecutionError(f"{kernel.name} must be launched with {kernel.required_threads} threads, not {threads}")
    if kernel.most_threads and count > int(np.prod(kernel.most_threads)):
        raise ExecutionError(f"{kernel.name} takes at most {kernel.most_threads} threads a block, not {threads}")


def _ordered_blocks(grid: tuple, order: str, seed: int) -> list[int]:
    blocks = list(range(grid[0] * grid[1] * grid[2]))
    if order == "reverse":
        blocks.reverse()
    elif order == "random":
        random.Random(seed).shuffle(blocks)
    elif order != "forward":
        raise ValueError(f'order must be "forward", "reverse" or "random", got {order!r}')
    return blocks


def _named(name: str, tensor: torch.Tensor) -> tuple[str, int, int]:
    """The name and the addresses of a tensor, from its first element to its last."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {tensor.device}")
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return name, start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return name, start, start + (last + 1) * tensor.element_size()


def _tensors(kernel: Entry, arguments: list, memory) -> list[tuple[str, int, int]]:
    named = [
        _named(parameter.name, argument)
        for parameter, argument in zip(kernel.parameters, arguments, strict=False)
        if isinstance(argument, torch.Tensor)
    ]
    return named + [_named(f"memory[{i}]", tensor) for i, tensor in enumerate(memory)]


def _packed(kernel: Entry, arguments: list) -> np.ndarray:
    """The bytes of all parameters."""
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    end = max((parameter.offset + parameter.bytes for parameter in kernel.parameters), default=0)
    packed = bytearray(end)
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        packed[parameter.offset : parameter.offset + parameter.bytes] = _argument_bytes(parameter, argument)
    return np.frombuffer(bytes(packed), np.uint8)


def _argument_bytes(parameter, argument) -> bytes:
    if isinstance(argument, bytes):
        if len(argument) != parameter.bytes:
            raise ValueError(f"{parameter.name} takes {parameter.bytes} bytes, got {len(argument)}")
        return argument
    if isinstance(argument, float):
        return struct.pack("<f" if parameter.bytes == 4 else "<d", argument)
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    value = int(argument or 0)
    return (value % 256**parameter.bytes).to_bytes(parameter.bytes, "little")


def _raise_race(kernel, grid, threads, race, name_of):
    if race is None:
        return
    address, *accesses = race
    sides = [f"{thread_name(grid, threads, thread)} at `{site.text}`" for thread, site in accesses]
    raise Race(f"{kernel.name}: {sides[0]} and {sides[1]} race for {name_of(address)}")


def _traffic(log: AccessLog, memory: GlobalMemory) -> tuple[int, ...]:
    """Requests and sectors of loads and of stores, bytes read and bytes written."""
    columns = log.columns()
    if columns is None:
        return (0,) * 6
    address, thread, _, _, size, kind, entry = columns
    counts = []
    for chosen in (kind == READ, kind != READ):
        request = entry[chosen].astype(np.int64) << 32 | thread[chosen] // WARP
        requests, number = np.unique(request, return_inverse=True)
        sector = address[chosen] // SECTOR
        sectors = np.unique(number << 32 | (sector - sector.min())) if len(sector) else sector
        counts += [len(requests), len(sectors)]
    for chosen in (kind == READ, kind != READ):
        counts.append(sum(_unique_bytes(address[chosen], size[chosen], region) for region in memory.regions))
    return tuple(counts)


def _unique_bytes(address, size, region) -> int:
    touched = np.zeros(region.end - region.start, bool)
    for width in np.unique(size).tolist():
        first = address[(size == width) & (address >= region.start) & (address < region.end)] - region.start
        for i in range(width):
            touched[first + i] = True
    return int(touched.sum())

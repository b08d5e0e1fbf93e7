"""What every bench_*.py does with its cases: name them, time one, and count what its operators do.

The record goes through pytest-benchmark's JSON to records.py.
"""

import gc
import itertools
import os
from typing import NamedTuple

import pytest
import torch

import armor
from benchmarks.counter import Counter

DEVICE = os.environ.get("ARMOR_BENCH_DEVICE", "cpu")  # python -m benchmarks sets it, in the process of pytest


class Case(NamedTuple):
    """One line of a table and one of its columns."""

    case: str  # divergence, transport cost, loss or model
    rows: int  # rows of losses, or samples
    n: int  # losses in a row, numbers in a sample, or classes
    mode: str
    provider: str


def each(cases):
    """Runs a test with `case` set to each of the cases."""
    return pytest.mark.parametrize("case", [pytest.param(c, id="{}-{}x{}-{}-{}".format(*c)) for c in cases])


def time(benchmark, kernel, case, step, *, config, error=None, counts=None, rounds=None):
    """Times `step`: as long as the command line says, warmed up before, or `rounds` of it.

    On a GPU, from the call until the device has finished.
    """
    benchmark.group = "{} {}x{} {}".format(*case)
    benchmark.extra_info = case._asdict() | {
        "kernel": kernel,
        "metrics": ({} if error is None else {"error": error}) | (counts or {}),
        "config": config,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "armor": armor.__version__,
    }
    if DEVICE != "cpu":
        benchmark.extra_info["device"] = torch.cuda.get_device_name()
        step = _finished(step)
    if rounds is None:
        step()
        benchmark(step)
    else:
        benchmark.pedantic(step, rounds=rounds)


def _finished(step):
    def run():
        step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return run


def graphed(step, warmups=3):
    """`step` as a CUDA graph: a function that replays it and returns its outputs, which are always the same tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and memory is allocated, which no capture may do
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        return outputs

    return replay


def peak(function):
    """Bytes of tensors and of what operators allocate at the most during `function`, beyond those before it.

    On the CPU those of PyTorch's allocator, which also serves oneDNN's copies and workspaces, as its profiler records
    them: other than the peak of the process they neither depend on what malloc keeps nor on what ran before.
    """
    gc.collect()
    if DEVICE != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def counts(step):
    """Operators, bytes and syncs of `step` on meta tensors: nothing is computed, and no device is needed."""
    with Counter() as counter:
        step()
    return {"operators": len(counter.operators), "syncs": counter.syncs, "bytes": counter.bytes}

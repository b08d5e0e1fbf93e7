"""What every bench_*.py does with its cases: name them, time one, and count what its operators do.

The record goes through pytest-benchmark's JSON to records.py.
"""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import armor


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
    """Times `step`: as long as the command line says, warmed up before, or `rounds` of it."""
    benchmark.group = "{} {}x{} {}".format(*case)
    benchmark.extra_info = case._asdict() | {
        "kernel": kernel,
        "metrics": ({} if error is None else {"error": error}) | (counts or {}),
        "config": config,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "armor": armor.__version__,
    }
    if rounds is None:
        step()
        benchmark(step)
    else:
        benchmark.pedantic(step, rounds=rounds)


def counts(step):
    """Operators, bytes and syncs of `step`, which runs on meta tensors: nothing is computed, and no device is needed.

    An operator is a launch of at least one kernel. Its bytes are those of its arguments and results, each once, so that
    an in-place operator's are too few. A sync is a number that the host waits for.
    """
    with _Counter() as counter:
        step()
    return {"operators": counter.operators, "syncs": counter.syncs, "bytes": counter.bytes}


class _Counter(TorchDispatchMode):
    COMPUTE_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.operators = self.syncs = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += 1
            return 0
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._opname not in self.COMPUTE_NOTHING:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
            self.operators += 1
            self.bytes += sum(_bytes(t) for t in tensors.values())
        return result


def _bytes(t):
    """Of the elements in memory: an expanded dimension has one."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count

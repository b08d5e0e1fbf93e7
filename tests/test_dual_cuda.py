"""The CUDA kernels of armor::dual. Without a GPU, their source runs thread by thread on the CPU under the host shim of
tests/kernelcheck, plain and under sanitizers, and nvcc compiles it for every architecture that is shipped. With one, the
operator itself is tested by what is marked `gpu`.
"""

import ctypes
import functools
import math
import re
import subprocess
from dataclasses import replace

import cases
import pytest
import torch
from armor import dc_loss, library, reference
from armor.ops import Status
from cases import FAMILIES, Problem, random_problem, solve
from kernelcheck import toolchain
from pytest import approx

inf, nan = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
# Which threads share a row, and how many blocks a test launches. A block holds eight warps: one block of them has fewer
# groups than the larger tests have rows. Three blocks are the fewest of which two can differ in how far they are.
GROUPS = {"warp": 1, "block": 2, "grid": 3}
KINDS = ["alone", "warp", "block", "grid"]
ORDERS = ["forward", "reverse", "random"]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
groups = pytest.mark.parametrize("group", GROUPS)


def kernel(group, *, blocks=None, order="random", seed=1, resident=None):
    """A raw `dual`: the kernel for groups of this kind, on the host shim, under one schedule."""
    blocks = blocks or GROUPS[group]

    def dual(losses, costs, clean_losses, *numbers):
        value, lam, nu = (torch.full(losses.shape[:-1], nan, dtype=losses.dtype) for _ in range(3))
        weights = torch.full_like(losses, nan)
        status, passes = (torch.full(losses.shape[:-1], -1, dtype=torch.int32) for _ in range(2))
        outputs = value, lam, nu, weights, status, passes
        divergence, *reals = numbers
        run(
            "dual",
            losses.dtype,
            *(KINDS.index(group), blocks, ORDERS.index(order), ctypes.c_uint64(seed), resident or blocks),
            *(losses, costs, clean_losses, *outputs),
            *(ctypes.c_int64(losses.shape[0]), ctypes.c_int64(losses.shape[1])),
            *(divergence, *map(ctypes.c_double, reals)),
        )
        return outputs

    return dual


def backward(*tensors, blocks=2):
    """A raw `dual_backward`, on the host shim."""
    losses = tensors[3]
    grads = [None if given is None else torch.full_like(given, nan) for given in tensors[3:]]
    shape = map(ctypes.c_int64, losses.shape)
    run("dual_backward", losses.dtype, blocks, *tensors, *grads, *shape)
    return [losses.new_empty(0) if grad is None else grad for grad in grads]


def run(name, dtype, *arguments):
    function = getattr(shim(), f"{name}_{'float' if dtype == torch.float32 else 'double'}")
    function.restype = ctypes.c_char_p
    failure = function(*(pointer(a) if a is None or isinstance(a, torch.Tensor) else a for a in arguments))
    assert failure is None, failure.decode()


def pointer(tensor):
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def shim():
    return ctypes.CDLL(str(toolchain.host_shim("dual_shim.cpp", "-O2", "-shared", "-fPIC")))


def tiled(problem, copies):
    """The row, repeated: the measure is the same, and so is the solution."""

    def repeat(values, factor=1.0):
        return None if values is None else [factor * value for value in values] * copies

    return replace(
        problem,
        losses=repeat(problem.losses),
        costs=repeat(problem.costs),
        clean_losses=repeat(problem.clean_losses),
        weights=repeat(problem.weights, 1 / copies),
    )


def assert_bit_equal(one, other):
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# known solutions


@groups
@dtypes
@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden(problem, dtype, group):
    solution = solve(kernel(group), problem, dtype)
    cases.assert_golden(problem, solution, dtype)
    if dtype == torch.float32:
        assert 0 < solution.passes <= (10 if problem.costs is None else 25)


# The same rows, long enough that every thread of the group has samples of its own.
@pytest.mark.parametrize("group", ["block", "grid"])
@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden_in_full_groups(problem, group):
    copies = -(-GROUPS[group] * 300 // len(problem.losses))
    cases.assert_golden(tiled(problem, copies), solve(kernel(group), tiled(problem, copies)), torch.float64)


# Lengths on both sides of a warp and of a block, and one that gives some threads of the grid a second sample. What
# the CPU operator answers is judged by test_dual.py.
@groups
@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 256, 257, 1000])
@pytest.mark.parametrize("given", ["losses", "costs", "clean"])
def test_lengths(n, given, group):
    for seed, family in enumerate(FAMILIES):
        problem = random_problem(n, family, seed=seed, costs=given != "losses", clean=given == "clean", shift=-2.0)
        solution, expected = solve(kernel(group, seed=seed), problem), solve(torch.ops.armor.dual, problem)
        spread = max(problem.losses) - min(problem.losses)
        assert solution.value.item() == approx(expected.value.item(), rel=1e-12, abs=1e-12 * spread)
        assert solution.lam.item() == approx(expected.lam.item(), rel=1e-5, abs=1e-9 * spread)
        assert solution.nu.item() == approx(expected.nu.item(), rel=1e-5)
        assert solution.weights.sum().item() == approx(1, abs=1e-12)
        assert solution.status == expected.status

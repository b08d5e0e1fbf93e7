"""The CUDA operators as a whole without a GPU (kernelcheck/cuda_ops.py): what their host code checks, allocates and
launches, and what comes out. test_dual_cuda.py and test_rowloss_cuda.py have more of the numbers.
"""

import pytest
import torch
from cases import Problem
from kernelcheck import cases_gpu, cuda_ops, toolchain
from kernelcheck.faults import OutOfBounds, Race

from armor import reference

OPERATORS = [name for names in cuda_ops.SOURCES.values() for name in names]
CASES = [case for case in cases_gpu.cases(core=True) if case.op in OPERATORS]
NUMBERS = Problem([], divergence="renyi", alpha=1.25).numbers()
CE = 0, 6.0, 0.0  # kind, beta, smoothing


def random_losses(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64).to(dtype)


def random_logits(*shape, dtype=torch.float32):
    """logits, target"""
    target = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    return random_losses(*shape, dtype=dtype), target


# ---------------------------------------------------------------------------------------------------------------
# results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(case):
    operators = cuda_ops.on_shim()
    case.run(operators)
    assert operators.launches == 1


# Losses that are solved by warps, by blocks and by the grid.
@pytest.mark.parametrize(("rows", "samples"), [(3, 20), (2, 300), (1, 17_000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_and_their_dual(dtype, rows, samples):
    logits, target = random_logits(rows, samples, 3, dtype=dtype)
    costs = 0.01 * torch.rand(target.shape, dtype=torch.promote_types(dtype, torch.float32))
    given = logits, target, -logits, costs, 1, *CE[1:], *Problem([]).numbers()
    operators = cuda_ops.on_shim()
    got, expected = operators.rowloss_dual(*given), reference.rowloss_dual(*given)
    assert operators.launches == 1
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for one, other in zip(got[:3], expected[:3], strict=True):  # value, losses, stats
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(samples * got[5], samples * expected[5], rtol=0, atol=1e-3)
    assert got[6].tolist() == expected[6].tolist()


# What is not contiguous, or only in its own way, is made so before a kernel sees it.
def test_layouts():
    losses, costs = random_losses(7, 40).t(), random_losses(40, 14).abs()[:, ::2]
    operators = cuda_ops.on_shim()
    got = operators.dual(losses, costs, None, *NUMBERS)
    for one, other in zip(got, operators.dual(losses.contiguous(), costs.contiguous(), None, *NUMBERS), strict=True):
        assert torch.equal(one, other)
    logits, target = random_logits(6, 4, 10)
    got = operators.rowloss(logits.transpose(0, 1), target.t(), None, *CE, -100)
    expected = operators.rowloss(logits.transpose(0, 1).contiguous(), target.t().contiguous(), None, *CE, -100)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------
# launches


def dual(rows, n):
    return lambda operators: operators.dual(random_losses(rows, n), None, None, *NUMBERS)


def rowloss(rows, classes):
    return lambda operators: operators.rowloss(*random_logits(rows, classes), None, *CE, -100)


def rowloss_dual(rows, n, classes):
    return lambda operators: operators.rowloss_dual(*random_logits(rows, n, classes), None, None, *CE, *NUMBERS)


# On three processors: the kernel for the length of a row, and the blocks that have something to do, but no more than 32
# for each processor, or than are resident together.
@pytest.mark.parametrize(
    ("call", "kernel", "blocks", "cooperative"),
    [
        (dual(1, 1), "dualIfNS0_9WarpGroupE", 1, False),
        (dual(9, 256), "dualIfNS0_9WarpGroupE", 2, False),
        (dual(800, 3), "dualIfNS0_9WarpGroupE", 96, False),
        (dual(4, 257), "dualIfNS0_10BlockGroupE", 4, False),
        (dual(2, 16384), "dualIfNS0_10BlockGroupE", 2, False),
        (dual(2, 16385), "dualIfNS0_9GridGroupE", 3, True),
        (rowloss(20, 10), "rowlossIffE", 3, False),
        (rowloss(2, 1024), "rowlossIffE", 1, False),
        (rowloss(5, 1025), "rowlossIffE", 5, False),
        (rowloss_dual(1, 20, 10), "rowloss_dualIffNS0_9WarpGroupE", 3, True),
        (rowloss_dual(2, 257, 2), "rowloss_dualIffNS0_10BlockGroupE", 3, True),
        (rowloss_dual(1, 2, 2000), "rowloss_dualIffNS0_9WarpGroupE", 2, True),
    ],
)
def test_grids(call, kernel, blocks, cooperative):
    operators = cuda_ops.on_shim(processors=3)
    call(operators)
    (launch,) = operators.launched
    assert kernel in launch.kernel
    assert launch[1:4] == (blocks, 256, cooperative)


@pytest.mark.parametrize(
    ("name", "arguments", "shapes"),
    [
        ("dual", (torch.empty(0, 5), None, None, *NUMBERS), [(0,), (0,), (0,), (0, 5), (0,), (0,)]),
        (
            "dual_backward",
            (torch.empty(0), torch.empty(0), *(torch.empty(0, 5) for _ in range(3)), None),
            [(0, 5), (0, 5), (0,)],
        ),
        ("rowloss", (torch.empty(0, 10), torch.empty(0).long(), None, *CE, -100), [(0,), (0, 2)]),
        (
            "rowloss_backward",
            (torch.empty(0), None, torch.empty(0, 10), torch.empty(0).long(), None, torch.empty(0, 2), *CE, -100, True),
            [(0, 10), (0,)],
        ),
        (
            "rowloss_dual",
            (torch.empty(0, 5, 10), torch.empty(0, 5).long(), None, None, *CE, *NUMBERS),
            [(0,), (0, 5), (0, 5, 2), (0,), (0,), (0, 5), (0,), (0,)],
        ),
    ],
)
def test_nothing_is_launched_for_no_rows(name, arguments, shapes):
    operators = cuda_ops.on_shim()
    assert [tuple(result.shape) for result in getattr(operators, name)(*arguments)] == shapes
    assert operators.launches == 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dual", (torch.ones(2, 0), None, None, *NUMBERS), "at least one sample along the last dimension"),
        ("dual", (torch.ones(3), None, None, 3, *NUMBERS[1:]), "divergence must be 0, 1 or 2, got 3"),
        ("dual", (torch.ones(3).half(), None, None, *NUMBERS), "losses must be float32 or float64"),
        ("dual", (torch.ones(3), torch.ones(4), None, *NUMBERS), "costs has another shape than losses"),
        ("dual", (torch.ones(3), None, torch.ones(3).double(), *NUMBERS), "clean_losses has another dtype than losses"),
        (
            "dual_backward",
            (torch.ones(()), torch.ones(()), torch.ones(4), torch.ones(3), None, None),
            "weights has another shape than losses",
        ),
        ("rowloss", (torch.ones(3, 4), torch.zeros(2).long(), None, *CE, 0), "target must have the shape of logits"),
        ("rowloss", (torch.ones(3, 4), torch.zeros(3), None, *CE, 0), "target must be int64"),
        ("rowloss", (torch.ones(3, 4), torch.zeros(3).long(), None, 4, 6.0, 0.0, 0), "kind must be 0, 1, 2 or 3"),
        ("rowloss", (torch.ones(3, 4), torch.zeros(3).long(), None, 1, 6.0, 0.0, 0), "this kind needs natural logits"),
        (
            "rowloss_backward",
            (torch.ones(3), None, torch.ones(3, 4), torch.zeros(3).long(), None, torch.ones(3, 5), *CE, 0, True),
            "stats has another shape than expected",
        ),
        (
            "rowloss_dual",
            (torch.ones(2, 3, 4), torch.zeros(2, 3).long(), None, torch.ones(2), *CE, *NUMBERS),
            "costs has another shape than losses",
        ),
    ],
)
def test_errors(name, arguments, message):
    operators = cuda_ops.on_shim()
    with pytest.raises(RuntimeError, match=message):
        getattr(operators, name)(*arguments)
    assert operators.launches == 0


# ---------------------------------------------------------------------------------------------------------------
# copies of the sources with one thing broken


def assert_solves(operators, rows, n):
    losses = random_losses(rows, n)
    got, expected = (ops.dual(losses, None, None, *NUMBERS) for ops in (operators, torch.ops.armor))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3], expected[3], rtol=1e-3, atol=1e-6)


def assert_finds_losses(operators):
    given = *random_logits(1, 20, 10), None, None, *CE, *NUMBERS
    got, expected = (ops.rowloss_dual(*given) for ops in (operators, torch.ops.armor))
    for one, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def by_warps(operators):
    assert_solves(operators, 9, 30)


def by_blocks(operators):
    assert_solves(operators, 2, 300)


def by_the_grid(operators):
    assert_solves(operators, 1, 17_000)


BUGS = {
    "half a workspace": (
        *("cuda/dual.cu", "{2 * blocks * kWidest}", "{blocks * kWidest}"),
        *(by_the_grid, OutOfBounds, "beside what aten.new_empty"),
    ),
    "half the threads": (
        *("cuda/dual.cu", "all.rows, kWarps), kBlock,", "all.rows, kWarps), kBlock / 2,"),
        *(by_warps, AssertionError, "not close"),
    ),
    "not launched cooperatively": (
        *("cuda/dual.cu", "launch_cooperatively(", "launch("),
        *(by_the_grid, RuntimeError, "__grid_sync in a launch that is not cooperative"),
    ),
    "written over the input": (
        *("tensors.h", "pointer<T>(weights), pointer<int>(status)", "pointer<T>(losses), pointer<int>(status)"),
        *(by_warps, OutOfBounds, "to losses"),
    ),
    "no barrier of the block": (
        *("cuda/dual.cuh", "__syncthreads();\n    return parts;", "return parts;"),
        *(by_blocks, AssertionError, "not close"),
    ),
    "no barrier of the grid": (
        *("cuda/rowloss.cuh", "find_losses(all);\n  __grid_sync();", "find_losses(all);"),
        *(assert_finds_losses, AssertionError, "not close"),
    ),
    "stats too narrow": (
        *("rowloss_tensors.h", "width) sizes.push_back(width)", "width) sizes.push_back(width - 1)"),
        *(assert_finds_losses, OutOfBounds, "beside what aten.new_empty"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug):
    file, right, wrong, work, error, message = BUGS[bug]
    sources = toolchain.changed(file, right, wrong)
    work(cuda_ops.on_shim())
    failures = (failure(work, cuda_ops.on_shim(seed=seed, sources=sources)) for seed in range(30))
    first = next(filter(None, failures), None)
    assert isinstance(first, error), first
    assert message in str(first)


def failure(work, operators):
    try:
        work(operators)
    except (AssertionError, RuntimeError) as found:
        return found
    return None


# ---------------------------------------------------------------------------------------------------------------
# the same, on what nvcc makes of the kernels


@pytest.mark.parametrize(
    ("arch", "work"),
    [
        *((arch, work) for arch in (80, 120) for work in (by_warps, by_blocks, by_the_grid)),
        (120, assert_finds_losses),
    ],
)
def test_on_the_executor(arch, work):
    operators = cuda_ops.on_executor(arch)
    work(operators)
    assert operators.launches == 1


@pytest.mark.parametrize(("bug", "error"), [("half a workspace", OutOfBounds), ("no barrier of the block", Race)])
def test_bugs_are_found_on_the_executor(bug, error):
    file, right, wrong, work, *_ = BUGS[bug]
    with pytest.raises(error):
        work(cuda_ops.on_executor(80, sources=toolchain.changed(file, right, wrong)))

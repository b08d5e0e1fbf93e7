"""The CUDA kernels of armor::dual. Without a GPU, operators and kernels run thread by thread on the CPU under the host
shim of tests/kernelcheck; `make audit` does so under sanitizers, too, and executes what nvcc compiles. With one, what
is marked `gpu` tests the operators themselves.
"""

import math
from dataclasses import replace

import cases
import pytest
import torch
from cases import Problem, random_problem, solve
from kernelcheck import cuda_ops
from kernelcheck.on_device import on_two_streams

from armor import dc_loss, library, reference
from armor.ops import Status
from benchmarks.measure import graphed

inf, nan = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
NUMBERS = Problem([], divergence="renyi", alpha=1.25).numbers()
# The shortest rows that get a warp, a block or the grid, or a little more.
LENGTHS = {"warp": 100, "block": 300, "grid": 17_000}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
groups = pytest.mark.parametrize("group", LENGTHS)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def operators(device="cuda"):
    """The CUDA operators for tensors of this device: those of the host shim are for CPU tensors."""
    if device == "cpu":
        return cuda_ops.on_shim()
    served_by = library.backends()["dual"][0]["cuda"]
    if served_by != "cuda":
        pytest.skip(f"CUDA tensors are served by {served_by} here, not by armor._C_cuda")
    return torch.ops.armor


def tiled(problem, copies):
    """The row, repeated: the measure is the same, and so is the solution."""

    def repeat(values):
        return None if values is None else values * copies

    rows = (problem.losses, problem.costs, problem.clean_losses)
    return replace(problem, **dict(zip(("losses", "costs", "clean_losses"), map(repeat, rows), strict=True)))


def assert_tiled_golden(problem, copies, solution, dtype):
    """As cases.assert_golden, but a value that cancels to next to nothing keeps fewer digits in longer sums."""
    tight = dtype == torch.float64
    spread = max(problem.losses) - min(problem.losses)
    assert solution.value.item() == pytest.approx(problem.value, rel=1e-12 if tight else 1e-6, abs=1e-15)
    assert solution.lam.item() == pytest.approx(problem.lam, rel=1e-6 if tight else 1e-5, abs=1e-9 * spread)
    known = torch.tensor(problem.weights, dtype=torch.float64).repeat(copies)
    got = copies * solution.weights.cpu().double()
    torch.testing.assert_close(got, known, rtol=0, atol=1e-7 if tight else 1e-6)
    assert got.sum().item() == pytest.approx(copies, rel=1e-12 if tight else 1e-6)


def assert_bit_equal(one, other):
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# known solutions


@groups
@dtypes
@devices
@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden(problem, device, dtype, group):
    copies = 1 if group == "warp" else -(-LENGTHS[group] // len(problem.losses))
    solution = solve(operators(device).dual, tiled(problem, copies), dtype, device)
    assert_tiled_golden(problem, copies, solution, dtype)
    if dtype == torch.float32 and copies == 1:
        assert 0 < solution.passes <= (10 if problem.costs is None else 25)


# Lengths on both sides of a warp, of a block, and of what gets a warp, a block or the grid. The CPU operator, which is
# the oracle here, is judged by test_dual.py.
@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 256, 257, 1000, 16_384, 16_385])
@pytest.mark.parametrize("given", ["losses", "costs", "clean"])
def test_lengths(n, given):
    for seed, family in enumerate([("kl", None), ("alpha", 6.0), ("renyi", 1.25)]):
        problem = random_problem(n, family, seed=seed, costs=given != "losses", clean=given == "clean", shift=-2.0)
        solution = solve(cuda_ops.on_shim(seed=seed).dual, problem)
        expected = solve(torch.ops.armor.dual, problem)
        spread = max(problem.losses) - min(problem.losses)
        assert solution.value.item() == pytest.approx(expected.value.item(), rel=1e-12, abs=1e-12 * spread)
        assert solution.lam.item() == pytest.approx(expected.lam.item(), rel=1e-5, abs=1e-9 * spread)
        assert solution.nu.item() == pytest.approx(expected.nu.item(), rel=1e-5)
        assert solution.weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert solution.status == expected.status


# ---------------------------------------------------------------------------------------------------------------
# rows


def many_rows(n=45):
    """losses, costs, clean_losses: a dozen rows, most of which need no search or cannot be searched."""
    generator = torch.Generator().manual_seed(n)
    losses = torch.randn(12, n, generator=generator, dtype=torch.float64)
    losses[2] = 2.5
    losses[3, ::4] = losses[3].max()
    losses[4, n // 3] = nan
    losses[5, ::7] = inf
    losses[6, 1], losses[6, 2] = -inf, inf
    losses[7, n - 1] = -inf
    losses[8] *= 1e300
    costs = 0.1 * torch.rand(losses.shape, generator=generator, dtype=torch.float64)
    costs[9, 1::2] = inf
    costs[10, n // 2] = nan
    costs[11] = inf
    return losses, costs, losses - torch.rand(losses.shape, generator=generator, dtype=torch.float64)


@groups
@pytest.mark.parametrize("given", ["losses", "costs", "clean"])
@pytest.mark.parametrize("family", [("kl", None), ("alpha", 2.0), ("renyi", 2.95)], ids=lambda family: family[0])
def test_rows(given, family, group):
    losses, costs, clean = many_rows(LENGTHS[group])
    tensors = losses, costs if given != "losses" else None, clean if given == "clean" else None
    numbers = Problem([], divergence=family[0], alpha=family[1]).numbers()
    dual = cuda_ops.on_shim().dual
    solution = cases.Solution(*dual(*tensors, *numbers))
    expected = cases.Solution(*torch.ops.armor.dual(*tensors, *numbers))
    assert solution.status.tolist() == expected.status.tolist()
    assert {Status.CONVERGED, Status.NONFINITE} < set(expected.status.tolist())
    torch.testing.assert_close(solution.value, expected.value, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(solution.weights, expected.weights, rtol=1e-5, atol=1e-9, equal_nan=True)
    for entry in (*solution[:3], solution.passes):
        assert not (entry.isnan() if entry.is_floating_point() else entry < 0)[expected.value.isfinite()].any()
    for row in range(len(losses)):
        alone = dual(*(None if t is None else t[row : row + 1].contiguous() for t in tensors), *numbers)
        assert_bit_equal(alone, [entry[row : row + 1] for entry in solution])


# 32 blocks for a processor are all that a launch has: these are more rows than groups.
@pytest.mark.parametrize(("rows", "n"), [(300, 5), (40, 257)])
def test_more_rows_than_groups(rows, n):
    losses = torch.randn(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operators = cuda_ops.on_shim(processors=1)
    solution, expected = (dual(losses, None, None, *NUMBERS) for dual in (operators.dual, torch.ops.armor.dual))
    assert operators.launched[0].blocks == 32
    torch.testing.assert_close(solution[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution[3], expected[3], rtol=1e-5, atol=1e-9)


# 12000 entries for 8192 threads; the last row's mu is what a saturated row has.
@dtypes
@pytest.mark.parametrize("given", ["losses", "costs", "clean", "costs and clean"])
def test_backward(dtype, given):
    generator = torch.Generator().manual_seed(0)
    losses, weights = (torch.rand(3, 4000, generator=generator).to(dtype) for _ in range(2))
    weights[:, ::5] = 0
    costs = torch.rand(losses.shape, generator=generator).to(dtype)
    costs[:, ::10] = inf
    tensors = (
        *(torch.tensor(values, dtype=dtype) for values in ([1.7, -2.0, 1.0], [0.3, 0.7, 0.0])),
        *(weights, losses, costs if "costs" in given else None, losses - 0.2 if "clean" in given else None),
    )
    grads = cuda_ops.on_shim(processors=1).dual_backward(*tensors)
    for grad, expected in zip(grads, reference.dual_backward(*tensors), strict=True):
        torch.testing.assert_close(grad, expected, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0)


# ---------------------------------------------------------------------------------------------------------------
# schedules


# As many processors as hold all blocks, or let some of them wait. On the grid their number changes the sums.
@groups
def test_any_schedule_gives_the_same_bits(group):
    tensors = [t[[3, 9, 6]].contiguous() for t in many_rows(LENGTHS[group])]
    first = cuda_ops.on_shim("forward").dual(*tensors, *NUMBERS)
    schedules = [{"order": "reverse"}, *({"seed": seed} for seed in range(28))]
    if group != "grid":
        schedules += [{"processors": 1}, {"processors": 2}, {"processors": 1, "order": "reverse"}]
    for schedule in schedules:
        assert_bit_equal(first, cuda_ops.on_shim(**schedule).dual(*tensors, *NUMBERS))


# ---------------------------------------------------------------------------------------------------------------
# on a GPU


def random_rows(n, seed=0):
    """losses, costs, clean_losses on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    losses, costs, gains = (torch.rand(5, n, generator=generator, device="cuda") for _ in range(3))
    return losses.exp(), 0.1 * costs, losses.exp() - gains


@pytest.mark.gpu
@groups
@pytest.mark.parametrize("given", ["losses", "costs", "clean"])
def test_rows_on_the_device(given, group):
    losses, costs, clean = many_rows(LENGTHS[group])
    tensors = losses, costs if given != "losses" else None, clean if given == "clean" else None
    solution = operators().dual(*(None if t is None else t.cuda() for t in tensors), *NUMBERS)
    expected = torch.ops.armor.dual(*tensors, *NUMBERS)
    assert solution[4].tolist() == expected[4].tolist()
    torch.testing.assert_close(solution[0].cpu(), expected[0], rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(solution[3].cpu(), expected[3], rtol=1e-5, atol=1e-9, equal_nan=True)


@pytest.mark.gpu
@groups
def test_reruns_are_bit_equal(group):
    rows = random_rows(LENGTHS[group])
    first = operators().dual(*rows, *NUMBERS)
    for _ in range(10):
        assert_bit_equal(first, operators().dual(*rows, *NUMBERS))


@pytest.mark.gpu
@groups
def test_cuda_graphs(group):
    dual, dual_backward = operators().dual, operators().dual_backward
    rows, ones = random_rows(LENGTHS[group]), torch.ones(5, device="cuda")

    def step():
        output = dual(*rows, *NUMBERS)
        return *output, *dual_backward(ones, output[1], output[3], *rows)

    replay = graphed(step, warmups=1)
    for seed in (1, 2):
        for static, new in zip(rows, random_rows(LENGTHS[group], seed), strict=True):
            static.copy_(new)
        assert_bit_equal(replay(), step())


# Two cooperative launches at a time must neither wait for each other nor share their workspace.
@pytest.mark.gpu
@groups
def test_streams(group):
    dual = operators().dual
    rows = [random_rows(LENGTHS[group], seed) for seed in (1, 2)]
    expected = [dual(*given, *NUMBERS) for given in rows]
    solutions = on_two_streams(lambda *later: dual(*later, *NUMBERS), rows, cycles=100_000_000, repeats=20)
    for one, found in zip(expected, solutions, strict=True):
        for other in found:
            assert_bit_equal(one, other)


@pytest.mark.gpu
@groups
def test_no_host_synchronisation(group):
    operators()
    losses, costs, clean = (t.requires_grad_() for t in random_rows(LENGTHS[group]))

    def step():
        return dc_loss(losses, costs, clean_losses=clean, radius=0.1, kappa=0.01).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# More than 2^31 entries, as a few rows for the grid and as many for warps. Copies of a known row have its solution.
@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "copies"), [(3, 2**25), (2**26 + 1, 1)])
def test_offsets_beyond_32_bits(rows, copies):
    dual, dual_backward = operators().dual, operators().dual_backward
    needed = 4 * 4 * rows * copies * 32  # losses, weights, gradients, and one to spare
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    problem = next(p for p in cases.golden() if len(p.losses) == 32 and p.costs is None and p.value != max(p.losses))
    losses = problem.tensors(torch.float32, "cuda")[0].repeat(rows, copies)
    value, lam, _, weights, status, _ = dual(losses, None, None, *problem.numbers())
    assert value[-1].item() == pytest.approx(problem.value, rel=1e-6)
    assert (value == value[-1]).all()
    assert (status == Status.CONVERGED).all()
    known = torch.tensor(problem.weights, device="cuda") / copies
    torch.testing.assert_close(weights[-1, -32:], known, rtol=1e-3, atol=1e-6 / copies)
    grads = dual_backward(torch.full_like(value, 2.0), lam, weights, losses, None, None)
    assert torch.equal(grads[0][-1], 2 * weights[-1])

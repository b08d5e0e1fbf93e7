"""The Triton twin of armor::dual, run by Triton's interpreter on CPU tensors: the golden cases, edges and rows of the
compiled kernels. `make test` starts this file in a process of its own, because the interpreter must be chosen before
Triton is imported; tests/test_triton_compiles.py compiles the same kernels for real architectures.
"""

import math
from dataclasses import replace

import cases
import pytest
import torch
from cases import FAMILIES, Problem, random_problem, solve

from armor import Status

knobs = pytest.importorskip("triton").knobs
if not knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from armor_kernels import dual as kernels  # noqa: E402

inf, nan = math.inf, math.nan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where both sides of a where() are computed
class TestDual:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("problem", cases.golden(), ids=str)
    def test_golden(self, problem, dtype):
        solution = solve(kernels.dual, problem, dtype)
        cases.assert_golden(problem, solution, dtype)
        if dtype == torch.float32:
            assert 0 < solution.passes <= (10 if problem.costs is None else 25)

    # One sample, one short of a warp, a warp, one more; one block, and rows that take several of the 512 lanes.
    @pytest.mark.parametrize("n", [1, 31, 32, 33, 512, 513, 1300])
    @pytest.mark.parametrize("form", ["losses", "costs", "clean"])
    def test_agrees_with_the_compiled_kernel(self, n, form):
        for family in FAMILIES[::2]:
            problem = random_problem(n, family, seed=n, costs=form != "losses", clean=form == "clean")
            ours, theirs = solve(kernels.dual, problem), solve(torch.ops.armor.dual, problem)
            assert ours.value.item() == pytest.approx(theirs.value.item(), rel=1e-12, abs=1e-12)
            assert ours.status == theirs.status
            torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        ("problem", "value", "status"),
        [
            (Problem([2.0, 2.0, 2.0]), 2.0, Status.SATURATED),
            (Problem([2.0, 2.0], kappa=0.1), 2.0, Status.CONVERGED),
            (Problem([5.0]), 5.0, Status.SATURATED),
            (Problem([1.0, 3.0, 3.0, 2.0], radius=2.0), 3.0, Status.SATURATED),
            (Problem([1.0, 2.0, 6.0], radius=0.0), 3.0, Status.CONVERGED),
            (Problem([1.0, nan, 6.0]), nan, Status.NONFINITE),
            (Problem([1.0, inf, 6.0]), inf, Status.NONFINITE),
            (Problem([1.0, -inf, 6.0]), -inf, Status.NONFINITE),
            (Problem([1.0, 2.0], costs=[0.0, nan]), nan, Status.NONFINITE),
            (Problem([1.0, 2.0], costs=[inf, inf]), -inf, Status.NONFINITE),
            (Problem([1.0, 2.0, 4.0], [1.0, 1.0, 2.0], [0.5] * 3), 0.675, Status.CONVERGED),
        ],
        ids=str,
    )
    def test_edges(self, problem, value, status):
        solution = solve(kernels.dual, problem)
        assert solution.value.item() == pytest.approx(value, rel=1e-12, nan_ok=True)
        assert solution.status == status
        if not math.isnan(value):
            assert solution.weights.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(solution, solve(torch.ops.armor.dual, problem), rtol=1e-9, atol=1e-9, equal_nan=True)

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f[0]}-{f[1]}")
    def test_small_radius_and_large_kappa(self, family):
        for changes in ({"radius": 1e-13}, {"kappa": 1e9}):
            problem = replace(random_problem(40, family, seed=3), **changes)
            ours, theirs = solve(kernels.dual, problem), solve(torch.ops.armor.dual, problem)
            assert ours.value.item() == pytest.approx(theirs.value.item(), rel=1e-13)
            assert ours.lam.item() == pytest.approx(theirs.lam.item(), rel=1e-9, abs=1e-9)

    def test_rows_and_leading_dimensions(self):
        losses = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
        ours = kernels.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)
        theirs = torch.ops.armor.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)
        assert ours[0].shape == (2, 3)
        torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-6, atol=1e-7)
        assert [t.shape for t in kernels.dual(losses[:0], None, None, 0, 0.0, 0.1, 0.0, 1e6)][:1] == [(0, 3)]

    @pytest.mark.parametrize("form", ["losses", "costs", "clean"])
    def test_backward(self, form):
        generator = torch.Generator().manual_seed(1)
        losses, costs, clean = (torch.rand(5, 70, generator=generator) for _ in range(3))
        given = (losses, None if form == "losses" else 0.1 * costs, clean if form == "clean" else None)
        _, lam, _, weights, _, _ = torch.ops.armor.dual(*given, 0, 0.0, 0.1, 0.01, 1e6)
        grad = torch.randn(5, generator=generator)
        ours = kernels.dual_backward(grad, lam + 0.01, weights, *given)
        theirs = torch.ops.armor.dual_backward(grad, lam + 0.01, weights, *given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

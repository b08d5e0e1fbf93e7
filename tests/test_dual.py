"""The D^c dual on the installed CPU kernel and on the float64 reference: golden cases, the properties of
section 1 of docs/math.md, every edge of section 3, and the public `dc_loss` around them.
"""

import math
from dataclasses import replace

import cases
import pytest
import torch
from cases import FAMILIES, Problem, over_families, random_problem, solve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from armor import library, reference
from armor.ops import Status, dc_loss

inf, nan = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def name_of(family):
    return family[0] if family[1] is None else f"{family[0]}-{family[1]:g}"


families = pytest.mark.parametrize("family", FAMILIES, ids=name_of)


@pytest.fixture(params=["installed", "reference"])
def backend(request):
    """A raw `dual`: the one that serves CPU tensors here, and the oracle."""
    if request.param == "reference":
        return reference.dual
    return compiled()


def compiled():
    if library.backends()["dual"][0]["cpu"] == "reference":
        pytest.skip("the reference serves the CPU here")
    return torch.ops.armor.dual


# ----------------------------------------------------------------------------------------------------
# known solutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden(problem, dtype):
    cases.assert_golden(problem, solve(compiled(), problem, dtype), dtype)


@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden_reference(problem):
    cases.assert_golden(problem, solve(reference.dual, problem), torch.float64)


@pytest.mark.parametrize("problem", cases.golden(), ids=str)
def test_golden_passes(problem):
    solution = solve(compiled(), problem, torch.float32)
    assert 0 < solution.passes <= (10 if problem.costs is None else 25)


def test_chi_square_in_closed_form(backend):
    # alpha = 2 and all weights positive: V = mean + sd * sqrt(2 eps) and mu = sd / sqrt(2 eps), exactly
    problem = Problem([0.0, 1.0, 2.0, 3.0, 4.0], divergence="alpha", alpha=2.0, radius=0.05)
    solution = solve(backend, problem)
    assert solution.value.item() == pytest.approx(2.447213595499958, rel=1e-14)
    assert solution.lam.item() == pytest.approx(4.472135954999579, rel=1e-8)
    expected = [0.2 * (1 + (loss - 2) / 4.472135954999579) for loss in problem.losses]
    assert solution.weights.tolist() == pytest.approx(expected, rel=1e-8)


def test_two_points_in_closed_form(backend):
    # KL((q, 1 - q) || (1/2, 1/2)) = log 2 - H(q), here of q = 3/4
    radius = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    solution = solve(backend, Problem([5.0, 1.0], radius=radius))
    assert solution.value.item() == pytest.approx(4.0, rel=1e-13)
    assert solution.weights.tolist() == pytest.approx([0.75, 0.25], rel=1e-8)
    assert solution.lam.item() == pytest.approx(4 / math.log(3), rel=1e-8)


# Sizes: less than a vector register, one sample more than two, an odd size, and a power of two that fills
# whole blocks. SciPy's bounded search leaves a kink of the clean fallback at 1e-10 of the value.
@families
@pytest.mark.parametrize("n", [3, 17, 257, 4096])
@pytest.mark.parametrize("kind", ["plain", "costs", "clean", "kappa", "outlier"])
def test_agrees_with_scipy(family, n, kind):
    options = {
        "plain": {},
        "costs": {"costs": True, "shift": 3.0},
        "clean": {"costs": True, "clean": True, "kind": "exponential"},
        "kappa": {"kappa": 0.5, "kind": "exponential", "radius": 0.7},
        "outlier": {"kind": "outlier", "radius": 0.02},
    }
    problem = random_problem(n, family, seed=n, **options[kind])
    solution = solve(compiled(), problem)
    spread = max(problem.losses) - min(problem.losses)
    assert solution.value.item() == pytest.approx(cases.scipy_value(problem), rel=1e-9, abs=1e-9 * spread)
    assert solution.status == Status.CONVERGED


# The gap rho* - max falls from 1e-5 of the range to below what float64 can add to the maximum.
@pytest.mark.parametrize(("alpha", "radius", "n"), [(2.95, 0.2, 100), (2.95, 2.0, 10), (6.0, 1.0, 32), (2.95, 6.0, 5)])
def test_renyi_gaps_beyond_float32(backend, alpha, radius, n):
    losses = [0.1 * (i % 7) + i for i in range(n)]
    value, gap = cases.renyi_in_many_digits(losses, alpha, radius)
    solution = solve(backend, Problem(losses, divergence="renyi", alpha=alpha, radius=radius))
    assert solution.value.item() == pytest.approx(value, rel=1e-13)
    assert solution.lam.item() == pytest.approx(alpha * (max(losses) + gap - value), rel=1e-3)
    # The others share what is left in proportion to distance^(-1/alpha), which pins the gap itself.
    rest = 1 - solution.weights.max().item()
    ratio = sum(((max(losses) - loss) / gap + 1) ** (-1 / alpha) for loss in losses) - 1
    assert rest / (1 - rest) == pytest.approx(ratio, rel=1e-6)


# ----------------------------------------------------------------------------------------------------
# properties


@st.composite
def problems(draw, with_costs=None, with_clean=False):
    """Rows of any family, scale and offset; None leaves the choice of costs or clean losses to the draw."""
    scale = 10 ** draw(st.floats(-6, 6))
    costs = draw(st.booleans()) if with_costs is None else with_costs
    return random_problem(
        draw(st.integers(1, 40)),
        draw(st.sampled_from(FAMILIES)),
        seed=draw(st.integers(0, 2**31)),
        radius=10 ** draw(st.floats(-5, 0.7)),
        kappa=scale * draw(st.sampled_from([0.0, 0.0, 0.01, 1.0])),
        costs=costs,
        clean=costs and (draw(st.booleans()) if with_clean is None else with_clean),
        scale=scale,
        shift=scale * draw(st.sampled_from([0.0, -7.0, 1000.0])),
        kind=draw(st.sampled_from(["normal", "exponential", "lognormal", "ties"])),
    )


def slack(problem, of_range=1e-9):
    """What rounding may do: 1e-12 of the largest loss or price, and more of the range where weights enter linearly."""
    prices = [problem.kappa * cost for cost in problem.costs or () if cost < inf]
    largest = max(map(abs, [*problem.losses, *prices]))
    return 1e-12 * largest + of_range * (max(problem.losses) - min(problem.losses))


@settings(max_examples=300)
@given(problems())
def test_weights_are_feasible_and_close_the_gap(problem):
    solution = solve(compiled(), problem)
    assume(solution.status != Status.MAX_DUAL)
    # For alpha > 2 the weight of a sample on the verge of losing it is only known to 1e-16 ** (1 / (alpha - 1)); the
    # value does not depend on it, the sums over the weights do.
    cusp = 1e-4 if problem.divergence == "alpha" and problem.alpha > 2 else 0.0
    weights = solution.weights.tolist()
    spent = cases.divergence_of(weights, problem.divergence, problem.alpha)
    if problem.costs is not None:
        spent += math.fsum(w * c for w, c in zip(weights, problem.costs, strict=True))
    assert min(weights) >= 0
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert spent <= problem.radius * (1 + 1e-6 + cusp) + 1e-14
    primal = math.fsum(w * loss for w, loss in zip(weights, problem.losses, strict=True)) - problem.kappa * spent
    assert primal == pytest.approx(solution.value.item(), abs=slack(problem, 1e-8 + cusp))
    if solution.lam > 1e-6 * slack(problem, 1.0):  # complementary slackness
        assert spent == pytest.approx(problem.radius, rel=1e-5 + cusp)


@settings(max_examples=60)
@given(problems(with_clean=None))
def test_agrees_with_the_reference(problem):
    ours, oracle = solve(compiled(), problem), solve(reference.dual, problem)
    assert ours.status == oracle.status
    assert ours.value.item() == pytest.approx(oracle.value.item(), rel=1e-12, abs=slack(problem, 1e-12))


# Few samples, where one that changes sides is much of the budget and most optima are kinks, and more of them;
# a radius that leaves the weights flat, and one that empties some. Transport overspends in every third row.
@families
@pytest.mark.parametrize("form", ["losses", "costs", "clean"])
@pytest.mark.parametrize(("rows", "n", "radius"), [(100, 3, 1e-4), (60, 4, 0.4), (16, 23, 0.03)])
def test_batches_agree_with_the_reference(family, form, rows, n, radius):
    generator = torch.Generator().manual_seed(7)

    def uniform():
        return torch.rand(rows, n, generator=generator, dtype=torch.float64)

    losses = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    costs = radius * uniform() if form != "losses" else None
    if form != "losses":
        costs[::3] *= 3
    clean = losses - uniform() if form == "clean" else None
    numbers = Problem([], divergence=family[0], alpha=family[1], radius=radius).numbers()
    ours, oracle = (cases.Solution(*raw(losses, costs, clean, *numbers)) for raw in (compiled(), reference.dual))
    assert torch.equal(ours.status, oracle.status)
    stopped = ours.status == Status.MAX_DUAL
    torch.testing.assert_close(ours.value[~stopped], oracle.value[~stopped], rtol=0, atol=5e-12)
    # There mu is a million, and so is the rounding of the budget.
    torch.testing.assert_close(ours.value[stopped], oracle.value[stopped], rtol=1e-12, atol=1e-9)
    if form != "clean":  # a kink has the weights of one of its sides
        torch.testing.assert_close(ours.weights, oracle.weights, rtol=0, atol=1e-6)


@settings(max_examples=100)
@given(problems(with_clean=None), st.sampled_from([1e-3, 7.0, 1e5]), st.sampled_from([-1.0, 0.3, 50.0]))
def test_shift_and_scale(problem, scale, shift):
    shift *= scale * max(abs(loss) for loss in problem.losses)

    def moved(values):
        return None if values is None else [scale * v + shift for v in values]

    other = replace(
        problem,
        losses=moved(problem.losses),
        clean_losses=moved(problem.clean_losses),
        kappa=scale * problem.kappa,
        max_dual=scale * problem.max_dual,
    )
    before, after = solve(compiled(), problem), solve(compiled(), other)
    expected = scale * before.value.item() + shift
    assert after.value.item() == pytest.approx(expected, rel=1e-12, abs=slack(other) + scale * slack(problem))


@settings(max_examples=100)
@given(problems(with_clean=None), st.randoms(use_true_random=False))
def test_permutation(problem, random):
    order = list(range(len(problem.losses)))
    random.shuffle(order)

    def shuffled(values):
        return None if values is None else [values[i] for i in order]

    other = replace(
        problem,
        losses=shuffled(problem.losses),
        costs=shuffled(problem.costs),
        clean_losses=shuffled(problem.clean_losses),
    )
    before, after = solve(compiled(), problem), solve(compiled(), other)
    assert after.value.item() == pytest.approx(before.value.item(), abs=slack(problem, 1e-12))
    if problem.clean_losses is None:  # a kink has the weights of one of its sides
        assert after.weights.tolist() == pytest.approx(before.weights[order].tolist(), abs=1e-6)


@settings(max_examples=100)
@given(problems(with_clean=None), st.floats(1.0, 10.0))
def test_monotone_in_radius(problem, factor):
    small, large = (
        solve(compiled(), problem),
        solve(compiled(), replace(problem, radius=factor * problem.radius)),
    )
    assert small.value.item() <= large.value.item() + slack(problem, 1e-12)
    assert large.lam.item() <= small.lam.item() * (1 + 1e-6)


@settings(max_examples=200)
@given(problems(with_costs=False))
def test_between_mean_and_maximum_and_in_order(problem):
    solution = solve(compiled(), problem)
    order = torch.tensor(problem.losses, dtype=torch.float64).argsort()
    assert solution.value.item() <= max(problem.losses)
    assert solution.value.item() >= math.fsum(problem.losses) / len(order) - slack(problem, 1e-15)
    assert (solution.weights[order].diff() >= 0).all()


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (("alpha", 1 + 1e-7), ("kl", None)),
        (("renyi", 1e-7), ("kl", None)),
        (("renyi", 1 - 1e-7), ("renyi", 1 + 1e-7)),
        (("alpha", 2 - 1e-7), ("alpha", 2 + 1e-7)),
    ],
    ids=lambda family: name_of(family),
)
@pytest.mark.parametrize("kappa", [0.0, 3.0])
def test_continuous_in_alpha(backend, near, limit, kappa):
    one, other = (solve(backend, random_problem(50, family, seed=4, kappa=kappa)) for family in (near, limit))
    assert one.value.item() == pytest.approx(other.value.item(), rel=1e-6)
    assert one.weights.tolist() == pytest.approx(other.weights.tolist(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------
# edges of section 3


@families
@pytest.mark.parametrize("losses", [[2.5] * 5, [-3.0], [0.0, 0.0], [1e-30] * 9])
def test_equal_losses(backend, family, losses):
    solution = solve(backend, *over_families(Problem(losses), [family]))
    assert solution.value.item() == losses[0]
    assert solution.lam.item() == 0
    assert solution.weights.tolist() == pytest.approx([1 / len(losses)] * len(losses), rel=1e-15)
    assert solution.status == Status.SATURATED


@families
def test_equal_losses_with_kappa(backend, family):
    solution = solve(backend, *over_families(Problem([2.5] * 4, kappa=0.2), [family]))
    assert solution.value.item() == pytest.approx(2.5, rel=1e-15)
    assert solution.lam.item() == 0
    assert solution.weights.tolist() == pytest.approx([0.25] * 4, rel=1e-12)


def saturation(family, n, m):
    """The smallest radius at which all weight may sit on m of n samples."""
    name, alpha = family
    if name == "kl":
        return math.log(n / m)
    if name == "alpha":
        return ((n / m) ** (alpha - 1) - 1) / (alpha * (alpha - 1))
    return math.log(n / m) / (1 - alpha) if alpha < 1 else inf


@pytest.mark.parametrize("family", [f for f in FAMILIES if saturation(f, 4, 2) < inf], ids=name_of)
@pytest.mark.parametrize(("top", "nu"), [(3.0, inf), (-3.0, -inf), (0.0, 0.0)])
def test_saturation(backend, family, top, nu):
    problem = Problem([top - 2, top, top - 0.5, top], divergence=family[0], alpha=family[1])
    solution = solve(backend, replace(problem, radius=1.01 * saturation(family, 4, 2)))
    assert solution.value.item() == top
    assert solution.lam.item() == 0
    assert solution.nu.item() == nu
    assert solution.weights.tolist() == [0, 0.5, 0, 0.5]
    assert solution.status == Status.SATURATED
    below = solve(backend, replace(problem, radius=0.99 * saturation(family, 4, 2)))
    assert below.value.item() < top
    assert below.lam.item() > 0
    assert below.status == Status.CONVERGED


@pytest.mark.parametrize("family", [f for f in FAMILIES if saturation(f, 2, 1) < inf], ids=name_of)
@pytest.mark.parametrize("n", [2, 3, 7, 10])
@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_at_the_edge_of_saturation(family, n, ulps):
    # Rounding decides on which side the radius is, and either answer is right.
    radius = saturation(family, n, 1) * (1 + ulps * 2.0**-52)
    losses = [0.25 * i for i in range(n - 1)] + [0.25 * n]
    problem = Problem(losses, divergence=family[0], alpha=family[1], radius=radius)
    solution = solve(compiled(), problem)
    assert solution.value.item() == pytest.approx(0.25 * n, rel=1e-12)
    assert solution.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert solution.weights[-1].item() == pytest.approx(1, abs=1e-7)
    assert solution.status in (Status.CONVERGED, Status.SATURATED)


@pytest.mark.parametrize("family", [("renyi", 1.25), ("renyi", 2.95)], ids=name_of)
def test_renyi_of_order_above_one_never_saturates(backend, family):
    solution = solve(backend, Problem([1.0, 3.0, 2.5, 3.0], divergence=family[0], alpha=family[1], radius=3.0))
    assert solution.value.item() < 3
    assert solution.lam.item() > 0
    assert (solution.weights > 0).all()


@families
def test_kappa_tempers_a_saturated_row(backend, family):
    problem = Problem([1.0, 3.0, 2.5, 3.0], divergence=family[0], alpha=family[1], radius=60.0, kappa=0.4)
    solution = solve(backend, problem)
    tempered = 0.4 * cases.cumulant(torch.tensor(problem.losses).double().numpy() / 0.4, *family)
    assert solution.value.item() == pytest.approx(tempered, rel=1e-12)
    assert solution.lam.item() == 0
    if family[0] == "kl":
        expected = torch.softmax(torch.tensor(problem.losses).double() / 0.4, 0)
        assert solution.weights.tolist() == pytest.approx(expected.tolist(), rel=1e-10)


@families
def test_kappa_below_the_optimal_mu_only_shifts_the_value(backend, family):
    problem = random_problem(20, family, seed=3)
    plain = solve(backend, problem)
    kappa = 0.5 * plain.lam.item()
    shifted = solve(backend, replace(problem, kappa=kappa))
    assert shifted.value.item() == pytest.approx(plain.value.item() - kappa * problem.radius, rel=1e-12)
    assert shifted.lam.item() == pytest.approx(kappa, rel=1e-6)
    assert shifted.weights.tolist() == pytest.approx(plain.weights.tolist(), abs=1e-8)


@families
def test_radius_zero_is_the_mean(backend, family):
    solution = solve(backend, *over_families(Problem([1.0, 2.0, 6.0, 4.0], radius=0.0), [family]))
    name, alpha = family
    assert solution.value.item() == 3.25
    assert solution.lam.item() == inf
    assert solution.nu.item() == {"kl": 0.0, "alpha": -1 / ((alpha or 0) - 1), "renyi": 1 / (alpha or 1)}[name]
    assert solution.weights.tolist() == [0.25] * 4
    assert solution.status == Status.CONVERGED


@families
@pytest.mark.parametrize("radius", [1e-6, 1e-9, 1e-13])
def test_small_radius(backend, family, radius):
    # V = mean + sd sqrt(2 eps) + O(eps); the authors' scripts cap lambda at 100, where it is up to 1e6 here.
    problem = random_problem(64, family, seed=2, radius=radius)
    losses = torch.tensor(problem.losses, dtype=torch.float64)
    deviation = losses.std(correction=0).item()
    solution = solve(backend, problem)
    excess = solution.value.item() - losses.mean().item()
    assert excess == pytest.approx(deviation * math.sqrt(2 * radius), rel=20 * math.sqrt(radius) + 1e-7)
    assert solution.lam.item() == pytest.approx(deviation / math.sqrt(2 * radius), rel=20 * math.sqrt(radius) + 1e-3)
    assert solution.status == Status.CONVERGED


@families
def test_frozen_transport_beyond_the_budget_stops_at_max_dual(backend, family):
    problem = Problem([1.0, 2.0, 4.0], costs=[1.0, 1.0, 2.0], divergence=family[0], alpha=family[1], max_dual=50.0)
    solution = solve(backend, problem)
    scores = torch.tensor(problem.losses).double().numpy() / 50 - problem.costs
    assert solution.value.item() == pytest.approx(50 * (0.1 + cases.cumulant(scores, *family)), rel=1e-12)
    assert solution.lam.item() == pytest.approx(50, rel=1e-13)
    assert solution.status == Status.MAX_DUAL
    assert solve(backend, replace(problem, max_dual=500.0)).value < solution.value
    assert solve(backend, replace(problem, kappa=20.0)).lam.item() == pytest.approx(30, rel=1e-13)


@families
def test_clean_losses_bound_what_costs_leave_unbounded(backend, family):
    # To move the third sample costs 2 / 3 of a budget of 0.1. At mu = (4 - 0.5) / 2 it stops paying, and all
    # scores are equal there: V = 0.5 + 1.75 * 0.1 whatever the divergence.
    problem = Problem(
        [1.0, 2.0, 4.0], costs=[1.0, 1.0, 2.0], clean_losses=[0.5] * 3, divergence=family[0], alpha=family[1]
    )
    solution = solve(backend, problem)
    assert solution.value.item() == pytest.approx(0.675, rel=1e-12)
    assert solution.lam.item() == pytest.approx(1.75, rel=1e-9)
    assert solution.status == Status.CONVERGED


def test_costs_split_the_ties_of_a_saturated_row(backend):
    # mu -> 0: q is proportional to exp(-c) on the maximisers, which log(3 / (1 + exp(-0.2))) pays for
    problem = Problem([3.0, 1.0, 3.0], costs=[0.0, 0.0, 0.2])
    threshold = math.log(3 / (1 + math.exp(-0.2)))
    solution = solve(backend, replace(problem, radius=threshold + 0.01))
    assert solution.value.item() == 3
    assert solution.lam.item() == 0
    assert solution.weights.tolist() == pytest.approx([1 / (1 + math.exp(-0.2)), 0, 1 / (1 + math.exp(0.2))], rel=1e-12)
    assert solution.status == Status.SATURATED
    assert solve(backend, replace(problem, radius=threshold - 0.01)).value.item() < 3


@families
def test_equal_losses_with_costs(backend, family):
    # Only the costs tell the samples apart: the maximum where the budget covers them, no bound where not.
    problem = Problem([2.0, 2.0, 2.0], costs=[0.0, 0.1, 0.3], divergence=family[0], alpha=family[1], radius=0.2)
    solution = solve(backend, problem)
    assert solution.value.item() == 2
    assert solution.lam.item() == 0
    assert solution.status == Status.SATURATED
    assert solve(backend, replace(problem, radius=0.05)).status == Status.MAX_DUAL


@families
@pytest.mark.parametrize("where", ["losses", "costs", "clean_losses"])
def test_nan(backend, family, where):
    given = {"losses": [1.0, inf, 3.0], "costs": [0.0, 0.1, 0.0], "clean_losses": [0.0, 0.5, 1.0]}
    given[where][2] = nan
    solution = solve(backend, Problem(**given, divergence=family[0], alpha=family[1]))
    assert math.isnan(solution.value.item())
    assert solution.weights.isnan().all()
    assert solution.status == Status.NONFINITE


@families
def test_positive_infinite_loss(backend, family):
    solution = solve(backend, *over_families(Problem([1.0, inf, -inf, inf]), [family]))
    assert solution.value.item() == inf
    assert solution.weights.tolist() == [0, 0.5, 0, 0.5]
    assert solution.status == Status.NONFINITE


@families
def test_negative_infinite_loss(backend, family):
    solution = solve(backend, *over_families(Problem([1.0, -inf, 2.0, 3.0]), [family]))
    assert solution.value.item() == -inf
    assert solution.weights.tolist() == [0, 1, 0, 0]
    assert solution.status == Status.NONFINITE


@families
def test_infinite_cost_takes_the_clean_branch(backend, family):
    problem = Problem(
        losses=[1.0, 9.0, 5.0, 3.0],
        costs=[0.0, inf, 0.01, inf],
        clean_losses=[0.5, 2.0, 1.0, 2.5],
        divergence=family[0],
        alpha=family[1],
    )
    solution = solve(backend, problem)
    finite = replace(problem, losses=[1.0, 2.0, 5.0, 2.5], costs=[0.0, 0.0, 0.01, 0.0])
    assert solution.value.item() == pytest.approx(cases.scipy_value(finite), rel=1e-9)
    # A transported loss that cannot be had is not looked at.
    assert solve(backend, replace(problem, losses=[1.0, inf, 5.0, -inf])).value == solution.value


@pytest.mark.parametrize("family", [f for f in FAMILIES if saturation(f, 3, 2) < inf], ids=name_of)
def test_infinite_cost_alone_gives_no_weight(backend, family):
    problem = Problem([1.0, 2.0, 5.0], costs=[0.0, 0.01, inf], divergence=family[0], alpha=family[1])
    problem = replace(problem, radius=saturation(family, 3, 2) + 0.05)
    solution = solve(backend, problem)
    assert solution.weights[2] == 0
    assert solution.status == Status.CONVERGED
    spent = cases.divergence_of(solution.weights.tolist(), *family) + 0.01 * solution.weights[1].item()
    assert spent == pytest.approx(problem.radius, rel=1e-6)
    expected = solution.weights[0].item() + 2 * solution.weights[1].item()
    assert solution.value.item() == pytest.approx(expected, rel=1e-9)


@families
@pytest.mark.parametrize(
    "losses",
    [[-1e308, 0.0, 1.7e308], [-1.7e308, 1e308, 1.0], [1e-200, 3e-200, 2e-200], [1e15 + 1, 1e15, 1e15 + 3]],
    ids=["overflowing-range", "negative", "tiny", "large-offset"],
)
def test_extreme_magnitudes(backend, family, losses):
    name, alpha = family
    solution = solve(backend, Problem(losses, divergence=name, alpha=alpha, radius=0.1))
    # The same row in units of 1, which no step of the solve can overflow.
    unit = max(abs(loss) for loss in losses) if losses[0] != 1e15 + 1 else 1.0
    offset = 1e15 if unit == 1 else 0.0
    small = solve(reference.dual, Problem([(loss - offset) / unit for loss in losses], None, None, name, alpha, 0.1))
    assert solution.value.item() == pytest.approx(unit * small.value.item() + offset, rel=1e-12)
    assert solution.weights.tolist() == pytest.approx(small.weights.tolist(), abs=1e-7)


@families
def test_largest_float32_losses(backend, family):
    top = torch.finfo(torch.float32).max
    solution = solve(backend, Problem([-top, 0.0, top], divergence=family[0], alpha=family[1]), torch.float32)
    small = solve(reference.dual, Problem([-1.0, 0.0, 1.0], divergence=family[0], alpha=family[1]))
    assert solution.value.item() == pytest.approx(top * small.value.item(), rel=1e-6)
    assert solution.status == Status.CONVERGED


# f* has the exponent alpha/(alpha - 1): 1e8 at the first; 1 + 1/399 at the last, where q is nearly a step.
@pytest.mark.parametrize("alpha", [1 + 1e-8, 1.001, 30.0, 400.0])
@pytest.mark.parametrize("radius", [0.003, 0.5, 2.0])
def test_extreme_orders_of_alpha(alpha, radius):
    problem = random_problem(24, ("alpha", alpha), seed=9, radius=radius)
    ours, oracle = solve(compiled(), problem), solve(reference.dual, problem)
    assert ours.value.item() == pytest.approx(oracle.value.item(), rel=1e-9)
    assert ours.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert cases.divergence_of(oracle.weights.tolist(), "alpha", alpha) == pytest.approx(radius, rel=1e-6)


def test_large_alpha_in_closed_form(backend):
    # Three samples share the maximum; D = eps fixes their common q, and 3q + r = 4 that of the last.
    alpha, share = 400.0, 1.02
    rest = 4 - 3 * share
    radius = ((3 * share**alpha + rest**alpha) / 4 - 1) / (alpha * (alpha - 1))
    solution = solve(backend, Problem([1.0, 1.0, 0.0, 1.0], divergence="alpha", alpha=alpha, radius=radius))
    assert solution.value.item() == pytest.approx(0.75 * share, rel=1e-9)
    # The value is flat in the weights, and these turn from all to nothing within 1e-16 of nu.
    assert solution.weights.tolist() == pytest.approx([share / 4, share / 4, rest / 4, share / 4], rel=5e-3)


@families
def test_rows_are_independent(backend, family):
    rows = [
        [1.0, 2.0, 4.0],
        [nan, 1.0, 2.0],
        [3.0, 3.0, 3.0],
        [-inf, 0.0, 1.0],
        [1e300, -1e300, 0.0],
        [0.0, 1.0, 5.0],
    ]
    name, alpha = family
    numbers = Problem([], divergence=name, alpha=alpha).numbers()
    solution = cases.Solution(*backend(torch.tensor(rows, dtype=torch.float64), None, None, *numbers))
    for i, row in enumerate(rows):
        alone = solve(backend, Problem(row, divergence=name, alpha=alpha))
        assert solution.value[i].item() == pytest.approx(alone.value.item(), rel=1e-13, nan_ok=True)
        assert solution.status[i] == alone.status


# ----------------------------------------------------------------------------------------------------
# gradients


def differentiable(problem):
    return [None if t is None else t.requires_grad_() for t in problem.tensors()]


@families
@pytest.mark.parametrize("given", ["losses", "costs", "costs-clean"])
@pytest.mark.parametrize("kappa", [0.0, 2.0])
def test_gradcheck(family, given, kappa):
    problem = random_problem(
        7, family, seed=11, radius=0.3, costs="costs" in given, clean="clean" in given, kappa=kappa
    )
    inputs = differentiable(problem)
    places = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def value(*tensors):
        losses, costs, clean = (tensors[places.index(i)] if i in places else None for i in range(3))
        return dc_loss(losses, costs, clean_losses=clean, **problem.options())

    assert torch.autograd.gradcheck(value, [inputs[i] for i in places], eps=1e-5, atol=1e-7, rtol=1e-6)


@families
def test_gradients_are_the_weights_on_the_branch_taken(family):
    # The second and fourth samples are better left alone: their loss falls short of clean + mu * cost.
    problem = Problem(
        losses=[2.0, 1.0, 3.0, 5.0],
        costs=[0.01, 0.5, 0.02, inf],
        clean_losses=[0.5, 0.9, 1.0, 1.2],
        divergence=family[0],
        alpha=family[1],
        kappa=0.3,
        radius=0.05,
    )
    losses, costs, clean = differentiable(problem)
    value, dual = dc_loss(losses, costs, clean_losses=clean, **problem.options(), return_dual=True)
    (7 * value).sum().backward()
    mu, weights = dual.lam + 0.3, dual.weights
    moved = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(losses.grad, 7 * weights * moved, rtol=1e-14, atol=0)
    torch.testing.assert_close(costs.grad, -7 * mu[:, None] * weights * moved, rtol=1e-14, atol=0)
    torch.testing.assert_close(clean.grad, 7 * weights * (1 - moved), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", ["losses", "costs", "costs-clean"])
def test_raw_backward_agrees_with_the_reference(dtype, given):
    problem = random_problem(37, ("kl", None), seed=5, costs="costs" in given, clean="clean" in given)
    losses, costs, clean = problem.tensors(dtype)
    weights = torch.softmax(losses, 1)
    weights[0, 3] = 0
    for mu in (0.0, 0.7):
        arguments = (
            torch.tensor([1.7], dtype=dtype),
            torch.tensor([mu], dtype=dtype),
            weights,
            losses,
            costs,
            clean,
        )
        ours = torch.ops.armor.dual_backward(*arguments)
        oracle = reference.dual_backward(*arguments)
        for one, other in zip(ours, oracle, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0)


def test_gradients_of_undefined_rows():
    losses = torch.tensor([[1.0, inf, inf], [1.0, nan, 2.0], [1.0, -inf, 2.0], [1.0, 2.0, 4.0]], requires_grad=True)
    costs = torch.zeros(4, 3, requires_grad=True)
    dc_loss(losses, costs, radius=0.1).sum().backward()
    assert losses.grad[0].tolist() == [0, 0.5, 0.5]
    assert losses.grad[1].isnan().all()
    assert losses.grad[2].tolist() == [0, 1, 0]
    assert losses.grad[3].sum().item() == pytest.approx(1, abs=1e-6)
    assert costs.grad[[0, 2, 3]].isfinite().all()


def test_gradient_of_the_mean():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    dc_loss(losses, radius=0.0).backward()
    assert losses.grad.tolist() == pytest.approx([1 / 3] * 3, rel=1e-7)


# ----------------------------------------------------------------------------------------------------
# dc_loss: layout, dtypes, arguments


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_dim(dim):
    losses = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = 0.01 * losses.square()
    value, dual = dc_loss(losses, costs, radius=0.2, dim=dim, return_dual=True)
    rows, row_costs = losses.movedim(dim, -1), costs.movedim(dim, -1)
    assert value.shape == dual.lam.shape == dual.nu.shape == dual.status.shape == rows.shape[:-1]
    assert dual.weights.shape == losses.shape
    torch.testing.assert_close(dual.weights.sum(dim), torch.ones_like(value))
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            alone = dc_loss(rows[i, j].clone(), row_costs[i, j].clone(), radius=0.2)
            torch.testing.assert_close(value[i, j], alone, rtol=1e-13, atol=0)


LAYOUTS = {
    "sliced": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "row-stride": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(layout, dtype):
    problem = random_problem(60, ("kl", None), seed=8, costs=True, clean=True)
    packed = [t.reshape(4, 15).clone().requires_grad_() for t in problem.tensors(dtype)]
    strided = [LAYOUTS[layout](t.detach()).requires_grad_() for t in packed]
    assert not all(t.is_contiguous() for t in strided) or layout == "offset"
    for losses, costs, clean in (packed, strided):
        dc_loss(losses, costs, clean_losses=clean, radius=0.1).sum().backward()
    values = [dc_loss(losses, costs, clean_losses=clean, radius=0.1) for losses, costs, clean in (packed, strided)]
    assert torch.equal(*values)
    for one, other in zip(packed, strided, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_expanded_rows():
    row = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    values = dc_loss(row.expand(5, 3), radius=0.1)
    values.sum().backward()
    assert torch.equal(values, dc_loss(row.detach(), radius=0.1).expand(5))
    assert row.grad.sum().item() == pytest.approx(5, rel=1e-6)


# Rule 11: no further from the float64 truth than the plain expression at the exact dual in the same dtype.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [1e-4, 0.05, 1.0])
def test_dtypes(dtype, radius):
    problem = random_problem(300, ("kl", None), seed=1, shift=4.0, radius=radius)
    losses = problem.tensors()[0].to(dtype).requires_grad_()
    truth = cases.Solution(*reference.dual(losses.detach().double(), None, None, *problem.numbers()))
    value, dual = dc_loss(losses, radius=radius, return_dual=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == dual.lam.dtype == dual.nu.dtype == dual.weights.dtype == wide
    assert dual.status.dtype == dual.passes.dtype == torch.int32
    lam = truth.lam.to(wide)
    naive = lam * (radius + torch.logsumexp(losses.detach().to(wide) / lam, 1) - math.log(300))
    error, allowed = ((v - truth.value).abs().item() for v in (value.detach(), naive))
    assert error <= allowed + torch.finfo(wide).eps * truth.value.item()
    value.backward()
    assert losses.grad.dtype == dtype
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(losses.grad.double(), truth.weights, rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 0, 1)])
def test_no_rows(shape):
    losses = torch.zeros(shape, requires_grad=True)
    value, dual = dc_loss(losses, radius=0.1, return_dual=True)
    assert value.shape == dual.lam.shape == shape[:-1]
    value.sum().backward()
    assert losses.grad.shape == shape


# Rows longer than any block, many rows of odd length, and rows few enough that threads must share one.
@families
@pytest.mark.parametrize("shape", [(1, 1_000_003), (3, 100_001), (301, 33)])
def test_bit_equal_for_any_number_of_threads(family, shape):
    raw = compiled()
    generator = torch.Generator().manual_seed(0)
    losses = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
    costs = 0.01 * torch.empty(shape, dtype=torch.float32).uniform_(generator=generator)
    numbers = Problem([], divergence=family[0], alpha=family[1]).numbers()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((*raw(losses, None, None, *numbers), *raw(losses, costs, losses - 1, *numbers)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_backward_is_bit_equal_for_any_number_of_threads():
    losses = torch.empty(2, 500_001).normal_(generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(losses, 1)
    arguments = (
        torch.tensor([1.0, 3.0]),
        torch.tensor([0.3, 0.0]),
        weights,
        losses,
        losses.square(),
        losses - 0.1,
    )
    results = []
    for threads in (1, 5):
        torch.set_num_threads(threads)
        results.append(torch.ops.armor.dual_backward(*arguments))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# A million float32 losses: the sum that a float32 accumulator gets wrong in the fourth digit.
def test_long_rows_are_summed_in_float64():
    losses = torch.empty(1, 1_000_000).exponential_(generator=torch.Generator().manual_seed(3)) + 100
    value = dc_loss(losses, radius=1e-4)
    exact = losses.double()
    log_mu = torch.linspace(4.0, 4.6, 601, dtype=torch.float64)  # sd / sqrt(2 eps) is 71
    objective = torch.stack([m * (1e-4 + torch.logsumexp(exact / m, 1) - math.log(1e6)) for m in log_mu.exp()])
    assert value.item() == pytest.approx(objective.min().item(), rel=1e-7)
    assert value.item() == pytest.approx(exact.mean().item() + math.sqrt(2e-4) * exact.std().item(), rel=1e-5)


BAD = {
    "integer losses": (TypeError, ["losses", "int64"], {"losses": torch.ones(3, dtype=torch.int64)}),
    "complex losses": (TypeError, ["losses", "complex64"], {"losses": torch.ones(3, dtype=torch.complex64)}),
    "boolean costs": (TypeError, ["costs", "bool"], {"costs": torch.ones(3, dtype=torch.bool)}),
    "list of losses": (TypeError, ["losses", "list"], {"losses": [1.0, 2.0]}),
    "number as costs": (TypeError, ["costs", "float"], {"costs": 0.5}),
    "scalar losses": (ValueError, ["losses"], {"losses": torch.tensor(1.0)}),
    "empty rows": (ValueError, ["losses", "0"], {"losses": torch.zeros(4, 0)}),
    "costs of another shape": (ValueError, ["costs", "(4,)", "(3,)"], {"costs": torch.zeros(4)}),
    "clean of another shape": (
        ValueError,
        ["clean_losses", "(1, 3)"],
        {"costs": torch.zeros(3), "clean_losses": torch.zeros(1, 3)},
    ),
    "costs elsewhere": (ValueError, ["costs", "meta", "cpu"], {"costs": torch.zeros(3, device="meta")}),
    "clean elsewhere": (
        ValueError,
        ["clean_losses", "meta"],
        {"costs": torch.zeros(3), "clean_losses": torch.zeros(3, device="meta")},
    ),
    "negative radius": (ValueError, ["radius", "-0.1"], {"radius": -0.1}),
    "nan radius": (ValueError, ["radius", "nan"], {"radius": nan}),
    "infinite radius": (ValueError, ["radius", "inf"], {"radius": inf}),
    "text radius": (TypeError, ["radius", "0.1"], {"radius": "0.1"}),
    "negative kappa": (ValueError, ["kappa", "-1"], {"kappa": -1.0}),
    "nan kappa": (ValueError, ["kappa", "nan"], {"kappa": nan}),
    "unknown divergence": (ValueError, ["divergence", "chi2"], {"divergence": "chi2"}),
    "alpha missing": (ValueError, ["alpha", "None"], {"divergence": "alpha"}),
    "alpha of one": (ValueError, ["alpha", "1"], {"divergence": "alpha", "alpha": 1.0}),
    "alpha below one": (ValueError, ["alpha", "0.5"], {"divergence": "alpha", "alpha": 0.5}),
    "infinite alpha": (ValueError, ["alpha", "inf"], {"divergence": "alpha", "alpha": inf}),
    "renyi without order": (ValueError, ["alpha", "None"], {"divergence": "renyi"}),
    "renyi of one": (ValueError, ["alpha", "1"], {"divergence": "renyi", "alpha": 1.0}),
    "renyi of zero": (ValueError, ["alpha", "0"], {"divergence": "renyi", "alpha": 0.0}),
    "negative renyi": (ValueError, ["alpha", "-2"], {"divergence": "renyi", "alpha": -2.0}),
    "alpha without use": (ValueError, ["alpha", "2"], {"divergence": "kl", "alpha": 2.0}),
    "clean without costs": (ValueError, ["clean_losses", "costs=None"], {"clean_losses": torch.zeros(3)}),
    "dim out of range": (ValueError, ["dim", "3"], {"dim": 3}),
    "dim of another type": (TypeError, ["dim", "1.0"], {"dim": 1.0}),
    "negative max_dual": (ValueError, ["max_dual", "-5"], {"max_dual": -5.0}),
    "nan max_dual": (ValueError, ["max_dual", "nan"], {"max_dual": nan}),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    error, words, changed = BAD[bad]
    arguments = {"losses": torch.tensor([1.0, 2.0, 4.0]), "radius": 0.1, **changed}
    with pytest.raises(error) as caught:
        dc_loss(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_dtensor_is_refused(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        losses = DTensor.from_local(torch.tensor([1.0, 2.0]), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"losses.*DTensor"):
            dc_loss(losses, radius=0.1)
    finally:
        distributed.destroy_process_group()


def test_status_values():
    assert {status.name: int(status) for status in Status} == {
        "CONVERGED": 0,
        "SATURATED": 1,
        "MAX_DUAL": 2,
        "NONFINITE": 3,
        "NOT_CONVERGED": 4,
    }

"""The modules of armor.losses and `dc_objective`: the exact module is `dc_loss`, and the objective at given
duals is an upper bound of it that touches at the optimum, with all its slopes (docs/math.md, section 1).
"""

import copy
import math
from dataclasses import replace

import cases
import pytest
import torch
from cases import FAMILIES, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.losses import DCLoss, LearnedDual
from armor.ops import DualResult, Status, dc_loss, dc_objective

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0] if f[1] is None else f"{f[0]}-{f[1]:g}")
forms = pytest.mark.parametrize("form", ["losses", "costs", "clean", "kappa"])


def problem_of(family, form, seed=3):
    return random_problem(
        24,
        family,
        seed=seed,
        radius=0.2,
        kappa=0.3 if form == "kappa" else 0.0,
        costs=form in ("costs", "clean"),
        clean=form == "clean",
        shift=2.0,
    )


def smooth_problem_of(family, form):
    """A row whose optimal mu is not where a sample changes branch: the objective has no slope there."""
    for seed in range(3, 20):
        problem = problem_of(family, form, seed)
        if form != "clean":
            return problem
        losses, costs, clean = problem.tensors()
        if ((losses - clean) / costs - exact(problem)[1].lam).abs().min() > 0.01:
            return problem
    raise AssertionError("every problem has a kink")


def exact(problem):
    losses, costs, clean = problem.tensors()
    return dc_loss(losses, costs, clean_losses=clean, **problem.options(), return_dual=True)


def objective(problem, lam, nu, tensors=None):
    losses, costs, clean = tensors or problem.tensors()
    options = {name: value for name, value in problem.options().items() if name != "max_dual"}
    nu = None if problem.divergence == "kl" else nu
    return dc_objective(losses, lam, nu, costs, clean_losses=clean, **options)


# ----------------------------------------------------------------------------------------------------
# dc_objective


@families
@forms
def test_objective_at_the_exact_duals_is_the_value(family, form):
    problem = problem_of(family, form)
    value, dual = exact(problem)
    assert dual.status == Status.CONVERGED
    assert objective(problem, dual.lam, dual.nu).item() == pytest.approx(value.item(), rel=1e-12)


@families
@forms
def test_slopes_at_the_exact_duals(family, form):
    # Stationary in the duals, and the envelope theorem in the rest: the op's gradient, without the op.
    problem = smooth_problem_of(family, form)
    given = [t if t is None else t.requires_grad_() for t in problem.tensors()]
    value, dual = dc_loss(given[0], given[1], clean_losses=given[2], **problem.options(), return_dual=True)
    tensors = [t for t in given if t is not None]
    expected = torch.autograd.grad(value.sum(), tensors)
    lam, nu = dual.lam.clone().requires_grad_(), dual.nu.clone().requires_grad_()
    bound = objective(problem, lam, nu, given).sum()
    slopes = torch.autograd.grad(bound, [lam, *([] if family[0] == "kl" else [nu]), *tensors])
    for slope in slopes[: -len(tensors)]:
        assert slope.item() == pytest.approx(0, abs=2e-6 * max(1.0, dual.lam.item()))
    for one, other in zip(slopes[-len(tensors) :], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@settings(max_examples=200)
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(["losses", "costs", "clean", "kappa"]),
    st.integers(0, 1000),
    st.floats(-6, 6),
    st.floats(-20, 20),
)
def test_objective_is_an_upper_bound(family, form, seed, log_lam, nu):
    problem = problem_of(family, form, seed)
    value, _ = exact(problem)
    bound = objective(problem, torch.tensor([math.exp(log_lam)]).double(), torch.tensor([nu]).double())
    assert bound.item() >= value.item() - 1e-12 * abs(value.item())


@families
def test_objective_has_its_least_at_the_exact_duals(family):
    problem = problem_of(family, "costs")
    value, dual = exact(problem)
    for factor in (0.8, 1.25):
        assert objective(problem, factor * dual.lam, dual.nu).item() > value.item()
    if family[0] != "kl":
        for step in (-0.01, 0.01):
            assert objective(problem, dual.lam, dual.nu + step).item() > value.item()


def test_objective_in_closed_form():
    # chi-square: f*(y) = y_+^2 / 2 + 1/2 and three losses, worked by hand at lam = 2, nu = 0
    losses = torch.tensor([-1.0, 2.0, 4.0], dtype=torch.float64)
    value = dc_objective(losses, 2.0, 0.0, radius=0.1, divergence="alpha", alpha=2.0)
    assert value.item() == pytest.approx(2 * (0.1 + (0 + 1 / 2 + 4 / 2) / 3 + 1 / 2), rel=1e-15)
    # KL: lam * (radius + log mean exp), here of exp(0) and exp(log 3)
    value = dc_objective(torch.tensor([0.0, 2 * math.log(3)], dtype=torch.float64), 2.0, radius=0.1)
    assert value.item() == pytest.approx(2 * (0.1 + math.log(2)), rel=1e-15)


def test_renyi_objective_is_infinite_up_to_the_largest_score():
    losses = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    for nu, finite in [(1.4, False), (1.5, False), (1.6, True)]:  # max(a) = 3 / 2
        value = dc_objective(losses, 2.0, nu, radius=0.1, divergence="renyi", alpha=1.25)
        assert math.isfinite(value.item()) == finite
        assert finite or value.item() == math.inf


def test_objective_has_second_derivatives():
    losses = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    duals = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, -1.3)]

    def bound(losses, lam, nu):
        return dc_objective(losses, lam, nu, radius=0.1, divergence="alpha", alpha=1.5)

    assert torch.autograd.gradgradcheck(bound, [losses, *duals])


@families
def test_objective_of_many_rows(family):
    problems = [problem_of(family, "costs", seed) for seed in range(3)]
    tensors = [torch.cat(parts) for parts in zip(*(p.tensors()[:2] for p in problems), strict=True)]
    lam, nu = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([9.0, 8.0, 7.0]).double()
    together = objective(problems[0], lam, nu, [*tensors, None])
    along_columns = objective(problems[0], lam, nu, [*tensors, None])
    for i, problem in enumerate(problems):
        alone = objective(replace(problem), lam[i], nu[i])
        assert together[i].item() == along_columns[i].item() == pytest.approx(alone.item(), rel=1e-14)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (ValueError, "nu .*alpha.*None", {"nu": None, "divergence": "alpha", "alpha": 2.0}),
        (ValueError, "nu .*kl", {"nu": 1.0}),
        (ValueError, "radius .*-1", {"radius": -1.0}),
        (ValueError, "kappa .*-2", {"kappa": -2.0}),
        (TypeError, "losses .*int64", {"losses": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "costs", {"costs": torch.ones(4)}),
    ],
    ids=lambda value: "",
)
def test_objective_refuses(error, words, changed):
    with pytest.raises(error, match=words):
        dc_objective(**{"losses": torch.ones(3), "lam": 1.0, "radius": 0.1, **changed})


# ----------------------------------------------------------------------------------------------------
# DCLoss


@families
@forms
def test_module_is_the_function(family, form):
    problem = problem_of(family, form)
    losses, costs, clean = problem.tensors()
    criterion = DCLoss(**problem.options())
    value, dual = exact(problem)
    assert torch.equal(criterion(losses, costs, clean), value)
    assert all(torch.equal(one, other) for one, other in zip(criterion.last, dual, strict=True))


def test_module_reduces_its_dimension_and_keeps_no_graph():
    criterion = DCLoss(0.1, dim=0)
    assert criterion.last is None
    losses = torch.randn(8, 3, requires_grad=True)
    value = criterion(losses)
    value.sum().backward()
    assert torch.equal(value, dc_loss(losses, radius=0.1, dim=0))
    assert isinstance(criterion.last, DualResult)
    assert torch.equal(criterion.last.weights, losses.grad)
    assert not any(entry.requires_grad for entry in criterion.last)


def test_module_limits_the_dual():
    criterion = DCLoss(0.1, max_dual=5.0)
    criterion(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    assert criterion.last.lam.item() == 5
    assert criterion.last.status == Status.MAX_DUAL


def test_module_has_no_state_and_says_what_it_is():
    criterion = DCLoss(0.02, "renyi", alpha=1.25, kappa=0.1)
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}
    assert all(word in repr(criterion) for word in ("DCLoss", "0.02", "renyi", "1.25", "0.1"))
    criterion(torch.randn(4))
    assert copy.deepcopy(criterion).radius == 0.02


@pytest.mark.parametrize("module", [DCLoss, LearnedDual])
@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("radius .*-1", {"radius": -1.0}),
        ("kappa .*-2", {"radius": 0.1, "kappa": -2.0}),
        ("divergence .*tv", {"radius": 0.1, "divergence": "tv"}),
        ("alpha .*0.5", {"radius": 0.1, "divergence": "alpha", "alpha": 0.5}),
    ],
    ids=["radius", "kappa", "divergence", "alpha"],
)
def test_modules_refuse_when_they_are_built(module, words, options):
    with pytest.raises(ValueError, match=words):
        module(**options)


# ----------------------------------------------------------------------------------------------------
# LearnedDual


def at_the_optimum(problem):
    """A LearnedDual whose parameters are the exact duals of the problem."""
    _, dual = exact(problem)
    options = {name: value for name, value in problem.options().items() if name != "max_dual"}
    module = LearnedDual(**options).double()
    losses, costs, clean = problem.tensors()
    scores = losses / (dual.lam + problem.kappa) - (0 if costs is None else costs)
    if clean is not None:
        scores = torch.maximum(scores, clean / (dual.lam + problem.kappa))
    with torch.no_grad():
        module.log_lam.copy_(dual.lam.log().squeeze())
        if problem.divergence == "alpha":
            module.nu.copy_(dual.nu.squeeze())
        if problem.divergence == "renyi":  # its parameter is the log of the gap above the largest score
            module.nu.copy_((dual.nu - scores.amax()).log().squeeze())
    return module


def test_the_published_starting_values():
    module = LearnedDual(0.1, "alpha", alpha=2.0)
    assert module.lam.item() == 1
    assert module.nu.item() == 1
    assert {name for name, _ in module.named_parameters()} == {"log_lam", "nu"}
    assert {name for name, _ in LearnedDual(0.1).named_parameters()} == {"log_lam"}
    assert LearnedDual(0.1, "alpha", alpha=2.0, lam=3.0, nu=-0.35).lam.item() == pytest.approx(3, rel=1e-6)
    assert LearnedDual(0.1, "alpha", alpha=2.0, lam=3.0, nu=-0.35).nu.item() == pytest.approx(-0.35, rel=1e-6)


def test_starting_value_of_the_objective():
    losses = torch.tensor([1.0, 2.0, 4.0])
    expected = dc_objective(losses, 1.0, 1.0, radius=0.1, divergence="alpha", alpha=2.0)
    assert torch.equal(LearnedDual(0.1, "alpha", alpha=2.0)(losses), expected)


@families
@forms
def test_learned_duals_at_the_optimum(family, form):
    problem = smooth_problem_of(family, form)
    value, dual = exact(problem)
    module = at_the_optimum(problem)
    losses, costs, clean = problem.tensors()
    bound = module(losses, costs, clean)
    assert bound.item() == pytest.approx(value.item(), rel=1e-11)
    bound.sum().backward()
    assert module.log_lam.grad.item() == pytest.approx(0, abs=2e-6 * dual.lam.item())
    if module.nu is not None:
        assert module.nu.grad.item() == pytest.approx(0, abs=2e-6 * dual.lam.item())


@settings(max_examples=100)
@given(st.sampled_from(FAMILIES), st.integers(0, 1000), st.floats(-5, 5), st.floats(-5, 5))
def test_learned_objective_is_an_upper_bound(family, seed, log_lam, nu):
    problem = problem_of(family, "costs", seed)
    value, _ = exact(problem)
    module = LearnedDual(problem.radius, *family, lam=math.exp(log_lam), nu=nu).double()
    losses, costs, _ = problem.tensors()
    assert module(losses, costs).item() >= value.item() - 1e-12 * abs(value.item())


@families
def test_descent_reaches_the_exact_value(family):
    problem = problem_of(family, "kappa")
    value, _ = exact(problem)
    module = LearnedDual(problem.radius, *family, kappa=problem.kappa).double()
    losses = problem.tensors()[0]
    optimiser = torch.optim.LBFGS(
        module.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def closure():
        optimiser.zero_grad()
        bound = module(losses).sum()
        bound.backward()
        return bound

    optimiser.step(closure)
    assert module(losses).item() == pytest.approx(value.item(), rel=1e-6)


def test_two_optimisers_train_a_model_and_its_duals():
    torch.manual_seed(0)
    model, module = torch.nn.Linear(3, 1), LearnedDual(0.1, "alpha", alpha=2.0)
    x = torch.randn(32, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    steps = [torch.optim.SGD(model.parameters(), 0.02), torch.optim.SGD(module.parameters(), 0.01)]
    history = []
    for _ in range(300):
        bound = module((model(x) - y).square().squeeze(-1))
        for step in steps:
            step.zero_grad()
        bound.backward()
        for step in steps:
            step.step()
        history.append(bound.item())
    assert history[-1] < 0.1 * history[0]
    assert module.lam.item() < 1


def test_state_dict_round_trip(tmp_path):
    module = LearnedDual(0.1, "renyi", alpha=1.25, lam=0.7, nu=-2.0)
    torch.save(module.state_dict(), tmp_path / "duals.pt")
    other = LearnedDual(0.1, "renyi", alpha=1.25)
    other.load_state_dict(torch.load(tmp_path / "duals.pt"))
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(other(losses), module(losses))
    assert other.lam.item() == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_losses(dtype):
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    value = LearnedDual(0.1, "alpha", alpha=2.0)(losses)
    assert value.dtype == torch.float32
    assert value.item() == LearnedDual(0.1, "alpha", alpha=2.0)(losses.detach().float()).item()
    value.backward()
    assert losses.grad.dtype == dtype


def test_exact_and_learned_share_names():
    # What a training step may swap without another change.
    problem = cases.random_problem(6, ("alpha", 2.0), costs=True, clean=True)
    losses, costs, clean = problem.tensors()
    for module in (DCLoss(0.1, "alpha", alpha=2.0), LearnedDual(0.1, "alpha", alpha=2.0)):
        assert module(losses, costs=costs, clean_losses=clean).shape == (1,)

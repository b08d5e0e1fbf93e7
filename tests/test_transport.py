"""Transport on the installed CPU kernel and on the float64 reference: random starts, steps, projections and costs
against the published rules, SciPy and exact laws (section 5 of docs/math.md), and the public functions around them.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transport_cases as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch._dynamo.testing import CompileCounterWithBackend
from transport_cases import DTYPES, RULES, STARTS, Moved, Rule, Start, Step, laid_out, random_step, real

from armor import library, reference
from armor.ops import (
    L1,
    L2,
    Binary,
    Linf,
    NormPower,
    SoftBall,
    TransportStatus,
    transport_cost,
    transport_init,
    transport_step,
)

inf, nan = math.inf, math.nan
SETS = [Rule("linf"), Rule("l2"), Rule("l1", weight=0.0), Rule("l1", weight=0.3)]
PLAIN_SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, 12345678901])

rules = pytest.mark.parametrize("rule", RULES, ids=str)
sets = pytest.mark.parametrize("rule", SETS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Kernel:
    def __init__(self, module):
        self.module = module

    def init(self, x, seeds, start, radius, *, radii=None, mean=None, std=None, lo=-50.0, hi=50.0, feed_dtype=None):
        answer = self.module.transport_init(x, seeds, radii, mean, std, STARTS[start], radius, lo, hi, feed_dtype)
        return Start(*answer)

    def step(self, step):
        return Moved(*self.module.transport_step(*step.raw()))

    def cost(self, step, x_adv):
        return self.module.transport_cost(*step.cost(x_adv))


def compiled():
    if library.backends()["transport_step"][0]["cpu"] == "reference":
        pytest.skip("the reference serves the CPU here")
    return Kernel(torch.ops.armor)


@pytest.fixture(params=["installed", "reference"])
def backend(request):
    """The raw operators: those that serve CPU tensors here, and the oracle."""
    return Kernel(reference) if request.param == "reference" else compiled()


def flat_norm(d, norm):
    return torch.linalg.vector_norm(d.double().flatten(1), ord=norm, dim=1)


NORM_OF = {"linf": inf, "l2": 2, "l1": 1}


def tight(dtype):
    """How far float64 formulas may be from costs of these samples."""
    return 4 * torch.finfo(torch.float32).eps if real(dtype) == torch.float32 else 1e-14


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------------
# random numbers


# The known answers of Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert cases.philox(counter, key) == answer


@pytest.mark.parametrize("stream", [cases.NOISE, cases.ROUNDING, cases.EXTRA])
def test_words_of_the_reference(stream):
    words = reference.transport.random_words(PLAIN_SEEDS, 21, stream)
    for seed, row in zip(PLAIN_SEEDS.tolist(), words.tolist(), strict=True):
        assert row == cases.words(seed, 21, stream).tolist()


# Radii with few bits let every format hold the products, so that nothing is rounded but the sum.
@wide_dtypes
@pytest.mark.parametrize("n", [1, 4, 5, 33])
def test_uniform_noise_bit_for_bit(backend, dtype, n):
    x = (torch.arange(7 * n).reshape(7, n) % 13).to(dtype) / 16
    x_adv, status, feed = backend.init(x, PLAIN_SEEDS, "linf", 0.25)
    noise = torch.tensor(np.stack([cases.noise("linf", seed, n) for seed in PLAIN_SEEDS.tolist()]))
    assert torch.equal(x_adv, x + 0.25 * noise.to(dtype))
    assert status.tolist() == [0] * 7
    assert feed.shape == (0,)


@wide_dtypes
def test_uniform_noise_at_any_radius_bit_for_bit(dtype):
    x = torch.rand(7, 33, dtype=dtype)
    u = torch.tensor(np.stack([cases.uniforms(seed, 33, cases.NOISE) for seed in PLAIN_SEEDS.tolist()])).to(dtype)
    x_adv = compiled().init(x, PLAIN_SEEDS, "linf", 8 / 255, lo=0.0, hi=1.0).x_adv
    assert torch.equal(x_adv, (x + (2 * u - 1) * (8 / 255)).clamp(0, 1))


# An odd n uses up half of its last pair of normal numbers; the polynomials in use are good to 2e-7 whatever the dtype.
@dtypes
@pytest.mark.parametrize("n", [1, 2, 5, 33, 1000])
@pytest.mark.parametrize("start", ["l2", "l1", "gaussian"])
def test_noise_of_the_other_starts(backend, start, n, dtype):
    seeds = PLAIN_SEEDS[: 7 if n < 100 else 2]
    x_adv = backend.init(torch.zeros(len(seeds), n, dtype=dtype), seeds, start, 3.0).x_adv
    assert x_adv.dtype == dtype
    expected = 3 * torch.tensor(np.stack([cases.noise(start, seed, n) for seed in seeds.tolist()]))
    rounding = 0.5 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    tiny = 1e-6 * expected.abs().amax(1, keepdim=True) + 2.0**-25  # and the subnormal numbers of float16
    assert ((x_adv.double() - expected).abs() <= (2e-6 + rounding) * expected.abs() + tiny).all()


def many_starts(backend, start, samples, n, first=0):
    seeds = torch.arange(first, first + samples)
    return backend.init(torch.zeros(samples, n, dtype=torch.float64), seeds, start, 1.0).x_adv.numpy()


def fits(sample, law):
    # The seeds are fixed, so a test either always passes or never does.
    return stats.kstest(np.ravel(sample), law).pvalue > 1e-3


# Barthe et al.: uniform in the ball, not merely on rays through it. In 3 dimensions every coordinate of a uniform
# direction of the l2 sphere is uniform (Archimedes); in the l1 ball |d_1| / ||d||_1 has the law of a simplex.
@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("start", ["linf", "l2", "l1"])
def test_starts_fill_their_ball_uniformly(backend, start, n):
    d = many_starts(backend, start, 4000, n)
    length = np.linalg.norm(d, ord=NORM_OF[start], axis=1)
    assert length.max() < 1
    assert fits(length**n, "uniform")
    assert stats.binomtest(int((d > 0).sum()), d.size).pvalue > 1e-3
    if start == "linf":
        assert fits(d, stats.uniform(-1, 2).cdf)
    elif start == "l2" and n == 3:
        assert all(fits(d[:, j] / length, stats.uniform(-1, 2).cdf) for j in range(3))
    elif start == "l1" and n > 1:
        assert all(fits(np.abs(d[:, j]) / length, stats.beta(1, n - 1).cdf) for j in (0, n - 1))
    if n > 1:
        assert abs(stats.spearmanr(length, np.abs(d[:, 0]) / length).statistic) < 0.06


# Marginals of one coordinate in high dimension: Beta laws of (1 + t) / 2 and of |t|.
@pytest.mark.parametrize(
    ("start", "law"),
    [("l2", lambda d: (stats.beta(17, 17).cdf, (1 + d) / 2)), ("l1", lambda d: (stats.beta(1, 33).cdf, abs(d)))],
)
def test_marginals_of_a_large_ball(backend, start, law):
    cdf, values = law(many_starts(backend, start, 2000, 33)[:, 16])
    assert fits(values, cdf)


def test_gaussian_start_is_normal(backend):
    d = many_starts(backend, "gaussian", 2000, 5)
    assert all(fits(d[:, j], "norm") for j in range(5))
    assert np.abs(np.corrcoef(d.T) - np.eye(5)).max() < 0.1


# Seeds that follow each other make independent samples, and so do the entries of one sample.
@pytest.mark.parametrize("start", ["linf", "gaussian"])
def test_samples_and_entries_are_independent(backend, start):
    rows = many_starts(backend, start, 48, 4096, first=2**32 - 24)
    entries = many_starts(backend, start, 4096, 48).T
    for noise in (rows, entries):
        assert np.abs(np.corrcoef(noise) - np.eye(48)).max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize("start", ["linf", "l2", "l1", "gaussian"])
@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (2, 3, 2, 3, 5)])
def test_noise_depends_on_seed_and_place_alone(backend, start, shape):
    seeds = torch.tensor([5, -9, 10**12])[: shape[0]]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    radii = torch.tensor([0.5, 2.0, 0.25])[: shape[0]]
    together = backend.init(x, seeds, start, 1.0, radii=radii).x_adv
    for layout in ("channels_last", "sliced", "transposed"):
        arranged = laid_out(x, layout)
        other = backend.init(arranged, seeds, start, 1.0, radii=radii).x_adv
        assert torch.equal(other, together)
        assert other.stride() == (arranged if layout == "channels_last" else x).stride()
    for i in range(shape[0]):
        alone = backend.init(x[i : i + 1], seeds[i : i + 1], start, radii[i].item()).x_adv
        assert torch.equal(alone, together[i : i + 1])
    assert torch.equal(backend.init(x.flip(0), seeds.flip(0), start, 1.0, radii=radii.flip(0)).x_adv, together.flip(0))
    assert not torch.equal(backend.init(x, seeds + 1, start, 1.0, radii=radii).x_adv, together)


@dtypes
@pytest.mark.parametrize("start", ["linf", "l2", "l1", "gaussian"])
def test_start_is_cut_at_the_box(backend, start, dtype):
    x = torch.rand(7, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    radius = {"linf": 0.5, "l2": 4.0, "l1": 20.0, "gaussian": 0.5}[start]
    noise = np.stack([radius * cases.noise(start, seed, 40) for seed in PLAIN_SEEDS.tolist()])
    x_adv = backend.init(x, PLAIN_SEEDS, start, radius, lo=0.25, hi=0.75).x_adv
    expected = (x.double() + torch.tensor(noise)).clamp(0.25, 0.75)
    rounding = 2e-6 + (0.5 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0)
    torch.testing.assert_close(x_adv.double(), expected, rtol=0, atol=rounding)
    assert (expected == 0.25).any()
    assert (expected == 0.75).any()


@dtypes
def test_clean_start_is_x(backend, dtype):
    x = torch.rand(3, 2, 5).to(dtype)
    x[1, 0, 0] = nan
    x_adv, status, feed = backend.init(x, None, "clean", 0.0, lo=0.0, hi=1.0, feed_dtype=torch.float64)
    torch.testing.assert_close(x_adv, x, rtol=0, atol=0, equal_nan=True)
    assert status.tolist() == [0, 2, 0]
    torch.testing.assert_close(feed, x.double(), rtol=0, atol=0, equal_nan=True)


def test_public_starts():
    x = torch.rand(4, 3, 6, 5)
    raw = compiled().init
    for cost, start in ((Linf(0.125), "linf"), (L2(0.75), "l2"), (L1(5.0), "l1"), (SoftBall(0.125, tau=0.1), "linf")):
        expected = raw(x, PLAIN_SEEDS[:4], start, cost.radius, lo=0.0, hi=1.0).x_adv
        moved = transport_init(x, cost, seeds=PLAIN_SEEDS[:4])
        assert torch.equal(moved.x_adv, expected)
        assert moved.status.tolist() == [0] * 4
        assert moved.feed is None
        per_sample = transport_init(x, replace(cost, radius=torch.full((4,), cost.radius)), seeds=PLAIN_SEEDS[:4])
        assert torch.equal(per_sample.x_adv, expected)
    for cost in (Linf(torch.full((4,), 3.0)), NormPower(1.0), SoftBall(0.1, tau=0.1)):
        gaussian = transport_init(x, cost, start="gaussian", sigma=0.02, seeds=PLAIN_SEEDS[:4], box=(-1, 2))
        assert torch.equal(gaussian.x_adv, raw(x, PLAIN_SEEDS[:4], "gaussian", 0.02, lo=-1.0, hi=2.0).x_adv)
    assert torch.equal(transport_init(x, NormPower(1.0), start="clean").x_adv, x)


def test_seeds_come_from_the_generator():
    x = torch.full((50, 4), 0.5)
    starts = [transport_init(x, Linf(0.1), generator=torch.Generator().manual_seed(seed)).x_adv for seed in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert len(starts[0].unique(dim=0)) == 50
    torch.manual_seed(3)
    ambient = transport_init(x, Linf(0.1)).x_adv
    assert not torch.equal(transport_init(x, Linf(0.1)).x_adv, ambient)
    torch.manual_seed(3)
    assert torch.equal(transport_init(x, Linf(0.1)).x_adv, ambient)


# ----------------------------------------------------------------------------------------------------
# a step against the oracle, and the oracle against the published expressions

# No sample, one, and more than a vector of lanes; one entry, less than a lane, odd, a CIFAR image.
SIZES = [(0, 5), (1, 1), (7, 1), (1, 5), (7, 5), (1, 33), (7, 33), (7, 0), (1, 3, 32, 32), (7, 3, 32, 32)]


@rules
@pytest.mark.parametrize("per_sample", [False, True])
def test_reference_agrees_with_the_published_expressions(rule, per_sample):
    for shape in SIZES:
        step = random_step(rule, shape, seed=len(shape), per_sample=per_sample)
        moved = Kernel(reference).step(step)
        torch.testing.assert_close(moved.x_adv, cases.naive_step(step), rtol=0, atol=2e-15)
        assert moved.status.tolist() == [0] * shape[0]


@rules
@dtypes
@pytest.mark.parametrize("per_sample", [False, True])
def test_step(rule, dtype, per_sample):
    for shape in SIZES:
        step = random_step(rule, shape, dtype, seed=math.prod(shape), per_sample=per_sample)
        moved = compiled().step(step)
        cases.assert_accurate(step, moved.x_adv)
        assert moved.status.dtype == torch.int32
        assert moved.status.tolist() == [0] * shape[0]
        assert moved.costs.shape == moved.feed.shape == (0,)
        if rule.is_set:
            costs = compiled().cost(step, moved.x_adv)
            assert costs.tolist() == [0.0] * shape[0]


@rules
def test_samples_without_entries_and_batches_without_samples(backend, rule):
    for shape in ((3, 0), (0, 3), (2, 3, 0, 4), (0, 3, 4, 4)):
        step = random_step(
            rule, shape, torch.float32, seeds=PLAIN_SEEDS[: shape[0]], final=True, feed_dtype=torch.float64
        )
        moved = backend.step(step)
        assert moved.x_adv.shape == moved.feed.shape == shape
        assert moved.status.tolist() == [0] * shape[0]
        assert moved.costs.tolist() == ([0.0] * shape[0] if rule.is_cost else [])
        assert backend.cost(step, step.x).tolist() == [0.0] * shape[0]
        start = backend.init(step.x, step.seeds, rule.kind if rule.is_set else "gaussian", 1.0)
        assert start.x_adv.shape == shape
        assert start.status.tolist() == [0] * shape[0]


@dtypes
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.power in (1.0, 1.5)], ids=str)
def test_one_large_image(rule, dtype):
    step = random_step(rule, (1, 3, 224, 224), dtype, seed=9)
    cases.assert_accurate(step, compiled().step(step).x_adv)


# The gradient may have the dtype of what the model is fed.
@rules
@dtypes
@pytest.mark.parametrize("grad_dtype", DTYPES[1:3], ids=str)
def test_gradients_of_another_dtype(rule, dtype, grad_dtype):
    step = random_step(rule, (3, 3, 5, 7), dtype, grad_dtype=grad_dtype)
    moved = compiled().step(step)
    assert moved.x_adv.dtype == dtype
    cases.assert_accurate(step, moved.x_adv)


LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


@rules
@dtypes
@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (2, 3, 2, 3, 5)])
def test_layouts(rule, dtype, shape):
    # Work goes in memory order, so sums may differ in the last bit. Random rounding must not.
    seeds = PLAIN_SEEDS[: shape[0]]
    plain = random_step(rule, shape, dtype, per_sample=True, seeds=seeds, final=True, feed_dtype=torch.float64)
    expected = compiled().step(plain)
    tolerance = 2 * torch.finfo(dtype).eps if rule.kind not in ("linf", "binary", "soft_ball") else 0.0
    for x_layout, x_adv_layout, grad_layout in [
        ("channels_last",) * 3,
        ("sliced",) * 3,
        ("transposed",) * 3,
        ("channels_last", "channels_last", "contiguous"),
        ("contiguous", "contiguous", "channels_last"),
        ("channels_last", "contiguous", "channels_last"),
        ("contiguous", "sliced", "transposed"),
    ]:
        step = replace(
            plain,
            x=laid_out(plain.x, x_layout),
            x_adv=laid_out(plain.x_adv, x_adv_layout),
            grad=laid_out(plain.grad, grad_layout),
        )
        moved = compiled().step(step)
        kept = x_layout == x_adv_layout == grad_layout == "channels_last"
        strides = (step.x if kept else plain.x).stride()
        assert moved.x_adv.stride() == moved.feed.stride() == strides
        torch.testing.assert_close(moved.x_adv, expected.x_adv, rtol=0, atol=tolerance)
        assert torch.equal(moved.feed, moved.x_adv.double())
        torch.testing.assert_close(moved.costs, expected.costs, rtol=1e-2 if tolerance > 1e-4 else 1e-5, atol=0)


def test_expanded_gradient():
    step = random_step(Rule("l2"), (3, 4, 5))
    spread = replace(step, grad=step.grad[:1, :1, :1].expand(3, 4, 5))
    dense = replace(step, grad=spread.grad.contiguous())
    assert torch.equal(compiled().step(spread).x_adv, compiled().step(dense).x_adv)


@rules
def test_samples_are_independent(backend, rule):
    step = random_step(rule, (5, 3, 4, 4), torch.float32, per_sample=True, seeds=PLAIN_SEEDS[:5], final=True)
    together = backend.step(step)
    for i in range(5):
        alone = backend.step(step.sample(i))
        assert torch.equal(alone.x_adv, together.x_adv[i : i + 1])
        assert torch.equal(alone.costs, together.costs[i : i + 1])


@rules
def test_inputs_are_left_alone(rule):
    step = random_step(rule, (3, 8), torch.float32, per_sample=True, seeds=PLAIN_SEEDS[:3], final=True)
    step = replace(step, active=torch.tensor([True, False, True]))
    before = [t.clone() for t in step.raw() if isinstance(t, torch.Tensor)]
    moved = compiled().step(step)
    moved.x_adv.fill_(7.0)
    assert equal(before, [t for t in step.raw() if isinstance(t, torch.Tensor)])


# ----------------------------------------------------------------------------------------------------
# the literal rules of published code


@wide_dtypes
@pytest.mark.parametrize("eps", [8 / 255, 0.031])
def test_linf_step_of_madry_trades_and_mart_bit_for_bit(dtype, eps):
    step = random_step(Rule("linf"), (4, 3, 16, 16), dtype, seed=3)
    x_adv, x_natural, grad, step_size = step.x_adv, step.x, step.grad, 0.007
    moved = compiled().step(replace(step, rule=Rule("linf", radius=eps, step=step_size)))
    trades = x_adv + step_size * torch.sign(grad)
    trades = torch.min(torch.max(trades, x_natural - eps), x_natural + eps)
    trades = torch.clamp(trades, 0.0, 1.0)
    assert torch.equal(moved.x_adv, trades)
    public = transport_step(x_adv, grad, x_natural, Linf(eps), step_size=step_size)
    assert torch.equal(public.x_adv, trades)


@wide_dtypes
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("lamda", [0.3, 1.0, 1.7])
def test_soft_ball_step_of_udr(dtype, order, lamda):
    # attack_udr keeps the displacement; a sum of three terms is rounded where it is added to x.
    step = random_step(Rule("soft_ball"), (4, 3, 16, 16), dtype, seed=4)
    eps, step_size, tau = 8 / 255, 2 / 255, 3 / 255
    delta = step.x_adv - step.x
    d = delta + step_size * torch.sign(step.grad)
    at = d if order == "after" else delta
    d = d - lamda * step_size / tau * (at - torch.sign(at) * eps) * (at.abs() > eps)
    udr = step.x + torch.clamp(d, 0 - step.x, 1 - step.x)
    moved = transport_step(
        step.x_adv, step.grad, step.x, SoftBall(eps, tau=tau, order=order), step_size=step_size, mu=lamda
    )
    torch.testing.assert_close(moved.x_adv, udr, rtol=0, atol=torch.finfo(dtype).eps)


@wide_dtypes
def test_l2_step_of_the_robustness_library(dtype):
    # L2Step: its 1e-10 and renorm's 1e-7 against division by zero are all that is different.
    step = random_step(Rule("l2"), (4, 3, 16, 16), dtype, seed=5)
    eps, step_size = 0.5, 0.1
    norm = step.grad.reshape(4, -1).norm(dim=1).view(-1, 1, 1, 1)
    diff = step.x_adv + step.grad / (norm + 1e-10) * step_size - step.x
    diff = diff.renorm(p=2, dim=0, maxnorm=eps)
    madry = torch.clamp(step.x + diff, 0, 1)
    moved = transport_step(step.x_adv, step.grad, step.x, L2(eps), step_size=step_size)
    torch.testing.assert_close(moved.x_adv, madry, rtol=0, atol=2e-7)


def test_attack_that_follows_a_constant_gradient_ends_at_the_edge_of_the_ball():
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    grad = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    ends = {
        Linf(0.125): [[0.625, 0.375, 0.5], [0.5, 0.5, 0.625]],
        L2(0.25): [[0.5 + 0.25 / 5**0.5, 0.5 - 0.5 / 5**0.5, 0.5], [0.5, 0.5, 0.75]],
        L1(0.25, top=0.0): [[0.5, 0.25, 0.5], [0.5, 0.5, 0.75]],
    }
    for cost, end in ends.items():
        x_adv = x
        for _ in range(20):
            x_adv = transport_step(x_adv, grad, x, cost, step_size=0.03).x_adv
        torch.testing.assert_close(x_adv, torch.tensor(end, dtype=torch.float64), rtol=0, atol=1e-14)


# ----------------------------------------------------------------------------------------------------
# geometry


@st.composite
def set_steps(draw):
    """Steps of any set, size, scale and dtype, from anywhere in the box."""
    rule = draw(st.sampled_from(SETS))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    box = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-2.0, 0.5), (0.0, 256.0), (-0.1, 0.3)]))
    lo, hi = torch.tensor(box, dtype=dtype).tolist()
    x, x_adv = (
        (lo + (hi - lo) * (1.2 * torch.rand(shape, generator=generator) - 0.1)).to(dtype).clamp(lo, hi)
        for _ in range(2)
    )
    grad = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-4, 4))
    radius = 10 ** draw(st.floats(-3, 2))
    rule = replace(rule, radius=radius, step=radius * 10 ** draw(st.floats(-2, 0.5)))
    return Step(rule, x_adv, grad.to(dtype), x, lo=lo, hi=hi, targeted=draw(st.booleans()))


@settings(max_examples=300)
@given(set_steps())
def test_result_is_in_ball_and_box(step):
    kernel = compiled()
    x_adv, status, *_ = kernel.step(step)
    assert status.eq(0).all()
    assert x_adv.min().item() >= step.lo
    assert x_adv.max().item() <= step.hi
    n = step.x.shape[1]
    growth = {"linf": 1.0, "l2": math.sqrt(n), "l1": n}[step.rule.kind]
    largest = max(t.abs().max().item() for t in (step.x, step.x_adv, x_adv))
    slack = 4 * torch.finfo(x_adv.dtype).eps * growth * largest
    length = flat_norm(x_adv.double() - step.x.double(), NORM_OF[step.rule.kind])
    assert (length <= step.rule.radius + slack).all()
    assert kernel.cost(step, x_adv).eq(0).all()


# The box binds nowhere and the ball is wide: the step is the steepest ascent of its norm, by duality.
@pytest.mark.parametrize(("rule", "dual"), [(Rule("linf"), 1), (Rule("l2"), 2), (Rule("l1", weight=0.0), inf)], ids=str)
@pytest.mark.parametrize("n", [1, 5, 33, 3072])
def test_a_linear_loss_rises_by_step_times_dual_norm(backend, rule, dual, n):
    grad = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = torch.zeros(4, n, dtype=torch.float64)
    step = Step(replace(rule, radius=100.0, step=0.37), x, grad, x, lo=-200.0, hi=200.0)
    for targeted in (False, True):
        d = backend.step(replace(step, targeted=targeted)).x_adv
        assert flat_norm(d, NORM_OF[rule.kind]).tolist() == pytest.approx([0.37] * 4, rel=1e-13)
        rise = (grad * d).sum(1) * (-1 if targeted else 1)
        assert rise.tolist() == pytest.approx((0.37 * flat_norm(grad, dual)).tolist(), rel=1e-13)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-30, 1e-20, 1e20, 1e37])
def test_l2_direction_survives_gradients_whose_squares_do_not(magnitude):
    generator = torch.Generator().manual_seed(0)
    grad = magnitude * torch.randint(-9, 10, (3, 33), generator=generator, dtype=torch.float64)
    step = random_step(Rule("l2", radius=10.0), (3, 33), torch.float32, grad_dtype=torch.float32, lo=-9.0, hi=9.0)
    step = replace(step, grad=grad.float())
    cases.assert_accurate(step, compiled().step(step).x_adv)


@sets
def test_no_gradient_no_step(backend, rule):
    step = random_step(rule, (3, 7), radii=None)
    step = replace(step, grad=torch.zeros(3, 7, dtype=torch.float64), rule=replace(rule, radius=100.0))
    assert torch.equal(backend.step(step).x_adv, step.x_adv)


def test_l1_step_skips_entries_at_the_box_and_shares_ties(backend):
    x = torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.0, 0.5]], dtype=torch.float64)
    grad = torch.tensor([[1.0, -2.0, 2.0, 5.0, -5.0, 0.0]], dtype=torch.float64)
    step = Step(Rule("l1", radius=10.0, step=0.25, weight=0.0), x, grad, x)
    assert backend.step(step).x_adv.tolist() == [[0.5, 0.375, 0.625, 1.0, 0.0, 0.5]]
    # the largest two are a tie, the largest three are those and the first; no fourth one can move
    for top, moved in [(2 / 6, 2), (0.5, 3), (1.0, 3)]:
        x_adv = backend.step(replace(step, rule=replace(step.rule, weight=top))).x_adv
        assert (x_adv != x).sum().item() == moved
        assert (x_adv - x).abs().sum().item() == pytest.approx(0.25, rel=1e-15)


# floor(0.29 * 100) is 28 in float64, in which it is defined, and 29 in float32.
@pytest.mark.parametrize(("top", "n", "moved"), [(0.01, 3072, 30), (0.29, 100, 28), (0.5, 33, 16), (1e-9, 7, 1)])
def test_l1_step_counts_its_entries(backend, top, n, moved):
    grad = torch.arange(1, n + 1, dtype=torch.float32)[None] * torch.tensor([1.0, -1.0])[:, None]
    x = torch.full((2, n), 0.5)
    step = Step(Rule("l1", radius=10.0, step=0.5, weight=top), x, grad, x)
    chosen = backend.step(step).x_adv != x
    assert torch.equal(chosen, (torch.arange(n) >= n - moved).expand(2, n))


def l1_steps(count, n, seed, dtype=torch.float64):
    """Displacements all over the box and beyond it, which a step then projects."""
    step = random_step(Rule("l1", step=0.4, weight=0.4), (count, n), dtype, seed=seed)
    x_adv = torch.rand(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    radii = torch.linspace(0.02, 0.5, count, dtype=torch.float64).to(real(dtype)) * n
    return replace(step, x_adv=x_adv, radii=radii)


def test_l1_projection_solves_its_quadratic_program(backend):
    step = l1_steps(6, 5, seed=2)
    y = cases.l1_ascent(step.x_adv, step.grad, step.rule).numpy()
    assert (y > 1).any()
    assert (y < 0).any()
    z = backend.step(step).x_adv.numpy()
    for y_b, x_b, z_b, radius in zip(y, step.x.numpy(), z, step.radii.numpy(), strict=True):
        # z - x = up - down with up, down >= 0 makes the l1 norm linear
        best = optimize.minimize(
            lambda v, y_b=y_b, x_b=x_b: ((x_b + v[:5] - v[5:] - y_b) ** 2).sum(),
            np.zeros(10),
            jac=lambda v, y_b=y_b, x_b=x_b: np.concatenate([s * 2 * (x_b + v[:5] - v[5:] - y_b) for s in (1, -1)]),
            bounds=[*((0, 1 - x) for x in x_b), *((0, x) for x in x_b)],
            constraints={"type": "ineq", "fun": lambda v, r=radius: r - v.sum(), "jac": lambda _: -np.ones(10)},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert np.abs(z_b - x_b).sum() <= radius * (1 + 1e-12)
        assert ((z_b - y_b) ** 2).sum() <= best.fun + 1e-12
        np.testing.assert_allclose(z_b, x_b + best.x[:5] - best.x[5:], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 33, 3072])
def test_l1_projection_meets_its_optimality_conditions(backend, n, dtype):
    # One multiplier theta >= 0, positive only where the radius binds: every entry is shrunk by it, stays at 0 if it is
    # no longer than it, and stops at the box if the rest reaches further.
    step = l1_steps(9, n, seed=n, dtype=dtype)
    eps = 1e-6 if dtype == torch.float32 else 1e-14
    x, radii = step.x.double(), step.radii.double()
    d = cases.l1_ascent(step.x_adv.double(), step.grad.double(), step.rule) - x
    z = backend.step(step).x_adv.double() - x
    assert (z * d >= -eps).all()
    size, kept, cap = d.abs(), z.abs(), torch.where(d > 0, 1 - x, x)
    used = kept.sum(1)
    rounding = n * torch.finfo(dtype).eps
    assert (used <= radii * (1 + eps) + rounding).all()
    free = (kept > eps) & (kept < cap - eps)
    thetas = [(size - kept)[b][free[b]] for b in range(9)]
    binding = 0
    for b in range(9):
        if size[b].minimum(cap[b]).sum() <= radii[b]:
            torch.testing.assert_close(kept[b], size[b].minimum(cap[b]), rtol=0, atol=3 * eps)
            continue
        binding += 1
        assert used[b].item() == pytest.approx(radii[b].item(), rel=eps, abs=rounding)
        theta = thetas[b].mean() if len(thetas[b]) else (size[b] - kept[b]).amax()
        assert theta > 0
        assert ((thetas[b] - theta).abs() <= 3 * eps).all()
        assert (size[b][(kept[b] <= eps) & (cap[b] > eps)] <= theta + 3 * eps).all()
        at_cap = kept[b] >= cap[b] - eps
        assert (size[b][at_cap] - theta >= cap[b][at_cap] - 3 * eps).all()
    assert binding > 2


def test_l1_projection_is_exact_where_the_box_binds(backend):
    # One step of 2 for the first entry, of which the box leaves 0.25; the second one keeps 0.5 of its 0.75.
    x = torch.tensor([[0.75, 0.125, 0.5]], dtype=torch.float64)
    x_adv = torch.tensor([[0.75, 0.875, 0.5]], dtype=torch.float64)
    grad = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    step = Step(Rule("l1", radius=0.75, step=2.0, weight=0.0), x_adv, grad, x)
    z = backend.step(step).x_adv
    assert z.tolist() == [pytest.approx([1.0, 0.625, 0.5], abs=1e-14)]
    # clipping after a projection on the ball alone would have wasted the radius on what the box forbids
    assert (z - x).abs().sum().item() == pytest.approx(0.75, rel=1e-14)


# ----------------------------------------------------------------------------------------------------
# costs


@rules
@wide_dtypes
def test_costs_by_their_formulas(backend, rule, dtype):
    for shape in ((0, 3), (1, 1), (5, 33), (3, 3, 32, 32)):
        step = random_step(rule, shape, dtype, per_sample=True)
        d = (step.x_adv.double() - step.x.double()).flatten(1)
        if rule.is_cost:
            radii = step.radii.double()[:, None]
            expected = cases.cost(step.rule, d, radii)
        elif rule.is_set:
            expected = torch.where(flat_norm(d, NORM_OF[rule.kind]) <= step.radii, 0.0, inf).double()
        else:
            expected = torch.full(shape[:1], inf, dtype=torch.float64)  # x_adv is not rounded
        costs = backend.cost(step, step.x_adv)
        assert costs.dtype == dtype
        torch.testing.assert_close(costs.double(), expected, rtol=tight(dtype), atol=0)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.is_cost], ids=str)
@dtypes
def test_final_costs_are_those_of_the_result(backend, rule, dtype):
    step = random_step(rule, (5, 3, 8, 8), dtype, per_sample=True, final=True)
    moved = backend.step(step)
    assert moved.costs.dtype == real(dtype)
    d = (moved.x_adv.double() - step.x.double()).flatten(1)  # x_adv as rounded to its dtype
    expected = cases.cost(step.rule, d, step.radii.double()[:, None])
    torch.testing.assert_close(moved.costs.double(), expected, rtol=tight(dtype), atol=0)
    torch.testing.assert_close(backend.cost(step, moved.x_adv), moved.costs, rtol=tight(dtype), atol=0)
    assert torch.equal(backend.step(replace(step, final=False)).x_adv, moved.x_adv)


@dtypes
def test_a_ball_forgives_the_rounding_of_the_dtype_and_no_more(backend, dtype):
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    x = torch.full((1, 4), 0.5, dtype=dtype)
    # d is a power of two and exact; the slack is eps * 0.75 times 1, 2 or 4.
    x_adv = x + torch.tensor([0.25, -0.25, 0.25, 0.25], dtype=dtype)
    for kind, length, growth in (("linf", 0.25, 1), ("l2", 0.5, 2), ("l1", 1.0, 4)):
        for part, expected in ((0.0, 0.0), (0.5, 0.0), (1.5, inf)):
            step = Step(Rule(kind, radius=length - part * eps * growth * 0.75), x_adv, x, x)
            assert backend.cost(step, x_adv).tolist() == [expected]


def test_costs_outside_the_box_of_bits_and_of_nan(backend):
    x = torch.tensor([[0.5, 0.5]] * 4)
    x_adv = torch.tensor([[0.5, 0.75], [0.5, 1.25], [-0.25, 0.5], [nan, 0.5]])
    for kind in ("linf", "l2", "l1"):
        costs = backend.cost(Step(Rule(kind, radius=9.0), x_adv, x, x), x_adv)
        assert costs[:3].tolist() == [0.0, inf, inf]
        assert costs[3].isnan()
    soft = backend.cost(Step(Rule("soft_ball", radius=0.25, weight=0.125), x_adv, x, x), x_adv)
    assert soft[:3].tolist() == [0.0, 1.0, 1.0]
    assert soft[3].isnan()
    assert backend.cost(Step(Rule("norm_power", weight=2.0, power=2.0), x_adv, x, x), x_adv)[:3].tolist() == [
        0.125,
        1.125,
        1.125,
    ]
    bits = torch.tensor([[0.0, 1.0]] * 5)
    flipped = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0], [2.0, 1.0]])
    assert backend.cost(Step(Rule("binary"), flipped, bits, bits), flipped).tolist() == [0.0, 0.0, inf, inf, inf]


# 0.1 is above 1/10 in float32 and bfloat16, and below in float16: bounds are what the dtype can say.
@dtypes
@sets
def test_bounds_that_the_dtype_rounds(rule, dtype):
    hi = torch.tensor([0.1], dtype=dtype).item()
    x = torch.tensor([[0.1, 0.0, 0.05]], dtype=dtype)
    cost, box = replace(rule, radius=9.0).public(), (-0.1, 0.1)
    assert torch.equal(transport_init(x, cost, start="clean", box=box).x_adv, x)
    moved = transport_step(x, torch.ones(1, 3, dtype=dtype), x, cost, step_size=9.0, box=box)
    assert moved.status.tolist() == [0]
    assert moved.x_adv.max().item() == hi
    assert transport_cost(moved.x_adv, x, cost, box=box).tolist() == [0.0]
    start = transport_init(x, cost, seeds=PLAIN_SEEDS[:1], box=box)
    assert transport_cost(start.x_adv, x, cost, box=box).tolist() == [0.0]


PUBLIC_COSTS = [
    *(NormPower(1.3, p=p, power=power) for p in (1, 2, inf) for power in (1.0, 1.5, 2.0)),
    SoftBall(0.05, tau=0.1),
    SoftBall(torch.tensor([0.02, 0.1, 0.2], dtype=torch.float64), tau=0.3),
]


@pytest.mark.parametrize("cost", PUBLIC_COSTS, ids=str)
def test_gradcheck_of_the_cost(cost):
    generator = torch.Generator().manual_seed(0)
    x_adv, x = (torch.rand(3, 2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: transport_cost(a, b, cost), (x_adv, x), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("cost", PUBLIC_COSTS[:-1], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2, 2), (0, 3), (3, 0)])
def test_gradient_of_the_cost_is_that_of_its_formula(cost, shape):
    rule = cost.rule()
    kind = "norm_power" if isinstance(cost, NormPower) else "soft_ball"
    plain = Rule(kind, weight=rule.weight, power=rule.power, norm=rule.norm or inf)
    for dtype in DTYPES:
        step = random_step(Rule("linf"), shape, dtype)
        x_adv, x = step.x_adv.clone().requires_grad_(), step.x.clone().requires_grad_()
        upstream = torch.arange(1.0, shape[0] + 1, dtype=real(dtype))
        transport_cost(x_adv, x, cost).backward(upstream)
        assert x_adv.grad.dtype == dtype
        if x.numel():
            wide = [t.detach().double().reshape(shape[0], -1) for t in (x_adv, x)]
            slope = upstream.double()[:, None] * cases.cost_gradient(plain, *wide, 0.05)
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(x_adv.grad.double().view_as(slope), slope, rtol=tolerance, atol=1e-7)
        assert torch.equal(x.grad, -x_adv.grad)


@pytest.mark.parametrize("cost", PUBLIC_COSTS[:-1], ids=str)
def test_gradient_of_the_cost_is_zero_where_nothing_moved(cost):
    x = torch.rand(3, 4)
    x_adv = x.clone().requires_grad_()
    transport_cost(x_adv, x, cost).sum().backward()
    assert x_adv.grad.eq(0).all()


def test_gradient_of_the_largest_entries_is_shared():
    x = torch.zeros(1, 4)
    x_adv = torch.tensor([[0.25, -0.25, 0.125, 0.25]], requires_grad=True)
    transport_cost(x_adv, x, NormPower(3.0, p=inf), box=(-1, 1)).backward()
    assert x_adv.grad.tolist() == [[1.0, -1.0, 0.0, 1.0]]


def test_second_derivative_of_the_cost_is_refused():
    x_adv = torch.rand(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(
        transport_cost(x_adv, torch.rand(3, 4), NormPower(1.0)).sum(), x_adv, create_graph=True
    )
    with pytest.raises(RuntimeError):
        slope.square().sum().backward()


def test_costs_of_sets_and_steps_carry_no_gradient():
    x_adv, x, grad = (torch.rand(3, 4, requires_grad=True) for _ in range(3))
    assert not transport_cost(x_adv, x, Linf(0.5)).requires_grad
    start = transport_init(x, SoftBall(0.1, tau=0.1), normalize=([0.5] * 4, [0.25] * 4))
    moved = transport_step(x_adv, grad, x, SoftBall(0.1, tau=0.1), step_size=0.1, final=True, feed_dtype=torch.float64)
    assert not any(t.requires_grad for t in (*start, *moved))


# The step's own gradient of the cost, seen through the direction that it gives a normalised step.
@pytest.mark.parametrize("p", [1, 2, inf])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_step_follows_the_gradient_of_loss_minus_price_times_cost(p, power):
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(3, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    x_adv = (x + 0.3 * torch.randn(3, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    cost, mu = NormPower(1.7, p=p, power=power, step="normalised"), torch.tensor([0.0, 0.5, 40.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(transport_cost(x_adv, x, cost, box=(-9, 9)).sum(), x_adv)
    ascent = grad - mu[:, None] * slope
    expected = x_adv + 0.1 * ascent / ascent.norm(dim=1, keepdim=True)
    moved = transport_step(x_adv, grad, x, cost, step_size=0.1, mu=mu, box=(-9, 9))
    torch.testing.assert_close(moved.x_adv, expected, rtol=0, atol=1e-14)
    signed = transport_step(x_adv, grad, x, replace(cost, step="sign"), step_size=0.1, mu=mu, box=(-9, 9))
    torch.testing.assert_close(signed.x_adv, x_adv + 0.1 * ascent.sign(), rtol=0, atol=1e-15)


def test_cost_of_an_unmoved_sample_does_not_hold_it_back(backend):
    for norm in (1, 2, inf):
        for variant in (0, 1):
            x, grad = torch.full((1, 4), 0.5), torch.tensor([[3.0, -4.0, 0.0, 0.0]])
            rule = Rule("norm_power", step=0.125, weight=1e6, norm=norm, power=1.0, variant=variant)
            moved = backend.step(Step(rule, x, grad, x, mu=torch.tensor(inf))).x_adv
            expected = [0.125, -0.125, 0.0, 0.0] if variant == 0 else [0.075, -0.1, 0.0, 0.0]
            assert (moved - x)[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_soft_ball_holds_the_radius_where_the_authors_order_overshoots(backend):
    # Section 5: at mu = 1 and tau = step_size a constant gradient ends at the radius, or at 1.25 of it.
    radius, step_size = 8 / 255, 2 / 255
    x = torch.full((1, 3), 0.5, dtype=torch.float64)
    grad = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    for variant, end in ((0, 1.0), (1, 1.25)):
        rule, x_adv = Rule("soft_ball", radius, step_size, weight=step_size, variant=variant), x
        largest = 0.0
        for _ in range(12):
            x_adv = backend.step(Step(rule, x_adv, grad, x)).x_adv
            largest = max(largest, (x_adv - x).abs().max().item())
        assert largest == pytest.approx(end * radius, rel=1e-12)
        assert (x_adv - x)[0].tolist() == pytest.approx([end * radius, -end * radius, 0.0], rel=1e-12, abs=1e-17)


# ----------------------------------------------------------------------------------------------------
# masks, radii, prices, targets, and what cannot be followed


@rules
@dtypes
def test_inactive_samples_stay(backend, rule, dtype):
    step = random_step(rule, (5, 3, 4, 4), dtype, per_sample=True, final=rule.is_cost, feed_dtype=torch.float32)
    step.grad[1, 0, 0, 0] = nan
    masked = backend.step(replace(step, active=torch.tensor([True, False, True, False, False])))
    everybody = backend.step(step)
    assert masked.status.tolist() == [0] * 5
    assert torch.equal(masked.x_adv[[1, 3, 4]], step.x_adv[[1, 3, 4]])
    assert torch.equal(masked.x_adv[[0, 2]], everybody.x_adv[[0, 2]])
    assert not torch.equal(masked.x_adv[3], everybody.x_adv[3])
    assert torch.equal(masked.feed, masked.x_adv.float())
    if rule.is_cost:
        expected = backend.cost(step, masked.x_adv)
        torch.testing.assert_close(masked.costs, expected, rtol=tight(dtype), atol=0)


@rules
def test_radii_and_prices_of_samples(backend, rule):
    step = random_step(rule, (4, 3, 4, 4), torch.float32, per_sample=True, final=True)
    together = backend.step(step)
    for i in range(4):
        alone = replace(
            step.sample(i),
            radii=None,
            rule=replace(step.rule, radius=step.radii[i].item()),
            mu=None if step.mu is None else step.mu[i],
        )
        assert torch.equal(backend.step(alone).x_adv, together.x_adv[i : i + 1])
        assert torch.equal(backend.step(alone).costs, together.costs[i : i + 1])
    if rule.is_cost:
        assert equal(backend.step(replace(step, mu=None)), backend.step(replace(step, mu=torch.tensor(1.0))))
        free, dear = (backend.step(replace(step, mu=torch.tensor(mu))).x_adv for mu in (0.0, 1e6))
        assert not torch.equal(free, dear)


@rules
def test_targeted_steps_descend(backend, rule):
    step = random_step(rule, (4, 3, 4, 4), torch.float32, per_sample=True)
    descent = backend.step(replace(step, targeted=True))
    assert equal(descent, backend.step(replace(step, grad=-step.grad)))
    assert not torch.equal(descent.x_adv, backend.step(step).x_adv)


@wide_dtypes
def test_an_infinite_price_leads_straight_back(backend, dtype):
    x = torch.full((1, 4), 0.5, dtype=dtype)
    x_adv = x + torch.tensor([[0.25, -0.125, 0.0, 0.25]], dtype=dtype)
    grad = torch.tensor([[1e6, -1e6, 1.0, -1e6]], dtype=dtype)
    away = (x_adv - x)[0]
    peaks = away * (away.abs() == 0.25)
    for norm, variant, direction in [
        (1, 0, torch.tensor([1.0, -1.0, -1.0, 1.0])),
        (2, 0, torch.tensor([1.0, -1.0, -1.0, 1.0])),
        (inf, 0, torch.tensor([1.0, 1.0, -1.0, 1.0])),
        (1, 1, away.sign() / away.sign().norm()),
        (2, 1, away / away.norm()),
        (inf, 1, peaks / peaks.norm()),
    ]:
        rule = Rule("norm_power", step=0.0625, weight=2.0, power=2.0, norm=norm, variant=variant)
        for mu in (torch.tensor(inf, dtype=dtype), torch.tensor([inf], dtype=dtype)):
            moved = backend.step(Step(rule, x_adv, grad, x, mu=mu))
            assert moved.status.tolist() == [0]
            expected = x_adv - 0.0625 * direction.to(dtype)
            torch.testing.assert_close(moved.x_adv, expected, rtol=0, atol=1e-7)
    # The soft ball's rule is an explicit step of rate mu: it only leaves alone what is inside.
    soft = Step(
        Rule("soft_ball", radius=0.1875, step=0.03125, weight=0.1), x_adv, grad, x, mu=torch.tensor(inf, dtype=dtype)
    )
    moved = backend.step(soft)
    assert moved.status.tolist() == [0]
    assert moved.x_adv[0].tolist() == pytest.approx([0.0, 0.34375, 0.53125, 0.0], abs=1e-7)


@rules
@dtypes
def test_gradients_that_cannot_be_followed(backend, rule, dtype):
    step = random_step(rule, (6, 3, 4, 4), dtype, per_sample=True, final=rule.is_cost, feed_dtype=torch.float32)
    broken = replace(step, grad=step.grad.clone())
    for sample, value in ((1, nan), (3, inf), (4, -inf)):
        broken.grad[sample, -1, -1, -1] = value
    broken.grad[2, 0, 0, 0] = torch.finfo(dtype).max
    step.grad[2] = broken.grad[2]
    moved, healthy = backend.step(broken), backend.step(step)
    assert moved.status.tolist() == [0, 1, 0, 1, 1, 0]
    assert torch.equal(moved.x_adv[[1, 3, 4]], step.x_adv[[1, 3, 4]])
    assert torch.equal(moved.x_adv[[0, 2, 5]], healthy.x_adv[[0, 2, 5]])
    assert torch.equal(moved.feed, moved.x_adv.float())
    masked = backend.step(replace(broken, active=torch.arange(6) != 3))
    assert masked.status.tolist() == [0, 1, 0, 0, 1, 0]
    assert torch.equal(masked.x_adv, moved.x_adv)
    if rule.is_cost:
        expected = backend.cost(step, moved.x_adv)
        torch.testing.assert_close(moved.costs, expected, rtol=tight(dtype), atol=0)
        priced = backend.step(replace(step, mu=torch.where(torch.arange(6) == 5, nan, step.mu)))
        assert priced.status.tolist() == [0, 0, 0, 0, 0, 1]
        assert torch.equal(priced.x_adv[5], step.x_adv[5])
        assert torch.equal(priced.x_adv[:5], healthy.x_adv[:5])


@sets
@dtypes
def test_samples_outside_the_box_are_flagged(backend, rule, dtype):
    step = random_step(rule, (5, 3, 4, 4), dtype)
    bad = step.x.clone()
    bad[1, 2, 3, 3], bad[2, 0, 0, 0], bad[3, 0, 0, 0] = 1.25, -0.25, nan
    broken = replace(step, x=bad, grad=step.grad.clone())
    broken.grad[2, 0, 0, 1] = nan
    moved = backend.step(broken)
    assert moved.status.tolist() == [0, 2, 3, 2, 0]
    assert torch.equal(moved.x_adv[[0, 4]], backend.step(step).x_adv[[0, 4]])
    assert moved.x_adv[1].min() >= 0
    assert moved.x_adv[1].max() <= 1
    assert backend.init(bad, None, "clean", 0.0, lo=0.0, hi=1.0).status.tolist() == [0, 2, 2, 2, 0]
    assert (TransportStatus.BAD_GRADIENT, TransportStatus.OUTSIDE) == (1, 2)


# ----------------------------------------------------------------------------------------------------
# feed

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


@dtypes
@pytest.mark.parametrize("feed_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_feed_is_normalised_and_cast(dtype, feed_dtype, layout):
    kernel, wide = compiled(), real(dtype)
    mean, std = (torch.tensor(v, dtype=wide) for v in (MEAN, STD))
    step = random_step(Rule("l2"), (3, 3, 5, 4), dtype, mean=mean, std=std, feed_dtype=feed_dtype)
    step = replace(step, **{name: laid_out(getattr(step, name), layout) for name in ("x", "x_adv", "grad")})
    started = kernel.init(
        step.x, PLAIN_SEEDS[:3], "linf", 0.1, mean=mean, std=std, lo=0.0, hi=1.0, feed_dtype=feed_dtype
    )
    for answer in (kernel.step(step), started):
        assert answer.feed.dtype == (feed_dtype or dtype)
        assert answer.feed.stride() == step.x.stride()
        # of x_adv as rounded to its dtype
        exact = (answer.x_adv.double() - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
        unit = torch.finfo(answer.feed.dtype).eps
        rounding = 2 * torch.finfo(wide).eps + (0.5 * unit if unit > torch.finfo(wide).eps else 0.0)
        torch.testing.assert_close(answer.feed.double(), exact, rtol=rounding, atol=2 * torch.finfo(wide).eps)


@rules
@wide_dtypes
def test_gradient_in_the_feed_is_divided_by_std(rule, dtype):
    # Powers of two, so that the division is exact; a nonlinear model, so that the gradient is autograd's.
    mean, std = torch.tensor([0.5, 0.25, 0.125], dtype=dtype), torch.tensor([0.25, 0.5, 2.0], dtype=dtype)
    step = random_step(rule, (3, 3, 5, 4), dtype, per_sample=True)
    x_adv = step.x_adv.clone().requires_grad_()
    feed = (x_adv - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    feed.retain_grad()
    feed.sin().sum().backward()
    for targeted in (False, True):
        in_feed = replace(step, grad=feed.grad, mean=mean, std=std, targeted=targeted)
        in_x = replace(step, grad=x_adv.grad, targeted=targeted)
        assert torch.equal(compiled().step(in_feed).x_adv, compiled().step(in_x).x_adv)


def test_public_feeds():
    x = torch.rand(2, 3, 4, 4)
    grad = torch.randn(2, 3, 4, 4).bfloat16()
    raw = compiled().step(
        Step(
            Rule("l2", 0.5, 0.1), x, grad, x, mean=torch.tensor(MEAN), std=torch.tensor(STD), feed_dtype=torch.bfloat16
        )
    )
    for normalize in ((MEAN, STD), (torch.tensor(MEAN), torch.tensor(STD).double())):
        moved = transport_step(x, grad, x, L2(0.5), step_size=0.1, normalize=normalize, feed_dtype=torch.bfloat16)
        assert torch.equal(moved.x_adv, raw.x_adv)
        assert torch.equal(moved.feed, raw.feed)
    start = transport_init(x, L2(0.5), start="clean", normalize=(MEAN, STD))
    expected = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(start.feed, expected, rtol=1e-6, atol=1e-6)
    cast = transport_step(x, grad, x, L2(0.5), step_size=0.1, feed_dtype=torch.float16)
    assert torch.equal(cast.feed, cast.x_adv.half())
    assert transport_step(x, grad, x, L2(0.5), step_size=0.1).feed is None


# ----------------------------------------------------------------------------------------------------
# binary features


@dtypes
def test_binary_rounds_by_its_random_numbers(backend, dtype):
    step = random_step(Rule("binary", step=0.3), (7, 3, 5, 5), dtype, seeds=PLAIN_SEEDS, seed=6)
    relaxed = backend.step(step).x_adv
    torch.testing.assert_close(
        relaxed, (step.x_adv + 0.3 * step.grad.sign()).clamp(0, 1), rtol=0, atol=torch.finfo(dtype).eps
    )
    u = torch.tensor(np.stack([cases.uniforms(seed, 75, cases.ROUNDING) for seed in PLAIN_SEEDS.tolist()]))
    exact = cases.truth(step).x_adv  # the threshold is met before the rounding to x's dtype
    rounded = backend.step(replace(step, final=True))
    assert torch.equal(rounded.x_adv, torch.maximum(step.x.double(), (exact > u.view(7, 3, 5, 5)).double()).to(dtype))
    assert rounded.costs.shape == (0,)
    assert backend.cost(step, rounded.x_adv).tolist() == [0.0] * 7


def test_binary_flips_with_the_relaxed_probability(backend):
    chances = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
    x = torch.zeros(4000, 6)
    step = Step(Rule("binary"), chances.expand(4000, 6), torch.zeros(4000, 6), x, seeds=torch.arange(4000), final=True)
    flips = backend.step(step).x_adv
    counts = flips.sum(0).int().tolist()
    assert counts[0] == 0
    assert counts[-1] == 4000
    for count, chance in zip(counts[1:-1], chances.tolist()[1:-1], strict=True):
        assert stats.binomtest(count, 4000, chance).pvalue > 1e-3
    assert abs(np.corrcoef(flips[:, 2], flips[:, 3])[0, 1]) < 0.08


@dtypes
def test_binary_without_seeds_rounds_at_a_half(backend, dtype):
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 0.0]], dtype=dtype)
    x_adv = torch.tensor([[0.25, 0.5, 0.5, 0.25, 1.0, 0.75]], dtype=dtype)
    grad = torch.tensor([[1.0, 0.0, 1.0, -1.0, -1.0, -1.0]], dtype=dtype)
    step = Step(Rule("binary", step=0.25), x_adv, grad, x, final=True)
    # 0.5 and no more is not enough; ones of x come back
    assert backend.step(step).x_adv.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 0.0]]


def test_binary_rounds_samples_that_did_not_move(backend):
    # They, too, must end as features: early stopping leaves samples with fractions behind.
    x = torch.tensor([[0.0, 0.0, 1.0]] * 3)
    x_adv = torch.tensor([[0.75, 0.25, 0.5]] * 3)
    grad = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, nan, 0.0], [-1.0, 1.0, 0.0]])
    step = Step(Rule("binary", step=0.5), x_adv, grad, x, final=True, active=torch.tensor([False, True, True]))
    moved = backend.step(step)
    assert moved.status.tolist() == [0, 1, 0]
    assert moved.x_adv.tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]


# ----------------------------------------------------------------------------------------------------
# the same bits, everywhere


@rules
def test_same_bits_for_any_number_of_threads_and_run(rule):
    kernel = compiled()
    for shape in ((33, 3, 32, 32), (1, 100_003)):
        step = random_step(rule, shape, torch.float32, per_sample=True, seeds=torch.arange(shape[0]), final=True)
        results = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            moved = kernel.step(step)
            results.append((*moved, kernel.cost(step, moved.x_adv)))
        assert equal(results[0], results[1])
        assert equal(results[0], results[2])


@pytest.mark.parametrize("start", ["linf", "l2", "l1", "gaussian"])
def test_starts_have_the_same_bits_for_any_number_of_threads(start):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(compiled().init(torch.zeros(33, 3, 32, 32), torch.arange(33), start, 1.0).x_adv)
    assert torch.equal(*results)


@pytest.mark.parametrize("rule", [RULES[i] for i in (0, 1, 3, 6, -3, -1)], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(rule, full):
    # everything optional and channels_last, or the plainest call and layouts that differ
    layouts = {"x": "channels_last", "x_adv": "channels_last", "grad": "channels_last" if full else "sliced"}
    step = random_step(rule, (3, 3, 4, 5), torch.bfloat16 if full else torch.float32, per_sample=full)
    step = replace(step, **{name: laid_out(getattr(step, name), layout) for name, layout in layouts.items()})
    if full:
        step = replace(
            step,
            active=torch.tensor([True, False, True]),
            seeds=PLAIN_SEEDS[:3],
            mean=torch.tensor(MEAN),
            std=torch.tensor(STD),
            final=True,
            feed_dtype=torch.float16,
        )
    torch.library.opcheck(torch.ops.armor.transport_step.default, step.raw())
    torch.library.opcheck(torch.ops.armor.transport_cost.default, step.cost(step.x_adv))
    if rule.kind in STARTS:
        numbers = (STARTS[rule.kind], 0.1, 0.0, 1.0, step.feed_dtype)
        arguments = (step.x, PLAIN_SEEDS[:3], step.radii, step.mean, step.std, *numbers)
        torch.library.opcheck(torch.ops.armor.transport_init.default, arguments)


PUBLIC = [
    Linf(0.1),
    L2(0.7),
    L1(3.0, top=0.1),
    NormPower(0.5, p=inf, power=1.5, step="normalised"),
    SoftBall(0.05, tau=0.1, order="before"),
    Binary(),
]


@pytest.mark.parametrize("cost", PUBLIC, ids=lambda cost: type(cost).__name__)
def test_compiled_step_and_cost(cost):
    torch._dynamo.reset()

    def last_step(x_adv, grad, x):
        moved = transport_step(x_adv, grad, x, cost, step_size=0.1, final=True, feed_dtype=torch.float64)
        return moved.x_adv, moved.status, moved.feed, transport_cost(moved.x_adv, x, cost)

    graph = torch.compile(last_step, fullgraph=True, backend="aot_eager")
    x_adv, grad, x = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5).round()
    assert equal(graph(x_adv, grad, x), last_step(x_adv, grad, x))


def test_one_dynamic_graph_serves_every_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x_adv, grad, x):
        return transport_step(x_adv, grad, x, Linf(0.1), step_size=0.1).x_adv

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in ((2, 3, 4, 5), (7, 3, 8, 9), (16, 3, 6, 4)):
        x_adv, grad, x = torch.rand(shape), torch.randn(shape), torch.rand(shape)
        assert torch.equal(graph(x_adv, grad, x), step(x_adv, grad, x))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiled_gradient_of_the_cost():
    torch._dynamo.reset()
    graph = torch.compile(transport_cost, fullgraph=True, backend="aot_eager")
    step = random_step(Rule("linf"), (3, 3, 4, 5), torch.float32)
    for cost in (NormPower(0.5), SoftBall(0.05, tau=0.1)):
        leaves = [step.x_adv.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((graph, transport_cost), leaves, strict=True):
            function(leaf, step.x, cost).sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


# ----------------------------------------------------------------------------------------------------
# the public functions: what they pass on, and what they refuse


@rules
@wide_dtypes
def test_public_step_is_the_raw_one(rule, dtype):
    step = random_step(rule, (3, 3, 4, 5), dtype, seed=8, per_sample=True, seeds=PLAIN_SEEDS[:3])
    changes = {"active": torch.tensor([True, True, False]), "final": True, "targeted": True, "lo": -0.5, "hi": 1.5}
    if rule.kind == "binary":
        changes["lo"], changes["hi"] = 0.0, 1.0
    step = replace(step, **changes)
    raw = compiled().step(step)
    cost = step.rule.public(step.radii.double())
    moved = transport_step(
        step.x_adv,
        step.grad,
        step.x,
        cost,
        step_size=step.rule.step,
        mu=None if step.mu is None else step.mu.double().requires_grad_(),
        box=(step.lo, step.hi),
        targeted=True,
        active=step.active,
        final=True,
        seeds=step.seeds,
    )
    assert torch.equal(moved.x_adv, raw.x_adv)
    assert torch.equal(moved.status, raw.status)
    assert moved.feed is None
    assert torch.equal(moved.costs, raw.costs) if rule.is_cost else moved.costs is None
    costs = transport_cost(moved.x_adv, step.x, cost, box=(step.lo, step.hi))
    assert torch.equal(costs, compiled().cost(step, raw.x_adv))
    plain = replace(step, radii=None, mu=None, active=None, final=False, targeted=False, seeds=None)
    moved = transport_step(
        step.x_adv, step.grad, step.x, step.rule.public(), step_size=step.rule.step, box=(step.lo, step.hi)
    )
    assert torch.equal(moved.x_adv, compiled().step(plain).x_adv)
    assert moved.costs is None


def test_prices_as_numbers_and_tensors():
    step = random_step(Rule("soft_ball", radius=0.04, weight=0.1), (3, 5), torch.float32)
    call = {"step_size": step.rule.step}
    arguments = (step.x_adv, step.grad, step.x, step.rule.public())
    once = transport_step(*arguments, mu=0.5, **call).x_adv
    for mu in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.full((3,), 0.5), np.float64(0.5)):
        assert torch.equal(transport_step(*arguments, mu=mu, **call).x_adv, once)
    free, dear = (transport_step(*arguments, mu=mu, **call).x_adv for mu in (0, inf))
    ascended = (step.x_adv + step.rule.step * step.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(free, ascended, rtol=0, atol=2e-7)
    assert not torch.equal(free, once)
    assert torch.equal(dear, transport_step(*arguments, mu=torch.tensor(inf), **call).x_adv)


X = torch.full((2, 3, 4, 4), 0.5)


def call(name, **changes):
    """One of the public functions on good arguments but for the changes."""
    given = {"x": X, "cost": Linf(0.1), **changes}
    x, cost = given.pop("x"), given.pop("cost")
    if name == "init":
        return transport_init(x, cost, **given)
    x_adv = given.pop("x_adv", x)
    if name == "cost":
        return transport_cost(x_adv, x, cost, **given)
    grad, step_size = given.pop("grad", x), given.pop("step_size", 0.1)
    return transport_step(x_adv, grad, x, cost, step_size=step_size, **given)


EVERY = ("init", "step", "cost")
MISTAKES = [
    # what, in which functions, the error, and what its message says: the argument and the value
    (EVERY, {"x": [[0.5]]}, TypeError, r"x must be a tensor, got list"),
    (EVERY, {"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"x must be .*int64"),
    (EVERY, {"x": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, r"x must be .*complex64"),
    (EVERY, {"x": torch.ones(2, 3).to(torch.float8_e4m3fn)}, TypeError, r"x must be .*float8_e4m3fn"),
    (EVERY, {"x": torch.tensor(0.5)}, ValueError, r"x must have a batch dimension"),
    (EVERY, {"cost": "linf"}, TypeError, r"cost must be .*'linf'"),
    (EVERY, {"cost": Linf}, TypeError, r"cost must be .*Linf"),
    (EVERY, {"cost": L2(torch.ones(3))}, ValueError, r"radius must be .*\(2,\).*\(3,\)"),
    (EVERY, {"box": (1.0, 0.0)}, ValueError, r"box must .*\(1.0, 0.0\)"),
    (EVERY, {"box": (0.5, 0.5)}, ValueError, r"box must .*\(0.5, 0.5\)"),
    (EVERY, {"box": (0.0, nan)}, ValueError, r"box must .*nan"),
    (EVERY, {"box": 1.0}, TypeError, r"box must .*1.0"),
    (EVERY, {"box": (0.0, 0.5, 1.0)}, TypeError, r"box must .*0.5, 1.0"),
    (EVERY, {"box": ("0", 1.0)}, TypeError, r"box must .*'0'"),
    (("init", "step"), {"x": X + 1}, ValueError, r"x must lie in box=\(0, 1\), got values .*1.5"),
    (("init", "step"), {"x": X - 1}, ValueError, r"x must lie in box=\(0, 1\), got values from -0.5"),
    (("init", "step"), {"x": torch.full((2, 3), nan)}, ValueError, r"x must lie in box=\(0, 1\), got .*nan"),
    (("init", "step"), {"x": X, "box": (0.0, 0.25)}, ValueError, r"x must lie in box=\(0, 0.25\), got .*0.5"),
    (("init",), {"x": X, "cost": Binary(), "start": "clean"}, ValueError, r"x must be 0 or 1 .*0.5"),
    (EVERY, {"x": X.round(), "cost": Binary(), "box": (0.0, 2.0)}, ValueError, r"box must be \(0, 1\) for Binary.*2.0"),
    # starts
    (("init",), {"start": "random"}, ValueError, r"start must be .*'random'"),
    (("init",), {"cost": NormPower(1.0)}, ValueError, r"start must be .*NormPower.*'uniform'"),
    (("init",), {"cost": Binary(), "x": X.round()}, ValueError, r"start must be .*Binary.*'uniform'"),
    (("init",), {"start": "gaussian", "sigma": 0.0}, ValueError, r"sigma must be .*0.0"),
    (("init",), {"start": "gaussian", "sigma": inf}, ValueError, r"sigma must be .*inf"),
    (("init",), {"start": "gaussian", "sigma": "1"}, TypeError, r"sigma must be .*'1'"),
    (("init",), {"generator": 5}, TypeError, r"generator must be .*5"),
    (("init", "step"), {"seeds": torch.zeros(2)}, TypeError, r"seeds must be .*float32"),
    (("init", "step"), {"seeds": torch.zeros(2, dtype=torch.int32)}, TypeError, r"seeds must be .*int32"),
    (("init", "step"), {"seeds": [0, 1]}, TypeError, r"seeds must be .*list"),
    (("init", "step"), {"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds must .*\(2,\).*\(3,\)"),
    (("init", "step"), {"seeds": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, r"seeds must .*meta"),
    # feeds
    (("init", "step"), {"normalize": 0.5}, TypeError, r"normalize must be .*0.5"),
    (("init", "step"), {"normalize": (MEAN,)}, TypeError, r"normalize must be .*0.4914"),
    (("init", "step"), {"normalize": (MEAN[:2], STD)}, ValueError, r"normalize.*mean must .*\(3,\), got \(2,\)"),
    (("init", "step"), {"normalize": (MEAN, STD + STD)}, ValueError, r"normalize.*std must .*\(3,\), got \(6,\)"),
    (("init", "step"), {"normalize": (MEAN, [1.0, 0.0, 1.0])}, ValueError, r"normalize.*std must be .*got .*0"),
    (
        ("init", "step"),
        {"normalize": (MEAN, torch.tensor([1.0, -1.0, 1.0]))},
        ValueError,
        r"normalize.*std must be .*-1",
    ),
    (("init", "step"), {"normalize": (MEAN, [1.0, nan, 1.0])}, ValueError, r"normalize.*std must be .*nan"),
    (
        ("init", "step"),
        {"x": X[:, 0, 0, 0], "normalize": (MEAN, STD)},
        ValueError,
        r"normalize needs a channel.*\(2,\)",
    ),
    (("init", "step"), {"feed_dtype": torch.int32}, TypeError, r"feed_dtype must be .*int32"),
    (("init", "step"), {"feed_dtype": "float16"}, TypeError, r"feed_dtype must be .*'float16'"),
    # steps
    (("step",), {"grad": None}, TypeError, r"grad must be a tensor, got NoneType"),
    (("step",), {"grad": X.long()}, TypeError, r"grad must be .*int64"),
    (("step",), {"grad": X[:1]}, ValueError, r"grad must have the shape of x \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    (("step",), {"grad": X.to("meta")}, ValueError, r"grad must be on the device of x \(cpu\), got meta"),
    (("step", "cost"), {"x_adv": 0.5}, TypeError, r"x_adv must be a tensor, got float"),
    (("step", "cost"), {"x_adv": X[0]}, ValueError, r"x_adv must have the shape of x .*\(3, 4, 4\)"),
    (("step", "cost"), {"x_adv": X.to("meta")}, ValueError, r"x_adv must be on the device of x \(cpu\), got meta"),
    (("step", "cost"), {"x_adv": X.double()}, TypeError, r"x_adv must have the dtype of x .*float64"),
    (("step",), {"step_size": 0.0}, ValueError, r"step_size must be .*0.0"),
    (("step",), {"step_size": -0.1}, ValueError, r"step_size must be .*-0.1"),
    (("step",), {"step_size": nan}, ValueError, r"step_size must be .*nan"),
    (("step",), {"step_size": torch.tensor(0.1)}, TypeError, r"step_size must be .*tensor"),
    (("step",), {"mu": 1.0}, ValueError, r"mu must be None for Linf.*1.0"),
    (("step",), {"mu": -1.0, "cost": NormPower(1.0)}, ValueError, r"mu must be .*-1.0"),
    (("step",), {"mu": nan, "cost": NormPower(1.0)}, ValueError, r"mu must be .*nan"),
    (("step",), {"mu": "1", "cost": NormPower(1.0)}, TypeError, r"mu must be .*'1'"),
    (("step",), {"mu": torch.ones(3), "cost": NormPower(1.0)}, ValueError, r"mu must be .*\(2,\), got \(3,\)"),
    (("step",), {"active": torch.ones(2)}, TypeError, r"active must be .*bool.*float32"),
    (("step",), {"active": torch.ones(3, dtype=torch.bool)}, ValueError, r"active must .*\(2,\).*\(3,\)"),
    (("step",), {"active": torch.ones(2, dtype=torch.bool, device="meta")}, ValueError, r"active must .*meta"),
    (("step",), {"active": [True, False]}, TypeError, r"active must be .*list"),
]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [(name, *mistake) for names, *mistake in MISTAKES for name in names],
)
def test_mistakes(name, changes, error, message):
    if name == "step":
        changes = {key: value for key, value in changes.items() if key != "start"}
    with pytest.raises(error, match=message):
        call(name, **changes)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linf(0.0), ValueError, r"radius must be .*0.0"),
        (lambda: L2(-1.0), ValueError, r"radius must be .*-1.0"),
        (lambda: L1(nan), ValueError, r"radius must be .*nan"),
        (lambda: SoftBall(0, tau=1.0), ValueError, r"radius must be .*0"),
        (lambda: Linf("8/255"), TypeError, r"radius must be .*'8/255'"),
        (lambda: Linf(torch.ones(2, 2)), ValueError, r"radius must be .*\(2, 2\)"),
        (lambda: Linf(torch.ones(2, dtype=torch.int64)), (TypeError, ValueError), r"radius must be .*int64"),
        (lambda: Linf(torch.tensor([0.1, 0.0])), ValueError, r"radius must be .*0"),
        (lambda: L1(1.0, top=-0.1), ValueError, r"top must be .*-0.1"),
        (lambda: L1(1.0, top=1.1), ValueError, r"top must be .*1.1"),
        (lambda: L1(1.0, top="all"), TypeError, r"top must be .*'all'"),
        (lambda: NormPower(0.0), ValueError, r"weight must be .*0.0"),
        (lambda: NormPower(1.0, p=3), ValueError, r"p must be .*3"),
        (lambda: NormPower(1.0, p="inf"), ValueError, r"p must be .*'inf'"),
        (lambda: NormPower(1.0, power=0.5), ValueError, r"power must be .*0.5"),
        (lambda: NormPower(1.0, power=inf), ValueError, r"power must be .*inf"),
        (lambda: NormPower(1.0, step="l2"), ValueError, r"step must be .*'l2'"),
        (lambda: SoftBall(0.1, tau=0.0), ValueError, r"tau must be .*0.0"),
        (lambda: SoftBall(0.1, tau=1.0, order="both"), ValueError, r"order must be .*'both'"),
    ],
)
def test_mistakes_in_a_cost(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""The Triton twin of armor::transport_*, run by Triton's interpreter on CPU tensors, against the float64 reference and
the compiled kernel. `make test` starts this file in a process of its own, because the interpreter must be chosen before
Triton is imported; tests/test_triton_compiles.py compiles the same kernels for real architectures.
"""

import math

import numpy as np
import pytest
import torch
import transport_cases as cases
from transport_cases import DTYPES, RULES, STARTS, Moved, Rule, Start, laid_out, random_step, real

from armor import library, reference

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from triton.runtime import interpreter  # noqa: E402

from armor_kernels import transport as kernels  # noqa: E402

inf, nan = math.inf, math.nan
FLOAT32, FLOAT64 = torch.float32, torch.float64
SEEDS = torch.tensor([1, -7, 2**40 + 5])
# One rule for every branch of the kernels.
BRANCHES = [RULES[i] for i in (0, 1, 4, 5, 9, 14, 15, 16, 17, 18)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where both sides of a where() are computed
rules = pytest.mark.parametrize("rule", RULES, ids=str)
branches = pytest.mark.parametrize("rule", BRANCHES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
real_dtypes = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)


@pytest.fixture(autouse=True)
def rounded_bfloat16(monkeypatch):
    """The interpreter cuts float32 off where devices round to the nearest bfloat16."""
    plain = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (triton.language.float32, triton.language.bfloat16):
            return plain(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", cast)


@pytest.fixture
def blockwise(monkeypatch):
    """No sample is held in registers: all are read in blocks of 64, the last of which is not full."""
    monkeypatch.setattr(kernels, "HELD", 0)
    monkeypatch.setattr(kernels, "BLOCK", 64)


@pytest.fixture(params=["held", "blockwise"])
def residence(request):
    if request.param == "blockwise":
        request.getfixturevalue("blockwise")


def move(step) -> Moved:
    return Moved(*kernels.transport_step(*step.raw()))


def start_of(module, x, seeds, start, radius, *, radii=None, mean=None, std=None, lo=0.0, hi=1.0, feed_dtype=None):
    return Start(*module.transport_init(x, seeds, radii, mean, std, STARTS[start], radius, lo, hi, feed_dtype))


def compiled():
    if library.backends()["transport_step"][0]["cpu"] != "cpp":
        pytest.skip("the C++ kernels are not built")
    return torch.ops.armor


def same_layout(tensor, x):
    return tensor.stride() == x.stride() and tensor.shape == x.shape


def assert_matches(step):
    """x_next, status, costs and feed against the reference, which takes x_next as it was rounded to its dtype."""
    moved = move(step)
    cases.assert_accurate(step, moved.x_adv)
    expected = Moved(*reference.transport_step(*step.raw()))
    assert moved.status.dtype == torch.int32
    assert moved.status.tolist() == expected.status.tolist()
    if not (step.final and step.rule.is_cost):
        assert moved.costs.shape == (0,)
    else:
        rounding = 1e-6 if real(step.x.dtype) == FLOAT32 else 1e-14
        costs = reference.transport_cost(*step.cost(moved.x_adv))
        torch.testing.assert_close(moved.costs, costs, rtol=rounding, atol=rounding * 1e-3)
    assert moved.feed.dtype == expected.feed.dtype
    if expected.feed.numel():
        fed = moved.x_adv.double()
        if step.mean is not None:
            shape = (-1, *(1,) * (step.x.dim() - 2))
            fed = (fed - step.mean.double().view(shape)) / step.std.double().view(shape)
        eps = max(torch.finfo(real(step.x.dtype)).eps, torch.finfo(moved.feed.dtype).eps)
        torch.testing.assert_close(moved.feed.double(), fed, rtol=eps, atol=2 * torch.finfo(real(step.x.dtype)).eps)
    return moved


# One more than a warp, and an image.
@rules
@dtypes
@pytest.mark.parametrize("shape", [(1, 33), (1, 3, 8, 8)], ids=str)
def test_step(rule, dtype, shape):
    assert_matches(random_step(rule, shape, dtype, final=True))


@branches
@pytest.mark.parametrize("n", [1, 5])
def test_step_of_few_elements(rule, n):
    assert_matches(random_step(rule, (3, n), FLOAT32, per_sample=True, final=True))


@rules
@real_dtypes
def test_step_of_a_sample_in_several_blocks(blockwise, rule, dtype):
    assert_matches(random_step(rule, (1, 2, 3, 5, 5), dtype, per_sample=True, final=True))


# Half of the tensors of an automatic mixed-precision loop: x in float32, the model and so the gradient in less.
@branches
def test_step_with_everything(residence, rule):
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    more = {"mean": mean, "std": std, "targeted": True, "final": True, "feed_dtype": torch.bfloat16, "seeds": SEEDS}
    active = torch.tensor([True, False, True])
    step = random_step(rule, (3, 3, 4, 5), FLOAT32, grad_dtype=torch.float16, per_sample=True, active=active, **more)
    moved = assert_matches(step)
    if rule.kind != "binary":
        assert torch.equal(moved.x_adv[1], step.x_adv[1])


@pytest.mark.parametrize("rule", [Rule("linf"), Rule("l1", weight=0.3), RULES[-1]], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (3, 2, 3, 2, 5)], ids=str)
def test_layouts(residence, rule, shape):
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.rand(shape[1], generator=generator) + 0.2 for _ in range(2))
    step = random_step(rule, shape, FLOAT32, mean=mean, std=std, seeds=SEEDS, final=True)
    plain = move(step)
    given = {name: getattr(step, name) for name in ("x_adv", "grad", "x")}
    last = {name: laid_out(t, "channels_last") for name, t in given.items()}
    mixed = last | {"grad": laid_out(step.grad, "sliced")}
    for tensors, layout in ((last, "channels_last"), (mixed, "contiguous")):
        moved = move(type(step)(**{**vars(step), **tensors}))
        assert same_layout(moved.x_adv, laid_out(step.x, layout))
        assert same_layout(moved.feed, laid_out(step.x, layout))
        torch.testing.assert_close(moved.x_adv, plain.x_adv, rtol=0, atol=3e-7 if rule.kind == "l1" else 0)
        assert torch.equal(moved.status, plain.status)


@branches
def test_bad_gradients_do_not_move(residence, rule):
    step = random_step(rule, (4, 150), FLOAT32, active=torch.tensor([True, True, False, True]), final=True)
    step.grad[0, 140], step.grad[2, 3], step.grad[3, 3] = nan, inf, -inf
    moved = assert_matches(step)
    assert moved.status.tolist() == [1, 0, 0, 1]
    if rule.kind != "binary":
        assert torch.equal(moved.x_adv[[0, 2, 3]], step.x_adv[[0, 2, 3]])
        assert not torch.equal(moved.x_adv[1], step.x_adv[1])


@pytest.mark.parametrize("rule", RULES[-4:], ids=str)
@pytest.mark.parametrize("mu", [0.0, 0.7, 1e30, inf])
def test_price_for_all_samples(rule, mu):
    assert_matches(random_step(rule, (2, 40), FLOAT32, mu=torch.tensor(mu), final=True))


def test_price_that_is_nan(residence):
    mu = torch.tensor([nan, 1.0, nan])
    step = random_step(RULES[-2], (3, 70), FLOAT32, mu=mu, active=torch.tensor([True, True, False]))
    moved = move(step)
    assert moved.status.tolist() == [1, 0, 0]
    assert torch.equal(moved.x_adv[0], step.x_adv[0])


@pytest.mark.parametrize("odd", [-0.01, 1.01, nan, inf])
def test_samples_outside_the_box_are_flagged(residence, odd):
    step = random_step(Rule("linf"), (3, 70), FLOAT32, active=torch.tensor([True, True, False]))
    step.x[1, 69] = step.x[2, 0] = odd
    moved = move(step)
    assert moved.status.tolist() == [0, 2, 2]
    assert start_of(kernels, step.x, SEEDS, "linf", 0.1).status.tolist() == [0, 2, 2]
    assert torch.equal(moved.x_adv, cases.naive_step(step).where(step.active[:, None], step.x_adv)) or math.isnan(odd)
    assert moved.x_adv[1, 69].isnan().item() == math.isnan(odd)


# Torch in the same dtype is the definition of the signed steps, to the last bit.
@real_dtypes
@pytest.mark.parametrize("rule", [Rule("linf", radius=8 / 255, step=2 / 255), Rule("binary", step=0.3)], ids=str)
def test_signed_steps_bit_for_bit(residence, rule, dtype):
    step = random_step(rule, (3, 150), dtype)
    assert torch.equal(move(step).x_adv, cases.naive_step(step))


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("rule", [Rule("l2"), Rule("norm_power", variant=1)], ids=str)
def test_gradients_of_any_size(residence, rule, scale):
    step = random_step(rule, (2, 150), FLOAT32, mu=torch.tensor(0.0) if rule.is_cost else None)
    step.grad.mul_(scale)
    # torch's own norm underflows here
    torch.testing.assert_close(move(step).x_adv.double(), cases.truth(step).x_adv, rtol=0, atol=5e-7)


@branches
def test_gradient_zero(residence, rule):
    step = random_step(rule, (2, 150), FLOAT32)
    step.grad.zero_()
    step.x_adv[0] = step.x[0]
    moved = assert_matches(step)
    assert torch.equal(moved.x_adv[0], step.x[0])


# Ties, of which all move; entries that cannot move; a share of everything; and a projection to the clean sample.
def test_l1_by_hand(residence):
    x = torch.full((1, 100), 0.5)
    x_adv, grad = x.clone(), torch.zeros(1, 100)
    grad[0, :4] = torch.tensor([2.0, -2.0, 2.0, 1.0])
    x_adv[0, 2] = 1.0
    arguments = (x_adv, grad, x, *(None,) * 6, 2)
    rest = (1.0, 0, 0, 0.0, 1.0, False, False, None)
    moved = kernels.transport_step(*arguments, 10.0, 0.2, 0.01, *rest)[0]
    expected = x.clone()
    expected[0, :3] = torch.tensor([0.6, 0.4, 1.0])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)
    # |d| = .1, .1, .5 on the ball of radius .4: theta = .1
    moved = kernels.transport_step(*arguments, 0.4, 0.2, 0.01, *rest)[0]
    expected[0, :3] = torch.tensor([0.5, 0.5, 0.9])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    # all four that are not zero, but one is at its bound: three shares
    moved = kernels.transport_step(*arguments, 10.0, 0.3, 1.0, *rest)[0]
    expected[0, :4] = torch.tensor([0.6, 0.4, 1.0, 0.6])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)
    assert torch.equal(kernels.transport_step(*arguments, 0.0, 0.3, 1.0, *rest)[0], x)


@pytest.mark.parametrize(("magnitude", "dtype"), [(1e-3, FLOAT32), (1.0, FLOAT64), (1e3, FLOAT32)], ids=str)
def test_l1_projection_meets_the_radius(residence, magnitude, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(4, 150, dtype=dtype)
    x_adv = magnitude * torch.randn(4, 150, generator=generator, dtype=dtype).exp()
    radii = x_adv.sum(1) * torch.tensor([0.5, 0.1, 0.01, 0.999], dtype=dtype)
    arguments = (x_adv, torch.zeros_like(x), x, None, radii, None, None, None, None, 2, 0.0, 0.1, 0.01, 1.0, 0, 0)
    for hi in (inf, 2 * magnitude):  # the cap makes the norm a function of theta that is neither convex nor concave
        moved = kernels.transport_step(*arguments, 0.0, hi, False, False, None)[0]
        norms, radius = moved.double().sum(1), radii.double().minimum(x_adv.clamp(max=hi).double().sum(1))
        torch.testing.assert_close(norms, radius, rtol=2e-6 if dtype == FLOAT32 else 1e-13, atol=0)


# 0 to 3 elements in the last call of Philox, and both halves of a pair of normal numbers.
@dtypes
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", [(3, 1), (3, 33), (3, 6, 5, 5)], ids=str)
def test_starts(start, shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64).to(dtype)
    given = {"radii": torch.tensor([0.3, 0.1, 2.0], dtype=real(dtype)), "lo": -5.0, "hi": 5.0}
    ours = start_of(kernels, x, SEEDS, start, 0.0, **given)
    exact = start_of(reference, x.double(), SEEDS, start, 0.0, **given | {"radii": given["radii"].double()})
    error = (ours.x_adv.double() - exact.x_adv).abs()
    rounding = 0.0 if dtype == FLOAT64 else 0.5 * torch.finfo(dtype).eps * exact.x_adv.abs()
    assert (error <= rounding + 2e-6 * (exact.x_adv - x.double()).abs() + 2e-7).all()
    assert ours.status.tolist() == [0, 0, 0]
    assert ours.feed.shape == (0,)


@real_dtypes
@pytest.mark.parametrize("n", [4, 150])
def test_uniform_noise_bit_for_bit(residence, n, dtype):
    x = torch.rand(3, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    u = torch.tensor(np.stack([cases.uniforms(seed, n, cases.NOISE) for seed in SEEDS.tolist()])).to(dtype)
    x_adv = start_of(kernels, x, SEEDS, "linf", 8 / 255).x_adv
    assert torch.equal(x_adv, (x + (2 * u - 1) * (8 / 255)).clamp(0, 1))


@pytest.mark.parametrize("start", STARTS)
def test_starts_of_a_sample_in_several_blocks(blockwise, start):
    x = torch.rand(3, 2, 5, 15, generator=torch.Generator().manual_seed(0))
    for layout in ("contiguous", "channels_last"):
        ours = start_of(kernels, laid_out(x, layout), SEEDS, start, 0.5)
        torch.testing.assert_close(ours.x_adv, start_of(reference, x, SEEDS, start, 0.5).x_adv, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_starts_depend_on_seed_and_place_alone(start):
    x = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    plain = start_of(kernels, x, SEEDS, start, 0.1).x_adv
    last = start_of(kernels, laid_out(x, "channels_last"), SEEDS, start, 0.1).x_adv
    assert same_layout(last, laid_out(x, "channels_last"))
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-7)  # the sums are in another order
    reversed_ = start_of(kernels, laid_out(x.flip(0), "sliced"), SEEDS.flip(0), start, 0.1).x_adv
    assert torch.equal(reversed_, plain.flip(0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_feed_of_a_clean_start(layout):
    x = laid_out(torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), layout)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    ours = start_of(kernels, x, None, "clean", 0.0, mean=mean, std=std, feed_dtype=torch.float16)
    expected = ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).half()
    assert torch.equal(ours.x_adv, x)
    assert ours.feed.stride() == x.stride()
    torch.testing.assert_close(ours.feed, expected, rtol=2e-3, atol=1e-6)
    # without normalisation the cast alone
    cast = start_of(kernels, x, None, "clean", 0.0, feed_dtype=torch.float16).feed
    assert torch.equal(cast, x.half())


@pytest.mark.parametrize("seeds", [SEEDS, None], ids=["random", "threshold"])
def test_binary_rounding(residence, seeds):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(3, 150, generator=generator) < 0.3).float()
    x_adv, grad = torch.rand(3, 150, generator=generator).maximum(x), torch.randn(3, 150, generator=generator)
    step = cases.Step(Rule("binary", step=0.25), x_adv, grad, x, seeds=seeds, final=True)
    relaxed = (x_adv + 0.25 * grad.sign()).clamp(0, 1)
    if seeds is None:
        u = torch.full_like(x, 0.5)
    else:
        u = torch.tensor(np.stack([cases.uniforms(seed, 150, cases.ROUNDING) for seed in seeds.tolist()])).float()
    assert torch.equal(move(step).x_adv, x.maximum((relaxed > u).float()))


@rules
@dtypes
def test_costs(rule, dtype):
    step = random_step(rule, (1, 40), dtype, per_sample=True)
    for x_adv in (step.x, step.x_adv, (step.x + 0.5 * (step.x_adv - step.x)).to(dtype)):
        ours, expected = (m.transport_cost(*step.cost(x_adv)) for m in (kernels, reference))
        assert ours.dtype == real(dtype)
        rounding = 1e-6 if ours.dtype == FLOAT32 else 1e-14
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=1e-3 * rounding)


@branches
def test_costs_of_a_sample_in_several_blocks(blockwise, rule):
    step = random_step(rule, (3, 150), FLOAT32, per_sample=True)
    moved = move(step).x_adv
    for x_adv in (moved, step.x_adv):
        ours, expected = (m.transport_cost(*step.cost(x_adv)) for m in (kernels, reference))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    if rule.is_set:
        assert kernels.transport_cost(*step.cost(moved)).tolist() == [0.0, 0.0, 0.0]


@branches
def test_costs_of_odd_samples(residence, rule):
    x = torch.zeros(4, 70)
    x_adv = x.clone()
    x_adv[0, 69], x_adv[1, 3], x_adv[2, 69] = nan, 1.01, -0.5
    ours = kernels.transport_cost(*cases.Step(rule.on(70), x_adv, x, x).cost(x_adv))
    assert ours[0].isnan()
    assert ours[3] == 0
    if rule.is_cost:
        assert ours[1:3].isfinite().all()
    else:
        assert ours[1:3].tolist() == [inf, inf]


def test_empty():
    for shape in [(0, 3, 4, 4), (2, 0)]:
        x, seeds = torch.zeros(shape), SEEDS[: shape[0]]
        ours = start_of(kernels, x, seeds, "l2", 0.1, feed_dtype=torch.float16)
        assert (ours.x_adv.shape, ours.feed.shape, ours.feed.dtype) == (shape, shape, torch.float16)
        assert ours.status.tolist() == [0] * shape[0]
        for rule in RULES:
            step = random_step(rule, (2, 1), FLOAT32, final=True)
            moved = move(type(step)(**{**vars(step), "x_adv": x, "grad": x, "x": x}))
            assert moved.x_adv.shape == shape
            assert moved.costs.tolist() == ([0.0] * shape[0] if rule.is_cost else [])
            assert kernels.transport_cost(*step.cost(x)[:1], x, *step.cost(x)[2:]).tolist() == [0.0] * shape[0]


# ---- the compiled kernel --------------------------------------------------------------------------------------------


@rules
@real_dtypes
@pytest.mark.parametrize("shape", [(3, 33), (3, 3, 8, 8)], ids=str)
def test_step_agrees_with_the_compiled_kernel(rule, dtype, shape):
    step = random_step(rule, shape, dtype, per_sample=True, seeds=SEEDS, final=True, feed_dtype=torch.float16)
    ours, theirs = move(step), Moved(*compiled().transport_step(*step.raw()))
    tolerance = 1e-6 if dtype == FLOAT32 else 1e-13
    exact = rule.kind in ("linf", "binary")
    torch.testing.assert_close(ours.x_adv, theirs.x_adv, rtol=0, atol=0 if exact else tolerance)
    assert torch.equal(ours.status, theirs.status)
    torch.testing.assert_close(ours.costs, theirs.costs, rtol=tolerance, atol=tolerance * 1e-3)
    torch.testing.assert_close(ours.feed, theirs.feed, rtol=1e-3, atol=tolerance)


@real_dtypes
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_starts_agree_with_the_compiled_kernel(start, dtype, layout):
    x = laid_out(torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    ours, theirs = (start_of(m, x, SEEDS, start, 0.3, lo=-2.0, hi=2.0) for m in (kernels, compiled()))
    assert same_layout(ours.x_adv, theirs.x_adv)
    tolerance = 0.0 if start in ("linf", "clean") else 1e-6
    torch.testing.assert_close(ours.x_adv, theirs.x_adv, rtol=tolerance, atol=tolerance * 0.1)


@branches
def test_costs_agree_with_the_compiled_kernel(rule):
    step = random_step(rule, (3, 150), FLOAT32, per_sample=True)
    for x_adv in (step.x_adv, move(step).x_adv):
        ours, theirs = (m.transport_cost(*step.cost(x_adv)) for m in (kernels, compiled()))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)

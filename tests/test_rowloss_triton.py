"""The Triton twin of armor::rowloss, run by Triton's interpreter on CPU tensors: values and gradients against the
float64 oracle, edges, and the compiled kernel. `make test` starts this file in a process of its own, because the
interpreter must be chosen before Triton is imported; tests/test_triton_compiles.py compiles the same kernels.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from armor import reference

knobs = pytest.importorskip("triton").knobs
if not knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from armor_kernels import rowloss as kernels  # noqa: E402

# numpy's, where both sides of a where() are computed
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

inf, nan = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CODES = {"ce": 0, "trades": 1, "mart": 2, "kl": 3}
BETA = 2.5
kinds = pytest.mark.parametrize("kind", CODES)
reals = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Row(NamedTuple):
    losses: Tensor
    stats: Tensor
    to_logits: Tensor
    to_natural: Tensor


def run(backend, kind, logits, target, natural=None, grad=None, *, smoothing=0.0, ignore_index=-100):
    """The two operators of a backend, one after the other; the upstream gradient is one where none is given."""
    numbers = (CODES[kind], BETA, smoothing, ignore_index)
    losses, stats = backend.rowloss(logits, target, natural, *numbers)
    grad = torch.ones_like(losses) if grad is None else grad.to(losses.dtype)
    return Row(
        losses,
        stats,
        *backend.rowloss_backward(grad, None, logits, target, natural, stats, *numbers, natural is not None),
    )


def draw(kind, shape, dtype=torch.float32, *, seed=0, scale=3.0):
    """Logits, target and, where the loss has them, natural logits."""
    generator = torch.Generator().manual_seed(seed)
    logits, natural = (
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, target, None if kind == "ce" else natural


def doubled(logits, target, natural):
    return logits.double(), target, None if natural is None else natural.double()


def assert_near(ours, exact, slack):
    """Within `slack` of the exact entry and of the largest one, and one unit of the dtype that was stored."""
    unit = torch.finfo(ours.dtype).eps if ours.dtype in DTYPES[:2] else 0.0  # the interpreter truncates
    largest = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact, rtol=unit + slack, atol=slack * max(largest, 1.0))


class TestRowloss:
    # The fewest classes, an odd number, digits, one more than a warp, ImageNet, and rows of several blocks.
    @pytest.mark.parametrize("classes", [2, 3, 10, 33, 1000, 5000])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @kinds
    def test_oracle(self, kind, dtype, classes):
        rows = draw(kind, (5, classes), dtype, seed=classes)
        grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
        ours = run(kernels, kind, *rows, grad, smoothing=0.1)
        exact = run(reference, kind, *doubled(*rows), grad, smoothing=0.1)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        assert [t.dtype for t in ours] == [real, real, dtype, dtype]
        for one, other in zip(ours, exact, strict=True):
            assert_near(one, other, 1e-13 if dtype == torch.float64 else 2e-6)
        assert (ours.to_logits[3] == 0).all()

    # 49 blocks of 2048
    @kinds
    def test_hundred_thousand_classes(self, kind):
        rows = draw(kind, (1, 100_000))
        ours, exact = run(kernels, kind, *rows), run(reference, kind, *doubled(*rows))
        for one, other in zip(ours, exact, strict=True):
            assert_near(one, other, 1e-6)

    # What torch's own expressions of the same formulas lose is the measure.
    @kinds
    @pytest.mark.parametrize("scale", [0.3, 8.0])
    @pytest.mark.parametrize("classes", [10, 1000])
    def test_no_further_from_the_truth_than_torch(self, kind, scale, classes):
        logits, target, natural = draw(kind, (32, classes), scale=scale, seed=1)
        exact = run(reference, kind, *doubled(logits, target, natural))
        ours = run(kernels, kind, logits, target, natural)
        z, w = logits.requires_grad_(), None if natural is None else natural.requires_grad_()
        losses = plain(kind, z, target, w)
        naive = (losses.detach(), *torch.autograd.grad(losses.sum(), [z] if w is None else [z, w]))
        for one, other, truth in zip((ours.losses, *ours[2:]), naive, (exact.losses, *exact[2:]), strict=False):
            error, allowed = ((t - truth).abs().max().item() for t in (one, other))
            assert error <= 2 * allowed + 1.2e-7 * truth.abs().max().item()

    @pytest.mark.parametrize("classes", [2, 10, 1000, 5000])
    @reals
    @kinds
    def test_agrees_with_the_compiled_kernel(self, kind, dtype, classes):
        rows = draw(kind, (4, classes), dtype, seed=2)
        ours, theirs = run(kernels, kind, *rows), run(torch.ops.armor, kind, *rows)
        for one, other in zip(ours, theirs, strict=True):
            assert_near(one, other.double(), 1e-13 if dtype == torch.float64 else 1e-6)

    def test_backward_reads_the_stats_of_the_compiled_kernel(self):
        for kind in CODES:
            logits, target, natural = draw(kind, (4, 33), torch.float64)
            numbers = (CODES[kind], BETA, 0.0, -100)
            _, stats = torch.ops.armor.rowloss(logits, target, natural, *numbers)
            grads = kernels.rowloss_backward(
                torch.ones(4).double(), None, logits, target, natural, stats, *numbers, natural is not None
            )
            for one, other in zip(grads, run(reference, kind, logits, target, natural)[2:], strict=True):
                assert_near(one, other, 1e-13)


class TestExtremes:
    # Adversarial mass on the wrong class and natural mass on the right one, as far apart as it gets.
    @pytest.mark.parametrize("gap", [110.0, 1e4, 1e30])
    @reals
    def test_gaps(self, dtype, gap):
        logits, natural = torch.tensor([[gap, 0.0]], dtype=dtype), torch.tensor([[0.0, gap]], dtype=dtype)
        target = torch.tensor([1])
        boost = -math.log(1e-4 + 1e-12) - BETA * 1e-7 * math.log(1e-12)
        for kind, loss, to_logits in (
            ("ce", gap, [1, -1]),
            ("trades", BETA * gap, [BETA, -BETA]),
            ("mart", gap + boost, [1, -1]),
            ("kl", gap, [1, -1]),
        ):
            row = run(kernels, kind, logits, target, None if kind == "ce" else natural)
            assert row.losses.item() == pytest.approx(loss, rel=1e-6)
            assert row.to_logits[0].tolist() == pytest.approx(to_logits, abs=1e-6)
            assert row.to_natural.flatten().tolist() == pytest.approx([0] * row.to_natural.numel(), abs=1e-6)

    @pytest.mark.parametrize("gap", [0.0, 20.0, 80.0])
    def test_confident_predictions_keep_their_digits(self, gap):
        row = run(kernels, "ce", torch.tensor([[gap, 0.0, 0.0]]), torch.tensor([0]))
        loss = math.log1p(2 * math.exp(-gap))
        assert row.losses.item() == pytest.approx(loss, rel=1e-5)
        assert row.to_logits[0].tolist() == pytest.approx([math.expm1(-loss), *[math.exp(-gap - loss)] * 2], rel=1e-5)

    def test_classes_without_mass(self):
        # in front, so that the first block of a long row may hold no mass at all
        for kind in CODES:
            logits, target, natural = draw(kind, (3, 40), torch.float64)
            bars = torch.full((3, 1100), -inf, dtype=torch.float64)
            longer = [None if t is None else torch.cat([bars, t, bars[:, :1500]], 1) for t in (logits, natural)]
            ours = run(kernels, kind, longer[0], target + 1100, longer[1])
            exact = run(reference, kind, logits, target, natural)
            assert_near(ours.losses, exact.losses, 1e-13)
            for one, other in zip(ours[2:], exact[2:], strict=True):
                assert_near(one[..., 1100:1140] if one.numel() else one, other, 1e-13)
                assert (one[..., :1100] == 0).all()
                assert (one[..., 1140:] == 0).all()

    @pytest.mark.parametrize("kind", ["trades", "kl"])
    def test_natural_mass_where_the_adversarial_has_none(self, kind):
        logits, natural = torch.tensor([[0.0, -inf, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        row = run(kernels, kind, logits, torch.tensor([0]), natural)
        expected = (torch.softmax(logits, 1) - torch.softmax(natural, 1)) * (1.0 if kind == "kl" else BETA)
        assert row.losses.item() == inf
        torch.testing.assert_close(row.to_logits, expected, rtol=1e-6, atol=0)

    @kinds
    def test_nan_and_targets_out_of_range(self, kind):
        logits, target, natural = draw(kind, (6, 19), torch.float16)
        if natural is not None:
            natural[:, 5] = -inf  # NaN also where there is no mass
            target.clamp_(min=6)
        clean = run(kernels, kind, logits, target, natural)
        logits[1, 18] = nan
        (logits if natural is None else natural)[2, 0] = nan
        target[3], target[4] = -1, 19
        row = run(kernels, kind, logits, target, natural)
        outputs = 2 if natural is None else 3
        for got, expected in list(zip((row.losses, *row[2:]), (clean.losses, *clean[2:]), strict=True))[:outputs]:
            assert got[1:5].isnan().all()
            assert torch.equal(got[::5], expected[::5])

    # A row of NaN, of an infinite loss, and without a class.
    @kinds
    def test_no_gradient_comes_from_no_upstream(self, kind):
        logits, target, natural = draw(kind, (3, 7))
        logits[0, 1], logits[1, target[1]], target[2] = nan, -inf, 7
        row = run(kernels, kind, logits, target, natural, torch.zeros(3))
        assert not row.losses.isfinite().any() or kind == "mart"
        assert (row.to_logits == 0).all()
        assert (row.to_natural == 0).all()

    @pytest.mark.parametrize("ignored", [-100, 2])
    def test_ignored_targets(self, ignored):
        logits = draw("ce", (4, 5))[0]
        logits[0, 0] = nan
        target = torch.tensor([ignored, 1, ignored, 3])
        row = run(kernels, "ce", logits, target, smoothing=0.1, ignore_index=ignored)
        kept = run(reference, "ce", logits[1::2].double(), target[1::2], smoothing=0.1)
        assert row.losses[::2].tolist() == [0, 0]
        assert (row.to_logits[::2] == 0).all()
        assert_near(row.losses[1::2], kept.losses, 1e-6)
        assert_near(row.to_logits[1::2], kept.to_logits, 1e-6)
        # the other losses ignore nothing
        logits, _, natural = draw("trades", (4, 5))
        target = target.clamp(min=0)
        for kind in ("trades", "mart", "kl"):
            ours, unignored = (run(kernels, kind, logits, target, natural, ignore_index=i) for i in (ignored, 4))
            assert all(map(torch.equal, ours, unignored))

    # Ties within and across the blocks of 2048 classes that a float32 row of 5000 takes.
    @pytest.mark.parametrize(
        ("tied", "target", "strongest"),
        [([1, 2], 0, 1), ([1, 2], 1, 2), ([100, 3000, 4999], 3000, 100), ([2047, 2048], 2047, 2048), ([], 0, 1)],
    )
    def test_of_tied_classes_the_first_is_the_strongest(self, tied, target, strongest):
        logits, natural = torch.zeros(2, 1, 5000)
        logits[0, tied] = 2.0
        assert run(kernels, "mart", logits, torch.tensor([target]), natural).stats[0, 5] == strongest


class TestShapes:
    @kinds
    def test_weights_are_upstream_times_weight(self, kind):
        # 70 samples take several programs for each of the six duals
        logits, target, natural = draw(kind, (2, 3, 70, 5), torch.float64)
        generator = torch.Generator().manual_seed(3)
        grad, weights = torch.randn(2, 3, generator=generator), torch.rand(2, 3, 70, generator=generator)
        grad, weights = grad.double(), weights.double()
        weights[0, 0, :4] = 0.0
        plain = run(kernels, kind, logits, target, natural, grad[..., None] * weights)
        numbers = (CODES[kind], BETA, 0.0, -100)
        weighted = kernels.rowloss_backward(
            grad, weights, logits, target, natural, plain.stats, *numbers, natural is not None
        )
        for one, other in zip(weighted, plain[2:], strict=True):
            assert torch.equal(one, other)
        assert (weighted[0][0, 0, :4] == 0).all()

    @pytest.mark.parametrize("kind", ["trades", "mart", "kl"])
    def test_gradient_of_the_logits_alone(self, kind):
        rows = draw(kind, (4, 6))
        both = run(kernels, kind, *rows)
        numbers = (CODES[kind], BETA, 0.0, -100)
        alone = kernels.rowloss_backward(torch.ones(4), None, *rows, both.stats, *numbers, False)
        assert torch.equal(alone[0], both.to_logits)
        assert alone[1].shape == (0,)

    @kinds
    @pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 0, 7)], ids=str)
    def test_leading_dimensions(self, kind, shape):
        rows = draw(kind, shape)
        ours, exact = run(kernels, kind, *rows), run(reference, kind, *doubled(*rows))
        assert [t.shape for t in ours] == [t.shape for t in exact]
        for one, other in zip(ours, exact, strict=True):
            assert_near(one, other, 2e-6)

    @kinds
    def test_strides(self, kind):
        logits, target, natural = draw(kind, (5, 12))
        spread = [None if t is None else t.t().contiguous().t() for t in (logits, natural)]
        labels, grad = torch.stack([target, target], 1)[:, 0], torch.ones(1).expand(5)
        strided = run(kernels, kind, spread[0], labels, spread[1], grad)
        for one, other in zip(strided, run(kernels, kind, logits, target, natural), strict=True):
            assert torch.equal(one, other)

    def test_one_class(self):
        row = run(kernels, "ce", torch.tensor([[3.5], [-1e30]]), torch.tensor([0, 0]), smoothing=0.1)
        assert row.losses.tolist() == [0, 0]
        assert row.to_logits.flatten().tolist() == pytest.approx([0, 0], abs=1e-7)


class TestRowlossDual:
    @pytest.mark.parametrize(
        ("kind", "divergence", "costs"),
        [("ce", 0, False), ("trades", 1, True), ("mart", 2, False), ("mart", 0, True)],
        ids=["ce-kl", "trades-alpha-costs", "mart-renyi", "mart-kl-costs"],
    )
    def test_is_the_dual_of_the_losses(self, kind, divergence, costs):
        logits, target, natural = draw(kind, (3, 20, 10), torch.float64, scale=1.0)
        paid = 0.01 * torch.rand(3, 20, generator=torch.Generator().manual_seed(4)).double() if costs else None
        settings = (divergence, 2.0, 0.1, 0.01, 1e6)
        got = kernels.rowloss_dual(logits, target, natural, paid, CODES[kind], BETA, 0.0, *settings)
        exact = run(reference, kind, logits, target, natural)
        value, lam, nu, weights, status, _ = torch.ops.armor.dual(exact.losses, paid, None, *settings)
        assert_near(got[1], exact.losses, 1e-13)
        assert_near(got[2], exact.stats, 1e-13)
        torch.testing.assert_close(got[0], value, rtol=1e-12, atol=0)
        torch.testing.assert_close(got[3:6], (lam, nu, weights), rtol=1e-6, atol=1e-7)
        assert torch.equal(got[6], status)
        assert (got[7] > 0).all()

    def test_no_target_is_ignored(self):
        logits = torch.zeros(1, 2, 3)
        got = kernels.rowloss_dual(logits, torch.tensor([[0, -100]]), None, None, 0, 0.0, 0.0, 0, 0.0, 0.1, 0.0, 1e6)
        assert got[1][0, 0].item() == pytest.approx(math.log(3))
        assert got[1][0, 1].isnan()
        assert got[0].isnan().all()


def plain(kind, logits, target, natural):
    """The losses of [rows, classes] in torch's own functions, in log space."""
    log_q = logits.log_softmax(1)
    if kind == "ce":
        return -log_q.gather(1, target[:, None]).squeeze(1)
    log_p = natural.log_softmax(1)
    if kind in ("trades", "kl"):
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        return kl if kind == "kl" else -log_p.gather(1, target[:, None]).squeeze(1) + BETA * kl
    q, p, y = logits.softmax(1), natural.softmax(1), target[:, None]
    strongest = q.scatter(1, y, -1.0).amax(1)
    kl = (p * (log_p - (q + 1e-12).log())).sum(1)
    boosted = -log_q.gather(1, y).squeeze(1) - (1.0001 - strongest + 1e-12).log()
    return boosted + BETA * kl * (1.0000001 - p.gather(1, y).squeeze(1))

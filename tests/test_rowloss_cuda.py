"""The CUDA operators of armor::rowloss, proven as those of armor::dual are (test_dual_cuda.py): without a GPU, they run
thread by thread under the host shim of tests/kernelcheck. The oracles are the formulas of docs/math.md, section 4,
differentiated by autograd in float64, and armor.reference.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from kernelcheck import cuda_ops
from test_dual_cuda import LENGTHS, NUMBERS, assert_bit_equal, groups

from armor import library, reference

inf, nan = math.inf, math.nan
KINDS = ["ce", "trades", "mart", "kl"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NOTHING = -(2**63)

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


@dataclass(frozen=True)
class Rows:
    """The arguments of a raw `rowloss`."""

    kind: str
    logits: torch.Tensor
    target: torch.Tensor
    natural: torch.Tensor | None
    beta: float = 6.0
    smoothing: float = 0.0
    ignore_index: int = NOTHING

    @property
    def real(self):
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def numbers(self):
        return KINDS.index(self.kind), self.beta, self.smoothing, self.ignore_index

    def raw(self):
        return self.logits, self.target, self.natural, *self.numbers()


def random_rows(kind, shape, classes, dtype=torch.float32, *, seed=0, scale=3.0, device="cpu", **settings) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    z, w = (scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(classes, shape, generator=generator).to(device)
    natural = None if kind == "ce" else w.to(device, dtype)
    return Rows(kind, z.to(device, dtype), target, natural, **settings)


# ---- the operators on the host shim ----------------------------------------------------------------------------------


def rowloss(rows, **schedule):
    return cuda_ops.on_shim(**schedule).rowloss(*rows.raw())


def rowloss_backward(grad, weights, rows, stats, natural_grad=True, **schedule):
    given = grad, weights, *rows.raw()[:3], stats, *rows.numbers(), natural_grad
    return cuda_ops.on_shim(**schedule).rowloss_backward(*given)


def rowloss_dual(rows, costs, **schedule):
    """value, losses, stats, lam, nu, weights, status, passes of logits [rows, n, classes]."""
    return cuda_ops.on_shim(**schedule).rowloss_dual(*rows.raw()[:3], costs, *rows.numbers()[:3], *NUMBERS)


# ---- oracles ---------------------------------------------------------------------------------------------------------


def formulas(rows, dtype=torch.float64):
    """Losses and both gradients of their sum, as section 4 of docs/math.md has them, by autograd."""
    z = rows.logits.detach().to(dtype).requires_grad_()
    w = None if rows.natural is None else rows.natural.detach().to(dtype).requires_grad_()
    y = rows.target
    log_q = z.log_softmax(-1)
    if rows.kind == "ce":
        losses = F.cross_entropy(z, y, reduction="none", label_smoothing=rows.smoothing)
        return losses.detach(), *torch.autograd.grad(losses.sum(), z), None
    log_p = w.log_softmax(-1)
    if rows.kind == "mart":
        q, p = log_q.exp(), log_p.exp()
        strongest = q.scatter(-1, y[..., None], -1.0).amax(-1)
        nll = F.nll_loss(log_q, y, reduction="none")
        kl = F.kl_div((q + 1e-12).log(), log_p, reduction="none", log_target=True).sum(-1)
        doubt = 1.0000001 - p.gather(-1, y[..., None]).squeeze(-1)
        losses = nll - (1.0001 - strongest + 1e-12).log() + rows.beta * kl * doubt
    else:
        losses = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        if rows.kind == "trades":
            losses = F.nll_loss(log_p, y, reduction="none") + rows.beta * losses
    return losses.detach(), *torch.autograd.grad(losses.sum(), (z, w))


def assert_gradients(got, expected, dtype):
    """Within a unit of the logits' dtype, and the rounding of float32 where that is the computation's."""
    relative = {torch.float64: 1e-11, torch.float32: 4e-6}.get(dtype, torch.finfo(dtype).eps)
    for one, other in zip(got, expected, strict=True):
        if one.numel():
            absolute = (1e-13 if dtype == torch.float64 else 1e-6) * other.abs().max().item()
            torch.testing.assert_close(one.double(), other.double(), rtol=relative, atol=absolute)


# ---------------------------------------------------------------------------------------------------------------
# known results

# Rows for many warps, or for one; classes below and above a warp, with and without loads of
# 16 bytes (1000, 1032), for warps (up to 1024) and for blocks.
SHAPES = [(130, 2), (70, 3), (40, 10), (17, 33), (9, 1000), (3, 1025), (3, 1032), (1, 5000)]


@kinds
@dtypes
@pytest.mark.parametrize(("count", "classes"), SHAPES)
def test_formulas(count, classes, dtype, kind):
    rows = random_rows(kind, (count,), classes, dtype, seed=classes, smoothing=0.1 if kind == "ce" else 0.0)
    losses, stats = rowloss(rows)
    gradients = rowloss_backward(torch.ones_like(losses), None, rows, stats)
    expected, *expected_gradients = formulas(rows)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    assert_gradients(gradients, [g for g in expected_gradients if g is not None] + [None] * (kind == "ce"), dtype)

    known, known_stats = reference.rowloss(*rows.raw())
    torch.testing.assert_close(losses, known, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats, known_stats, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, count, dtype=rows.real)
    gradients = rowloss_backward(upstream, None, rows, stats)
    assert_gradients(
        gradients,
        reference.rowloss_backward(upstream, None, *rows.raw()[:3], known_stats, *rows.numbers(), kind != "ce"),
        dtype,
    )


# A kernel may be no further from the truth than PyTorch's own expression in float32, with a factor of two to spare.
@kinds
@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (3.0, 0.0), (30.0, 0.0), (3.0, 1000.0)])
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_no_less_accurate_than_pytorch(classes, scale, shift, kind):
    rows = random_rows(kind, (9,), classes, scale=scale, smoothing=0.1 if kind == "ce" else 0.0)
    rows = replace(rows, logits=rows.logits + shift, natural=None if kind == "ce" else rows.natural - shift)
    losses, stats = rowloss(rows)
    got = losses, *rowloss_backward(torch.ones_like(losses), None, rows, stats)
    for one, naive, truth in zip(got, formulas(rows, torch.float32), formulas(rows), strict=True):
        if truth is not None:
            error, allowed = ((t.double() - truth).abs().max() for t in (one, naive))
            assert error <= 2 * allowed + 1e-7 * truth.abs().max()


# The natural logits say nothing, the adversarial ones that class 1 is right; the target is class 0.
@pytest.mark.parametrize("gap", [110.0, 1e4, 1e30])
@pytest.mark.parametrize("repeated", [1, 600])  # 1200 classes are for a block
def test_confident_rows(gap, repeated):
    def rows(kind):
        logits = torch.full((1, 2 * repeated), -gap)
        logits[0, 1] = 0.0
        natural = torch.full_like(logits, -inf)
        natural[0, :2] = 0.0
        return Rows(kind, logits, torch.tensor([0]), None if kind == "ce" else natural, beta=2.0)

    log2 = math.log(2)
    known = {
        "ce": gap,
        "kl": gap / 2 - log2,
        "trades": gap - log2,
        "mart": gap - math.log(1e-4) + 2 * (0.5 * -math.log(1e-12) - log2) * 0.5000001,
    }
    for kind, expected in known.items():
        losses, stats = rowloss(rows(kind))
        assert losses.item() == pytest.approx(expected, rel=1e-6)
        to_logits, to_natural = rowloss_backward(torch.ones(1), None, rows(kind), stats)
        assert to_logits.isfinite().all()
        assert to_natural.isfinite().all()
        if kind == "ce":
            assert to_logits[0, :2].tolist() == [-1, 1]


# A right and confident prediction keeps its digits: log1p(exp(-20)) is far below the rounding of a log of a sum.
def test_small_losses():
    losses, stats = rowloss(Rows("ce", torch.tensor([[20.0, 0.0]]), torch.tensor([0]), None))
    assert losses.item() == pytest.approx(2.0611536e-09, rel=1e-6)
    gradient, _ = rowloss_backward(
        torch.ones(1), None, Rows("ce", torch.tensor([[20.0, 0.0]]), torch.tensor([0]), None), stats
    )
    torch.testing.assert_close(gradient, torch.tensor([[-2.0611536e-09, 2.0611536e-09]]), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------
# rows that cannot be answered


@kinds
@dtypes
@pytest.mark.parametrize("classes", [10, 1032])
def test_unusual_rows(classes, dtype, kind):
    rows = random_rows(kind, (9,), classes, dtype)
    bad = rows.target.clone()
    bad[0], bad[1], bad[2], bad[3] = -1, classes, 2**40, -(2**63)
    logits, natural = rows.logits.clone(), rows.natural if kind == "ce" else rows.natural.clone()
    logits[4, 3] = nan
    logits[5, classes - 1], bad[5] = -inf, 0
    logits[6] = -inf
    if kind != "ce":
        natural[7, 1] = nan
    odd = replace(rows, logits=logits, natural=natural, target=bad)
    losses, stats = rowloss(odd)
    unanswered = [0, 1, 2, 3, 4, 6, *([] if kind == "ce" else [7])]
    if kind == "ce":  # the least integer is also the index that ignores nothing
        unanswered.remove(3)
        assert losses[3] == 0
    assert losses.isnan().nonzero().flatten().tolist() == unanswered
    assert losses[5].isinf() if kind in ("trades", "kl") else losses[5].isfinite()
    assert torch.equal(losses[8], rowloss(rows)[0][8])

    gradients = [g for g in rowloss_backward(torch.ones_like(losses), None, odd, stats) if g.numel()]
    for gradient in gradients:
        assert gradient.isnan().all(-1).nonzero().flatten().tolist() == unanswered
        assert gradient[8].isfinite().all()
    assert gradients[0][5].isfinite().all()
    for gradient in rowloss_backward(torch.zeros_like(losses), None, odd, stats):
        assert (gradient == 0).all()  # upstream zero is zero, whatever the loss


@pytest.mark.parametrize("classes", [10, 1032])
def test_ignored_targets(classes):
    rows = random_rows("ce", (9,), classes, ignore_index=-100)
    target = rows.target.clone()
    target[::3] = -100
    logits = rows.logits.clone()
    logits[3, 0] = nan
    ignoring = replace(rows, target=target, logits=logits)
    losses, stats = rowloss(ignoring)
    (gradient, _), expected = rowloss_backward(torch.ones(9), None, ignoring, stats), rowloss(rows)[0]
    assert (losses[::3] == 0).all()
    assert (gradient[::3] == 0).all()
    kept = target != -100
    assert torch.equal(losses[kept], expected[kept])
    assert (gradient[kept] != 0).any(-1).all()


# ---------------------------------------------------------------------------------------------------------------
# loads, weights, schedules


# One logit behind a multiple of 16 bytes, where nothing may be loaded 16 bytes at a time.
@kinds
@dtypes
@pytest.mark.parametrize("classes", [64, 1032])
def test_views(classes, dtype, kind):
    rows = random_rows(kind, (5,), classes, dtype)

    def shifted(tensor):
        return None if tensor is None else torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

    view = replace(rows, logits=shifted(rows.logits), natural=shifted(rows.natural))
    losses, stats = rowloss(view)
    expected, expected_stats = rowloss(rows)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats, expected_stats, rtol=tolerance, atol=tolerance)
    ones = torch.ones_like(losses)
    assert_gradients(rowloss_backward(ones, None, view, stats), rowloss_backward(ones, None, rows, stats), dtype)


@kinds
def test_weights(kind):
    rows = random_rows(kind, (3, 5), 33)
    _, stats = rowloss(rows)
    generator = torch.Generator().manual_seed(1)
    grad, weights = torch.randn(3, generator=generator), torch.rand(3, 5, generator=generator)
    weights[1, 2] = 0.0
    gradients = rowloss_backward(grad, weights, rows, stats)
    assert_bit_equal(gradients, rowloss_backward(grad[:, None] * weights, None, rows, stats))
    assert (gradients[0][1, 2] == 0).all()
    to_logits, nothing = rowloss_backward(grad, weights, rows, stats, natural_grad=False)
    assert torch.equal(to_logits, gradients[0])
    assert nothing.numel() == 0


@kinds
@pytest.mark.parametrize(("count", "classes"), [(19, 33), (4, 1032)])
def test_any_schedule_gives_the_same_bits(count, classes, kind):
    rows = random_rows(kind, (count,), classes)
    ones = torch.ones(count)

    def step(**schedule):
        losses, stats = rowloss(rows, **schedule)
        return losses, stats, *rowloss_backward(ones, None, rows, stats, **schedule)

    first = step(order="forward")
    schedules = [{"order": "reverse"}, *({"seed": seed} for seed in range(28))]
    schedules += [{"processors": 1}, {"processors": 2}, {"processors": 1, "order": "reverse"}]
    for schedule in schedules:
        assert_bit_equal(first, step(**schedule))


# 32 blocks for a processor are all that a launch has: these are more rows than groups.
@pytest.mark.parametrize(("count", "classes"), [(300, 3), (40, 1025)])
def test_more_rows_than_groups(count, classes):
    rows = random_rows("mart", (count,), classes)
    losses, stats = rowloss(rows, processors=1)
    ones = torch.ones_like(losses)
    gradients = rowloss_backward(ones, None, rows, stats, processors=1)
    assert_bit_equal((losses, stats), rowloss(rows, processors=2))
    assert_bit_equal(gradients, rowloss_backward(ones, None, rows, stats, processors=2))
    known = reference.rowloss(*rows.raw())
    torch.testing.assert_close(losses, known[0], rtol=1e-6, atol=1e-6)
    given = ones, None, *rows.raw()[:3], known[1], *rows.numbers(), True
    assert_gradients(gradients, reference.rowloss_backward(*given), rows.logits.dtype)


# ---------------------------------------------------------------------------------------------------------------
# losses and their dual in one launch


@kinds
@pytest.mark.parametrize(("shape", "classes"), [((5, 9), 10), ((2, 3), 1032), ((2, 300), 10), ((1, 17_000), 3)])
def test_dual_of_losses(shape, classes, kind):
    rows = random_rows(kind, shape, classes)
    rows.logits[1:, 2, 0] = nan  # rows of the dual that are not finite
    costs = 0.01 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    first = rowloss_dual(rows, costs, order="forward")
    value, losses, stats, lam, nu, weights, status, passes = first
    assert_bit_equal((losses, stats), rowloss(rows))
    alone = cuda_ops.on_shim().dual(losses, costs, None, *NUMBERS)
    assert_bit_equal((value, lam, nu, weights, status, passes), alone)
    schedules = [{"order": "reverse"}, *({"seed": seed} for seed in range(28 if shape[1] < 1000 else 1))]
    for schedule in schedules:
        assert_bit_equal(first, rowloss_dual(rows, costs, **schedule))

    oracle = reference if shape[1] < 1000 else torch.ops.armor  # where the reference takes long, the CPU operator
    known = oracle.rowloss_dual(*rows.raw()[:3], costs, *rows.numbers()[:3], *NUMBERS)
    torch.testing.assert_close(value, known[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(weights, known[5], rtol=0, atol=1e-4, equal_nan=True)
    assert status.tolist() == known[6].tolist()


# Warps without a loss, and groups without any row of the dual: all of them must meet at the barrier.
def test_idle_groups():
    rows = random_rows("ce", (1, 20), 10)
    one, many = (rowloss_dual(rows, None, processors=processors) for processors in (1, 5))
    assert_bit_equal(one, many)


# ---------------------------------------------------------------------------------------------------------------
# on a GPU


def operators():
    served_by = library.backends()["rowloss_dual"][0]["cuda"]
    if served_by != "cuda":
        pytest.skip(f"CUDA tensors are served by {served_by} here, not by armor._C_cuda")
    return torch.ops.armor


def on_device(group, kind, seed=0):
    """Rows of the dual, of losses over ten classes, and costs."""
    rows = random_rows(kind, (2, LENGTHS[group]), 10, seed=seed, device="cuda")
    return rows, 0.01 * torch.rand(
        rows.target.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
    )


def training_step(rows, costs):
    """What a training step calls: the worst expected loss, and its gradients."""
    armor = operators()
    given = rows.logits, rows.target, rows.natural
    outputs = armor.rowloss_dual(*given, costs, *rows.numbers()[:3], *NUMBERS)
    _, _, stats, _, _, weights, *_ = outputs
    ones = torch.ones_like(outputs[0])
    natural_grad = rows.kind != "ce"
    return *outputs, *armor.rowloss_backward(ones, weights, *given, stats, *rows.numbers(), natural_grad)


@pytest.mark.gpu
@kinds
@dtypes
@pytest.mark.parametrize(("count", "classes"), [*SHAPES, (2, 100_003), (2, 100_000)])
def test_formulas_on_the_device(count, classes, dtype, kind):
    armor = operators()
    rows = random_rows(kind, (count,), classes, dtype, seed=classes, device="cuda")
    losses, stats = armor.rowloss(*rows.raw())
    known, known_stats = reference.rowloss(*rows.raw())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(losses, known, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats, known_stats, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, count, dtype=rows.real, device="cuda")
    given = upstream, None, *rows.raw()[:3]
    settings = *rows.numbers(), kind != "ce"
    got = armor.rowloss_backward(*given, stats, *settings)
    assert_gradients(got, reference.rowloss_backward(*given, known_stats, *settings), dtype)


@pytest.mark.gpu
@kinds
@groups
def test_dual_of_losses_on_the_device(group, kind):
    rows, costs = on_device(group, kind)
    value, losses, stats, lam, nu, weights, status, passes = operators().rowloss_dual(
        rows.logits, rows.target, rows.natural, costs, *rows.numbers()[:3], *NUMBERS
    )
    assert_bit_equal((losses, stats), operators().rowloss(*rows.raw()))
    expected = operators().dual(losses, costs, None, *NUMBERS)
    tolerance = 0 if group != "grid" else 1e-5  # a grid of another size adds up in another order
    for one, other in zip((value, lam, nu, weights, status), expected, strict=False):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    if group != "grid":
        assert torch.equal(passes, expected[5])


@pytest.mark.gpu
@kinds
@groups
def test_reruns_are_bit_equal(group, kind):
    given = on_device(group, kind)
    first = training_step(*given)
    for _ in range(10):
        assert_bit_equal(first, training_step(*given))


@pytest.mark.gpu
@kinds
@groups
def test_cuda_graphs(group, kind):
    rows, costs = on_device(group, kind)
    training_step(rows, costs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(rows, costs)
    for seed in (1, 2):
        new_rows, new_costs = on_device(group, kind, seed)
        for static, new in [(rows.logits, new_rows.logits), (rows.target, new_rows.target), (costs, new_costs)]:
            static.copy_(new)
        if kind != "ce":
            rows.natural.copy_(new_rows.natural)
        graph.replay()
        assert_bit_equal(captured, training_step(rows, costs))


# The logits arrive on the stream only after it has slept: a launch on any other stream would not wait for them.
@pytest.mark.gpu
@groups
def test_streams(group):
    rows, costs = on_device(group, "mart")
    expected = training_step(rows, costs)
    arriving = replace(rows, logits=torch.zeros_like(rows.logits))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        arriving.logits.copy_(rows.logits)
        found = [training_step(arriving, costs) for _ in range(10)]
    torch.cuda.synchronize()
    for other in found:
        assert_bit_equal(expected, other)


@pytest.mark.gpu
@groups
def test_no_host_synchronisation(group):
    given = on_device(group, "trades")
    training_step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")

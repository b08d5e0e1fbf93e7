"""What only a GPU can show, for every backend that is there: results against the float64 oracle, the same bits from run
to run whatever memory held before, CUDA graphs, streams, a second device, no wait for the device, torch.compile.

Raw operators are called by backend. All else goes through the public functions, served by ARMOR_BACKEND as always, so
that `make gpu` runs this file twice. ARMOR_TEST_DEVICE=cpu tries the tests themselves where there is no GPU.
"""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mpmath")
pytest.importorskip("scipy")

from kernelcheck.cases_gpu import bits, cases, check_step
from kernelcheck.on_device import OnDevice, on_two_streams, operators
from transport_cases import RULES, random_step

from armor import attacks, library, ops, reference
from armor.ops import dc_cross_entropy, dc_loss, dc_mart, dc_trades, transport_step
from armor.reference.rowloss import TRADES
from benchmarks.measure import graphed

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("ARMOR_TEST_DEVICE", "cuda")
COMPILED = {"cuda": "cuda", "cpu": "cpp"}[DEVICE]
FLOAT32, FLOAT64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def unbroken_device():
    """Errors of a kernel surface in the test that launched it; after one that breaks the device's context nothing in
    this process would work, so pytest-xdist gets a chance to start another."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            raise


def on_device(backend, op, device=DEVICE):
    """An engine of this backend; skips where the backend is missing."""
    served_by = library.backends()[op][0][DEVICE]
    if backend == "compiled" and served_by != COMPILED:
        pytest.skip(f"{DEVICE} tensors are served by {served_by} here, not by a compiled module")
    if backend == "triton":
        pytest.importorskip("triton")
    return OnDevice(operators(backend), device)


def assert_bit_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b))


backends = pytest.mark.parametrize("backend", ["compiled", "triton"])

# ---- raw operators ---------------------------------------------------------------------------------------------------


# The core cases first: they take every branch, should time be short. Transport has no compiled kernels.
EVERY_CASE = [
    pytest.param(backend, case, id=f"{backend}-{case.name.replace(' ', '_')}")
    for case in sorted(cases(), key=lambda case: not case.core)
    for backend in ("compiled", "triton")
    if backend == "triton" or not case.op.startswith("transport")
]


@pytest.mark.parametrize(("backend", "case"), EVERY_CASE)
def test_operators(backend, case):
    """Right, and the same bits again from other memory."""
    engine = on_device(backend, case.op)
    first = case.run(engine)
    for garbage in (math.nan, 3.0):
        with stale_memory(garbage):
            assert_bit_equal(first, getattr(engine, case.op)(*case.arguments))


@contextlib.contextmanager
def stale_memory(garbage):
    """Memory that operators allocate holds the number `garbage`, as that of freed tensors does."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # it fills new tensors
    blocks = [torch.full((2**power,), garbage, device=DEVICE) for power in range(7, 21) for _ in range(8)]
    del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# A row for the whole grid, a few of them, and more rows than there are blocks or programs at once. Copies of a row have
# its solution.
@backends
@pytest.mark.parametrize(("rows", "n", "copies"), [(1, 64, 2**14), (3, 29, 3449), (100_003, 33, 1)])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_large_duals(dtype, rows, n, copies, backend):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, n, generator=generator, dtype=FLOAT64).exp().to(dtype)[:rows]
    losses = base.repeat(-(-rows // len(base)), copies)[:rows]
    tolerance = 2e-6 if dtype == FLOAT32 else 1e-11
    for numbers in [(0, 0.0, 0.2, 0.1, 1e6), (1, 2.0, 0.2, 0.0, 1e6), (2, 1.25, 0.2, 0.0, 1e6)]:
        value, lam, _, weights, status, _ = on_device(backend, "dual").dual(losses, None, None, *numbers)
        exact_value, exact_lam, _, exact_weights, *_ = reference.dual(base.double(), None, None, *numbers)
        which = torch.arange(rows) % len(base)
        assert (status == 0).all()
        torch.testing.assert_close(value.double(), exact_value[which], rtol=tolerance, atol=0)
        torch.testing.assert_close(lam.double(), exact_lam[which], rtol=1e-5, atol=1e-8)
        relative = n * copies * weights.double()
        torch.testing.assert_close(relative, n * exact_weights.repeat(1, copies)[which], rtol=2e-5, atol=2e-5)


@backends
@pytest.mark.parametrize(("rows", "classes"), [(2**18, 10), (64, 100_003)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT32])
def test_many_logits(dtype, rows, classes, backend):
    generator = torch.Generator().manual_seed(0)
    logits, natural = (torch.randn(rows, classes, generator=generator).to(dtype) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator)
    numbers = (TRADES, 6.0, 0.0, library.IGNORE_NOTHING)
    losses, stats = on_device(backend, "rowloss").rowloss(logits, target, natural, *numbers)
    exact, exact_stats = reference.rowloss(logits.double(), target, natural.double(), *numbers)
    torch.testing.assert_close(losses.double(), exact, rtol=5e-6, atol=5e-6)
    given = (torch.ones(rows), None, logits, target, natural)
    grads = on_device(backend, "rowloss").rowloss_backward(*given, stats, *numbers, True)
    given = tuple(None if t is None else t.double() if t.is_floating_point() else t for t in given)
    exact_grads = reference.rowloss_backward(*given, exact_stats, *numbers, True)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("rule", [RULES[i] for i in (0, 1, 3, 9, 17, 19)], ids=str)
@pytest.mark.parametrize("shape", [(256, 3, 32, 32), (2, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, FLOAT32], ids=str)
def test_many_images(dtype, shape, rule):
    step = random_step(rule, shape, dtype, per_sample=True, final=True)
    check_step(step, on_device("triton", "transport_step").transport_step(*step.raw()))


# Triton launches on the current device, and a compiled kernel might: neither is where these tensors are.
@pytest.mark.parametrize(("backend", "case"), [p for p in EVERY_CASE if p.values[1].core][::6])
def test_second_device(backend, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    assert torch.cuda.current_device() == 0
    case.run(on_device(backend, case.op, "cuda:1"))
    assert torch.cuda.current_device() == 0


# ---- public functions ------------------------------------------------------------------------------------------------
# What they compute, forward and backward, as functions of tensors: name -> (step, inputs of a seed).


def gradients(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


def dual_step(losses, costs, clean, **settings):
    leaves = [t.detach().requires_grad_() for t in (losses, costs, clean)]
    value, dual = dc_loss(leaves[0], leaves[1], clean_losses=leaves[2], return_dual=True, **settings)
    return value.detach(), *dual, *gradients(value, *leaves)


def dual_inputs(rows, n):
    def inputs(draw):
        losses = draw(rows, n).exp()
        return losses, 0.05 * draw(rows, n).abs().clamp(max=2), losses - draw(rows, n).abs()

    return inputs


def batch_step(function):
    def step(natural, adversarial, target, costs):
        leaves = [t.detach().requires_grad_() for t in (natural, adversarial, costs)]
        logits = leaves[:2] if function is not dc_cross_entropy else leaves[1:2]
        value, dual = function(*logits, target, leaves[2], radius=0.1, kappa=0.05, return_dual=True)
        return value.detach(), *dual, *gradients(value, *logits, leaves[2])

    return step


def batch_inputs(n, classes):
    def inputs(draw):
        natural = draw(n, classes)
        return natural, natural + draw(n, classes), natural.argmax(1), 0.05 * draw(n).abs().clamp(max=2)

    return inputs


def moving_step(cost_of):
    def step(x_adv, grad, x, radii, mu):
        cost = cost_of(radii)
        price = {"mu": mu} if cost.rule().is_cost else {}
        moved = transport_step(x_adv, grad, x, cost, step_size=0.02, final=True, feed_dtype=torch.bfloat16, **price)
        return tuple(t for t in moved if t is not None)

    return step


def moving_inputs(draw):
    x = draw(5, 3, 9, 7).sigmoid()
    x_adv = (x + 0.05 * draw(5, 3, 9, 7)).clamp(0, 1)
    return x_adv, draw(5, 3, 9, 7), x, 0.02 + draw(5).sigmoid(), draw(5).exp()


def attack_step(attack):
    def step(x, weight, target, seeds, mu):
        def model(images):  # sums in a fixed order, unlike those of cuBLAS on several streams
            return (images.flatten(1)[:, None, :] * weight).sum(-1)

        price = {"mu": mu} if attack.cost.rule().is_cost else {}
        found = attack.run(model, x, target, seeds=seeds, **price)
        return tuple(t for t in found if t is not None)

    return step


def attack_inputs(draw):
    x, weight = draw(6, 2, 5, 5).sigmoid(), draw(10, 50)
    seeds = (1e9 * draw(6)).long()
    return x, weight, (x.flatten(1) @ weight.T).argmax(1), seeds, draw(6).exp()


STEPS = {
    **{
        f"dc_loss {family} {rows}x{n}": (
            lambda *given, family=family, alpha=alpha: dual_step(
                *given, radius=0.1, kappa=0.01, divergence=family, alpha=alpha
            ),
            dual_inputs(rows, n),
        )
        for family, alpha in [("kl", None), ("alpha", 2.0), ("renyi", 1.25)]
        for rows, n in [(1, 128), (5, 300), (2, 17_000)]
    },
    **{
        f"{function.__name__} {n}x{classes}": (batch_step(function), batch_inputs(n, classes))
        for function in (dc_cross_entropy, dc_trades, dc_mart)
        for n, classes in [(128, 10), (300, 1000)]
    },
    "linf": (moving_step(ops.Linf), moving_inputs),
    "l2": (moving_step(ops.L2), moving_inputs),
    "l1": (moving_step(lambda radii: ops.L1(20 * radii, top=0.05)), moving_inputs),
    "norm_power": (moving_step(lambda radii: ops.NormPower(0.01, power=1.5)), moving_inputs),
    "soft_ball": (moving_step(lambda radii: ops.SoftBall(radii, tau=0.1)), moving_inputs),
    "pgd": (attack_step(attacks.pgd(0.05, steps=3, step_size=0.02)), attack_inputs),
    "trades": (attack_step(attacks.trades(0.05, steps=3, step_size=0.02)), attack_inputs),
    "udr": (attack_step(attacks.udr(0.05, steps=3, step_size=0.02)), attack_inputs),
    "penalised": (attack_step(attacks.penalised_ot(steps=3)), attack_inputs),
}
DIFFERENTIABLE = [name for name in STEPS if name.startswith("dc_")]

steps = pytest.mark.parametrize("name", STEPS)


def inputs(name, seed=0):
    """The inputs of a step, on the device; drawn on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [t.to(DEVICE) for t in STEPS[name][1](lambda *shape: torch.randn(shape, generator=generator))]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_public_functions_agree_with_the_cpu(name):
    """In float64 there. No sample is as well off where it was: rounding decides on its gradient."""
    step, given = STEPS[name][0], inputs(name)
    if name.startswith("dc_loss"):
        given[2] -= 10
    exact = step(*(t.cpu().double() if t.is_floating_point() else t.cpu() for t in given))
    found = [t.cpu() for t in step(*given)]
    # value, lam, nu, weights, status, passes, gradients: the value is accurate, the rest to about half its digits
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=2e-6)
    assert found[4].tolist() == exact[4].tolist()
    for i in (1, 3, *range(6, len(found))):
        scale = exact[i].abs().max().item()
        torch.testing.assert_close(found[i].double(), exact[i], rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_and_strided_losses(dtype):
    """Any layout and dtype that dc_loss takes, with the samples in front."""
    wide = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    losses = wide.to(DEVICE)[:, ::2].requires_grad_()
    value = dc_loss(losses, radius=0.1, dim=0)
    (grad,) = torch.autograd.grad(value.sum(), losses)
    exact, _, _, weights, *_ = reference.dual(wide[:, ::2].double().T, None, None, 0, 0.0, 0.1, 0.0, 1e6)
    torch.testing.assert_close(value.cpu().double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.cpu().double(), weights.T, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# With each replay new inputs, prices and radii, and not those of the capture.
@steps
def test_cuda_graphs(name):
    step, static = STEPS[name][0], inputs(name)
    replay = graphed(lambda: step(*static))
    found = []
    for seed in (1, 2):
        for old, new in zip(static, inputs(name, seed), strict=True):
            old.copy_(new)
        found.append([t.clone() for t in replay()])
        assert_bit_equal(found[-1], step(*static))
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attacks_in_a_graph_draw_new_noise():
    attack, (x, weight, target, _, _) = attacks.pgd(0.05, steps=1, step_size=0.001), inputs("pgd")
    replay = graphed(lambda: (attack(lambda images: images.flatten(1) @ weight.T, x, target),))
    first, second = (replay()[0].clone() for _ in range(2))
    assert not torch.equal(first, second)
    assert (second - x).abs().max() <= 0.05 + 1e-6


def small_net():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8 * 7 * 7, 10)).to(DEVICE)


def trainer(net, amp=False):
    """A whole step of ARMOR_D on top of TRADES, of batches x and y with seeds of the attack; returns the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    attack = attacks.trades(0.05, steps=3, step_size=0.02)

    def step(x, y, seeds):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            x_adv = attack(net, x, y, seeds=seeds)
            loss = dc_trades(net(x), net(x_adv), y, radius=0.1, kappa=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(16, 3, 16, 16, generator=generator), torch.randint(10, (16,), generator=generator)
    return [t.to(DEVICE) for t in (x, y, torch.arange(16) + 100 * seed)]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_graph_of_a_training_step(amp):
    """Replays train as eager steps do, from the same weights."""
    net, twin, static = small_net(), small_net(), batch(0)
    step, eager_step = trainer(net, amp), trainer(twin, amp)
    replay = graphed(lambda: (step(*static),), warmups=2)
    for _ in range(2):  # as often as before the capture; that itself computes nothing
        eager_step(*static)
    for seed in (1, 2, 3):
        for old, new in zip(static, batch(seed), strict=True):
            old.copy_(new)
        loss, eager_loss = replay()[0].item(), eager_step(*static).item()
        assert math.isfinite(loss)
        assert loss == pytest.approx(eager_loss, rel=5e-2 if amp else 1e-2)


# What runs at the same time must not share memory.
@steps
def test_streams(name):
    step, both = STEPS[name][0], [inputs(name, seed) for seed in (1, 2)]
    expected = [step(*given) for given in both]
    found = on_two_streams(step, both, cycles=20_000_000, repeats=5)
    for one, others in zip(expected, found, strict=True):
        for other in others:
            assert_bit_equal(one, other)


@contextlib.contextmanager
def never_waiting():
    """RuntimeError where PyTorch makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device=DEVICE).item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@steps
def test_no_synchronisation(name):
    step, given = STEPS[name][0], inputs(name)
    expected = step(*given)
    with never_waiting():
        found = step(*given)
    assert_bit_equal(expected, found)


@pytest.mark.parametrize("name", ["dc_loss kl 1x128", "dc_trades 128x10", "dc_cross_entropy 300x1000"])
def test_compile(name):
    """Compiled whole, with the gradient."""
    given = inputs(name)
    leaves = [t.detach().requires_grad_() for t in given if t.is_floating_point()]

    def value(*floats):
        if name.startswith("dc_loss"):
            return 2 * dc_loss(floats[0].exp(), floats[1], radius=0.1, kappa=0.01)
        if name.startswith("dc_trades"):
            return 2 * dc_trades(floats[0] * 0.5, floats[1], given[2], floats[2], radius=0.1, kappa=0.01)
        return 2 * dc_cross_entropy(floats[1] * 0.5, given[2], floats[2], radius=0.1, kappa=0.01)

    compiled = torch.compile(value, fullgraph=True)
    for eager, other in [(value(*leaves), compiled(*leaves))]:
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
        wanted = leaves[1:2]
        torch.testing.assert_close(gradients(other, *wanted), gradients(eager, *wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [("kl", None), ("alpha", 2.0), ("renyi", 1.25)], ids=lambda family: family[0])
def test_gradcheck(family):
    draw = torch.Generator().manual_seed(11)
    losses, costs = (torch.rand(2, 7, generator=draw, dtype=FLOAT64).to(DEVICE).requires_grad_() for _ in range(2))

    def value(losses, costs):
        return dc_loss(losses, 0.1 * costs, radius=0.3, divergence=family[0], alpha=family[1])

    assert torch.autograd.gradcheck(value, (losses, costs), eps=1e-5, atol=1e-7, rtol=1e-6)


def test_gradcheck_of_logits():
    draw = torch.Generator().manual_seed(3)
    given = [torch.randn(4, 3, generator=draw, dtype=FLOAT64).to(DEVICE).requires_grad_() for _ in range(2)]
    target = torch.tensor([0, 2, 1, 1], device=DEVICE)
    for function in (dc_trades, dc_mart):
        assert torch.autograd.gradcheck(
            lambda *logits, f=function: f(*logits, target, radius=0.3), given, eps=1e-5, atol=1e-6, rtol=1e-5
        )


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
@backends
def test_compute_sanitizer(backend, tool):
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        pytest.skip("compute-sanitizer is not installed")
    on_device(backend, "dual")
    command = [program, "--tool", tool, "--error-exitcode", "86"]
    command += [sys.executable, "-m", "kernelcheck.on_device", backend]
    # allocations of PyTorch's own size would hide what lies between them
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if "not supported" in said:
        pytest.skip(next(line for line in said.splitlines() if "not supported" in line))
    assert done.returncode == 0, said[-10_000:]
    assert f"cases of {backend}" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said, said[-10_000:]

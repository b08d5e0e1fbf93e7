"""What benchmarks/counts.py counts without a GPU: the gates that armor's training steps must pass, that the counter
sees what it should see, and that docs/counts.md shows what the code counts."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from armor import attacks, ops, reference
from armor.training import step as training_step
from armor.training.models import mlp
from benchmarks import counter, counts, naive
from benchmarks.counter import Counter, fake_cuda

ROOT = Path(__file__).parents[1]
EVERY_STEP = [(method, weights) for method in counts.METHODS for weights in counts.METHODS[method].weights]


# --- gates


@pytest.mark.parametrize(("method", "weights"), EVERY_STEP)
@pytest.mark.parametrize("net", list(counts.NETS))
def test_armors_step_never_waits(net, method, weights):
    assert counts.counted("armor", method, weights, net).syncs == 0


@pytest.mark.parametrize("weights", list(counts.WEIGHTS))
def test_the_step_of_armor_train_never_waits(weights):
    assert counts.counted("armor train", "PGD", weights, "mnist_cnn").syncs == 0


@pytest.mark.parametrize("weights", ["KL", "Rényi"])
@pytest.mark.parametrize("loss", list(counts.LOSSES))
def test_a_loss_with_its_dual_is_one_launch_each_way(loss, weights):
    forward, backward = counts.counted_loss("armor", loss, weights)
    assert (forward.launches, forward.syncs) == (1, 0)
    assert (backward.launches, backward.syncs) == (1, 0)


COSTS = [
    ops.Linf(0.1),
    ops.L2(0.5),
    ops.L1(5.0),
    ops.NormPower(0.1, 2, 1.5),
    ops.SoftBall(0.1, 0.1),
    ops.Binary(),
]


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: type(cost).__name__)
def test_a_transport_step_is_one_launch(cost, final):
    with fake_cuda() as cuda:
        x, x_adv, grad = (torch.empty(8, 3, 8, 8, device=cuda) for _ in range(3))
        found = counts.count(lambda: ops.transport_step(x_adv, grad, x, cost, step_size=0.1, final=final))
    assert (found.launches, found.syncs) == (1, 0)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("loss", ["ce", "kl", "mart"])
def test_a_step_of_an_attack_is_the_model_twice_its_loss_and_slope_and_one_launch(loss, steps):
    """Beside it: the seeds and the start, the ones that the slope begins with, and once the natural samples."""
    with fake_cuda() as cuda:
        model = mlp().to(cuda)
        x, y = torch.empty(16, 1, 8, 8, device=cuda), torch.empty(16, dtype=torch.int64, device=cuda)
        eaten = x.clone().requires_grad_()
        logits = []
        forward = counts.count(lambda: logits.append(model(eaten)))
        backward = counts.count(lambda: torch.autograd.grad(logits[0], eaten, logits[0].detach()))
        attack = attacks.Transport(ops.Linf(0.1), steps, 0.01, loss=loss)
        found = counts.count(lambda: attack(model, x, y))
    natural = 0 if loss == "ce" else forward.launches + 1
    status = steps  # of each step, added to those before
    once = 3 + natural
    assert (forward.launches, forward.syncs, backward.syncs) == (5, 0, 0)
    assert found.launches == once + steps * (forward.launches + backward.launches + 2 + 1) + status
    assert found.syncs == 0


# A number that is copied to the device makes the host wait; one that is written there as the value of a fill does not.
def test_statistics_that_are_numbers_do_not_make_an_attack_wait():
    with fake_cuda() as cuda:
        x, y = torch.empty(16, 3, 8, 8, device=cuda), torch.empty(16, dtype=torch.int64, device=cuda)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to(cuda)
        attack = attacks.pgd(0.1, steps=2, step_size=0.05, normalize=((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)))
        assert counts.count(lambda: attack(model, x, y)).syncs == 0


# The attack of 10 steps, the adversarial samples in the loss, and the natural ones: in the loss (twice in TRADES'
# script), and for the attack once or, in the scripts, in each of its steps. UDR's has a pass to choose a restart.
PASSES = {"PGD": (11, 11), "TRADES": (23, 13), "MART": (22, 13), "UDR": (12, 11), "penalised OT": (11, 11)}


@pytest.mark.parametrize("method", list(counts.METHODS))
def test_natural_samples_are_predicted_once_for_an_attack(method):
    passes = tuple(counts.counted(provider, method, "KL", "mnist_cnn").forwards for provider in ("scripts", "armor"))
    assert passes == PASSES[method]


# TRADES and MART copy their noise; UDR chooses by a mask, and with PGD and penalised OT reads two numbers for its log.
# The dual copies the losses and, if there are some, the costs.
SCRIPTS_WAIT = {"PGD": (2, 1), "TRADES": (1, 1), "MART": (1, 1), "UDR": (4, 2), "penalised OT": (2, 2)}


@pytest.mark.parametrize(("method", "weights"), EVERY_STEP)
def test_the_scripts_wait_and_launch_more(method, weights):
    scripts, armor = (counts.counted(provider, method, weights, "mnist_cnn") for provider in ("scripts", "armor"))
    step, dual = SCRIPTS_WAIT[method]
    assert scripts.syncs == step + (0 if weights == "uniform" else dual)
    assert scripts.launches > armor.launches
    assert scripts.bytes > armor.bytes


def test_a_step_that_waits_is_found(monkeypatch):
    """The gate of `armor train` with a number asked for, and with a constant that comes from the host."""
    uncached = counts.with_one_and_two.__wrapped__
    for share, syncs in (
        (lambda weights: weights.new_full((), 1 / weights.square().sum().item()), 1),
        (lambda weights: weights.new_tensor(1.0), 1),
        (lambda weights: weights.sum(), 0),
    ):
        monkeypatch.setattr(training_step, "effective_share", share)
        for found in uncached("armor train", "PGD", "KL", "mnist_cnn"):
            assert found.syncs == syncs


@pytest.mark.parametrize("provider", ["scripts", "armor"])
@pytest.mark.parametrize("method", list(counts.METHODS))
def test_two_steps_of_an_attack_tell_about_more(provider, method):
    with fake_cuda() as cuda:
        model = counts.mnist_cnn().to(cuda)
        x, y = torch.empty(128, 1, 28, 28, device=cuda), torch.empty(128, dtype=torch.int64, device=cuda)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = counts.STEPS_OF[provider](counts.METHODS[method], counts.WEIGHTS["KL"], model, optimizer, 4, cuda)
        counts.count(lambda: step(x, y))
        found = counts.count(lambda: step(x, y))
    assert found[:3] == counts.counted(provider, method, "KL", "mnist_cnn", 4)[:3]


# --- the counter


def vector():
    return torch.empty(8, device=counter.CUDA)


WAITING = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "if": lambda t: bool((t > 0).any()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to cpu": lambda t: t.to("cpu"),
    "copy_ to the host": lambda t: torch.empty(8).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask as index": lambda t: t[t > 0],
    "assignment by mask": lambda t: t.__setitem__(t > 0, t[:1]),
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.unique(),
    "equal": lambda t: t.equal(t + 1),
    "number from the host": lambda t: torch.tensor(1.0, device=t.device),
    "new_tensor": lambda t: t.new_tensor([1.0, 2.0]),
    "list as tensor": lambda t: torch.as_tensor([1.0, 2.0], device="cuda"),
    "tensor from the host": lambda t: torch.ones(8).to(t.device),
    "copy_ from the host": lambda t: t.copy_(torch.ones(8)),
}
NOT_WAITING = {
    "arithmetic": lambda t: ((t + 1) * t).sum().sqrt(),
    "views": lambda t: t.view(2, 4).t()[0].detach(),
    "shape": lambda t: t.numel() + len(t),
    "constants": lambda t: (torch.zeros(3, device=t.device), t.new_full((), 2.0), torch.full_like(t, 1.0)),
    "where of three": lambda t: torch.where(t > 0, t, 0.0),
    "masked_fill": lambda t: t.masked_fill(t > 0, 0.0),
    "index": lambda t: t[torch.zeros(2, dtype=torch.int64, device=t.device)],
    "to the same device": lambda t: t.to(t.device),
    "tensor as tensor": lambda t: torch.as_tensor(t, device=t.device),
    "to another dtype": lambda t: t.to(torch.float16),
    "non_blocking": lambda t: torch.ones(8).to(t.device, non_blocking=True),
    "number of the host": lambda t: torch.ones(()).item(),
    "random numbers": lambda t: torch.randint(5, (3,), device=t.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_counter_sees_the_host_wait(name):
    with fake_cuda():
        assert counts.count(functools.partial(WAITING[name], vector())).syncs == 1


@pytest.mark.parametrize("name", NOT_WAITING)
def test_counter_does_not_see_what_is_not_there(name):
    with fake_cuda():
        assert counts.count(functools.partial(NOT_WAITING[name], vector())).syncs == 0


def test_counter_lists_operators_with_their_bytes():
    with fake_cuda():
        t = vector()
        with Counter() as found:
            (t.view(2, 4) + t[:4]).sum()
            torch.ones(5) + 1  # not on the device
    assert found.operators == [("aten::add.Tensor", 4 * (8 + 4 + 8)), ("aten::sum", 4 * (8 + 1))]


def test_gradient_without_costs_reads_the_weights_alone():
    """128 weights and gradients, and the gradient of the value; with costs mu and the costs' gradient as well."""
    found = {name: moved for name, size, moved in counts.kernels() if size == "KL, 128 losses"}
    assert found["dual_backward"] == 4 * (128 + 128 + 1)
    with fake_cuda() as cuda:
        losses, costs = (torch.empty(128, device=cuda, requires_grad=True) for _ in range(2))
        with Counter() as counted:
            ops.dc_loss(losses, costs, radius=0.1).backward()
    assert dict(counted.operators)["armor::dual_backward"] == 4 * (4 * 128 + 1 + 1)


def test_fake_tensors_take_the_ways_of_cuda_tensors():
    with fake_cuda() as cuda:
        model = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.rand(4, 3).to(cuda)
        assert (x.device, x.is_cuda, x.is_meta, torch.ones(2).is_cuda) == (cuda, True, False, False)
        with Counter() as found:
            model(x).sum().backward()
            optimizer.step()
        assert model.weight.grad.device == cuda
        assert found.operators[-1][0].startswith("aten::_foreach_")
        with pytest.raises(ValueError, match="must be on the device of logits"):
            ops.cross_entropy(x, torch.zeros(4, dtype=torch.int64))
    assert x.device.type == "meta"
    assert not x.is_cuda


def test_fake_tensors_of_pytorch_count_the_same():
    """As far as they go without a GPU, which is not through autograd: a layer, a loss with its dual and a step."""

    def compute(device):
        x, weight = torch.empty(16, 64, device=device), torch.empty(10, 64, device=device)
        target = torch.empty(16, dtype=torch.int64, device=device)
        with Counter() as found:
            logits = F.relu(F.linear(x, weight))
            ops.dc_trades(logits, logits + 1, target, radius=0.2)
            ops.transport_step(x, x + 1, x, ops.Linf(0.1), step_size=0.1)
        return found.operators, found.syncs

    with FakeTensorMode():
        of_pytorch = compute("cuda:0")
    with fake_cuda() as cuda:
        assert compute(cuda) == of_pytorch
    assert [name for name, _ in of_pytorch[0]] == [
        *("aten::mm", "aten::relu", "aten::add.Tensor"),
        *("armor::rowloss_dual", "aten::add.Tensor", "armor::transport_step"),
    ]


def test_bounds_are_the_bytes_over_the_bandwidth():
    """x_adv, gradient, x and the next x_adv of 128 x 3072 numbers, and the status of 128 samples."""
    row = next(
        row for row in counts.kernels_table().splitlines() if row.startswith("| `transport_step` | linf, 128 x 3")
    )
    moved = 4 * (4 * 128 * 3072 + 128)
    assert moved / 2039e9 == pytest.approx(3.1e-6, rel=0.02)
    assert moved / 3350e9 == pytest.approx(1.9e-6, rel=0.02)
    assert row.endswith("| 6.29 MB | 3.1 us | 1.9 us |")


# --- the scripts' steps compute what they should


@pytest.mark.parametrize(
    ("weights", "costly"), [("KL", False), ("KL", True), ("Rényi", False)], ids=["KL", "KL with costs", "Rényi"]
)
def test_dual_on_the_host_agrees_with_the_oracle(weights, costly):
    """KL to what the bisection allows; Rényi's L-BFGS-B stops earlier."""
    torch.manual_seed(0)
    losses = torch.rand(64, dtype=torch.float64) * 3
    costs = torch.rand(64, dtype=torch.float64) / 100 if costly else None
    settings = counts.WEIGHTS[weights]
    value = naive.host_dc_loss(losses.requires_grad_(), costs, **settings)
    (gradient,) = torch.autograd.grad(value, losses)
    kind = {"KL": reference.KL, "Rényi": reference.RENYI}[weights]
    scalars = (kind, settings.get("alpha", 1.0), settings["radius"], settings["kappa"], 1e6)
    exact, _, _, exact_weights, _, _ = reference.dual(
        losses.detach()[None], None if costs is None else costs[None], None, *scalars
    )
    torch.testing.assert_close(value, exact[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient, exact_weights[0], rtol=0, atol=1e-9 if weights == "KL" else 1e-4)


@pytest.mark.parametrize("method", list(counts.METHODS))
def test_scripts_attack_and_learn(method):
    """A step raises the losses, prices what it moved, and changes the weights by the gradient of what it weighs."""
    torch.manual_seed(0)
    model, x, y = mlp(), torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = {}

    def weigh(losses, costs=None):
        seen["losses"], seen["costs"] = losses.detach(), costs
        seen["gradients"] = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
        return losses.mean()

    clean = {"cross_entropy": naive.cross_entropy(model(x), y)}
    clean["trades"] = naive.trades_loss(model(x), model(x), y, beta=6.0)
    clean["mart"] = naive.mart_loss(model(x), model(x), y, beta=6.0)
    before = [p.detach().clone() for p in model.parameters()]
    settings = counts.METHODS[method].settings | {"steps": 5}
    if method == "UDR":
        settings |= {"mean": torch.zeros(1), "std": torch.ones(1)}
    counts.METHODS[method].naive(model, optimizer, x, y, weigh, **settings)

    assert (seen["losses"] > clean[counts.METHODS[method].loss]).all()
    assert (seen["costs"] is not None) == (method in ("UDR", "penalised OT"))
    if method == "UDR":  # five steps of a quarter of the radius, from within: beyond the ball by less than four of them
        assert 0 <= seen["costs"].min() <= seen["costs"].max() < 64 * (8 / 255) ** 2 / 0.2
    if method == "penalised OT":  # five sign steps, or fewer where a pixel leaves the box
        assert 0 < seen["costs"].min() <= seen["costs"].max() <= 0.1 * (5 * 0.01 * 8) ** 1.5 * (1 + 1e-6)
    for parameter, old, gradient in zip(model.parameters(), before, seen["gradients"], strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient)


# --- the page


def test_page_shows_what_is_counted():
    text = (ROOT / "docs/counts.md").read_text()
    assert counts.insert(text) == text, "python -m benchmarks.counts --write docs/counts.md renews it"


def test_pages_without_a_table_are_refused():
    with pytest.raises(ValueError, match="no marker <!-- counts:steps -->"):
        counts.insert("<!-- counts:losses -->\n<!-- /counts:losses -->\n")

"""The attacks of armor.attacks against the published update rules, written out literally, and against known optima; and
what every attack must hold: it leaves the model alone, treats samples one by one, and never waits for the device.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armor import attacks
from armor.attacks import Transport, margin
from armor.ops import (
    L1,
    L2,
    Binary,
    Linf,
    NormPower,
    SoftBall,
    TransportStatus,
    mart_loss,
    transport_cost,
    transport_init,
)


def convnet(dtype=torch.float64, classes=10, seed=0):
    """A small convolutional net with BatchNorm whose decisions are not obvious, in eval mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, classes)
    )
    return net.to(dtype).eval()


def images(n=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(n) % 10


SEEDS = torch.arange(100, 112)
# One attack of every sort, by the name it has in the field.
EVERY = {
    "fgsm": attacks.fgsm(),
    "pgd-linf": attacks.pgd(steps=4),
    "pgd-l2": attacks.pgd(0.5, 4, 0.2, norm="l2"),
    "pgd-l1": attacks.pgd(4.0, 4, 1.5, norm="l1"),
    "trades": attacks.trades(steps=4),
    "mart": attacks.mart(steps=4),
    "mart-own": attacks.mart(steps=4, loss="mart"),
    "udr": attacks.udr(steps=4, step_size=4 / 255),
    "penalised-ot": attacks.penalised_ot(steps=4),
    "margin-restarts": attacks.pgd(steps=2, loss="margin", restarts=3),
}
every = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY)


# ---- the published rules -------------------------------------------------------------------------------------------


def start_of(attack, x, seeds=SEEDS):
    return transport_init(x, attack.cost, start=attack.start, sigma=attack.sigma, seeds=seeds).x_adv


def input_gradient(loss, x_adv):
    return torch.autograd.grad(loss, x_adv)[0]


def test_pgd_is_madrys():
    model, (x, y), attack = convnet(), images(), attacks.pgd(0.05, 7, 0.02)
    x_adv = start_of(attack, x)
    for _ in range(7):
        x_adv.requires_grad_()
        grad = input_gradient(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 0.02 * grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - 0.05), x + 0.05), 0.0, 1.0)
    assert torch.equal(attack(model, x, y, seeds=SEEDS), x_adv)


def test_pgd_l2_is_the_customary_one():
    model, (x, y), attack = convnet(), images(), attacks.pgd(0.5, 7, 0.1, norm="l2")
    x_adv = start_of(attack, x)
    for _ in range(7):
        x_adv.requires_grad_()
        grad = input_gradient(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 0.1 * grad / grad.flatten(1).norm(dim=1)[:, None, None, None]
        delta = x_adv - x
        delta = delta * (0.5 / delta.flatten(1).norm(dim=1)).clamp(max=1.0)[:, None, None, None]
        x_adv = torch.clamp(x + delta, 0.0, 1.0)
    torch.testing.assert_close(attack(model, x, y, seeds=SEEDS), x_adv, rtol=0, atol=1e-12)


def test_trades_attack_is_the_published_one():
    model, (x, y), attack = convnet(), images(), attacks.trades()
    criterion_kl = nn.KLDivLoss(reduction="sum")
    x_adv = start_of(attack, x)
    for _ in range(10):
        x_adv.requires_grad_()
        loss_kl = criterion_kl(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
        grad = input_gradient(loss_kl, x_adv)
        x_adv = x_adv.detach() + 0.007 * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - 0.031), x + 0.031)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    assert torch.equal(attack(model, x, y, seeds=SEEDS), x_adv)


def test_mart_attack_is_the_published_one():
    model, (x, y), attack = convnet(), images(), attacks.mart()
    x_adv = start_of(attack, x)
    for _ in range(10):
        x_adv.requires_grad_()
        grad = input_gradient(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + 0.007 * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - 0.031), x + 0.031)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    assert torch.equal(attack(model, x, y, seeds=SEEDS), x_adv)


@pytest.mark.parametrize("mu", [None, 0.3, torch.tensor(2.0, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("order", ["after", "before"])
def test_udr_attack_is_the_published_one_and_the_authors_order(order, mu):
    radius, tau, step = 0.03, 0.05, 0.02
    model, (x, y), attack = convnet(), images(), attacks.udr(radius, tau, 7, step, order)
    rate = step * float(1.0 if mu is None else mu) / tau
    delta = start_of(attack, x) - x
    for _ in range(7):
        x_adv = (x + delta).requires_grad_()
        grad = input_gradient(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        here = delta + step * grad.sign() if order == "after" else delta
        outside = (here.abs() > radius).double()
        delta = delta + step * grad.sign() - rate * (here - radius * here.sign()) * outside
        delta = torch.clamp(x + delta, 0.0, 1.0) - x
    result = attack.run(model, x, y, mu=mu, seeds=SEEDS)
    torch.testing.assert_close(result.x_adv, x + delta, rtol=0, atol=1e-12)
    costs = (delta.abs() - radius).clamp(min=0).square().flatten(1).sum(1) / (2 * tau)
    torch.testing.assert_close(result.costs, costs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("p", "power"), [(2, 1.5), (2, 1.0), (math.inf, 1.5), (1, 1.0)])
def test_penalised_ot_ascends_loss_minus_mu_cost(p, power):
    model, (x, y), mu = convnet(), images(), torch.tensor(0.4, dtype=torch.float64)
    attack = attacks.penalised_ot(0.3, p, power, steps=6, step_size=0.02)
    x_adv = x.clone()
    for step in range(6):
        x_adv.requires_grad_()
        objective = F.cross_entropy(model(x_adv), y, reduction="none")
        if step > 0:  # the norm has no gradient at 0, where a step follows the loss alone
            objective = objective - mu * 0.3 * torch.linalg.vector_norm((x_adv - x).flatten(1), p, dim=1) ** power
        x_adv = torch.clamp(x_adv.detach() + 0.02 * input_gradient(objective.sum(), x_adv).sign(), 0.0, 1.0)
    result = attack.run(model, x, y, mu=mu)
    torch.testing.assert_close(result.x_adv, x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.costs, transport_cost(x_adv, x, NormPower(0.3, p, power)))


def test_rfgsm_flips_zeros_alone_and_keeps_what_is_no_worse():
    torch.manual_seed(0)
    model = nn.Linear(30, 2).double()
    x = (torch.rand(200, 30) < 0.4).double()
    y = torch.randint(2, (200,))
    before = F.cross_entropy(model(x), y, reduction="none")
    result = attacks.rfgsm_k(10, 0.05).run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert ((result.x_adv == 0) | (result.x_adv == 1)).all()
    assert (result.x_adv >= x).all()
    after = F.cross_entropy(model(result.x_adv), y, reduction="none")
    torch.testing.assert_close(result.losses, after)
    fooled = model(result.x_adv).argmax(1) != y
    assert (fooled | (after >= before)).all()
    # After 10 steps of 0.05 a zero that raises the loss is one with probability 1/2: the mean number of flips is half
    # the number of such zeros, minus what was given up for being no worse.
    raises = model.weight[1 - y] > model.weight[y]
    candidates = ((x == 0) & raises).sum().item()
    flips = (result.x_adv - x).sum().item()
    assert flips == pytest.approx(candidates / 2, abs=4 * math.sqrt(candidates / 4))


def test_rfgsm_without_a_harmful_flip_returns_the_sample():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))  # every flip helps class 1
    x, y = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1])
    assert torch.equal(attacks.rfgsm_k(5, 0.3)(model, x, y), x)


# ---- known optima --------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Class 1 if the pixel is bright: logits (0.5 - v, v - 0.5) times 10."""

    def forward(self, x):
        v = x.flatten(1).mean(1)
        return 10 * torch.stack([0.5 - v, v - 0.5], 1)


def pixels(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize("loss", ["ce", "margin", lambda logits, y: F.cross_entropy(logits, y, reduction="none")])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_model_is_pushed_to_the_edge_of_ball_or_box(norm, loss):
    x, y = pixels(0.9, 0.2, 0.05, 0.97), torch.tensor([1, 0, 1, 0])
    x_adv = attacks.pgd(0.1, 10, 0.05, norm=norm, loss=loss)(Brightness(), x, y)
    torch.testing.assert_close(x_adv, pixels(0.8, 0.3, 0.0, 1.0))


def test_targeted_goes_where_it_is_told():
    x, y = pixels(0.9, 0.2), torch.tensor([1, 0])
    towards = attacks.pgd(0.1, 10, 0.05, targeted=True)(Brightness(), x, 1 - y)
    torch.testing.assert_close(towards, pixels(0.8, 0.3))


def test_margin_values():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert margin(logits, torch.tensor([1, 0])).tolist() == [-1.0, 2.0]


@every
def test_raises_the_loss(attack):
    model, (x, y) = convnet(), images()
    with torch.no_grad():
        # of TRADES the loss is the distance of the predictions
        before, after = model(x), model(attack(model, x, y, seeds=SEEDS))
    if attack.loss == "kl":
        assert (F.kl_div(after.log_softmax(1), before.softmax(1), reduction="none").sum(1) > 1e-4).all()
    else:
        assert (F.cross_entropy(after, y, reduction="none") > F.cross_entropy(before, y, reduction="none")).all()


# ---- sample by sample ----------------------------------------------------------------------------------------------


@every
def test_a_batch_is_its_samples_one_by_one(attack):
    model, (x, y) = convnet(), images()
    together = attack(model, x, y, seeds=SEEDS)
    for i in range(len(x)):
        alone = attack(model, x[i : i + 1], y[i : i + 1], seeds=SEEDS[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("batch", [0, 1])
def test_batch_of_none_and_of_one(attack, batch):
    model, (x, y) = convnet(), images(batch)
    result = attack.run(model, x, y)
    assert result.x_adv.shape == x.shape
    assert result.status.tolist() == [0] * batch
    assert (result.costs is not None) == isinstance(attack.cost, (NormPower, SoftBall))


@every
def test_deterministic_under_a_seed(attack):
    model, (x, y) = convnet(), images()
    first, again, other = (attack(model, x, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    if attack.start != "clean":
        assert not torch.equal(first, other)
    torch.manual_seed(5)
    by_default = attack(model, x, y)
    torch.manual_seed(5)
    assert torch.equal(by_default, attack(model, x, y))


def test_of_several_restarts_the_worst_is_kept():
    model, (x, y) = convnet(), images()
    one = attacks.pgd(0.2, 1, 0.01)  # short steps: the start decides
    runs = [one(model, x, y, seeds=SEEDS + r) for r in range(4)]
    with torch.no_grad():
        logits = torch.stack([model(x_adv) for x_adv in runs])
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(4), reduction="none").view(4, -1)
    key = (logits.argmax(2) != y).double() * 1e3 + losses  # fooled first
    result = attacks.pgd(0.2, 1, 0.01, restarts=4).run(model, x, y, seeds=SEEDS)
    best = key.argmax(0)
    assert len(best.unique()) > 2  # else the test could not tell the worst from the last
    assert torch.equal(result.x_adv, torch.stack(runs)[best, torch.arange(len(x))])
    torch.testing.assert_close(result.losses, losses[best, torch.arange(len(x))])


def test_restarts_of_a_cost_maximise_loss_minus_mu_cost():
    model, (x, y), mu = convnet(), images(), 3.0
    options = {"steps": 2, "step_size": 0.05, "start": "gaussian", "sigma": 0.05}
    runs = [attacks.penalised_ot(0.5, **options).run(model, x, y, mu=mu, seeds=SEEDS + r) for r in range(4)]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(model(run.x_adv), y, reduction="none") for run in runs])
    best = (losses - mu * torch.stack([run.costs for run in runs])).argmax(0)
    result = attacks.penalised_ot(0.5, restarts=4, **options).run(model, x, y, mu=mu, seeds=SEEDS)
    assert len(best.unique()) > 1
    assert torch.equal(result.x_adv, torch.stack([run.x_adv for run in runs])[best, torch.arange(len(x))])
    assert torch.equal(result.costs, torch.stack([run.costs for run in runs])[best, torch.arange(len(x))])


def test_early_stop_leaves_a_fooled_sample_where_it_is():
    # 0.45 is taken for class 0 from the start; 0.9 is never fooled; 0.55 is fooled by the second step of 0.04.
    x, y = pixels(0.45, 0.9, 0.55), torch.tensor([1, 1, 1])
    x_adv = attacks.pgd(0.2, 5, 0.04, start="clean", early_stop=True)(Brightness(), x, y)
    torch.testing.assert_close(x_adv, pixels(0.45, 0.7, 0.47))


def test_a_nan_gradient_stops_its_sample_alone():
    class Broken(nn.Module):
        def forward(self, x):
            logits = Brightness()(x)
            return logits * torch.where(x.flatten(1).mean(1, keepdim=True) > 0.8, float("nan"), 1.0)

    x, y = pixels(0.3, 0.9, 0.6), torch.tensor([0, 1, 1])
    result = attacks.pgd(0.1, 3, 0.05, start="clean").run(Broken(), x, y)
    assert result.status.tolist() == [0, TransportStatus.BAD_GRADIENT, 0]
    torch.testing.assert_close(result.x_adv, pixels(0.4, 0.9, 0.5))


def test_radius_and_price_per_sample():
    radius = torch.tensor([0.05, 0.1, 0.2])
    x, y = pixels(0.5, 0.5, 0.5), torch.tensor([0, 0, 0])
    x_adv = attacks.pgd(radius, 10, 0.05)(Brightness(), x, y)
    torch.testing.assert_close(x_adv.flatten() - 0.5, radius)
    mu = torch.tensor([0.0, 1.0, 1e6])
    moved = attacks.penalised_ot(1.0, 2, 2.0, steps=4, step_size=0.1)(Brightness(), x, y, mu=mu).flatten() - 0.5
    assert moved[0].item() == pytest.approx(0.4)
    assert moved[2].abs().item() <= 0.1 + 1e-6


# ---- the model is left alone ---------------------------------------------------------------------------------------


@every
def test_leaves_the_model_as_it_was(attack):
    # Dropout in train mode and a BatchNorm that the user froze: a blanket model.train() would wake it up.
    model = convnet().train()
    model[1].eval()
    frozen = model[0].bias
    frozen.requires_grad_(False)
    model[4].weight.grad = kept = torch.ones_like(model[4].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = images()
    x_adv = attack(model, x, y)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[4].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["4.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert not x_adv.requires_grad
    assert not x.requires_grad


def test_modes_come_back_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    model = nn.Sequential(nn.Dropout(), Fails()).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        attacks.pgd()(model, *images())
    assert all(m.training for m in model.modules())


def test_eval_mode_is_the_default_and_can_be_left_out():
    model = nn.Sequential(nn.Dropout(0.5), Brightness()).train()
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    attacks.pgd(steps=1)(model, pixels(0.3), torch.tensor([0]))
    attacks.pgd(steps=1, eval_mode=False)(model, pixels(0.3), torch.tensor([0]))
    assert seen == [False, True]


def test_works_under_no_grad_and_on_an_input_that_requires_grad():
    model, (x, y) = convnet(), images()
    expected = attacks.pgd()(model, x, y, seeds=SEEDS)
    with torch.no_grad():
        assert torch.equal(attacks.pgd()(model, x, y, seeds=SEEDS), expected)
    assert torch.equal(attacks.pgd()(model, x.clone().requires_grad_(), y, seeds=SEEDS), expected)


@pytest.mark.parametrize(
    ("attack", "forwards"),
    [
        (attacks.fgsm(), 1),
        (attacks.pgd(steps=5), 5),
        (attacks.pgd(steps=5, restarts=2), 12),  # a forward per restart finds the worst
        (attacks.trades(steps=5), 6),  # the natural prediction once, not five times
        (attacks.mart(steps=5, loss="mart"), 6),
        (attacks.penalised_ot(steps=5), 5),
        (attacks.rfgsm_k(steps=5), 7),
    ],
    ids=["fgsm", "pgd", "restarts", "trades", "mart", "penalised-ot", "rfgsm"],
)
def test_forward_passes(attack, forwards):
    model, (x, y) = convnet(), images()
    count = []
    model.register_forward_hook(lambda *_: count.append(1))
    attack(model, x.round(), y)
    assert len(count) == forwards


def test_weight_gradients_are_not_computed():
    model, (x, y) = convnet(), images()
    touched = []
    for parameter in model.parameters():
        parameter.register_hook(touched.append)
    attacks.pgd(steps=2)(model, x, y)
    assert touched == []


@pytest.mark.parametrize("name", [*EVERY, "rfgsm"])
def test_never_waits_for_the_device(name):
    # Meta tensors have no values: whatever asks a device for one raises here.
    attack = EVERY.get(name, attacks.rfgsm_k(3))
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
        x, y, seeds = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        mu = torch.rand(()) if isinstance(attack.cost, (NormPower, SoftBall)) else None
        x_adv = attack(model, x, y, mu=mu, seeds=seeds)
    assert x_adv.device.type == "meta"
    assert x_adv.shape == x.shape


# ---- what the model is fed -----------------------------------------------------------------------------------------

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.3, 0.25)


class Normalised(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        shape = (1, 3, 1, 1)
        return self.model((x - x.new_tensor(MEAN).view(shape)) / x.new_tensor(STD).view(shape))


@every
def test_normalising_in_the_step_is_a_layer_less(attack):
    model, (x, y) = convnet(), images()
    inside = attack(Normalised(model), x, y, seeds=SEEDS)
    options = {name: getattr(attack, name) for name in attack.__dataclass_fields__} | {"normalize": (MEAN, STD)}
    torch.testing.assert_close(Transport(**options)(model, x, y, seeds=SEEDS), inside, rtol=0, atol=1e-9)


def test_the_feed_has_the_dtype_and_layout_asked_for():
    model, (x, y) = convnet(torch.bfloat16), images(dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x_adv = attacks.pgd(steps=2, feed_dtype=torch.bfloat16)(model, x, y, seeds=SEEDS)
    assert {t.dtype for t in seen} == {torch.bfloat16}
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in [*seen, x_adv])
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_channels_last_changes_nothing_but_the_layout():
    model, (x, y) = convnet(), images()
    plain = attacks.pgd()(model, x, y, seeds=SEEDS)
    last = attacks.pgd()(model, x.contiguous(memory_format=torch.channels_last), y, seeds=SEEDS)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-9)


def test_the_mart_attack_of_the_authors_ascends_the_mart_loss():
    model, (x, y) = convnet(), images()
    with torch.no_grad():
        natural = model(x)
    published = Transport(Linf(0.031), 6, 0.007, "gaussian", loss=lambda z, y: mart_loss(natural, z, y, beta=4.0))
    own = attacks.mart(steps=6, loss="mart", beta=4.0)
    assert torch.equal(own(model, x, y, seeds=SEEDS), published(model, x, y, seeds=SEEDS))


# ---- an outside peer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_torchattacks_finds_the_same_adversarial_loss(norm):
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = convnet(torch.float32), images(256, torch.float32)
    y = model(x).argmax(1)  # all classified rightly, so that there is a loss to raise
    if norm == "linf":
        peer, ours = torchattacks.PGD(model, 8 / 255, 2 / 255, 10), attacks.pgd()
    else:
        peer, ours = torchattacks.PGDL2(model, 0.5, 0.1, 10), attacks.pgd(0.5, 10, 0.1, norm="l2")
    torch.manual_seed(0)
    found = peer(x, y), ours(model, x, y)
    with torch.no_grad():
        theirs, mine = (F.cross_entropy(model(x_adv), y).item() for x_adv in found)
        clean = F.cross_entropy(model(x), y).item()
    assert mine > 1.02 * clean
    assert mine == pytest.approx(theirs, rel=0.01)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
        ({"restarts": True}, TypeError, "restarts must be an int, got bool True"),
        ({"step_size": -0.1}, ValueError, "step_size must be greater than 0, got -0.1"),
        ({"loss": "cw"}, ValueError, "loss must be one of 'ce', 'kl', 'mart', 'margin', got 'cw'"),
        ({"start": "zero"}, ValueError, "start must be one of 'uniform', 'gaussian', 'clean', got 'zero'"),
        ({"sigma": 0.0}, ValueError, "sigma must be greater than 0, got 0.0"),
        ({"beta": -1}, ValueError, "beta must be at least 0, got -1"),
        ({"box": (1.0, 0.0)}, ValueError, r"box must be \(lo, hi\) with lo < hi, got \(1.0, 0.0\)"),
        ({"targeted": True, "loss": "kl"}, ValueError, "got loss='kl'"),
        ({"targeted": 1}, TypeError, "targeted must be a bool, got int 1"),
        ({"loss": "kl", "start": "clean"}, ValueError, "start must not be 'clean' for loss='kl'"),
        ({"cost": Binary()}, ValueError, "start must be 'gaussian' or 'clean' for Binary, got 'uniform'"),
        ({"cost": 0.1}, TypeError, "cost must be one of Linf, L2, L1, NormPower, SoftBall, Binary, got 0.1"),
    ],
    ids=str,
)
def test_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        Transport(**{"cost": Linf(0.1), "steps": 1, "step_size": 0.1} | options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [0.1]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(3, dtype=torch.uint8)}, TypeError, "x must be floating point, got torch.uint8"),
        ({"x": torch.tensor(0.5)}, ValueError, "x must have a batch dimension, got a scalar"),
        ({"x": pixels(0.5, 1.5)}, ValueError, r"x must lie in box=\(0, 1\), got values from 0.5 to 1.5"),
        ({"x": pixels(0.5, float("nan"))}, ValueError, r"x must lie in box=\(0, 1\), got values from nan to nan"),
        (
            {"y": torch.tensor([0])},
            ValueError,
            r"y must be a tensor with one entry per sample of x \(2, 1, 1, 1\), got \(1,\)",
        ),
        ({"y": torch.tensor([0, 7])}, ValueError, r"target must be in \[0, 1\], got 7"),
        ({"mu": 1.0}, ValueError, "mu must be None for Linf, which is a set and has no price, got 1.0"),
        ({"seeds": torch.tensor([1])}, ValueError, r"seeds must have shape \(2,\)"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int 3"),
    ],
    ids=str,
)
def test_refuses_arguments(change, error, message):
    arguments = {"x": pixels(0.2, 0.6), "y": torch.tensor([0, 1])} | change
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(error, match=message):
        attacks.pgd()(Brightness(), x, y, **arguments)


def test_refuses_unknown_norms_and_radii():
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', 'l1', got 'l3'"):
        attacks.pgd(norm="l3")
    for ball in (Linf, L2, L1):
        with pytest.raises(ValueError, match="radius must be greater than 0, got 0"):
            ball(0.0)

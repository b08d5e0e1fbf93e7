"""The training package: one step against its definition, one job, pairing and selection, configuration, workers."""

import copy
import math
import os
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from armor import dc_objective, reference
from armor.attacks import pgd
from armor.training import ConfigError, TrainConfig, checkpoint, data, loop, run, workers
from armor.training.config import (
    AttackConfig,
    AverageConfig,
    AWPConfig,
    DualConfig,
    EvaluateConfig,
    OptimizerConfig,
    SpeedConfig,
    training_attack,
)
from armor.training.evaluate import evaluate
from armor.training.graph import WARMUPS, GraphedUpdate
from armor.training.resolve import resolve
from armor.training.step import effective_share, make_model, make_state, stream, train_step
from benchmarks import naive

METHODS = ("pgd", "trades", "mart", "udr", "penalised-ot", "natural")
FAMILIES = {"kl": None, "alpha": 3.0, "renyi": 1.5}
DIGIT = (1, 8, 8)


# A run of a second or less.
SMALL = {
    "name": "run",
    "epochs": 2,
    "train_size": 120,
    "test_size": 50,
    "attack": AttackConfig(steps=3),
    "evaluate": EvaluateConfig(steps=5),
}


def config(tmp_path, **changes):
    return resolve(TrainConfig(**{**SMALL, "runs_dir": str(tmp_path), **changes}))


def problem(shape=DIGIT):
    return types.SimpleNamespace(shape=shape, classes=10)


def state_of(c, seed=0, weighting="dc", shape=DIGIT, steps_per_epoch=5):
    return make_state(c, seed, weighting, problem(shape), steps_per_epoch)


def batch(n=12, shape=DIGIT, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=draw), torch.randint(10, (n,), generator=draw)


def first_norm(model):
    return next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


# --- one step against its definition

PLAIN = {"lr": 0.5, "warmup": 0.0, "momentum": 0.0, "schedule": "constant"}  # a step is p - lr * gradient


def combinations():
    for method in METHODS:
        for mix in (0.0, 0.3):
            if mix and method == "natural":
                continue
            yield method, mix, "mean", "exact"
            for divergence in FAMILIES:
                for solve in ("exact", "learned", "frozen"):
                    yield method, mix, divergence, solve


def expected_losses(c, natural, adversarial, y):
    if c.method == "trades":
        return naive.trades_loss(natural, adversarial, y, beta=6.0)
    if c.method == "mart":
        return naive.mart_loss(natural, adversarial, y, beta=6.0)
    return F.cross_entropy(adversarial, y, reduction="none")


def expected_value(c, losses, costs, clean):
    """The re-weighted loss, with gradients as the envelope theorem has them; lam, nu where they are learned; mu."""
    dual = c.dual
    if dual.divergence == "mean":
        return losses.mean(), None, float("nan") if costs is None else dual.lam
    if dual.solve == "exact":
        kind = {"kl": reference.KL, "alpha": reference.ALPHA, "renyi": reference.RENYI}[dual.divergence]
        rows = [
            None if t is None else t.detach().double()[None]
            for t in (losses, costs, clean if costs is not None else None)
        ]
        value, lam, _, weights, *_ = reference.dual(*rows, kind, dual.alpha or 1.0, dual.radius, dual.kappa, 1e6)
        mu = lam.item() + dual.kappa
        moved = losses
        if costs is not None:  # who stays pays nothing
            moved = torch.where(losses.double() - mu * costs >= clean.double(), losses, clean)
        weighted = (weights[0].to(losses.dtype) * moved).sum()
        return weighted + (value.item() - weighted.detach()), None, mu
    lam = torch.tensor(math.log(dual.lam), requires_grad=True)
    nu = torch.tensor(dual.nu, requires_grad=True)
    mu = lam.exp() + dual.kappa
    a = losses / mu if costs is None else losses / mu - costs
    actual = {"kl": None, "alpha": nu, "renyi": a.max() + nu.exp()}[dual.divergence]
    return dc_objective(losses, lam.exp(), actual, costs, **dual.ball), (lam, nu), mu.item()


@pytest.mark.parametrize(("method", "mix", "divergence", "solve"), list(combinations()))
def test_a_step_is_its_definition(method, mix, divergence, solve):
    alpha = FAMILIES.get(divergence)
    dual = DualConfig(divergence, 0.3, 0.05, alpha, solve, lam=0.7, nu=-0.2, lr=0.01)
    given = TrainConfig(method=method, natural_mix=mix, dual=dual, optimizer=OptimizerConfig(**PLAIN))
    c = resolve(given)
    weighting = "mean" if divergence == "mean" else "dc"
    state, twin = state_of(c, 3, weighting), state_of(c, 3, weighting)
    x, y = batch()
    record = train_step(state, x, y)

    model, costs = twin.model, None
    if method == "natural":
        x_adv = x
    else:
        first = dual.lam + (dual.kappa if solve != "exact" else 0.0)
        priced = method in ("udr", "penalised-ot")
        result = training_attack(c).run(model, x, y, mu=first if priced else None, generator=twin.noise)
        x_adv, costs = result.x_adv, result.costs
        assert (costs is not None) == priced
    natural, adversarial = model(x), model(x_adv)
    losses, clean = expected_losses(c, natural, adversarial, y), F.cross_entropy(natural, y, reduction="none")
    value, duals, mu = expected_value(c, losses, costs, clean)
    objective = mix * clean.mean() + (1 - mix) * value
    gradients = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
    for parameter, before, gradient in zip(state.model.parameters(), model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * gradient, rtol=1e-4, atol=2e-6)
    assert record[0].item() == pytest.approx(objective.item(), rel=1e-4)
    assert record[1].item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert record[2].item() == pytest.approx(mu, rel=1e-3, nan_ok=True)
    assert 1 / 12 <= record[3].item() <= 1 + 1e-6
    if divergence != "mean":
        assert record[3] < 0.99999  # or nothing was re-weighted

    if solve == "learned":  # Adam's first step is lr against the sign
        slopes = torch.autograd.grad(objective, duals, allow_unused=True)
        assert state.dual.log_lam.item() == pytest.approx(math.log(0.7) - 0.01 * slopes[0].sign().item(), abs=1e-5)
        if divergence != "kl":
            assert state.dual.nu.item() == pytest.approx(-0.2 - 0.01 * slopes[1].sign().item(), abs=1e-5)
    elif solve == "frozen":
        assert state.dual.log_lam.item() == pytest.approx(math.log(0.7))


def test_the_price_of_a_step_is_the_dual_of_the_one_before(monkeypatch):
    prices = []
    original = training_attack(resolve(TrainConfig(method="udr"))).__class__.run

    def recording(self, model, x, y, *, mu=None, generator=None, seeds=None):
        prices.append(float(mu))
        return original(self, model, x, y, mu=mu, generator=generator, seeds=seeds)

    monkeypatch.setattr("armor.attacks.Transport.run", recording)
    c = resolve(TrainConfig(method="udr", dual=DualConfig(radius=0.3, kappa=0.05, lam=0.7)))
    state = state_of(c)
    records = [train_step(state, *batch(seed=seed)) for seed in range(3)]
    assert prices == pytest.approx([0.7, records[0][2].item(), records[1][2].item()])
    assert len(set(prices)) == 3


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_label_smoothing(method):
    if method == "trades":
        with pytest.raises(ConfigError, match=r"label_smoothing belongs to cross-entropy, got 0.1 with trades"):
            resolve(TrainConfig(method=method, label_smoothing=0.1))
        return
    c = resolve(TrainConfig(label_smoothing=0.1, dual=DualConfig("mean")))
    state, twin = state_of(c, weighting="mean"), state_of(c, weighting="mean")
    x, y = batch()
    x_adv = training_attack(c)(twin.model, x, y, generator=twin.noise)
    expected = F.cross_entropy(twin.model(x_adv), y, label_smoothing=0.1)
    assert train_step(state, x, y)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def published_awp(model, x_adv, y, gamma):
    """The proxy of Wu et al.'s script: a step of SGD upwards, scaled to the norm of each matrix."""
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-F.cross_entropy(proxy(x_adv), y)).backward()
    optimizer.step()
    perturbed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in perturbed.named_parameters():
            if weight.dim() > 1:
                difference = dict(proxy.named_parameters())[name] - weight
                weight += gamma * weight.norm() / (difference.norm() + 1e-20) * difference
    return perturbed


def test_awp_is_the_published_one():
    optimizer = OptimizerConfig(**PLAIN)
    c = resolve(TrainConfig(awp=AWPConfig(0.05), dual=DualConfig("mean"), optimizer=optimizer))
    state, twin = state_of(c, weighting="mean"), state_of(c, weighting="mean")
    x, y = batch()
    record = train_step(state, x, y)
    x_adv = training_attack(c)(twin.model, x, y, generator=twin.noise)
    perturbed = published_awp(twin.model, x_adv, y, 0.05)
    loss = F.cross_entropy(perturbed(x_adv), y)
    assert record[0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert loss > 1.001 * F.cross_entropy(twin.model(x_adv), y)
    gradients = torch.autograd.grad(loss, list(perturbed.parameters()))
    for parameter, before, gradient in zip(state.model.parameters(), twin.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * gradient, rtol=1e-3, atol=1e-5)


def test_awp_begins_with_its_epoch_and_leaves_the_statistics_to_the_training_passes():
    images = {"data": "cifar10", "model": "wrn-10-1", "dual": DualConfig("mean"), "attack": AttackConfig(steps=1)}
    still = OptimizerConfig(lr=1e-30, warmup=0.0, momentum=0.0)
    finals = {}
    for start in (1, 2):
        c = resolve(TrainConfig(**images, awp=AWPConfig(0.5, start=start), optimizer=still))
        state = state_of(c, weighting="mean", shape=(3, 32, 32), steps_per_epoch=1)
        before = [p.clone() for p in state.model.parameters()]
        losses = [train_step(state, *batch(4, (3, 32, 32)))[0].item() for _ in range(2)]
        for parameter, kept in zip(state.model.parameters(), before, strict=True):  # what was perturbed is back
            torch.testing.assert_close(parameter, kept, rtol=0, atol=1e-20)
        assert first_norm(state.model).num_batches_tracked == 2
        finals[start] = losses
    assert finals[1][0] > 1.05 * finals[2][0]  # perturbed from the first epoch on, and not yet
    assert finals[2][1] > 1.05 * finals[2][0]


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    x, y = batch()
    moved = {}
    for clip in (None, 0.01):
        c = resolve(TrainConfig(optimizer=OptimizerConfig(**PLAIN, clip=clip)))
        state = state_of(c)
        before = [p.clone() for p in state.model.parameters()]
        train_step(state, x, y)
        steps = [p.detach() - b for p, b in zip(state.model.parameters(), before, strict=True)]
        moved[clip] = torch.cat([s.flatten() for s in steps]).norm().item()
    assert moved[0.01] == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved[None] > 2 * moved[0.01]


# --- paths of a step: what is fast equals what is plain

PATHS = {
    "plain": {"channels_last": False, "fold": False},
    "channels_last": {"fold": False},
    "folded": {},
    "bf16": {"precision": "bf16"},
}


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("method", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("model", ["wrn-10-1", "small-cnn"])
def test_fast_paths_equal_the_plain_path(method, model):
    """Two steps from the same start. The attack takes signs of gradients, so a rounding may turn a pixel around: the
    tolerances are on the loss, and on the whole update relative to its length."""
    x, y = batch(8, (3, 32, 32))
    losses, weights = {}, {}
    for path, speed in PATHS.items():
        c = resolve(
            TrainConfig(
                data="cifar10",
                model=model,
                method=method,
                attack=AttackConfig(steps=2),
                optimizer=OptimizerConfig(lr=0.01, warmup=0.0),
                speed=SpeedConfig(**speed),
            )
        )
        state = state_of(c, shape=(3, 32, 32))
        kernels = [p for p in state.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert all(p.is_contiguous() == (path == "plain") for p in kernels)
        before = flat(state.model)
        losses[path] = torch.stack([train_step(state, x, y)[0] for _ in range(2)])
        weights[path] = flat(state.model) - before
    for path, (loss, update) in {
        "channels_last": (1e-3, 0.06),
        "folded": (1e-3, 0.06),
        "bf16": (0.03, 0.6),  # TRADES starts where predictions all but agree: their difference is mostly rounding
    }.items():
        torch.testing.assert_close(losses[path], losses["plain"], rtol=loss, atol=0)
        assert (weights[path] - weights["plain"]).norm() < update * weights["plain"].norm(), path


def test_the_compiled_path_equals_the_plain_path():
    """The attacked and the trained model are compiled apart, and a smaller last batch is one more shape of both."""
    losses = {}
    for compiled in (False, True):
        c = resolve(TrainConfig(method="trades", attack=AttackConfig(steps=2), speed=SpeedConfig(compile=compiled)))
        state = state_of(c)
        losses[compiled] = torch.stack([train_step(state, *batch(n))[0] for n in (8, 8, 5)])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_only_an_attack_in_train_mode_feeds_batchnorm(mode):
    attack = AttackConfig(steps=3, batchnorm=mode)
    c = resolve(TrainConfig(data="cifar10", model="wrn-10-1", attack=attack, dual=DualConfig("mean")))
    assert c.speed.fold == (mode == "eval")
    state = state_of(c, weighting="mean", shape=(3, 32, 32))
    train_step(state, *batch(4, (3, 32, 32)))
    assert first_norm(state.model).num_batches_tracked == (1 if mode == "eval" else 4)
    assert all(module.training for module in state.model.modules())


class FakeGraph:
    """A CUDA graph on the CPU: what is captured is run again by `replay`."""

    def register_generator_state(self, generator):
        pass

    def replay(self):
        self.again()


def test_a_graph_is_captured_once_and_only_of_whole_settled_batches(monkeypatch):
    """The bookkeeping alone: tests/test_gpu.py has the real capture."""
    seen, captured = [], []

    class Capture:
        def __init__(self, graph, stream):
            self.graph = graph

        def __enter__(self):
            captured.append(len(seen))

        def __exit__(self, *_):
            self.graph.again = lambda: seen.append((graphed.captured.x.clone(), len(graphed.captured.y)))

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)

    def fake_update(state, x, y):
        seen.append((x.clone(), len(y)))
        return torch.zeros(4)

    c = resolve(TrainConfig(batch_size=6, attack=AttackConfig(warmup=0.2), epochs=2))
    state, graphed = state_of(c), GraphedUpdate(fake_update)
    assert state.attack_warmup == 2
    batches = [torch.full((size, 1), float(number)) for number, size in enumerate([6, 6, 6, 6, 6, 6, 3, 6, 6])]
    for x in batches:
        graphed(state, x, torch.zeros(len(x)))
        state.optimizer.step()
        state.schedule.step()
    assert captured == [2 + WARMUPS]  # after the warm-up of the attack and that of the graph
    done = seen[: captured[0]] + seen[captured[0] + 1 :]  # what is recorded is not done
    assert [len(x) for x, _ in done] == [6, 6, 6, 6, 6, 6, 3, 6, 6]
    assert all(torch.equal(x, given) for (x, _), given in zip(done, batches, strict=True))


# --- schedule and averages


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 0.2}, [0.5, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
        ({"warmup": 0.2, "schedule": "constant"}, [0.5] + 9 * [1]),
        # From the third and the fifth of five epochs on.
        ({"warmup": 0.0, "schedule": "piecewise", "drops": {3: 0.1, 5: 0.01}}, 4 * [1] + 4 * [0.1] + 2 * [0.01]),
        ({"warmup": 0.0, "schedule": "cosine"}, [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]),
    ],
    ids=["linear", "constant", "piecewise", "cosine"],
)
def test_schedules(settings, expected):
    c = resolve(TrainConfig(epochs=5, optimizer=OptimizerConfig(lr=1.0, **settings)))
    state = state_of(c, steps_per_epoch=2)
    rates = []
    for _ in range(10):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        state.schedule.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_are_pytorchs_own(name):
    """The fused kernel on channels_last weights against the plain one on contiguous ones."""
    c = resolve(
        TrainConfig(
            data="cifar10",
            optimizer=OptimizerConfig(name, 0.01, nesterov=name == "sgd", weight_decay=0.1, warmup=0.0),
            model="small-cnn",
        )
    )
    state = state_of(c, shape=(3, 32, 32))
    twin = copy.deepcopy(state.model).to(memory_format=torch.contiguous_format)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    settings = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    plain = kind(twin.parameters(), lr=0.01, weight_decay=0.1, fused=False, **settings)
    x, y = batch(4, (3, 32, 32))
    for _ in range(3):
        for model, optimizer in ((state.model, state.optimizer), (twin, plain)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for ours, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_attack_grows_over_its_warmup(monkeypatch):
    radii = []

    def recording_attack(self, model, x, y, **_):
        radii.append((self.cost.radius, self.step_size))
        return type("Result", (), {"x_adv": x, "costs": None})

    monkeypatch.setattr("armor.attacks.Transport.run", recording_attack)
    for warmup, expected in ((0.5, [0.05, 0.1, 0.1, 0.1]), (0.0, [0.1] * 4), (None, [0.1] * 4)):
        c = resolve(TrainConfig(attack=AttackConfig(warmup=warmup), epochs=1))
        state = state_of(c, steps_per_epoch=4)
        radii.clear()
        for _ in range(4):
            train_step(state, *batch(4))
        assert [eps for eps, _ in radii] == pytest.approx(expected)
        assert [step for _, step in radii] == pytest.approx([eps / 4 for eps in expected])
    assert resolve(TrainConfig(data="mnist")).attack.warmup == 0.3


def test_ema_is_the_recursion_and_is_what_is_judged():
    c = resolve(TrainConfig(average=AverageConfig("ema", decay=0.7), optimizer=OptimizerConfig(**PLAIN)))
    state = state_of(c)
    assert state.judged is state.model
    expected = None
    for seed in range(4):
        train_step(state, *batch(seed=seed))
        now = [p.detach().clone() for p in state.model.parameters()]
        expected = now if expected is None else [0.7 * e + 0.3 * n for e, n in zip(expected, now, strict=True)]
    assert state.judged is not state.model
    for average, value in zip(state.judged.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-6)


def test_swa_averages_epochs_and_meets_the_training_samples(tmp_path):
    c = config(tmp_path, epochs=4, average=AverageConfig("swa", start=0.5), dual=DualConfig("mean"), select="last")
    state = state_of(c, weighting="mean", steps_per_epoch=2)
    state.model.append(nn.BatchNorm1d(10, momentum=None))  # a cumulative mean: that of one pass over the samples
    state.average = type(state.average)(state.model)
    splits = data.load(c, stream(0, "split"))
    train, kept = splits.train, []
    for epoch in range(1, 5):
        loop.train_epoch(state, train, None, lambda images: None)
        loop.average_epoch(state, train, None, epoch)
        kept.append([p.detach().clone() for p in state.model.parameters()])
    for average, third, fourth in zip(state.judged.parameters(), kept[2], kept[3], strict=True):
        torch.testing.assert_close(average, (third + fourth) / 2)
    with torch.no_grad():
        logits = state.judged[:-1](train.x)
    # The mean of the batches' means: batches of 64 and 56.
    torch.testing.assert_close(state.judged[-1].running_mean, logits.mean(0), rtol=0.05, atol=0.05)


def test_effective_share():
    assert effective_share(torch.tensor([0.25, 0.25, 0.25, 0.25])).item() == pytest.approx(1.0)
    assert effective_share(torch.tensor([1.0, 0.0, 0.0, 0.0])).item() == pytest.approx(0.25)
    assert effective_share(torch.tensor([3.0, 3.0, 3.0, 3.0])).item() == pytest.approx(
        1.0
    )  # of duals that are not exact
    assert effective_share(torch.zeros(4)).item() == 0


def test_duals_that_leave_no_sample_a_weight_end_the_run(tmp_path):
    stuck = DualConfig("alpha", 0.2, 0.0, 3.0, "frozen", lam=1.0, nu=100.0)
    with pytest.raises(FloatingPointError, match=r"no sample of epoch 1 has any weight; another dual.nu or dual.lam"):
        run_job(config(tmp_path, dual=stuck), "dc")


# --- one job


def run_job(c, weighting, setting="balanced", seed=0):
    return loop.run_job(loop.Job(setting, seed, weighting), lambda images: None, c)


def stored(c, weighting, setting="balanced", seed=0):
    return checkpoint.load(loop.checkpoint_path(c, loop.Job(setting, seed, weighting)))


def test_the_two_models_of_a_pair_share_weights_batches_and_noise(tmp_path, monkeypatch):
    seen = {}

    def recording_step(state, x, y):
        weights = [p.detach().clone() for p in state.model.parameters()]
        seen.setdefault(state.weighting, []).append((weights, x.clone(), y.clone(), state.noise.get_state()))
        return train_step(state, x, y)

    monkeypatch.setattr(loop, "train_step", recording_step)
    c = config(tmp_path, control=True)
    assert c.weightings == ("mean", "dc")
    for weighting in c.weightings:
        run_job(c, weighting, "label-noise")
    assert len(seen["mean"]) == len(seen["dc"]) == 4  # 2 epochs of 120 samples in batches of 64
    for step, ((weights, x, y, noise), (weights_dc, x_dc, y_dc, noise_dc)) in enumerate(
        zip(*seen.values(), strict=True)
    ):
        assert torch.equal(x, x_dc)
        assert torch.equal(y, y_dc)
        assert torch.equal(noise, noise_dc)
        # The same start; and from then on the weighting must make a difference, or nothing was compared.
        assert all(map(torch.equal, weights, weights_dc)) == (step == 0)
    assert not torch.equal(seen["mean"][0][1], seen["mean"][2][1])  # each epoch has its own batches


def test_a_radius_of_zero_is_the_control(tmp_path):
    c = config(tmp_path, dual=DualConfig(radius=0.0, kappa=0.0))
    finals = []
    for weighting in ("mean", "dc"):
        run_job(c, weighting)
        finals.append(stored(c, weighting)["model"])
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-4, atol=1e-5)


def test_a_job_is_deterministic_under_its_seed(tmp_path):
    c = config(tmp_path)
    entries, files = [], []
    for seed in (5, 5, 6):
        torch.rand(3)  # whatever the global generator does must not matter
        entry = run_job(c, "dc", "long-tail", seed)
        entries.append({key: entry[key] for key in ("final", "history")})
        files.append(stored(c, "dc", "long-tail", seed))
    assert entries[0] == entries[1] != entries[2]
    assert all(torch.equal(files[0]["model"][name], files[1]["model"][name]) for name in files[0]["model"])
    assert all(torch.equal(files[0]["samples"][name], files[1]["samples"][name]) for name in files[0]["samples"])


@pytest.mark.parametrize("changes", [{}, {"normalize": True}, {"average": AverageConfig("ema", 0.9)}])
def test_checkpoint_holds_the_model_that_was_judged(tmp_path, changes):
    c = config(tmp_path, **changes)
    entry = run_job(c, "dc")
    content = stored(c, "dc")
    splits = data.load(c, stream(0, "split"))
    model = make_model(c, splits)
    assert (content["input_shape"], content["classes"]) == ([1, 8, 8], 10)
    model.load_state_dict(content["model"])
    again = evaluate(model, splits.test, norm="linf", eps=0.1, steps=5, step_size=0.01, generator=stream(0, "evaluate"))
    assert again == content["final"] == entry["final"]
    assert content["config"]["attack"]["eps"] == "0.1"


ODD = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, classes)

    def forward(self, x):
        return self.layer(x.flatten(1)) if x.sum() > 0 else self.layer(0 * x.flatten(1))
"""


def test_a_model_of_ones_own_trains_and_the_run_says_that_it_is_not_folded(tmp_path, monkeypatch, capsys):
    (tmp_path / "odd_net.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    longer = {**SMALL, "epochs": 15, "runs_dir": str(tmp_path)}
    metrics = run(TrainConfig(**longer, model="odd_net:Net", workers=1))
    assert "The attack runs the model unfolded, because torch.fx cannot trace it" in capsys.readouterr().out
    assert metrics["runs"][0]["final"]["clean"] > 0.4
    assert stored(config(tmp_path), "dc")["model"]["layer.weight"].shape == (10, 64)


@pytest.mark.parametrize(("select", "expected"), [("best", 2), ("last", 4)])
def test_the_best_epoch_on_the_validation_part_is_kept(tmp_path, monkeypatch, select, expected):
    robust = iter([0.3, 0.6, 0.5, 0.6])
    weights = []

    def given(model, samples, c, seed):
        weights.append(model.state_dict()["1.weight"].clone())
        return 0.9, next(robust)

    monkeypatch.setattr(loop, "validation_accuracy", given)
    c = config(tmp_path, epochs=4, select=select)
    entry = run_job(c, "dc")
    assert entry["selected_epoch"] == expected
    assert torch.equal(stored(c, "dc")["model"]["1.weight"], weights[expected - 1])


def test_the_monitor_stops_a_collapse_and_keeps_the_epoch_before(tmp_path, monkeypatch, capsys):
    robust = iter([0.3, 0.6, 0.45, 0.05, 0.9])
    monkeypatch.setattr(loop, "validation_accuracy", lambda *_: (0.9, next(robust)))
    c = config(tmp_path, epochs=5, monitor=True, attack=AttackConfig(steps=1))
    assert c.step_size == pytest.approx(0.125)
    entry = run_job(c, "dc")
    assert entry["selected_epoch"] == 2
    assert len(entry["history"]["robust"]) == 4
    assert "stopped after epoch 4 of 5, robust accuracy fell from 60.0% to 5.0%" in capsys.readouterr().err


def test_selection_and_judgement_use_the_ball_of_the_evaluation(tmp_path):
    c = config(tmp_path, evaluate=EvaluateConfig(eps="0.05", steps=5))
    attack = loop.selecting_attack(c)
    assert (attack.cost.radius, attack.steps, attack.step_size) == (0.05, 10, 0.0125)
    assert loop.judging(c) == {"norm": "linf", "eps": 0.05, "steps": 5, "step_size": 0.005}


@pytest.mark.parametrize("method", METHODS)
def test_shown_samples_are_the_most_and_the_least_weighted(tmp_path, method):
    c = config(tmp_path, method=method)
    run_job(c, "dc", "label-noise")
    samples = stored(c, "dc", "label-noise")["samples"]
    weight, loss = samples["weight"], samples["loss"]
    assert len(weight) == 20
    assert weight[:10].min() > 1 > weight[10:].max()
    assert torch.equal(weight, weight.sort(descending=True).values)
    if method not in ("udr", "penalised-ot"):  # there the cost has a say, too
        assert torch.equal(loss.argsort(descending=True, stable=True), torch.arange(20))


def test_progress_adds_up_to_the_announced_work(tmp_path):
    c, amounts = config(tmp_path), []
    loop.run_job(loop.Job("balanced", 0, "mean"), amounts.append, c)
    assert sum(amounts) == loop.image_passes(120, 200, 50, c)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a" / "model.pt"
    checkpoint.save({"model": {"w": torch.arange(3.0)}, "epoch": 2}, path)
    loaded = checkpoint.load(path)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))

    def disk_full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 3}, path)
    assert checkpoint.load(path)["epoch"] == 2
    assert os.listdir(path.parent) == ["model.pt"]


# --- configuration


def attacked(**changes):
    return {"attack": AttackConfig(**changes)}


def dual(**changes):
    return {"dual": DualConfig(**changes)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "cifar11"}, "data must be one of digits, mnist, fashion-mnist, cifar10, .*, got 'cifar11'"),
        ({"method": "pdg"}, "method must be one of pgd, trades, mart, udr, penalised-ot, natural, got 'pdg'"),
        ({"settings": ["long-tale"]}, "settings must be one of balanced, long-tail, label-noise, got 'long-tale'"),
        ({"settings": []}, "settings must name at least one"),
        (attacked(eps="8/256/2"), "attack.eps must be a number such as 0.1 or a fraction such as 8/255"),
        (attacked(eps="8/0"), "attack.eps must be a number"),
        (attacked(eps="nan"), "attack.eps must be a number"),
        (attacked(eps="8"), "attack.eps must lie in .0, 1. because pixels lie in .0, 1., got '8'"),
        (attacked(eps=-0.1), "attack.eps must lie in .0, 1."),
        (attacked(eps=-1.0, norm="l2"), "attack.eps must be positive and finite, got -1.0"),
        ({"evaluate": EvaluateConfig(eps="2")}, "evaluate.eps must lie in .0, 1."),
        ({"evaluate": EvaluateConfig(steps=0)}, "evaluate.steps must be at least 1, got 0"),
        (attacked(step_size="-1/255"), "attack.step_size must be positive and finite, got -0.0039"),
        (attacked(warmup=1.5), "attack.warmup must lie in .0, 1., got 1.5"),
        (attacked(steps=0), "attack.steps must be at least 1, got 0"),
        (attacked(loss="kl"), "attack.loss kl belongs to trades and mart, got it with method pgd"),
        (attacked(loss="kl", start="clean") | {"method": "trades"}, "attack: start must not be 'clean' for loss='kl'"),
        (attacked(norm="l2") | {"method": "udr"}, "attack.norm has no use with method udr, whose cost has its own"),
        (attacked(norm="binary") | {"method": "trades"}, "attack.norm binary needs method pgd, got trades"),
        (attacked(tau=-1.0) | {"method": "udr"}, "attack: tau.*-1"),
        (dual(radius=-1.0), "dual: .*radius.*-1"),
        (dual(kappa=-2.0), "dual: .*kappa.*-2"),
        (dual(divergence="alpha", alpha=0.5), "dual: .*alpha.*0.5"),
        (dual(divergence="alpha"), "dual: alpha must be given for divergence='alpha', got None"),
        (dual(divergence="mean", solve="learned"), "dual.solve learned has no use with dual.divergence mean"),
        (dual(lam=0.0), "dual.lam must be positive and finite, got 0.0"),
        (dual(lam=-1.0, solve="learned"), "dual: lam.*-1"),
        (dual(divergence="mean") | {"control": True}, "control has no use with dual.divergence mean"),
        ({"beta": 6.0}, "beta belongs to trades and mart, got 6.0 with method pgd"),
        ({"beta": -1.0, "method": "mart"}, "beta must be at least 0, got -1.0"),
        ({"natural_mix": 1.0}, "natural_mix must lie in .0, 1., got 1.0"),
        ({"natural_mix": 0.5, "method": "natural"}, "natural_mix has no use with method natural"),
        ({"monitor": True}, "monitor is for attacks of one step, got 10 steps with method pgd"),
        ({"awp": AWPConfig(-1.0)}, "awp.gamma must be at least 0, got -1.0"),
        ({"average": AverageConfig("ema", decay=1.0)}, "average.decay must lie in .0, 1., got 1.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"optimizer": OptimizerConfig(lr=0.0)}, "optimizer.lr must be positive and finite, got 0.0"),
        ({"optimizer": OptimizerConfig(clip=0.0)}, "optimizer.clip must be positive, got 0.0"),
        (
            {"optimizer": OptimizerConfig(schedule="piecewise")},
            "optimizer.drops and schedule piecewise need each other",
        ),
        ({"optimizer": OptimizerConfig(drops={5: 0.1})}, "optimizer.drops and schedule piecewise need each other"),
        ({"label_noise": 1.5}, "label_noise must lie in .0, 1., got 1.5"),
        ({"long_tail_ratio": 0.5}, "long_tail_ratio must be at least 1, got 0.5"),
        ({"extra": "a.npz", "extra_share": 1.0}, "extra_share must lie in .0, 1., got 1.0"),
        ({"augment": True}, "augment needs images larger than digits, got data digits"),
        ({"speed": SpeedConfig(cuda_graph=True), "device": "cpu"}, "speed.cuda_graph needs a CUDA device"),
        ({"speed": SpeedConfig(precision="tf32"), "device": "cpu"}, "speed.precision tf32 needs a CUDA device"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device cuda:99 asked for, but torch sees"),
        ({"name": "../elsewhere"}, "name must be one folder name"),
        ({"data_dir": "somewhere"}, "data_dir has no use with data digits"),
    ],
)
def test_configuration_errors_name_the_argument_and_the_value(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(TrainConfig(**changes))


def test_numbers_are_kept_as_given():
    c = resolve(TrainConfig(attack=AttackConfig(eps="8/255"), evaluate=EvaluateConfig(step_size="1/255")))
    assert (c.attack.eps, c.evaluate.eps) == ("8/255", "8/255")
    assert c.eps == c.evaluate_eps == 8 / 255
    assert c.step_size == pytest.approx(2 / 255)
    assert c.evaluate_step_size == 1 / 255


def test_attacks_of_the_methods():
    """Against the constructors of armor.attacks, which have the published defaults."""
    from armor import attacks

    def attack(method, **changes):
        return training_attack(resolve(TrainConfig(method=method, **attacked(eps=0.05, step_size=0.01, **changes))))

    assert attack("pgd") == pgd(0.05, 10, 0.01)
    assert attack("pgd", norm="l2") == pgd(0.05, 10, 0.01, "l2")
    assert attack("trades") == attacks.trades(0.05, 10, 0.01)
    assert attack("mart") == attacks.mart(0.05, 10, 0.01)
    assert attack("mart", loss="mart") == attacks.mart(0.05, 10, 0.01, loss="mart", beta=6.0)
    assert attack("udr", tau=0.2) == attacks.udr(0.05, 0.2, 10, 0.01)
    assert attack("penalised-ot", p="inf", power=1.0) == attacks.penalised_ot(0.1, math.inf, 1.0, 10, 0.01)
    assert attack("pgd", norm="binary") == attacks.rfgsm_k(10, 0.01)
    assert attack("pgd", batchnorm="train").eval_mode is False


# --- workers


def square(job, progress):
    progress(1.0)
    if job == "fails":
        raise ZeroDivisionError("on purpose")
    if job == "dies":
        os.kill(os.getpid(), 9)
    return job * job


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_jobs(count):
    assert workers.run_jobs(square, [3, 1, 2], [1, 1, 1], count, threads=1) == [9, 1, 4]


@pytest.mark.parametrize("count", [1, 2])
def test_a_failing_job_is_named(count):
    with pytest.raises(workers.JobError, match="fails failed: ZeroDivisionError: on purpose"):
        workers.run_jobs(square, [1, "fails", 2], [1, 1, 1], count, threads=1)


def test_a_killed_worker_does_not_hang_the_run():
    with pytest.raises(workers.JobError, match="a worker process died"):
        workers.run_jobs(square, ["dies", 2], [1, 1], 2, threads=1)

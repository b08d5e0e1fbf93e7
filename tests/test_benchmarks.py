"""The benchmarks' baselines against the float64 oracle, and their way from a run to csv, tables and plot."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from armor import ops, reference
from armor.losses import LearnedDual

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from benchmarks import (
    bench_attack,
    bench_dual,
    bench_rowloss,
    bench_train,
    bench_transport,
    markdown,
    measure,
    naive,
    plot,
    records,
    tables,
)

command_line = importlib.import_module("benchmarks.__main__")
ROOT = Path(__file__).parents[1]
BASELINES = [("scipy", "kl"), ("brent", "kl"), ("eager", "kl"), ("scipy", "alpha"), ("scipy", "renyi")]

MODULES = {"dual": bench_dual, "transport": bench_transport, "rowloss": bench_rowloss, "attack": bench_attack}
MODULES["train"] = bench_train
HAS_TORCHATTACKS = importlib.util.find_spec("torchattacks") is not None
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}

# Relative error of the value, and L1 distance of the gradient from the exact weights. The Rényi script tells
# L-BFGS-B to stop at 1e-7, which leaves the duals, and with them the weights, far looser than the value.
TOLERANCES = {
    (torch.float32, "kl"): (2e-6, 1e-5),
    (torch.float32, "alpha"): (2e-6, 1e-5),
    (torch.float32, "renyi"): (5e-6, 5e-4),
    (torch.float64, "kl"): (1e-12, 1e-6),
    (torch.float64, "alpha"): (1e-12, 1e-9),
    (torch.float64, "renyi"): (1e-8, 5e-4),
}


# The smallest and the usual row of the benchmark, several rows at once, and sums long enough to round.
@pytest.mark.parametrize("shape", [(1, 32), (1, 128), (8, 64), (1, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("provider", "divergence"), BASELINES)
def test_baselines_agree_with_the_oracle(provider, divergence, dtype, shape):
    losses = bench_dual.make_losses(*shape).to(dtype).requires_grad_()
    value = bench_dual.PROVIDERS[provider](losses, divergence=divergence, **bench_dual.SETTINGS[divergence])
    (gradient,) = torch.autograd.grad(value.sum(), losses)

    exact, weights = oracle(losses, shape, divergence)
    value_tolerance, weight_tolerance = TOLERANCES[dtype, divergence]
    assert value.shape == losses.shape[:-1]
    assert ((value.view(-1) - exact) / exact).abs().max() < value_tolerance
    assert (gradient.view(shape) - weights).abs().sum(-1).max() < weight_tolerance


def test_compiled_baseline_is_the_eager_one():
    """Traced as the benchmark does it; bench_dual.py checks the generated code before it times it."""
    traced = torch.compile(naive.eager_dc_loss, fullgraph=True, backend="aot_eager")
    losses = bench_dual.make_losses(1, 64).requires_grad_()
    values = [solve(losses, radius=0.2, kappa=0.12) for solve in (traced, naive.eager_dc_loss)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, losses)[0] for value in values]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_kl_baselines_with_kappa_in_charge():
    """kappa = 5 is above the unregularised mu, so the value is kappa * log mean exp(losses / kappa)."""
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = 5 * torch.log(torch.exp(losses / 5).mean())
    for provider in ("scipy", "brent", "eager"):
        value = bench_dual.PROVIDERS[provider](losses, divergence="kl", radius=0.2, kappa=5.0)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_published_cap_is_kept():
    """Losses of thousands need lambda above 100, where the published search stops: the value is too big."""
    losses = 1000 * torch.arange(8, dtype=torch.float64)
    capped = naive.scipy_dc_loss(losses, divergence="kl", radius=0.02)
    tuned = naive.brent_dc_loss(losses, radius=0.02)
    exact, _ = oracle(losses, (1, 8), "kl", radius=0.02, kappa=0.0)
    torch.testing.assert_close(tuned, exact[0], rtol=1e-9, atol=0)
    assert capped > 1.1 * exact[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost", ["linf", "l2", "norm_power", "soft_ball", "binary"])
def test_steps_agree_with_the_oracle(cost, dtype):
    x_adv, grad, x = attacked(cost, dtype)
    kind, settings, step_size = bench_transport.COSTS[cost]
    found = naive.STEPS[cost](x_adv, grad, x, step_size=step_size, **settings)
    exact, _ = oracle_step(kind(**settings), x_adv, grad, x, step_size)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=ROUNDING[dtype])


def test_l1_step_is_exact_away_from_the_box():
    x_adv, grad, x = attacked("l1", torch.float64)
    x_adv, x = 0.3 + 0.4 * x_adv, 0.3 + 0.4 * x
    found = naive.l1_step(x_adv, grad, x, step_size=0.5, radius=1.0, top=0.05)
    exact, _ = oracle_step(ops.L1(1.0, top=0.05), x_adv, grad, x, 0.5)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)
    assert (found - x).abs().flatten(1).sum(1).tolist() == pytest.approx([1.0] * 3, rel=1e-12)


def test_l1_step_loses_what_the_box_cuts_off():
    """The displacement (2, 1) shrinks by 0.5 into the ball of radius 2, and the box leaves (1, 0.5) of (1.5, 0.5). The
    closest point of both is (1, 1): the second entry may have what the first one cannot."""
    x_adv, grad, x = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2)
    assert naive.l1_step(x_adv, grad, x, step_size=1.5, radius=2.0, top=0.5).tolist() == [[1.0, 0.5]]
    assert oracle_step(ops.L1(2.0, top=0.5), x_adv, grad, x, 1.5)[0].tolist() == [[1.0, 1.0]]


def test_fed_step_agrees_with_the_oracle():
    x_adv, grad, x = attacked("l2", torch.float64)
    mean, std = (torch.tensor(numbers).double() for numbers in (bench_transport.MEAN, bench_transport.STD))
    x_next, feed = naive.fed_step(naive.l2_step, x_adv, grad, x, mean, std, step_size=0.125, radius=0.5)
    exact, exact_feed = oracle_step(ops.L2(0.5), x_adv, grad, x, 0.125, mean, std)
    torch.testing.assert_close(x_next, exact, rtol=0, atol=1e-13)
    torch.testing.assert_close(feed, exact_feed, rtol=0, atol=1e-12)


def test_starts_are_the_named_distributions():
    """Entries are uniform in the linf ball; in the l2 ball of 4 dimensions (length / radius)^4 is."""
    torch.manual_seed(0)
    x = torch.full((20000, 1, 2, 2), 0.5, dtype=torch.float64)
    entry = (naive.linf_start(x, radius=0.25) - x) / 0.25
    assert entry.abs().max() <= 1
    assert entry.mean().item() == pytest.approx(0, abs=0.01)
    assert entry.square().mean().item() == pytest.approx(1 / 3, rel=0.01)
    length = (naive.l2_start(x, radius=0.25) - x).flatten(1).norm(dim=1) / 0.25
    assert length.max() <= 1
    assert length.pow(4).mean().item() == pytest.approx(1 / 2, rel=0.02)
    assert length.pow(8).mean().item() == pytest.approx(1 / 3, rel=0.03)
    assert (naive.gaussian_start(x, sigma=0.01) - x).std().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("loss", list(bench_rowloss.SETTINGS))
def test_losses_agree_with_the_oracle(loss):
    """Values and the gradients in all logits, at 3 classes and at 100."""
    for classes in (3, 100):
        case = measure.Case(loss, 16, classes, "forward+backward", "eager")
        logits, target = bench_rowloss.inputs(case)
        logits = [t.detach().double().requires_grad_() for t in logits]
        value = getattr(naive, loss)(*logits, target, **bench_rowloss.SETTINGS[loss])
        upstream = torch.linspace(0.5, 2, value.numel(), dtype=torch.float64).view(value.shape)
        gradients = torch.autograd.grad(value, logits, upstream)
        exact, exact_gradients = oracle_loss(loss, logits, target, upstream)
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=0)
        for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
            torch.testing.assert_close(gradient, exact_gradient, rtol=1e-6, atol=1e-12)


def test_losses_are_the_official_batch_losses():
    """TRADES and MART as their repositories write them, with a mean over the batch."""
    case = measure.Case("mart_loss", 8, 10, "forward", "eager")
    (natural, adversarial), y = bench_rowloss.inputs(case)
    kl = torch.nn.KLDivLoss(reduction="sum")
    robust = kl(torch.log_softmax(adversarial, 1), torch.softmax(natural, 1)) / 8
    trades = torch.nn.functional.cross_entropy(natural, y) + 6.0 * robust
    torch.testing.assert_close(naive.trades_loss(natural, adversarial, y, beta=6.0).mean(), trades)
    q, p = torch.softmax(adversarial, 1), torch.softmax(natural, 1)
    rows = torch.arange(8)
    wrong = q.scatter(1, y[:, None], 0).argmax(1)
    boosted = -q[rows, y].log().mean() - torch.log(1.0001 - q[rows, wrong] + 1e-12).mean()
    doubted = (torch.nn.KLDivLoss(reduction="none")(torch.log(q + 1e-12), p).sum(1) * (1.0000001 - p[rows, y])).sum()
    mart = boosted + 6.0 * doubted / 8
    torch.testing.assert_close(naive.mart_loss(natural, adversarial, y, beta=6.0).mean(), mart)


def test_attack_loops_differ_only_in_the_weights_gradients():
    case = measure.Case("resnet", 128, 3072, "pgd-10", "autograd")
    model, x, y = bench_attack.problem(case.case)
    x, y, found = x[:4], y[:4], {}
    for name, gradient in (("backward", naive.by_backward), ("autograd", naive.by_autograd)):
        torch.manual_seed(1)
        found[name] = naive.pgd(model, x, y, gradient, radius=0.1, step_size=0.02, steps=3)
        assert all((p.grad is None) == (name == "autograd") for p in model.parameters())
        model.zero_grad()
    assert torch.equal(found["backward"], found["autograd"])


def test_attacks_that_cheat_are_not_timed(monkeypatch):
    """Noise raises the loss too little; twice the radius leaves the ball."""
    case = measure.Case("resnet", 128, 3072, "pgd-10", "armor")
    monkeypatch.setattr(bench_attack, "BATCH", 8)
    monkeypatch.setattr(bench_attack, "attained", bench_attack.attained.__wrapped__)
    model, x, y = bench_attack.problem(case.case)
    honest = naive.pgd(model, x, y, naive.by_autograd, **bench_attack.SETTINGS)
    assert bench_attack.check(case, honest) < 0.05
    with pytest.raises(AssertionError, match="raises the loss"):
        bench_attack.check(case, naive.linf_start(x, radius=8 / 255))
    with pytest.raises(AssertionError):
        bench_attack.check(case, naive.linf_start(x, radius=16 / 255))


def trained(method, provider, net="mnist-cnn"):
    return measure.Case(f"{net} fp32", 16, torch.Size(bench_train.NETS[net].shape).numel(), method, provider)


# The net with BatchNorm, which armor attacks folded, for one method, because it takes a second.
STEPPED = [trained(method, provider) for method in bench_train.METHODS for provider in ("published", "eager", "armor")]
STEPPED += [trained("trades", provider, "resnet8") for provider in ("published", "eager", "armor")]


@pytest.mark.parametrize("case", STEPPED, ids="{0.case} {0.mode} {0.provider}".format)
def test_training_steps_attack_and_have_the_exact_loss_and_gradient(case):
    assert bench_train.check(case, *bench_train.watched(bench_train.build(case, 2)), 2) < 1e-5


@pytest.mark.parametrize("method", list(bench_train.METHODS))
def test_training_steps_that_cheat_are_not_timed(method):
    """Samples that stayed where they were or went too far, the mean instead of the worst case, half of the gradient."""
    case = trained(method, "armor")
    training = bench_train.build(case, 2)
    x_adv, loss, gradient = bench_train.watched(training)
    assert bench_train.check(case, x_adv, loss, gradient) < 1e-5
    with pytest.raises(AssertionError, match="raises the objective"):
        bench_train.check(case, training.x + 1e-4 * (x_adv - training.x), loss, gradient)
    with pytest.raises(AssertionError):
        bench_train.check(case, training.x + 2.1 * (x_adv - training.x), loss, gradient)
    with pytest.raises(AssertionError, match="loss is off by"):
        bench_train.check(case, x_adv, 0.999 * loss, gradient)
    with pytest.raises(AssertionError, match="gradient is off by"):
        bench_train.check(case, x_adv, loss, [*gradient[:-4], *(0.5 * each for each in gradient[-4:])])


@pytest.mark.parametrize("net", ["mnist-cnn", "resnet8"])
@pytest.mark.parametrize("method", list(bench_train.METHODS))
def test_passes_are_all_that_armors_step_asks_of_the_net(method, net):
    """The same convolutions in the same layout, forwards and backwards, and as many; nothing that solves or updates."""
    armor, passes = (asked(bench_train.build(trained(method, provider, net), 3)) for provider in ("armor", "passes"))
    convolutions = [name for name, _ in passes if "convolution" in name]
    assert Counter(call for call in armor if "convolution" in call[0]) == Counter(
        call for call in passes if "convolution" in call[0]
    )
    natural = method in ("trades", "mart")
    layers = {"mnist-cnn": 4, "resnet8": 9}[net]
    assert len(convolutions) == layers * (2 * (3 + 1) + 3 * natural)
    assert any(name.startswith("armor::") for name, _ in armor)
    assert not any(name.startswith("armor::") for name, _ in passes)


def asked(training):
    """(operator, what tells its work) of every operator of a step."""
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [(tuple(t.shape), t.stride()) for t in args if isinstance(t, torch.Tensor)]
            calls.append((func.name(), str((tensors, args[-1] if "convolution" in func.name() else None))))
            return func(*args, **(kwargs or {}))

    with Watch():
        training.run()
    return calls


def test_learned_dual_is_that_of_the_scripts():
    """Its value is the dual objective of armor at the same lambda; Adam's first step is as long as its step size."""
    losses, costs = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([0.0, 0.1, 0.2])
    learned = naive.LearnedKL(radius=0.05, step_size=0.125)
    value = learned(losses, costs)
    torch.testing.assert_close(value, LearnedDual(0.05)(losses, costs))
    value.backward()
    learned.update()
    assert learned.lam.item() in (pytest.approx(0.875), pytest.approx(1.125))
    with pytest.raises(FloatingPointError, match="NaN"):
        learned(losses * torch.nan, costs)


def test_peak_of_memory():
    """1 MB that was there before does not count, 4 MB that were returned before another 2 MB do."""
    mega, kept = 2**18, []  # float32

    def grow_and_shrink():
        kept.append(torch.ones(mega))
        torch.ones(4 * mega).sum()
        kept.append(torch.ones(2 * mega))

    before = torch.ones(mega)
    assert measure.peak(grow_and_shrink) == pytest.approx(5 * 2**20, abs=4096)
    assert measure.peak(lambda: before.add_(1)) < 4096


def test_time_on_a_gpu_ends_with_its_work(monkeypatch):
    done = []
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("finished"))
    benchmark = types.SimpleNamespace(pedantic=lambda step, rounds: [step() for _ in range(rounds)])
    case = measure.Case("kl", 1, 128, "forward", "armor")
    measure.time(benchmark, "dual", case, lambda: done.append("called"), config={}, rounds=2)
    assert done == ["finished", "called", "finished", "called", "finished"]
    assert benchmark.extra_info["device"] == "a GPU"


def test_a_failing_case_keeps_the_recorded_numbers(tmp_path, monkeypatch, capsys):
    """In another folder the cases that passed are written all the same."""
    monkeypatch.setattr(command_line, "_run", lambda *_: False)
    monkeypatch.setattr(records, "from_json", lambda path: sample())
    monkeypatch.setattr(records, "DATA", tmp_path / "data")
    for folder, written in ((records.DATA, False), (tmp_path / "other", True)):
        assert command_line.measure(["dual"], False, folder, "cpu", []) == 1
        assert (folder / "dual.csv").exists() == written
    assert "dual: not written, because a case failed" in capsys.readouterr().err


def test_counts_of_a_step():
    """128 x 3072 numbers of 4 bytes are N. Eager linf: sign and the two clamps touch 2 N, the other three 3 N."""
    size = 128 * 3072 * 4
    eager, armor = (
        measure.counts(bench_transport.build(measure.Case("linf", 128, 3072, "step", provider), "meta"))
        for provider in ("eager", "armor")
    )
    assert eager == {"operators": 6, "syncs": 0, "bytes": 15 * size}
    assert armor == {"operators": 1, "syncs": 0, "bytes": 4 * size + 128 * 4}  # and the status


def test_counts_know_views_syncs_and_expanded_tensors():
    x = torch.empty(8, 16, device="meta")
    assert measure.counts(lambda: x.view(16, 8).t()[0].detach()) == {"operators": 0, "syncs": 0, "bytes": 0}
    assert measure.counts(lambda: x.sum().item()) == {"operators": 1, "syncs": 1, "bytes": 4 * 128 + 4}
    row = x[0].expand(8, 16)
    assert measure.counts(lambda: x + row) == {"operators": 1, "syncs": 0, "bytes": 4 * (128 + 16 + 128)}


def test_every_provider_has_its_cases():
    for module in MODULES.values():
        timed = module.cases()
        assert len(set(timed)) == len(timed)
    timed = bench_dual.cases()
    at_128 = [case for case in timed if case[1:4] == (1, 128, "forward+backward")]
    providers = [case.provider for case in at_128 if case.case == "kl"]
    assert providers == ["scipy", "brent", "eager", "compile", "mean", "armor"]
    assert [case.provider for case in at_128 if case.case == "renyi"] == ["scipy", "mean", "armor"]
    assert {case.n for case in timed if case.rows == 1} >= {32, 1048576}
    # what the targets compare
    steps = {(c.case, c.provider) for c in bench_transport.cases() if c[1:4] == (128, 3072, "step")}
    assert steps == {(cost, p) for cost in naive.STEPS for p in ("eager", "compile", "armor")}
    losses = {(c.case, c.n, c.provider) for c in bench_rowloss.cases() if c.mode == "forward+backward"}
    assert losses >= {("dc_trades", n, p) for n in (10, 1000) for p in ("eager", "compile", "armor")}
    assert len(bench_attack.cases()) == 8
    stepped = {(c.case, c.rows, c.mode, c.provider) for c in bench_train.cases()}
    held = ("published", "armor", "passes")
    wanted = {("resnet18 fp32", 32, mode, p) for mode in ("trades", "mart", "renyi") for p in held}
    modes = ("trades", "mart", "renyi", "penalised-ot")
    assert stepped == wanted | {("mnist-cnn fp32", 128, mode, p) for mode in modes for p in (*held, "eager")}


def test_cases_of_a_gpu():
    """Which choices there are is read when the module is imported, so that a process of its own is asked."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_train.py", "--collect-only", "-q"]
    env = os.environ | {"ARMOR_BENCH_DEVICE": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("[turn0-")[2].rstrip("]") for line in done.stdout.splitlines()}
    wanted = {"resnet18 fp32-128x3072-trades-published", "resnet8 bf16-128x3072-trades graph-armor"}
    assert wanted | {"resnet18 tf32-128x3072-trades compile-armor"} <= found
    assert not {f"resnet18 fp32-128x3072-trades{mode}-published" for mode in (" graph", " compile")} & found


def test_quick_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", *records.KERNELS, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    shapes = {"dual": {(1, 128)}, "transport": {(128, 3072)}, "rowloss": {(128, 10)}, "attack": {(128, 784)}}
    shapes["train"] = {(128, 784)}
    for kernel in records.KERNELS:
        rows = records.read(tmp_path / f"{kernel}.csv")
        times = [r for r in rows if r["metric"] == "time"]
        timed = {(r["case"], r["rows"], r["n"], r["mode"], r["provider"]) for r in times}
        cases = MODULES[kernel].cases()
        absent = {"compile"} if HAS_TORCHATTACKS else {"compile", "torchattacks"}
        wanted = {c for c in cases if (c.rows, c.n) in shapes[kernel] and c.provider not in absent}
        assert timed == {c for c in wanted if kernel != "train" or c.mode == "trades"}
        assert all(0 < r["p20"] <= r["p50"] <= r["p80"] and r["unit"] == "us" for r in times)
        assert {r["threads"] for r in rows} == {1}
        assert {r["torch"] for r in rows} == {torch.__version__}
        assert tables.full(rows) in done.stdout
        ElementTree.parse(tmp_path / f"{kernel}.svg")


def test_only_compiled_kernels_are_recorded():
    command = [sys.executable, "-m", "benchmarks", "dual"]
    env = os.environ | {"ARMOR_BACKEND": "reference"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("not recorded: dual, dual_backward")


def test_rounds_of_a_case_in_several_turns_are_one_record(tmp_path):
    info = {"kernel": "attack", "case": "resnet", "rows": 128, "n": 3072, "mode": "pgd-10", "provider": "armor"}
    info |= {"metrics": {"error": 0.01, "syncs": 0}, "config": {"steps": 10}, "threads": 1, "torch": "2", "armor": "0"}
    turns = [{"extra_info": info, "stats": {"data": [seconds]}} for seconds in (0.3, 0.1, 0.2)]
    machine = {"machine_info": {"cpu": {"brand_raw": "a processor"}}, "datetime": "2026-01-02T03:04:05.678"}
    (tmp_path / "report.json").write_text(json.dumps(machine | {"benchmarks": turns}))
    time, error, syncs = records.from_json(tmp_path / "report.json")
    assert (time["metric"], time["unit"], time["p50"], time["rounds"]) == ("time", "us", "200000", 3)
    assert (error["metric"], error["unit"], error["p50"]) == ("error", "relative", "0.01")
    assert (syncs["metric"], syncs["unit"], syncs["p50"]) == ("syncs", "count", "0")


def test_plot_comes_from_the_csv_alone(tmp_path):
    rows = written_and_read(tmp_path, sample())
    plot.draw(rows, tmp_path / "one.svg")
    plot.draw(rows, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()

    rows[0]["p50"] = 3 * rows[0]["p50"]
    plot.draw(rows, tmp_path / "other.svg")
    assert (tmp_path / "one.svg").read_bytes() != (tmp_path / "other.svg").read_bytes()


def test_bars_come_from_the_csv_alone(tmp_path):
    rows = written_and_read(tmp_path, sample_of_steps())
    plot.draw(rows, tmp_path / "one.svg")
    plot.draw(rows, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = "".join(ElementTree.parse(tmp_path / "one.svg").getroot().itertext())
    assert all(words in text for words in ("linf", "l1", "128 x 3072", "step, 1 thread"))


def test_table_and_targets(tmp_path):
    lines = tables.full(written_and_read(tmp_path, sample())).splitlines()
    assert lines[0] == "Medians on a processor, torch 2.14.1, armor 0.1.0, float32 losses, 2026-01-02."
    promise = "| armor, forward+backward, n = 128: at least 20 times faster than"
    assert f"{promise} scipy | 1 | 25x | yes |" in lines
    assert f"{promise} eager | 1 | 10x | no |" in lines
    assert "| armor, forward+backward, n = 128: at most 100 us above mean | 1 | 30 us | yes |" in lines
    assert "| kl | 1 x 128 | 1 ms | 400 us | 40 us | 10 us | 25x | 10x |" in lines


def test_table_of_steps(tmp_path):
    """A target for some cases only, a ratio of one, and what the operators count."""
    lines = tables.full(written_and_read(tmp_path, sample_of_steps())).splitlines()
    assert lines[0] == "Medians on a processor, torch 2.14.1, armor 0.1.0, float32 images, 2026-01-02."
    promise = "| armor, step, 128 x 3072: at least"
    assert f"{promise} 3 times faster than eager | 1 | 4x | 2x | no |" in lines
    assert f"{promise} as fast as compile | 1 | 1x | 1.4x | yes |" in lines
    assert f"{promise} 1.5 times faster than compile | 1 |  | 1.4x | no |" in lines
    assert "| linf | 128 x 3072 | 400 us | 100 us | 100 us | 4x | 1x |" in lines
    assert "| linf | 128 x 3072 | step | 6, 2, 20 MB | 1, 0, 5 MB | 4x |" in lines


def test_table_of_training_steps(tmp_path):
    """Targets in percent, of time and of memory, and a target that one net reaches and the other does not."""
    lines = tables.full(written_and_read(tmp_path, sample_of_trainings())).splitlines()
    head = "| target | threads | resnet18 fp32 | mnist-cnn fp32 | reached |"
    assert head in lines
    assert "| armor, trades: at least 1.7 times faster than published | 1 | 1.5x | 2x | no |" in lines
    assert "| armor, trades: at most 3 % above passes | 1 | +2.0 % | -1.0 % | yes |" in lines
    assert "| armor, trades: memory at most that of published | 1 | +25.0 % |  | no |" in lines
    assert "| resnet18 fp32 | 32 x 3072 | 1.5 s | 1 s | 980 ms | 1.5x | 0.98x |" in lines
    assert "| resnet18 fp32 | 32 x 3072 | trades | 800 MB | 1 GB | 0.8x |" in lines


def test_marked_tables_are_renewed(tmp_path):
    recorded = {"dual": written_and_read(tmp_path, sample()), "transport": sample_of_steps()}
    text = "before\n<!-- benchmarks:summary -->\nold\n<!-- /benchmarks:summary -->\nafter\n"
    renewed = tables.insert(text, recorded)
    assert renewed.startswith("before\n<!-- benchmarks:summary -->\nMedians on a processor")
    assert renewed.endswith("<!-- /benchmarks:summary -->\nafter\n")
    assert "old" not in renewed
    assert [line[:6] for line in renewed.splitlines() if line.startswith(("| kl |", "| linf "))] == ["| kl |", "| linf"]
    assert tables.insert(renewed, recorded) == renewed

    one = "<!-- benchmarks:transport -->\n<!-- /benchmarks:transport -->\n"
    assert tables.full(recorded["transport"]) in tables.insert(one, recorded)
    assert tables.insert(one, {"dual": recorded["dual"]}) == one
    with pytest.raises(ValueError, match="must name one of summary, dual"):
        tables.insert("<!-- benchmarks:full -->\n<!-- /benchmarks:full -->", recorded)


def test_marked_parts_of_a_page():
    """Only what the page shows is made; markers of other kinds and what is around them stay."""
    page = "a\n<!-- kind:one -->\nold\n<!-- /kind:one -->\n<!-- other:one -->\nb\n<!-- /other:one -->\n"
    shown = {"one": lambda: "new\n", "two": lambda: 1 / 0}
    assert markdown.renew(page, "kind", shown) == page.replace("old", "new")
    assert markdown.renew(page, "other", {"one": lambda: ""}) == page.replace("\nb\n", "\n")
    bare = "<!-- kind -->\n<!-- /kind -->\n"
    assert markdown.renew(bare, "kind", {"": lambda: "new"}) == "<!-- kind -->\nnew\n<!-- /kind -->\n"
    with pytest.raises(ValueError, match="no marker <!-- kind:NAME -->"):
        markdown.renew("nothing here", "kind", shown)
    with pytest.raises(ValueError, match="<!-- kind:three --> must name one of one, two"):
        markdown.renew(page.replace(":one", ":three"), "kind", shown)
    with pytest.raises(ValueError, match="<!-- kind:one --> is not closed"):
        markdown.renew(page.replace("/kind:one", "/kind:two"), "kind", shown)
    with pytest.raises(ValueError, match="no marker <!-- kind:two -->"):
        markdown.renew(page, "kind", shown, every=True)


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_documents_show_the_recorded_numbers(name):
    text = (ROOT / name).read_text()
    assert tables.insert(text, records.recorded()) == text


def oracle(losses, shape, divergence, **settings):
    settings = {"alpha": 1.0, "kappa": 0.0} | (settings or bench_dual.SETTINGS[divergence])
    scalars = (
        bench_dual.CODES[divergence],
        settings["alpha"],
        settings["radius"],
        settings["kappa"],
        bench_dual.MAX_DUAL,
    )
    value, _, _, weights, _, _ = reference.dual(losses.detach().double().view(shape), None, None, *scalars)
    return value, weights


def attacked(cost, dtype):
    """x_adv, gradient and x of three samples of an odd size, on the edge of the ball."""
    return [t.to(dtype) for t in bench_transport.inputs(cost, (3, 3, 5, 7), "step")]


def oracle_step(cost, x_adv, grad, x, step_size, mean=None, std=None):
    """The next samples and the feed, in float64."""
    rule = cost.rule()
    x_next, _, _, feed = reference.transport_step(
        *(x_adv.double(), grad.double(), x.double(), None, None, None, None, mean, std),
        *(rule.kind, float(rule.radius), step_size, rule.weight, rule.power, rule.norm, rule.variant, 0.0, 1.0),
        *(False, False, None),
    )
    return x_next, feed


def oracle_loss(loss, logits, target, upstream):
    """The value and the gradients in the logits, natural ones first."""
    kind, settings = bench_rowloss.CODES[loss], bench_rowloss.SETTINGS[loss]
    *natural, adversarial = (t.detach() for t in logits)
    fixed = (natural[0] if natural else None, kind, bench_rowloss.BETA, 0.0)
    losses, stats = reference.rowloss(adversarial, target, fixed[0], *fixed[1:], -100)
    value, weights = losses, None
    if loss == "dc_trades":
        scalars = (reference.KL, 1.0, settings["radius"], settings["kappa"], bench_dual.MAX_DUAL)
        value, _, _, weights, _, _ = (t[0] for t in reference.dual(losses[None], None, None, *scalars))
    gradients = reference.rowloss_backward(
        upstream, weights, adversarial, target, fixed[0], stats, *fixed[1:], -100, bool(natural)
    )
    return value, gradients[::-1] if natural else gradients[:1]


def sample():
    """Records of one problem: 1 ms for SciPy, 400 us for eager, 40 us for armor, 10 us for the mean."""
    shared = {
        "kernel": "dual",
        "case": "kl",
        "mode": "forward+backward",
        "metric": "time",
        "unit": "us",
    }
    shared |= {"rows": 1, "n": 128, "rounds": 9, "threads": 1, "config": "{}", "device": "a processor"}
    shared |= {"torch": "2.14.1", "armor": "0.1.0", "time": "2026-01-02T03:04:05"}
    medians = {"scipy": 1000, "eager": 400, "armor": 40, "mean": 10}
    return [shared | {"provider": p, "p50": t, "p20": 0.9 * t, "p80": 1.2 * t} for p, t in medians.items()]


def sample_of_steps():
    """Records of two steps, linf with armor 4 times faster than eager and l1 with 2 times, and linf's counts."""
    shared = {"kernel": "transport", "mode": "step", "rows": 128, "n": 3072, "rounds": 9, "threads": 1, "config": "{}"}
    shared |= {"device": "a processor", "torch": "2.14.1", "armor": "0.1.0", "time": "2026-01-02T03:04:05"}
    medians = {("linf", "eager"): 400, ("linf", "compile"): 100, ("linf", "armor"): 100}
    medians |= {("l1", "eager"): 2000, ("l1", "compile"): 1400, ("l1", "armor"): 1000}
    counts = {"eager": {"operators": 6, "syncs": 2, "bytes": 2e7}, "armor": {"operators": 1, "syncs": 0, "bytes": 5e6}}
    measured = [(case, provider, "time", median) for (case, provider), median in medians.items()]
    measured += [("linf", provider, metric, x) for provider, found in counts.items() for metric, x in found.items()]
    return [
        shared | {"case": case, "provider": provider, "metric": metric, "unit": "", "p50": x, "p20": x, "p80": x}
        for case, provider, metric, x in measured
    ]


def sample_of_trainings():
    """Records of a step on two nets: armor 1.5 and 2 times as fast as published, 2 % above the passes and 1 % below,
    and with a quarter more memory."""
    shared = {"kernel": "train", "mode": "trades", "rounds": 3, "threads": 1, "config": "{}", "device": "a processor"}
    shared |= {"torch": "2.14.1", "armor": "0.1.0", "time": "2026-01-02T03:04:05"}
    nets = {"resnet18 fp32": {"rows": 32, "n": 3072}, "mnist-cnn fp32": {"rows": 128, "n": 784}}
    times = {"resnet18 fp32": {"published": 1.5e6, "armor": 1e6, "passes": 1e6 / 1.02}}
    times["mnist-cnn fp32"] = {"published": 198e3, "armor": 99e3, "passes": 100e3}
    measured = [(net, provider, "time", x) for net, found in times.items() for provider, x in found.items()]
    measured += [("resnet18 fp32", provider, "peak", x) for provider, x in {"published": 8e8, "armor": 1e9}.items()]
    named = [dict(zip(("case", "provider", "metric", "p50"), one, strict=True)) for one in measured]
    return [shared | nets[one["case"]] | one | {"unit": "", "p20": one["p50"], "p80": one["p50"]} for one in named]


def written_and_read(folder, rows):
    records.write(folder / "dual.csv", rows)
    return records.read(folder / "dual.csv")

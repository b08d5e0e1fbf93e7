"""The benchmarks' baselines against the float64 oracle, and their way from a run to csv, tables and plot."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from armor import ops, reference

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from benchmarks import (
    bench_attack,
    bench_dual,
    bench_rowloss,
    bench_train,
    bench_transport,
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


def test_training_steps_that_cheat_are_not_timed(monkeypatch):
    """Noise raises the divergence too little, twice the radius leaves the ball, and a mean is not the worst case."""
    case = measure.Case("resnet8 fp32", 16, 3072, "step", "armor")
    monkeypatch.setattr(bench_train, "BATCH", 16)
    model, x, y = bench_train.problem("resnet8")
    state = copy.deepcopy(model.state_dict())

    def judged(change_samples, change_loss=lambda loss: loss):
        model.load_state_dict(state)
        x_adv = change_samples(bench_train.naive_attack(model, x))
        losses = naive.trades_loss(model(x), model(x_adv), y, beta=6.0)
        loss = naive.eager_dc_loss(losses, radius=0.2, kappa=0.12)
        model.load_state_dict(state)
        return bench_train.check(case, model, x, y, x_adv, change_loss(loss).detach())

    assert judged(lambda x_adv: x_adv) < 1e-5
    with pytest.raises(AssertionError, match="raises the divergence"):
        judged(lambda x_adv: naive.linf_start(x, radius=8 / 255))
    with pytest.raises(AssertionError):
        judged(lambda x_adv: (x + 2 * (x_adv - x)).clamp(0, 1))
    with pytest.raises(AssertionError, match="is off by"):
        judged(lambda x_adv: x_adv, lambda loss: 0.9 * loss)


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
    trained = {(c.case, c.rows, c.mode, c.provider) for c in bench_train.cases()}
    assert trained == {
        (f"{net} fp32", 32, "step", p) for net in ("resnet18", "resnet8") for p in ("published", "eager", "armor")
    }


def test_quick_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", *records.KERNELS, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    shapes = {"dual": {(1, 128)}, "transport": {(128, 3072)}, "rowloss": {(128, 10)}, "attack": {(128, 784)}}
    shapes["train"] = {(32, 3072)}
    for kernel in records.KERNELS:
        rows = records.read(tmp_path / f"{kernel}.csv")
        times = [r for r in rows if r["metric"] == "time"]
        timed = {(r["case"], r["rows"], r["n"], r["mode"], r["provider"]) for r in times}
        cases = MODULES[kernel].cases()
        absent = {"compile"} if HAS_TORCHATTACKS else {"compile", "torchattacks"}
        wanted = {c for c in cases if (c.rows, c.n) in shapes[kernel] and c.provider not in absent}
        assert timed == {c for c in wanted if "resnet18" not in c.case}
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
    assert f"{promise} scipy | 1 | 25x |  |  | yes |" in lines
    assert f"{promise} eager | 1 | 10x |  |  | no |" in lines
    assert "| armor, forward+backward, n = 128: at most 100 us above mean | 1 | 30 us |  |  | yes |" in lines
    assert "| kl | 1 x 128 | 1 ms | 400 us | 40 us | 10 us | 25x | 10x |" in lines


def test_table_of_steps(tmp_path):
    """A target for some cases only, a ratio of one, and what the operators count."""
    lines = tables.full(written_and_read(tmp_path, sample_of_steps())).splitlines()
    assert lines[0] == "Medians on a processor, torch 2.14.1, armor 0.1.0, float32 images, 2026-01-02."
    promise = "| armor, step, 128 x 3072: at least"
    assert f"{promise} 3 times faster than eager | 1 | 4x |  | 2x |  |  |  | no |" in lines
    assert f"{promise} as fast as compile | 1 | 1x |  | 1.4x |  |  |  | yes |" in lines
    assert f"{promise} 1.5 times faster than compile | 1 |  |  | 1.4x |  |  |  | no |" in lines
    assert "| linf | 128 x 3072 | 400 us | 100 us | 100 us | 4x | 1x |" in lines
    assert "| linf | 128 x 3072 | step | 6, 2, 20 MB | 1, 0, 5 MB | 4x |" in lines


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
    with pytest.raises(ValueError, match="no marker"):
        tables.insert("nothing here", recorded)
    with pytest.raises(ValueError, match="not closed"):
        tables.insert("<!-- benchmarks:dual -->", recorded)
    with pytest.raises(ValueError, match="must name one of summary, dual"):
        tables.insert("<!-- benchmarks:full -->\n<!-- /benchmarks:full -->", recorded)


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


def written_and_read(folder, rows):
    records.write(folder / "dual.csv", rows)
    return records.read(folder / "dual.csv")

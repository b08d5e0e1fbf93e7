"""The benchmark's baselines against the float64 oracle, and its way from a run to csv, tables and plot."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from armor import reference

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from benchmarks import cases, naive, plot, records, tables

ROOT = Path(__file__).parents[1]
BASELINES = [("scipy", "kl"), ("brent", "kl"), ("eager", "kl"), ("scipy", "alpha"), ("scipy", "renyi")]

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
    losses = cases.make_losses(*shape).to(dtype).requires_grad_()
    value = cases.PROVIDERS[provider](losses, divergence=divergence, **cases.SETTINGS[divergence])
    (gradient,) = torch.autograd.grad(value.sum(), losses)

    exact, weights = oracle(losses, shape, divergence)
    value_tolerance, weight_tolerance = TOLERANCES[dtype, divergence]
    assert value.shape == losses.shape[:-1]
    assert ((value.view(-1) - exact) / exact).abs().max() < value_tolerance
    assert (gradient.view(shape) - weights).abs().sum(-1).max() < weight_tolerance


def test_compiled_baseline_is_the_eager_one():
    """Traced as the benchmark does it; bench_dual.py checks the generated code before it times it."""
    traced = torch.compile(naive.eager_dc_loss, fullgraph=True, backend="aot_eager")
    losses = cases.make_losses(1, 64).requires_grad_()
    values = [solve(losses, radius=0.2, kappa=0.12) for solve in (traced, naive.eager_dc_loss)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, losses)[0] for value in values]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_kl_baselines_with_kappa_in_charge():
    """kappa = 5 is above the unregularised mu, so the value is kappa * log mean exp(losses / kappa)."""
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = 5 * torch.log(torch.exp(losses / 5).mean())
    for provider in ("scipy", "brent", "eager"):
        value = cases.PROVIDERS[provider](losses, divergence="kl", radius=0.2, kappa=5.0)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_published_cap_is_kept():
    """Losses of thousands need lambda above 100, where the published search stops: the value is too big."""
    losses = 1000 * torch.arange(8, dtype=torch.float64)
    capped = naive.scipy_dc_loss(losses, divergence="kl", radius=0.02)
    tuned = naive.brent_dc_loss(losses, radius=0.02)
    exact, _ = oracle(losses, (1, 8), "kl", radius=0.02, kappa=0.0)
    torch.testing.assert_close(tuned, exact[0], rtol=1e-9, atol=0)
    assert capped > 1.1 * exact[0]


def test_every_provider_has_its_cases():
    timed = cases.cases()
    assert len(set(timed)) == len(timed)
    at_128 = [case for case in timed if case[1:4] == (1, 128, "forward+backward")]
    assert [case[4] for case in at_128 if case[0] == "kl"] == [
        "scipy",
        "brent",
        "eager",
        "compile",
        "mean",
        "armor",
    ]
    assert [case[4] for case in at_128 if case[0] == "renyi"] == ["scipy", "mean", "armor"]
    assert {case[2] for case in timed if case[1] == 1} >= {32, 1048576}


def test_quick_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "dual", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    rows = records.read(tmp_path / "dual.csv")
    timed = {(r["divergence"], r["n"], r["mode"], r["provider"]) for r in rows if r["metric"] == "time"}
    wanted = {(c[0], *c[2:]) for c in cases.cases() if c[1:3] == (1, 128) and c[4] != "compile"}
    assert timed == wanted
    assert all(0 < r["p20"] <= r["p50"] <= r["p80"] and r["unit"] == "us" for r in rows if r["metric"] == "time")
    assert all(r["p50"] < 1e-5 for r in rows if r["metric"] == "error")
    assert {r["threads"] for r in rows} == {1}
    assert {r["torch"] for r in rows} == {torch.__version__}
    assert tables.full(rows) in done.stdout
    ElementTree.parse(tmp_path / "dual.svg")


def test_plot_comes_from_the_csv_alone(tmp_path):
    rows = written_and_read(tmp_path, sample())
    plot.draw(rows, tmp_path / "one.svg")
    plot.draw(rows, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()

    rows[0]["p50"] = 3 * rows[0]["p50"]
    plot.draw(rows, tmp_path / "other.svg")
    assert (tmp_path / "one.svg").read_bytes() != (tmp_path / "other.svg").read_bytes()


def test_table_and_targets(tmp_path):
    lines = tables.full(written_and_read(tmp_path, sample())).splitlines()
    assert lines[0] == "Medians on a processor, torch 2.14.1, armor 0.1.0, float32 losses, 2026-01-02."
    promise = "| armor, forward+backward, n = 128: at least 20 times faster than"
    assert f"{promise} scipy | 1 | 25x |  |  | yes |" in lines
    assert f"{promise} eager | 1 | 10x |  |  | no |" in lines
    assert "| armor, forward+backward, n = 128: at most 100 us above mean | 1 | 30 us |  |  | yes |" in lines
    assert "| kl | 1 x 128 | 1 ms | 400 us | 40 us | 10 us | 25x | 10x |" in lines


def test_marked_tables_are_renewed(tmp_path):
    rows = written_and_read(tmp_path, sample())
    text = "before\n<!-- benchmarks:summary -->\nold\n<!-- /benchmarks:summary -->\nafter\n"
    renewed = tables.insert(text, rows)
    assert renewed.startswith("before\n<!-- benchmarks:summary -->\nMedians on a processor")
    assert renewed.endswith("<!-- /benchmarks:summary -->\nafter\n")
    assert "old" not in renewed
    assert tables.insert(renewed, rows) == renewed
    with pytest.raises(ValueError, match="no marker"):
        tables.insert("nothing here", rows)
    with pytest.raises(ValueError, match="not closed"):
        tables.insert("<!-- benchmarks:full -->", rows)


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_documents_show_the_recorded_numbers(name):
    text = (ROOT / name).read_text()
    assert tables.insert(text, records.read(records.DATA / "dual.csv")) == text


def oracle(losses, shape, divergence, **settings):
    settings = {"alpha": 1.0, "kappa": 0.0} | (settings or cases.SETTINGS[divergence])
    scalars = (
        cases.CODES[divergence],
        settings["alpha"],
        settings["radius"],
        settings["kappa"],
        cases.MAX_DUAL,
    )
    value, _, _, weights, _, _ = reference.dual(losses.detach().double().view(shape), None, None, *scalars)
    return value, weights


def sample():
    """Records of one problem: 1 ms for SciPy, 400 us for eager, 40 us for armor, 10 us for the mean."""
    shared = {
        "kernel": "dual",
        "divergence": "kl",
        "mode": "forward+backward",
        "metric": "time",
        "unit": "us",
    }
    shared |= {"rows": 1, "n": 128, "rounds": 9, "threads": 1, "config": "{}", "device": "a processor"}
    shared |= {"torch": "2.14.1", "armor": "0.1.0", "time": "2026-01-02T03:04:05"}
    medians = {"scipy": 1000, "eager": 400, "armor": 40, "mean": 10}
    return [shared | {"provider": p, "p50": t, "p20": 0.9 * t, "p80": 1.2 * t} for p, t in medians.items()]


def written_and_read(folder, rows):
    records.write(folder / "dual.csv", rows)
    return records.read(folder / "dual.csv")

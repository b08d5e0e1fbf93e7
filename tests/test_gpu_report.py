"""What `make gpu` does where a step fails, hangs, lacks something or has no time, and where there is no GPU at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu, records, summary
from benchmarks.gpu import Step

ROOT = Path(__file__).parents[1]
PASSES = [sys.executable, "-c", "print('all is well')"]
FAILS = [sys.executable, "-c", "print('before'); raise ValueError('seeded')"]


def rows(out):
    """Step -> (result, why) of the summary."""
    table = (out / "summary.md").read_text().partition("## Steps")[2].partition("## ")[0]
    cells = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return {row[0]: (row[1], row[3].strip() if len(row) > 3 else "") for row in cells}


def test_dry_run(tmp_path):
    """Without a GPU every step but the description of the machine is skipped, and the page says why."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "report")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "report")
    assert found.pop("environment")[0] == "passed"
    assert {"build", "tests", "tests with triton", "compute-sanitizer", "benchmark train"} <= found.keys()
    assert {row[0] for row in found.values()} == {"skipped"}
    assert all(row[1] == "no CUDA or ROCm device" for name, row in found.items() if name != "build")
    page = (tmp_path / "report" / "summary.md").read_text()
    assert f"torch                    {torch.__version__}" in page
    assert page in done.stdout
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"summary.md", "environment.txt"}


def test_a_failing_step_is_reported_and_stops_no_other(tmp_path):
    steps = [Step("first", FAILS), Step("then", PASSES), Step("absent", PASSES, needs=("torch", "no_such_module"))]
    assert gpu.run(steps, tmp_path, no_device="") == 1
    assert rows(tmp_path) == {
        "first": ("failed", "ValueError: seeded"),
        "then": ("passed", ""),
        "absent": ("skipped", "needs no_such_module, not installed"),
    }
    assert "before\n" in (tmp_path / "first.txt").read_text()
    assert (tmp_path / "then.txt").read_text() == "all is well\n"
    assert gpu.run(steps[1:], tmp_path, no_device="") == 0
    assert not (tmp_path / "first.txt").exists()


def test_a_step_that_hangs_is_ended(tmp_path, monkeypatch, ctrl_c_works):
    """With all that it started, and after it could write down what it has, as on Ctrl-C."""
    monkeypatch.setattr(gpu, "GRACE", 2)
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    hangs = f"print('at work', flush=True)\ntry:\n    {child}\nexcept KeyboardInterrupt:\n    print('ended')"
    assert gpu.run([Step("hangs", [sys.executable, "-c", hangs], limit=1)], tmp_path, no_device="") == 1
    state, why = rows(tmp_path)["hangs"]
    assert (state, why) == ("failed", "did not end within 3 s; last line: ended")


def test_time(tmp_path, monkeypatch):
    """A step is told when to end, and what no time is left for is skipped; no device is the better reason."""
    monkeypatch.setattr(gpu, "GRACE", 0)
    tells = [sys.executable, "-c", "import os, time; print(float(os.environ['ARMOR_UNTIL']) - time.time())"]
    slow = [sys.executable, "-c", "import time; time.sleep(3)"]
    steps = [
        Step("tells", tells),
        Step("limited", tells, limit=2.5),
        Step("slow", slow, limit=30),
        Step("late", PASSES),
    ]
    gpu.run(steps, tmp_path, no_device="", minutes=0.05)
    found = rows(tmp_path)
    assert 1 < float((tmp_path / "tells.txt").read_text()) <= 3
    assert float((tmp_path / "limited.txt").read_text()) <= 2.5
    assert found["slow"][0] == "failed"
    assert found["late"] == ("skipped", "the time given was over")
    gpu.run(steps, tmp_path, no_device="no device", minutes=0)
    assert set(rows(tmp_path).values()) == {("skipped", "no device")}


def test_no_pytorch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.missing_device() == "PyTorch cannot be imported: ImportError: no such library"


def test_tests_are_counted_by_backend(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('backend', ['compiled', 'triton'])\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_operators(n, backend):\n"
        "    assert backend == 'triton' or n == 1, 'off by one'\n"
        "def test_skipped():\n"
        "    pytest.skip('needs two devices')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    out = tmp_path / "report"
    assert gpu.run([Step("tests", [*command, f"--junitxml={out}/tests.xml"])], out, no_device="") == 1
    page = (out / "summary.md").read_text()
    assert "| tests, compiled | 1 | 1 | 0 |" in page
    assert "| tests, triton | 2 | 0 | 0 |" in page
    assert "| tests | 0 | 0 | 1 |" in page
    assert "- `tests`: `test_operators[2-compiled]`: AssertionError: off by one" in page
    assert "- 1: needs two devices" in page
    assert rows(out)["tests"][1].startswith("AssertionError: off by one; 1 failed, 3 passed, 1 skipped")
    (out / "killed.xml").write_text("<testsuite><testcase")
    assert "| tests, triton | 2 | 0 | 0 |" in summary.page(out, [])


def test_speed_on_the_page(tmp_path):
    shared = {"kernel": "train", "case": "resnet18 bf16", "mode": "graph", "metric": "time", "unit": "us", "rows": 128}
    shared |= {"n": 3072, "rounds": 9, "threads": 1, "config": "{}", "device": "a GPU", "torch": "2", "armor": "0"}
    times = {"armor": 2000, "eager": 5000}
    found = [shared | {"provider": p, "p50": t, "p20": 0.9 * t, "p80": 1.1 * t, "time": ""} for p, t in times.items()]
    records.write(tmp_path / "compiled" / "train.csv", found)
    line = "| train | resnet18 bf16 | 128 x 3072 | graph | 2 ms | 1.8 ms to 2.2 ms | eager 2.5 |"
    assert line in summary.page(tmp_path, [])


def test_tests_end_in_time(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_one():\n    raise AssertionError\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p", "benchmarks.deadline"]
    env = os.environ | {"ARMOR_UNTIL": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert "the time given was over" in done.stdout
    assert "1 skipped" in done.stdout


def test_benchmarks_end_in_time(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "rowloss", "--quick", "--out", str(tmp_path)]
    env = os.environ | {"ARMOR_UNTIL": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rowloss: not written, because nothing was timed" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", ["", "no CUDA or ROCm device"])
def test_every_step_knows_its_needs(tmp_path, said, monkeypatch):
    """Nothing is started for a package that is absent."""
    monkeypatch.setattr(gpu, "missing", lambda modules: "absent" if modules else "")
    assert gpu.run([s._replace(skip="") for s in gpu.steps(tmp_path)], tmp_path / "report", no_device=said) == 0
    assert set(rows(tmp_path / "report").values()) == {("skipped", said or "absent"), ("skipped", "absent")}


def test_programs_that_the_machine_lacks():
    assert environment._said(["no-such-program"]) == "not found"
    assert environment._said([sys.executable, "-c", "print(1)"]) == "1"

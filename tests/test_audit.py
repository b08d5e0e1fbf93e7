"""`make audit` fails where it must. Each bug here is seeded into a copy of the sources, and the unit named for it must
say so of that kernel, while it passes the sources as they are. The tools of the audit have tests of their own with more
bugs: test_kernelcheck.py, test_executor.py, test_strict_triton.py, test_triton_compiles.py.
"""

import csv
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from kernelcheck import audit

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    unit: str
    match: str  # the runs that will do
    kernel: str
    message: str  # in what the audit says


BUGS = {
    "missing barrier": Bug(
        "csrc/cuda/dual.cuh",
        "    __syncthreads();\n    return parts;",
        "    return parts;",
        "execute-cuda-dual",
        "kl-None clean kappa0.02 float32 2x257",
        "dual",
        "Race",
    ),
    "shared memory that nobody wrote": Bug(
        "csrc/cuda/dual.cuh",
        "if (threadIdx.x % kWarp == 0) parts",
        "if (threadIdx.x == 0) parts",
        "thread-cuda-dual",
        "kl-None clean kappa0.02 float32 2x257",
        "dual",
        "",
    ),
    "one sample too many": Bug(
        "csrc/cuda/dual.cuh",
        "i < g.rows * g.n",
        "i <= g.rows * g.n",
        "thread-cuda-dual",
        "dual_backward losses float32",
        "dual_backward",
        "OutOfBounds",
    ),
    "one element too many": Bug(
        "armor_kernels/transport.py",
        "    here = i < n\n    a = tl.load",
        "    here = i <= n\n    a = tl.load",
        "interpret-triton-transport",
        "transport_step linf float32",
        "_step",
        "OutOfBounds",
    ),
    "programs that overlap": Bug(
        "armor_kernels/rowloss.py",
        "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
        "row = tl.program_id(0).to(tl.int64) * (ROWS // 2) + tl.arange(0, ROWS)",
        "interpret-triton-rowloss",
        "rowloss ce float32 33x10",
        "_rowloss",
        "Race",
    ),
    "a wrong sign": Bug(
        "armor_kernels/transport.py",
        "return tl.where(tl.abs(d) > r, d - r * _sign(d), 0.0)",
        "return tl.where(tl.abs(d) > r, d + r * _sign(d), 0.0)",
        "execute-triton-transport",
        "transport_step soft_ball-before float32 2x31",
        "_step",
        "AssertionError",
    ),
    "lost alignment": Bug(
        "armor_kernels/transport.py",
        "unit = math.gcd(n, 16)",
        "unit = 1",
        "compile-triton-transport",
        "linf 3x32x32",
        "_step",
        "reads",
    ),
}


def audited(root, bug, folder):
    """The exit status, what was printed, and the findings of the kernel, in the sources at `root`."""
    command = [sys.executable, "-m", "kernelcheck.audit", bug.unit, "--match", bug.match, "--out", folder]
    environment = os.environ | {"PYTHONPATH": f"{root / 'tests'}:{root}:{root / 'python'}"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    with (folder / "audit.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["kernel"] == bug.kernel]
    assert found, done.stdout + done.stderr
    return done.returncode, done.stdout, found


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bug(name, tmp_path):
    bug = BUGS[name]
    status, printed, found = audited(ROOT, bug, tmp_path / "right")
    if all(each["failure"].startswith(audit.SKIPPED) for each in found):
        pytest.skip(found[0]["failure"])
    assert (status, [each["failure"] for each in found if each["failure"]]) == (0, [])

    copy = tmp_path / "copy"
    for folder in ("csrc", "armor_kernels", "python", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    source = (copy / bug.file).read_text()
    assert source.count(bug.right) == 1
    (copy / bug.file).write_text(source.replace(bug.right, bug.wrong))
    status, printed, found = audited(copy, bug, tmp_path / "wrong")
    assert status == 1
    assert printed.endswith("audit: failed\n")
    failures = [each["failure"] for each in found if each["failure"]]
    assert failures
    assert any(bug.message in failure for failure in failures)


def finding(check, kernel, arch="*", **given):
    return audit.Finding(check, kernel, arch, "a case", **given)


def everything():
    """What an audit without a failure finds."""
    for language, _, kernel in audit.kernels():
        for check in audit.CHECKS[language]:
            for arch in audit.ARCHS if language == "Triton" else audit.EXECUTED:
                yield finding(check, kernel, arch)


def problems(found):
    return [problem for row in audit.table(list(found), complete=True) for problem in row["problems"]]


class TestTable:
    def test_every_kernel_is_found_in_the_sources(self):
        languages = [language for language, _, _ in audit.kernels()]
        assert languages.count("Triton") == 7
        assert languages.count("CUDA") == 5

    def test_passes(self):
        rows = audit.table(list(everything()), complete=True)
        assert len(rows) == 7 * 5 + 5 * 4
        assert problems(everything()) == []

    @pytest.mark.parametrize("check", ["source", "sanitized", "executed", "compiled"])
    def test_a_check_that_left_out_a_kernel_is_a_problem(self, check):
        found = [each for each in everything() if (each.check, each.kernel) != (check, "dual")]
        assert problems(found) == [f"{check}: no finding"] * 4

    def test_an_instance_that_never_ran_is_a_problem(self):
        instances = [
            audit.Finding("compiled", "dual", "sm_90", run) for run in ("<float, BlockGroup>", "<float, GridGroup>")
        ]
        ran = finding("executed", "dual", "sm_90", instances=["dual<float, BlockGroup>", "duala case"])
        assert problems([*everything(), *instances, ran]) == ["executed: dual<float, GridGroup> was not"]

    def test_a_skipped_check_is_no_failure_and_is_seen(self):
        skipped = [finding("sanitized", "dual", failure=f"{audit.SKIPPED}no compiler")]
        rows = audit.table(skipped, complete=False)
        assert [row["problems"] for row in rows if row["kernel"] == "dual"] == [[]] * 4
        assert rows[0]["sanitized"] == "1 skipped"

    def test_a_failure_is_a_problem_of_every_architecture_it_speaks_of(self):
        failed = [finding("source", "dual", failure="Race"), finding("executed", "_dual", "sm_80", failure="wrong")]
        expected = ["executed, a case: wrong", *["source, a case: Race"] * 4]
        assert problems([*everything(), *failed]) == expected


def test_a_match_without_a_run_fails_the_audit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audit", "compile-cuda-dual", "--match", "no such", "--out", str(tmp_path)])
    monkeypatch.setattr(audit, "started", lambda unit, match: [])
    assert audit.main() == 1
    assert "nothing was run: no case has 'no such' in its name" in capsys.readouterr().out


def test_the_table_of_a_page_is_renewed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- audit -->\nold\n<!-- /audit -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["audit", "--out", str(tmp_path), "--write", str(page)])
    monkeypatch.setattr(audit, "started", lambda unit, match: list(everything()))
    assert audit.main() == 0
    before, table, after = page.read_text().replace("<!-- /", "<!-- ").split("<!-- audit -->\n")
    assert (before, after) == ("before\n", "after\n")
    assert f"triton {importlib.metadata.version('triton')}" in table
    assert table.count("| _step | Triton |") == 5


@pytest.mark.parametrize("unit", ["interpret-triton-dual", "compile-triton-dual", "execute-cuda-dual"])
def test_without_triton_its_units_are_skipped(unit, tmp_path):
    """PyTorch for the CPU alone brings no Triton; the other units run without it."""
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('No module named triton', name='triton')")
    command = [sys.executable, "-m", "kernelcheck.audit", unit, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}:{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: could not import 'triton'" in done.stdout
    assert done.stdout.endswith("audit: passed, but for what was skipped\n")


def test_a_page_may_be_renewed_without_triton(monkeypatch):
    absent = importlib.metadata.distributions
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [each for each in absent() if each.metadata["Name"] != "triton"]
    )
    assert ", triton not installed, " in audit.versions()


def test_a_unit_that_breaks_off_fails_the_audit(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "armor_kernels", copy / "armor_kernels")
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "tests/kernelcheck/strict.py").write_text("raise SystemExit('no such interpreter')")
    command = [sys.executable, "-m", "kernelcheck.audit", "interpret-triton-dual"]
    environment = os.environ | {"PYTHONPATH": f"{copy / 'tests'}:{copy}:{ROOT / 'python'}"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "interpret-triton-dual broke off: no such interpreter" in done.stdout

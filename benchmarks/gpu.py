"""`make gpu`: all that needs a GPU in one run, and a folder with what came out, to send to us.

Builds, runs the tests marked `gpu` with every backend, the benchmarks and compute-sanitizer, and writes gpu-report/:
summary.md, one page; the log of every step; the tests' junit xml; csv and svg of the benchmarks. Every step is a
process of its own with a time limit. One that fails stops no other and is reported; one that cannot run says why. The
summary is written anew after every step. Only the standard library is imported here.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import summary

ROOT = Path(__file__).parents[1]
GRACE = 45  # seconds beyond its limit that a step has to write down what it found
OVER = "the time given was over"
COUNTS = (" passed", " skipped", "nothing was timed")  # what pytest and benchmarks say in the end


class Step(NamedTuple):
    """A command and the Python modules that it needs. It is told by ARMOR_UNTIL when to end: after `limit` seconds, or
    after its share of the time that there is for all."""

    name: str
    command: list
    limit: float = 1800
    share: float = 1.0
    needs: tuple = ()
    device: bool = True
    env: tuple = ()
    skip: str = ""  # why it need not run


class Outcome(NamedTuple):
    """state: passed, failed or skipped. note: why it was skipped, what went wrong, or how many tests there were."""

    name: str
    state: str
    seconds: float
    note: str


def main():
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="end about then, whatever is left (default: no limit)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report", help="folder of the report; emptied first")
    args = parser.parse_args()
    no_device = missing_device()
    sys.exit(run(steps(args.out.resolve()), args.out, no_device, args.minutes))


def run(steps, out, no_device, minutes=None):
    """Runs the steps and writes the folder; returns 1 if one failed. `no_device` says why there is no GPU, if so."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started, outcomes = time.time(), []
    until = float("inf") if minutes is None else started + 60 * minutes
    for step in steps:
        reason = step.skip or (no_device if step.device else "") or missing(step.needs)
        limit = min(step.limit, step.share * (until - started), until - time.time() - GRACE)
        if not reason and limit < 0:
            reason = OVER
        _say(started, f"{step.name} ...")
        outcome = Outcome(step.name, "skipped", 0.0, reason) if reason else perform(step, out, limit)
        _say(started, f"{step.name}: {outcome.state}{outcome.note and f': {outcome.note}'}")
        outcomes.append(outcome)
        (out / "summary.md").write_text(summary.page(out, outcomes))
    print(f"\n{(out / 'summary.md').read_text()}\nwritten: {out}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


def steps(out):
    """Tests first, then the benchmarks, in the order of their weight should time be short."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "benchmarks.deadline"]
    pytest += ["-o", "faulthandler_timeout=120"]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    marked = [
        str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()
    ]
    marked.remove("tests/test_gpu.py")
    tested = ("pytest", "scipy", "mpmath")
    timed = (*tested, "pytest_benchmark", "matplotlib", "tqdm", "yaml")  # the nets are those of `armor train`

    def test(name, *arguments, share=0.15, env=()):
        command = [*pytest, "-m", "gpu", f"--junitxml={out / name.replace(' ', '-')}.xml", *arguments]
        return Step(name, command, share=share, needs=tested, env=env)

    def bench(kernel, *arguments, name=None, folder=out):
        command = [python, "-m", "benchmarks", kernel, "--device", "cuda", "--out", str(folder), *arguments]
        return Step(name or f"benchmark {kernel}", command, share=0.15, needs=timed)

    build = [python, "setup.py", "build_ext", "--inplace"]
    raw = "test_operators or test_large or test_many or test_second"
    public = ["tests/test_gpu.py", "-k", f"not sanitizer and not ({raw})", *parallel]
    return [
        Step("build", build, needs=("torch", "setuptools"), skip=built()),
        Step("environment", [python, "-m", "benchmarks.environment"], needs=("torch",), device=False),
        test("tests of operators", "tests/test_gpu.py", "-k", raw, *parallel, share=0.3),
        test("tests of kernels", *marked),
        test("tests", *public),
        test("tests with triton", *public, env=(("ARMOR_BACKEND", "triton"),)),
        bench("train", "-k", "not compile"),
        bench("dual"),
        bench("rowloss"),
        bench("transport"),
        test("compute-sanitizer", "tests/test_gpu.py", "-k", "sanitizer", share=0.3),
        bench("attack"),
        bench("train", "-k", "compile", name="benchmark train compiled", folder=out / "compiled"),
    ]


def perform(step, out, limit):
    """Runs the command with its output in a log; kills it when it is long past its limit."""
    log, started = out / f"{step.name.replace(' ', '-')}.txt", time.time()
    env = os.environ | dict(step.env) | {"ARMOR_UNTIL": str(started + limit), "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # a compiler that PYTHON brings along, such as ninja, is beside it
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            failed = process.wait(limit + GRACE) != 0
            state, note = ("failed", _wrong(log)) if failed else ("passed", _said(log, *COUNTS))
        except subprocess.TimeoutExpired:
            _kill(process)
            state, note = "failed", f"did not end within {limit + GRACE:.0f} s; last line: {_said(log)}"
    return Outcome(step.name, state, time.time() - started, note)


def missing_device():
    """Why PyTorch sees no GPU here, or nothing."""
    code = "import torch; print(torch.cuda.is_available())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "PyTorch did not answer within five minutes whether there is a device"
    if done.returncode:
        return f"PyTorch cannot be imported: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
    return "" if done.stdout.strip() == "True" else "no CUDA or ROCm device"


def missing(modules):
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}, not installed" if absent else ""


def built():
    """Why nothing need be compiled, or nothing: a build that lacks the CUDA module is tried again."""
    note, module = ROOT / "python/armor/_build.json", ROOT / "python/armor/_C.abi3.so"
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    if not (note.exists() and module.exists()):
        return ""
    if max(path.stat().st_mtime for path in sources) > module.stat().st_mtime:
        return ""
    outcome = json.loads(note.read_text())
    try:
        same = outcome["torch"] == importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"built before, with torch {outcome['torch']}" if same and not outcome["missing"] else ""


def _kill(process):
    """First as Ctrl-C does, so that pytest writes its report."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wrong(log):
    """How the first failure of pytest begins, and what was said of errors in the end."""
    first = re.search(r"^E  +(\S.*)", log.read_text(errors="replace"), re.MULTILINE)
    last = _said(log, "error", " failed") or _said(log)
    return f"{first[1][:200]}; {last}" if first else last


def _said(log, *words):
    """The last line of a log that has one of the words; of all lines, where no words are given."""
    lines = [stripped for line in log.read_text(errors="replace").splitlines() if (stripped := line.strip(" ="))]
    telling = [line for line in lines if not words or any(word in line.lower() for word in words)]
    return telling[-1][:200] if telling else ""


def _say(started, text):
    print(f"{time.time() - started:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()

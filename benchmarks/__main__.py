"""Command line of the benchmarks: kernels are measured, `table` and `plot` show what was recorded.

pytest-benchmark does the timing, in one process per kernel and thread count;
docs/benchmarks.md says how to read the result.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from armor import library
from benchmarks import plot, records, tables

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / ".benchmarks"
# Seconds instead of minutes: small problems and nets, nothing to compile, one thread.
QUICK = {
    "dual": "1x128 and not compile",
    "transport": "128x3072 and not compile",
    "rowloss": "128x10- and not compile",
    "attack": "mnist_cnn and turn0",
    "train": "mnist-cnn and trades and turn0",
}


def main():
    kernels = list(itertools.takewhile(records.KERNELS.__contains__, sys.argv[1:]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if kernels:
        parser.prog += f" {' '.join(kernels)}"
        parser.description = f"Times {', '.join(kernels)}; all further arguments go to pytest."
        parser.add_argument("--quick", action="store_true", help="small problems on one thread, in seconds")
        parser.add_argument("--out", type=Path, help="folder for KERNEL.csv and KERNEL.svg")
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda is AMD's GPUs, too")
        args, extra = parser.parse_known_args(sys.argv[1 + len(kernels) :])
        sys.exit(measure(kernels, args.quick, args.out, args.device, extra))
    commands = parser.add_subparsers(dest="command", required=True)
    for kernel in records.KERNELS:
        commands.add_parser(kernel, help=f"time {kernel}; several kernels may be named")
    table = commands.add_parser("table", help="print the tables, or renew them in the given files")
    table.add_argument("files", nargs="*", type=Path)
    commands.add_parser("plot", help="draw benchmarks/data/*.svg again")
    args = parser.parse_args()

    recorded = records.recorded()
    if args.command == "plot":
        for kernel, rows in recorded.items():
            plot.draw(rows, records.DATA / f"{kernel}.svg")
    elif args.files:
        for file in args.files:
            file.write_text(tables.insert(file.read_text(), recorded))
    else:
        print("\n".join(map(tables.full, recorded.values())), end="")


def measure(kernels, quick, out, device, extra):
    """Measures, writes and prints; returns how many kernels had a case that failed."""
    # Only a whole run on the CPU replaces the recorded numbers.
    out = out or (REPORTS if quick or extra or device != "cpu" or "ARMOR_UNTIL" in os.environ else records.DATA)
    if out == records.DATA:
        _refuse_reference()
    return sum(not _measure(kernel, quick, out, device, extra) for kernel in dict.fromkeys(kernels))


def _refuse_reference():
    slow = [op for op, (chosen, _) in library.backends().items() if chosen["cpu"] != "cpp"]
    if slow:
        raise SystemExit(f"not recorded: {', '.join(slow)} would run without the compiled kernel; see python -m armor")


def _measure(kernel, quick, out, device, extra):
    rows, passed = [], True
    for threads in [1] if quick or device != "cpu" or kernel == "train" else [1, 2]:
        report = REPORTS / f"{kernel}-{threads}-threads.json"
        passed &= _run(kernel, report, threads, quick, device, extra)
        rows += records.from_json(report)
    if not rows or not (passed or out != records.DATA):
        print(f"{kernel}: not written, because {'a case failed' if rows else 'nothing was timed'}", file=sys.stderr)
        return passed
    records.write(out / f"{kernel}.csv", rows)
    rows = records.read(out / f"{kernel}.csv")
    plot.draw(rows, out / f"{kernel}.svg")
    print(tables.full(rows), end="")
    print(f"\nwritten: {out / kernel}.csv, {out / kernel}.svg")
    return passed


def _run(kernel, report, threads, quick, device, extra):
    """Whether all cases passed."""
    report.parent.mkdir(exist_ok=True)
    selection = [f"benchmarks/bench_{kernel}.py", *(["-k", QUICK[kernel]] if quick else []), *extra]
    timing = ["--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"]
    # A round of at least 50 us, so that timer and loop cost nothing beside a solve of a few.
    timing += ["--benchmark-min-time=0.00005", "--benchmark-min-rounds=3"]
    timing += [f"--benchmark-max-time={0.05 if quick else 0.3}"]
    if kernel == "train" and device == "cpu":
        # Minutes, in which the machine does other things as well: CPU time.
        return _run_apart(selection, [*timing, "--benchmark-timer=time.process_time"], report, threads, device)
    return _timed(selection, timing, report, threads, device)


def _run_apart(selection, timing, report, threads, device):
    """Every case in a process of its own, because what malloc does depends on what the process did before."""
    collected = _pytest([*selection, "--collect-only"], threads, device, capture_output=True, text=True).stdout
    parts, passed = [], True
    for case in (line for line in collected.splitlines() if "::" in line):
        passed &= _timed([case], timing, report, threads, device)
        if report.exists():
            parts.append(json.loads(report.read_text()))
    if parts:
        report.write_text(json.dumps(parts[0] | {"benchmarks": [one for part in parts for one in part["benchmarks"]]}))
    return passed


def _timed(selection, timing, report, threads, device):
    """pytest-benchmark writes no report if no case was timed."""
    report.unlink(missing_ok=True)
    return _pytest([*selection, *timing, f"--benchmark-json={report}"], threads, device).returncode == 0


def _pytest(arguments, threads, device, **options):
    """One process per thread count: OpenMP reads its settings only once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.deadline", *arguments]
    # torch takes the smaller of the first two; OpenBLAS's threads only hinder L-BFGS-B in two variables.
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    env |= {"OMP_WAIT_POLICY": "passive", "ARMOR_BENCH_DEVICE": device}
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, **options)


if __name__ == "__main__":
    main()

"""Command line of the benchmarks: `dual` measures, `table` and `plot` show what was recorded.

pytest-benchmark does the timing, in one process per thread count;
docs/benchmarks.md says how to read the result.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import plot, records, tables

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / ".benchmarks"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dual = commands.add_parser("dual", help="time the dual solve; further arguments go to pytest")
    dual.add_argument("--quick", action="store_true", help="one row length on one thread, in seconds")
    dual.add_argument("--out", type=Path, help="folder for dual.csv and dual.svg")
    table = commands.add_parser("table", help="print the tables, or renew them in the given files")
    table.add_argument("files", nargs="*", type=Path)
    commands.add_parser("plot", help="draw benchmarks/data/dual.svg again")
    args, extra = parser.parse_known_args()
    if extra and args.command != "dual":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")

    if args.command == "dual":
        # Only a whole run replaces the recorded numbers.
        _dual(args.quick, args.out or (REPORTS if args.quick or extra else records.DATA), extra)
    elif args.command == "plot":
        plot.draw(records.read(records.DATA / "dual.csv"), records.DATA / "dual.svg")
    else:
        recorded = records.read(records.DATA / "dual.csv")
        for file in args.files:
            file.write_text(tables.insert(file.read_text(), recorded))
        if not args.files:
            print(tables.full(recorded), end="")


def _dual(quick, out, extra):
    rows = []
    for threads in [1] if quick else [1, 2]:
        report = REPORTS / f"dual-{threads}-threads.json"
        _run(report, threads, quick, extra)
        rows += records.from_json(report)
    records.write(out / "dual.csv", rows)
    rows = records.read(out / "dual.csv")
    plot.draw(rows, out / "dual.svg")
    print(tables.full(rows), end="")
    print(f"\nwritten: {out / 'dual.csv'}, {out / 'dual.svg'}")


def _run(report, threads, quick, extra):
    """One process per thread count: OpenMP reads its settings only once."""
    report.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_dual.py", "-q", "-p", "no:cacheprovider"]
    # A round of at least 50 us, so that timer and loop cost nothing beside a solve of a few.
    command += ["--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc"]
    command += ["--benchmark-min-time=0.00005", "--benchmark-min-rounds=3"]
    command += [f"--benchmark-max-time={0.05 if quick else 0.3}"]
    command += [f"--benchmark-json={report}", *(["-k", "1x128 and not compile"] if quick else []), *extra]
    # torch takes the smaller of the first two; OpenBLAS's threads only hinder L-BFGS-B in two variables.
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    env = os.environ | env | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

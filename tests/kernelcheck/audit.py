"""`make audit`: what a machine without a GPU can say of every GPU kernel, one row a kernel and architecture.

    python -m kernelcheck.audit [UNIT ...] [--match TEXT] [--out FOLDER]

A unit is one engine on the kernels of one family, such as `execute-triton-dual`, and runs in a process of its own, as
many at a time as there are cores. What was found goes to FOLDER/audit.md and audit.csv; the exit status is 1 if a check
failed or left out a kernel. docs/kernels.md explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
EXECUTED = ARCHS[:4]  # those that have PTX
SCHEDULES = 30


@dataclass(frozen=True)
class Finding:
    """What a check says of a kernel on an architecture, or on all of them where it is one of the source."""

    check: str
    kernel: str
    arch: str  # "*" for all
    run: str  # the case, the build or the launch
    failure: str = ""
    facts: dict[str, int] = field(default_factory=dict)  # of compiled code
    instances: list[str] = field(default_factory=list)  # of a C++ template


# ---- engines: each yields findings for the kernels of a family -------------------------------------------------------


def interpret_triton(family: str, match: str) -> Iterator[Finding]:
    """All cases on Triton's source. The programs of core cases run in three orders, which must give the same bits; they
    share nothing, as all runs show, so that to the others order can only matter in how a program ends."""
    from kernelcheck import cases_gpu, on_device, strict

    engine = on_device.operators("triton")

    def interpret(case: Any, order: str) -> Any:
        with strict.checking(order=order, seed=1) as launched:
            result = case.run(engine)
        assert launched == list(case.kernels), f"launched {launched}"
        return result

    def in_orders(case: Any) -> None:
        first = interpret(case, "forward")
        for order in strict.ORDERS[1:] if case.core and not case.large else ():
            for one, other in zip(first, interpret(case, order), strict=True):
                assert cases_gpu.bits(one).equal(cases_gpu.bits(other)), f"other bits in {order} order"

    for case in cases_of(family, match):
        yield from findings("source", case.kernels, ["*"], case.name, in_orders, case)


def execute_triton(family: str, match: str) -> Iterator[Finding]:
    """The core cases on what Triton compiles; architectures for which that is the same PTX share an execution."""
    from kernelcheck import launches, on_device

    engine = on_device.operators("triton")

    def execute(case: Any, arch: str) -> None:
        with launches.executed(launches.TARGETS[arch]):
            case.run(engine)

    for case in cases_of(family, match, core=True):
        launched = launches.launches_of(getattr(engine, case.op), *case.arguments)
        texts = {arch: [each.compiled(launches.TARGETS[arch]).asm["ptx"] for each in launched] for arch in EXECUTED}
        for archs in alike(texts):
            yield from findings("executed", case.kernels, archs, case.name, execute, case, archs[0])


def compile_triton(family: str, match: str) -> Iterator[Finding]:
    """Representative launches, ahead of time, within their budgets."""
    from kernelcheck import compiled

    yield from within_budgets(compiled.triton_rows(family), match)


def thread_cuda(family: str, match: str) -> Iterator[Finding]:
    """All cases on CUDA's source and host code, thread by thread: each under one of the schedules, some under all."""
    from kernelcheck import cuda_ops

    def thread(case: Any, schedules: Iterable[int]) -> None:
        for number in schedules:
            case.run(cuda_ops.on_shim(cuda_ops.ORDERS[min(number, 2)], number))

    for i, case in enumerate(cases_of(family, match)):
        schedules = range(SCHEDULES) if case.core and not case.large and i % 8 == 0 else [i % SCHEDULES]
        yield from findings("source", [case.op], ["*"], case.name, thread, case, schedules)


def sanitize_cuda(family: str, match: str) -> Iterator[Finding]:
    """The programs that run the same kernels plain, under all schedules, and under sanitizers, under some."""
    from kernelcheck import toolchain

    program, kernels = {
        "dual": ("dual_watched.cpp", ["dual", "dual_backward"]),
        "rowloss": ("rowloss_watched.cpp", ["rowloss", "rowloss_backward", "rowloss_dual"]),
    }[family]

    def watch(flags: list[str], schedules: int) -> None:
        command = [toolchain.host_shim(program, *flags), str(schedules)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr).strip()

    for build, flags in {"plain": ["-O2"], **toolchain.SANITIZERS}.items():
        schedules = SCHEDULES if build == "plain" else 3
        if match in build:
            yield from findings("sanitized", kernels, ["*"], f"{build}, {schedules} schedules", watch, flags, schedules)


def execute_cuda(family: str, match: str) -> Iterator[Finding]:
    """The core cases on what nvcc compiles, under the host code that launches it."""
    from kernelcheck import compiled, cuda_ops, toolchain

    texts = {arch: [toolchain.operators_ptx(f"{family}.cu", int(arch[3:])).read_text()] for arch in EXECUTED}
    cases = cases_of(family, match, core=True)
    for archs in alike(texts):
        engine = cuda_ops.on_executor(int(archs[0][3:]))
        for case in cases:
            found = findings("executed", [case.op], archs, case.name, case.run, engine)
            instances = sorted({compiled.readable(launch.kernel) for launch in engine.launched})
            yield from (replace(finding, instances=instances) for finding in found)


def compile_cuda(family: str, match: str) -> Iterator[Finding]:
    """All kernels of the CUDA module, ahead of time, within their budgets."""
    from kernelcheck import compiled

    yield from within_budgets(compiled.cuda_rows(family), match)


# What they run on, and the column of the table that they fill.
ENGINES = {
    "interpret-triton": (interpret_triton, "Triton", "source"),
    "execute-triton": (execute_triton, "Triton", "executed"),
    "compile-triton": (compile_triton, "Triton", "compiled"),
    "thread-cuda": (thread_cuda, "CUDA", "source"),
    "sanitize-cuda": (sanitize_cuda, "CUDA", "sanitized"),
    "execute-cuda": (execute_cuda, "CUDA", "executed"),
    "compile-cuda": (compile_cuda, "CUDA", "compiled"),
}
# Without Triton, as on PyTorch for the CPU alone, they are skipped. Those of CUDA take the tools that it brings along.
NEED_TRITON = {"interpret-triton", "execute-triton", "compile-triton", "execute-cuda", "compile-cuda"}
# The longest first, so that no core is left with one at the end.
UNITS = [
    *("sanitize-cuda-rowloss", "compile-cuda-rowloss", "execute-cuda-rowloss", "execute-triton-transport"),
    *("compile-triton-transport", "compile-triton-rowloss", "interpret-triton-transport", "execute-triton-rowloss"),
    *("execute-cuda-dual", "execute-triton-dual", "sanitize-cuda-dual", "thread-cuda-rowloss", "thread-cuda-dual"),
    *("interpret-triton-rowloss", "interpret-triton-dual", "compile-triton-dual", "compile-cuda-dual"),
]


def cases_of(family: str, match: str = "", *, core: bool = False) -> list[Any]:
    """The cases whose name contains `match`, of the operators of a family."""
    from kernelcheck import cases_gpu

    return [case for case in cases_gpu.cases(core=core) if case.op.startswith(family) and match in case.name]


def alike(texts: dict[str, list[str]]) -> list[list[str]]:
    """Architectures in groups for which the PTX is the same but for what says for whom and from where it was made."""
    groups = defaultdict(list)
    for arch, ptx in texts.items():
        code = (re.sub(r"^\s*\.section\s+\.debug.*", "", text, flags=re.M | re.S) for text in ptx)
        code = (re.sub(r"//.*|^\s*\.(version|target|file|loc)\b.*", "", text, flags=re.M) for text in code)
        groups[tuple(code)].append(arch)
    return list(groups.values())


def findings(check: str, kernels: Any, archs: Any, run: str, body: Callable[..., Any], *given: Any) -> list[Finding]:
    """Calls `body`, and says of every kernel and architecture how that went."""
    failure = ""
    try:
        body(*given)
    except pytest.skip.Exception as reason:
        failure = f"{SKIPPED}{reason}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {str(error).strip() or where.line}"
    return [Finding(check, kernel, arch, run, failure) for kernel in kernels for arch in archs]


def within_budgets(rows: Iterable[Any], match: str) -> Iterator[Finding]:
    for row in rows:
        if match in row.variant:
            facts = vars(row.facts) | {"blocks": row.facts.blocks(row.arch)}
            yield Finding("compiled", row.kernel, row.arch, row.variant, "; ".join(row.violations), facts)


# ---- processes -------------------------------------------------------------------------------------------------------


def work(unit: str, match: str) -> None:
    """In a process of its own: a line of JSON for each finding."""
    engine, _, family = unit.rpartition("-")
    run, language, check = ENGINES[engine]
    try:
        if engine in NEED_TRITON:
            pytest.importorskip("triton")
        for finding in run(family, match):
            print(json.dumps(asdict(finding)), flush=True)
    except pytest.skip.Exception as reason:  # all of it
        for kernel in (kernel for *where, kernel in kernels() if where == [language, family]):
            print(json.dumps(asdict(Finding(check, kernel, "*", unit, f"{SKIPPED}{reason}"))))


def started(unit: str, match: str) -> list[Finding]:
    """The findings of a unit. One that breaks off is a finding, too."""
    begun = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if unit.startswith("interpret") else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kernelcheck.audit", "--worker", unit, "--match", match]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    found = [Finding(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode:
        found.append(Finding("unit", unit, "*", unit, (done.stderr.strip() or "no message").splitlines()[-1]))
    failures = sum(bool(each.failure) for each in found)
    print(f"{unit:28} {len(found):5} findings, {failures} failed, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return found


# ---- the table -------------------------------------------------------------------------------------------------------

CHECKS = {language: [check for _, its, check in ENGINES.values() if its == language] for language in ("Triton", "CUDA")}
COLUMNS = ("kernel", "language", "arch", "source", "sanitized", "executed", "compiled")
WORST = {"registers": max, "local": max, "spills": max, "shared": max, "blocks": min}  # of all variants of a kernel
SKIPPED = "skipped: "


def kernels() -> list[tuple[str, str, str]]:
    """All that are launched, as the sources have them: language, family and name."""
    found = []
    for path in sorted((ROOT / "armor_kernels").glob("*.py")):
        found += [("Triton", path.stem, name) for name in re.findall(r"^ +(\w+)\[\(", path.read_text(), re.M)]
    for path in sorted((ROOT / "csrc/cuda").glob("*.cuh")):
        pattern = r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\("
        found += [("CUDA", path.stem, name) for name in re.findall(pattern, path.read_text())]
    return found


def table(found: list[Finding], complete: bool) -> list[dict[str, Any]]:
    """A row a kernel and architecture. In a complete audit no check may be missing, and no instance of a template."""
    rows = []
    for language, _, kernel in kernels():
        for arch in ARCHS if language == "Triton" else EXECUTED:
            here = [each for each in found if each.kernel == kernel and each.arch in (arch, "*")]
            if not (here or complete):
                continue
            row = {"kernel": kernel, "language": language, "arch": arch, "problems": []}
            for check in COLUMNS[3:]:
                answers = [each for each in here if each.check == check]
                needed = check in CHECKS[language] and (check != "executed" or arch in EXECUTED)
                row[check] = _cell(answers) if needed or answers else "-"
                if complete and needed and not answers:
                    row["problems"].append(f"{check}: no finding")
            for name, worst in WORST.items():
                row[name] = worst((each.facts[name] for each in here if each.facts), default="")
            made = {f"{kernel}{each.run}" for each in here if each.check == "compiled" and language == "CUDA"}
            ran = {name for each in here for name in each.instances}
            if complete and ran:
                row["problems"] += [f"executed: {name} was not" for name in sorted(made - ran)]
            row["problems"] += [f"{each.check}, {each.run}: {each.failure}" for each in here if _failed(each)]
            rows.append(row)
    return rows


def _failed(finding: Finding) -> bool:
    return bool(finding.failure) and not finding.failure.startswith(SKIPPED)


def _cell(answers: list[Finding]) -> str:
    skipped = [each for each in answers if each.failure.startswith(SKIPPED)]
    failed = sum(map(_failed, answers))
    parts = [str(len(answers) - len(skipped)) if len(answers) > len(skipped) else ""]
    parts += [f"{failed} failed" if failed else "", f"{len(skipped)} skipped" if skipped else ""]
    return ", ".join(filter(None, parts)) or "missing"


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = [*COLUMNS, *WORST]
    lines = [columns, ["---"] * len(columns)] + [[row[name] for name in columns] for row in rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def versions() -> str:
    """What compiled the kernels, and when."""
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    names = [f"{name} {installed.get(name, 'not installed')}" for name in ("torch", "triton")]
    return f"{', '.join(names)}, {time.strftime('%Y-%m-%d')}:"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernelcheck.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("units", nargs="*", metavar="UNIT", help=f"instead of all: {', '.join(UNITS)}")
    parser.add_argument("--match", default="", help="only runs with this in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "build/audit", help="default: build/audit")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also renew the table in a page such as docs/kernels.md"
    )
    parser.add_argument("--worker", choices=UNITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.match)
        return 0
    if unknown := set(args.units) - set(UNITS):
        parser.error(f"there is no unit {', '.join(sorted(unknown))}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chosen = args.units or UNITS
        found = [each for unit in pool.map(lambda unit: started(unit, args.match), chosen) for each in unit]
    rows = table(found, complete=not (args.units or args.match))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "audit.md").write_text(markdown(rows))
    with (args.out / "audit.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["check", "kernel", "arch", "run", "failure", "facts", "instances"])
        writer.writerows(asdict(each).values() for each in found)

    if args.write:
        from benchmarks.markdown import renew

        page = renew(args.write.read_text(), "audit", {"": lambda: f"{versions()}\n\n{markdown(rows)}"})
        args.write.write_text(page)
    print(markdown(rows))
    problems = [f"{row['kernel']} {row['arch']} {problem}" for row in rows for problem in row["problems"]]
    problems += [f"{each.run} broke off: {each.failure}" for each in found if each.check == "unit"]
    if not found:
        problems.append(f"nothing was run: no case has {args.match!r} in its name")
    skipped = sorted({each.failure for each in found if each.failure.startswith(SKIPPED)})
    print("\n".join([*problems, *skipped, f"written: {args.out}/audit.md, audit.csv"]))
    print("audit: failed" if problems else "audit: passed, but for what was skipped" if skipped else "audit: passed")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

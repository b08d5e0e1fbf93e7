"""Tries one wheel on many PyTorches, each with the Triton that it brings, and prints the table of docs/install.md.

    python tests/compat.py WHEEL [--keep] 2.10.0 2.13.0+cpu 2.15.0@python3.12 ...

`make compat` runs it on the wheel of `make wheel`. Every version gets a fresh environment under build/compat with all
that pip installs for it: some gigabytes, removed at the end unless --keep is given, and a quarter of an hour of tests.
The logs stay there. The exit status is 1 if anything failed.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from environments import ROOT, report, run, site_packages, smoke

WORK = ROOT / "build/compat"
# The interpreter of Triton 3.6 fails on NumPy 2.4: it takes the int of an array of one element.
TOOLS = ("numpy<2.4", "pytest", "hypothesis", "mpmath", "scipy", "setuptools", "ninja")
COLUMNS = (
    "torch",
    "CUDA",
    "Triton",
    "Python",
    "`_C`",
    "`_C_cuda`",
    "operators",
    "Triton interpreted",
    "Triton compiled",
)
OPERATORS = ("test_dual.py", "test_losses.py", "test_rowloss.py", "test_transport.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="+", metavar="TORCH[@PYTHON]")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    rows = []
    for version in options.versions:
        torch, _, python = version.partition("@")
        rows.append(row(options.wheel.resolve(), torch, python or sys.executable, WORK / version, options.keep))
        print(f"{version}: {rows[-1]}", file=sys.stderr, flush=True)
    print(options.wheel.name, "", line(COLUMNS), line(["---"] * len(COLUMNS)), *map(line, rows), sep="\n")
    sys.exit(any(re.search("failed|error|no tests", cell) for cells in rows for cell in cells))


def line(cells):
    return "| " + " | ".join(cells) + " |"


def row(wheel, torch, python, folder, keep):
    """The cells of one version; where it cannot be installed, pip's reason."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv/bin/python"
    for what in ([f"torch=={torch}", *TOOLS], ["--no-deps", wheel]):
        installed = run(inside, "-m", "pip", "install", "--no-cache-dir", *what, cwd="/")
        if installed.returncode:
            return [torch, f"error: {installed.stderr.strip().splitlines()[-1]}", *[""] * (len(COLUMNS) - 2)]
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    try:
        assert site_packages(inside) in smoke(inside).parents
        said = report(inside)
        interpreted = sorted(path.name for path in (folder / "tests").glob("test_*_triton.py"))
        return [
            *versions(inside),
            *(re.search(rf"\(armor/{module}\) +(.+)", said)[1] for module in ("_C", "_C_cuda")),
            tests(inside, folder, "operators", OPERATORS),
            tests(inside, folder, "interpreted", interpreted, TRITON_INTERPRET="1"),
            tests(inside, folder, "compiled", ["test_triton_compiles.py"]),
        ]
    finally:
        if not keep:
            shutil.rmtree(folder / "venv")


def versions(python):
    """Of torch, CUDA, Triton and Python."""
    asked = """
import importlib.metadata as metadata, platform, torch
has_triton = any(found.metadata["Name"] == "triton" for found in metadata.distributions())
triton = metadata.version("triton") if has_triton else "none"
print(torch.__version__, torch.version.cuda or "none", triton, platform.python_version())
"""
    return run(python, "-c", asked, cwd="/").stdout.split()


def tests(python, folder, name, files, **variables):
    """pytest's closing words about these files of tests/; all it said is in the log of that name."""
    paths = [f"tests/{file}" for file in files]
    result = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, cwd=folder, **variables)
    (folder / f"{name}.log").write_text(result.stdout + result.stderr)
    return re.sub(
        r",? \d+ warnings?| in [\d.]+s.*|=", "", (result.stdout or result.stderr).strip().splitlines()[-1]
    ).strip()


if __name__ == "__main__":
    main()

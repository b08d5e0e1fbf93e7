"""What the report of a GPU run says about the machine, `python -m benchmarks.environment`. Called by gpu.py."""

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import torch

from armor.__main__ import main as armor_report

PACKAGES = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "scipy", "mpmath", "matplotlib", "torchattacks"]


def main():
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} processors"
        print(f"{f'GPU {i}':<24} {gpu.name}, {size}, compute capability {gpu.major}.{gpu.minor}")
    armor_report()
    print()
    for name in PACKAGES:
        print(f"{name:<24} {_version(name)}")
    for command in (
        ["git", "log", "-1", "--format=%H %cd"],
        ["nvidia-smi"],
        ["rocm-smi"],
        ["nvcc", "--version"],
        ["compute-sanitizer", "--version"],
    ):
        print(f"\n$ {' '.join(command)}\n{_said(command)}", flush=True)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _said(command):
    program = shutil.which(command[0]) or shutil.which(f"/usr/local/cuda/bin/{command[0]}")
    if program is None:
        return "not found"
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent
        )
    except subprocess.TimeoutExpired:
        return "no answer within a minute"
    return (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    main()

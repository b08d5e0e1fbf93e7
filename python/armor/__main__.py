"""`python -m armor`: versions, compiled modules, which backend serves each operator, and why one is missing.

It prints what a bug report needs, and initialises no device.
"""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import armor
from armor import library


def main() -> None:
    build = library.build_info()
    if torch.version.cuda or torch.version.hip:
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    else:
        kind = "CPU only"
    _print("armor", armor.__version__)
    _print("python", f"{platform.python_version()}, {platform.platform()}")
    _print("torch", f"{torch.__version__} ({kind})")
    _print("triton", _version("triton"))
    _print("numpy", _version("numpy"))
    _print("built with", f"torch {build['torch']}, {build['compiler']}" if build else "not built")
    if "cuda" in build:
        _print("built for", f"CUDA {build['cuda']}, architectures {build['architectures']}")
    print()

    found = library.backends()
    for backend in library.SERVES:
        reasons = {op: missing[backend] for op, (_, missing) in found.items() if backend in missing}
        module = f" (armor/{library.MODULES[backend]})" if backend in library.MODULES else ""
        state = "available" if len(reasons) < len(found) else "missing"
        _print(backend + module, "; ".join([state, *dict.fromkeys(reasons.values())]))
    print()

    devices = ["cpu"] if kind == "CPU only" else list(library.PREFERENCE)
    for op, (chosen, _) in found.items():
        _print(f"armor::{op}", ", ".join(f"{device} by {chosen[device]}" for device in devices))


def _print(name: str, text: str) -> None:
    print(f"{name:<24} {text}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()

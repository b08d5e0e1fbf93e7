"""Compilers for the tests of kernels: g++ for what the host shim runs, with and without sanitizers, and nvcc for PTX,
registers and memory. Output is kept in build/kernelcheck under a hash of everything that went in. A test that needs
what the machine does not have is skipped with the reason.
"""

import functools
import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "kernelcheck"
COMPILER = os.environ.get("CXX", "c++")  # the one that torch.utils.cpp_extension takes, too
SHIM = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DARMOR_HOST_SHIM"]
TORCH = Path(torch.__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]  # as in setup.py
SANITIZERS = {
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def host_shim(source: str, *flags: str) -> Path:
    """A program, or with `-shared` a library, made of a source of this folder under the host shim."""
    return _host_compiled(HERE / source, *flags)


def operators(source: str, sources: Path = CSRC) -> Path:
    """A library with the operators of a .cu in sources/cuda, host code and kernels, for CPU tensors (device.h)."""
    flags = ["-O2", "-shared", "-fPIC", "-fno-gnu-unique"]  # another version of it may be loaded, too
    torch_library = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    return _host_compiled(sources / "cuda" / source, *flags, *STABLE_ABI, *torch_library, "-xc++", sources=sources)


def operators_ptx(source: str, arch: int, sources: Path = CSRC) -> Path:
    """The PTX of the kernels that the same .cu launches."""
    flags = ["-std=c++20", "-ptx", "-DUSE_CUDA", *STABLE_ABI]
    return _compiled(sources / "cuda" / source, arch, *flags, sources=sources)[0]


def cubin(source: Path, arch: int) -> Path:
    """The kernels that a .cu launches, as they come out of ptxas."""
    return _compiled(source, arch, "-std=c++20", "-cubin", "-DUSE_CUDA", *STABLE_ABI)[0]


def changed(file: str, before: str, after: str) -> Path:
    """A copy of csrc with a piece of text, which must be there once, replaced: for tests that a bug is found."""
    path = CSRC / file
    assert path.read_text().count(before) == 1, f"{file} does not hold this once: {before}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        copy = Path(folder, "csrc")
        shutil.copytree(CSRC, copy)
        (copy / file).write_text(path.read_text().replace(before, after))
        digest = hashlib.sha256()
        for each in sorted(each for each in copy.rglob("*") if each.is_file()):
            digest.update(each.read_bytes())
        kept = BUILD / f"csrc-{digest.hexdigest()[:16]}"
        if not kept.exists():
            copy.rename(kept)
    return kept


def ptx(source: str, arch: int, *flags: str) -> str:
    """The PTX of the kernels in a .cu of this folder."""
    return _compiled(HERE / source, arch, "-std=c++17", "-ptx", *flags)[0].read_text()


def _host_compiled(source: Path, *flags: str, sources: Path = CSRC) -> Path:
    tried = [flag for flag in flags if flag.startswith(("-O", "-g", "-f", "-D"))]
    if reason := _missing(*tried):
        pytest.skip(f"{COMPILER} {' '.join(tried)}: {reason}")
    return _built([COMPILER, *SHIM, *flags], source, sources, HERE)[0]


def _compiled(source: Path, arch: int, *flags: str, sources: Path = CSRC) -> tuple[Path, str]:
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no CUDA toolkit with bin/nvcc and include/cuda_runtime.h")
    if f"sm_{arch}" not in _output((nvcc, "--list-gpu-code")).split():
        pytest.skip(f"{nvcc} does not know sm_{arch}")
    return _built([nvcc, "-O3", f"-arch=sm_{arch}", *flags], source, sources)


def _nvcc() -> Path | None:
    """The nvcc of a real toolkit; one on PATH may be a shim outside of it (architecture.md, rule 3)."""
    found = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        *(str(Path(path).parents[1]) for path in (found, found and os.path.realpath(found)) if path),
        "/usr/local/cuda",
        *sorted(glob.glob("/usr/local/cuda-*"), reverse=True),
        "/opt/cuda",
    ]
    for home in filter(None, homes):
        if Path(home, "bin/nvcc").is_file() and Path(home, "include/cuda_runtime.h").is_file():
            return Path(home, "bin/nvcc")
    return None


def _built(command: list, source: Path, sources: Path, *more: Path) -> tuple[Path, str]:
    """What `command` makes of a source, and what it printed, from an earlier call where nothing has changed."""
    folders = [*more, sources / "include", sources / "cuda"]
    command = [*command, *(f"-I{folder}" for folder in folders), source]
    digest = hashlib.sha256(repr([*command, torch.__version__]).encode() + _output((command[0], "--version")).encode())
    headers = (path for folder in folders for path in folder.rglob("*.*h"))  # .h and .cuh
    for file in [source, *sorted(headers), *sorted(sources.glob("*.h"))]:
        digest.update(file.read_bytes())
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}"
    log = target.with_suffix(".log")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, "made")
            printed = subprocess.run([*command, "-o", made], capture_output=True, text=True)
            assert printed.returncode == 0, printed.stderr
            log.write_text(printed.stdout + printed.stderr)
            made.rename(target)
    return target, log.read_text()


@functools.cache
def _missing(*flags: str) -> str:
    """Why a program that is compiled with these flags does not run here, or nothing."""
    if shutil.which(COMPILER) is None:
        return "no such compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "nothing.cpp"), Path(folder, "nothing")
        source.write_text("int main() {}")
        for command in ([COMPILER, *flags, source, "-o", program], [program]):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                return (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
    return ""


@functools.cache
def _output(command: tuple) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

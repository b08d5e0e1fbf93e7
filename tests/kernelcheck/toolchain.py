"""Compilers for the tests of kernels: g++ for what the host shim runs, with and without sanitizers, and nvcc for what
it says about registers and memory. Output is kept in build/kernelcheck under a hash of everything that went in. A test
that needs what the machine does not have is skipped with the reason.
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

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = [HERE, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
INCLUDES = [f"-I{folder}" for folder in FOLDERS]
COMPILER = os.environ.get("CXX", "c++")  # the one that torch.utils.cpp_extension takes, too
SANITIZERS = {
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def host_shim(source: str, *flags: str) -> Path:
    """A program, or with `-shared` a library, made of a source of this folder under the host shim."""
    if reason := _missing(*flags):
        pytest.skip(f"{COMPILER} {' '.join(flags)}: {reason}")
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DARMOR_HOST_SHIM"]
    return _built([COMPILER, *options, *flags, *INCLUDES, HERE / source], source)[0]


def sanitized(source: str, sanitizer: str) -> Path:
    """The same with one of SANITIZERS."""
    return host_shim(source, *SANITIZERS[sanitizer])


def ptxas_report(source: str, arch: int, *flags: str) -> str:
    """What ptxas says of the kernels in a .cu of this folder, optimised as setup.py has it, for sm_`arch`."""
    checks = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"
    return _compiled(source, arch, "-cubin", checks, *flags)[1]


def ptx(source: str, arch: int, *flags: str) -> str:
    """The PTX of the kernels in a .cu of this folder."""
    return _compiled(source, arch, "-ptx", *flags)[0].read_text()


def _compiled(source: str, arch: int, *flags: str) -> tuple[Path, str]:
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no CUDA toolkit with bin/nvcc and include/cuda_runtime.h")
    if f"sm_{arch}" not in _output((nvcc, "--list-gpu-code")).split():
        pytest.skip(f"{nvcc} does not know sm_{arch}")
    return _built([nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", *flags, *INCLUDES, HERE / source], source)


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


def _built(command: list, source: str) -> tuple[Path, str]:
    """What `command` makes of a source, and what it printed, from an earlier call where nothing has changed."""
    digest = hashlib.sha256(repr(command).encode() + _output((command[0], "--version")).encode())
    headers = (path for folder in FOLDERS for path in folder.rglob("*.*h"))  # .h and .cuh
    for file in [HERE / source, *sorted(headers)]:
        digest.update(file.read_bytes())
    target = ROOT / "build" / "kernelcheck" / f"{Path(source).stem}-{digest.hexdigest()[:16]}"
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
    flags = tuple(flag for flag in flags if flag != "-shared")
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

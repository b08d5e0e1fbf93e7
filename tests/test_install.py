"""Installs as strangers do them: bare, editable, on a CPU-only PyTorch, with odd toolkits, with no PyTorch.

Every test runs pip, with its build isolation, in fresh virtual environments on a copy of the sources. The
environments see the PyTorch of the environment that runs the tests through a .pth file, so that nothing large
is downloaded, except where another PyTorch is the point.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.install

ROOT = Path(__file__).parent.parent
CPU_TORCH = "2.13.0+cpu"
NO_SUCH_PLACE = "/no/such/toolkit"

needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is not a CUDA build")

# KL over losses 0 and 1, radius above log(2): the worst case, and so the gradient, is the larger loss alone.
SMOKE = """
import torch, armor, armor.library
losses = torch.tensor([0.0, 1.0], requires_grad=True)
value = armor.dc_loss(losses, radius=1.0)
value.backward()
print(armor.__file__, armor.library.backends()["dual"][0]["cpu"], value.item(), losses.grad.tolist(), sep="|")
"""


def environment(folder, *, sees_torch):
    """The python of a new virtual environment; with `sees_torch` it finds the packages of this one too."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    if sees_torch:
        (purelib,) = folder.glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (purelib / "parent.pth").write_text("\n".join(here) + "\n")
    return python


def run(python, *arguments, cwd, **variables):
    inherited = {k: v for k, v in os.environ.items() if k not in ("ARMOR_CUDA", "ARMOR_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env=inherited | variables,
        capture_output=True,
        text=True,
    )


def pip_install(python, *what, **variables):
    """pip's output. With ARMOR_CUDA=0 unless said otherwise, because nvcc takes its time."""
    result = run(python, "-m", "pip", "install", *what, cwd="/", **({"ARMOR_CUDA": "0"} | variables))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip_refuses(python, *what, **variables):
    result = run(python, "-m", "pip", "install", *what, cwd="/", **variables)
    assert result.returncode != 0
    return " ".join((result.stdout + result.stderr).split())


def smoke(python):
    """Where armor was imported from, after its loss and gradient were found right."""
    result = run(python, "-c", SMOKE, cwd="/")
    assert result.returncode == 0, result.stderr
    path, *rest = result.stdout.strip().split("|")
    assert rest == ["cpp", "1.0", "[0.0, 1.0]"]
    return Path(path)


def report(python):
    result = run(python, "-m", "armor", cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a clone holds, shared because its object files save later builds most of their time."""
    folder = tmp_path_factory.mktemp("clone") / "armor"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in ("csrc", "armor_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("venv"), sees_torch=True)


@pytest.fixture(scope="module")
def wheel(python, sources, tmp_path_factory):
    """Built in isolation against the PyTorch that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    result = run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, sources, cwd="/", ARMOR_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("armor-*.whl"))


@pytest.fixture(scope="module")
def cpu_python(tmp_path_factory):
    """An environment with a CPU-only PyTorch of another version than the newest."""
    python = environment(tmp_path_factory.mktemp("cpu"), sees_torch=False)
    found = run(python, "-m", "pip", "install", f"torch=={CPU_TORCH}", cwd="/")
    if found.returncode:
        pytest.skip(f"torch=={CPU_TORCH} cannot be had from the configured indexes: {found.stderr.splitlines()[-1]}")
    return python


def test_bare_install(python, sources):
    pip_install(python, sources)
    assert python.parent.parent in smoke(python).parents
    assert "ARMOR_CUDA=0 was set when armor was built" in report(python)
    # Nothing outside the two packages, and no tests or benchmarks, in the caller's environment.
    (installed,) = python.parent.parent.glob("lib/python*/site-packages/armor-*.dist-info/RECORD")
    tops = {line.split("/")[0].split(",")[0] for line in installed.read_text().splitlines()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"armor", "armor_kernels", ".."}


def test_one_wheel_serves_every_python_and_leaves_out_stale_modules(python, sources, wheel):
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    stale = sources / "python/armor/_C_cuda.abi3.so"
    stale.write_bytes(b"of an earlier editable install")
    try:
        pip_install(python, sources)
        (package,) = python.parent.parent.glob("lib/python*/site-packages/armor")
        assert sorted(path.name for path in package.glob("_C*")) == ["_C.abi3.so"]
    finally:
        stale.unlink()


def test_editable_install(python, sources):
    pip_install(python, "-e", sources)
    assert smoke(python) == sources / "python/armor/__init__.py"
    # The second build finds its object files: the compiler is not started.
    modified = max(path.stat().st_mtime_ns for path in (sources / "build/objects").rglob("*.o"))
    pip_install(python, "-e", sources)
    assert modified == max(path.stat().st_mtime_ns for path in (sources / "build/objects").rglob("*.o"))


def test_bare_install_on_cpu_only_torch(cpu_python, sources):
    pip_install(cpu_python, sources, ARMOR_CUDA="")
    smoke(cpu_python)
    said = report(cpu_python)
    assert f"torch                    {CPU_TORCH} (CPU only)" in said
    assert f"cuda (armor/_C_cuda)     missing; torch {CPU_TORCH} is not a CUDA build" in said


def test_a_wheel_built_with_one_torch_runs_on_another(cpu_python, wheel):
    pip_install(cpu_python, "--force-reinstall", "--no-deps", wheel)
    smoke(cpu_python)
    assert f"built with               torch {torch.__version__}" in report(cpu_python)


def test_without_torch_one_sentence_says_what_to_do(tmp_path, sources):
    python = environment(tmp_path, sees_torch=False)
    assert ("install torch, setuptools and ninja first, then run `pip install --no-build-isolation .`") in pip_refuses(
        python, sources
    )


def test_cuda_required_but_impossible_is_an_error(python, sources):
    said = pip_refuses(python, sources, ARMOR_CUDA="1", CUDA_HOME=NO_SUCH_PLACE)
    assert "ARMOR_CUDA=1 requires the CUDA module, but torch" in said
    assert (f"found none in {NO_SUCH_PLACE}" if torch.version.cuda else "is not a CUDA build") in said


def fake_toolkit(folder, version):
    """Something with the face of a CUDA toolkit of that version, whose compiler always fails."""
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    (folder / "include/cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    (folder / "bin").mkdir()
    (folder / "bin/nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin/nvcc").chmod(0o755)
    return str(folder)


@needs_cuda_torch
def test_a_toolkit_of_another_major_version_is_named_and_left_alone(tmp_path, python, sources):
    home = fake_toolkit(tmp_path / "cuda", 9020)
    pip_install(python, sources, ARMOR_CUDA="", CUDA_HOME=home)
    smoke(python)
    assert f"found {home} (CUDA 9.2)" in report(python)


@needs_cuda_torch
def test_a_failing_nvcc_costs_the_cuda_module_only(tmp_path, python, sources):
    major = int(torch.version.cuda.split(".")[0])
    home = fake_toolkit(tmp_path / "cuda", major * 1000)
    pip_install(python, sources, ARMOR_CUDA="", CUDA_HOME=home)
    smoke(python)
    assert f"nvcc of {home} failed" in report(python)
    pip_refuses(python, sources, ARMOR_CUDA="1", CUDA_HOME=home)


@needs_cuda_torch
def test_an_nvcc_shim_on_path_does_not_hide_the_toolkit(tmp_path, python, sources):
    header = Path("/usr/local/cuda/include/cuda_runtime_api.h")
    major = torch.version.cuda.split(".")[0]
    if not (header.exists() and f"CUDART_VERSION  {major}" in header.read_text(errors="replace")):
        pytest.skip(f"no CUDA {major} toolkit in /usr/local/cuda")
    shim = tmp_path / "bin/nvcc"
    shim.parent.mkdir()
    shim.write_text('#!/bin/sh\nexec /usr/local/cuda/bin/nvcc "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    # One architecture is enough: what used to fail is the link.
    pip_install(python, sources, ARMOR_CUDA="1", CUDA_HOME="", CUDA_PATH="", PATH=path, TORCH_CUDA_ARCH_LIST="9.0")
    (package,) = python.parent.parent.glob("lib/python*/site-packages/armor")
    assert json.loads((package / "_build.json").read_text())["architectures"] == "9.0"
    assert "cuda (armor/_C_cuda)     available" in report(python)
    assert "cuda by cuda" in report(python)

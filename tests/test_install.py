"""Installs as strangers do them: bare, editable, on a CPU-only PyTorch, with odd toolkits, with no PyTorch.

Every test runs pip, with its build isolation, in fresh virtual environments on the unpacked sdist. The environments see
the PyTorch of the environment that runs the tests through a .pth file, so that nothing large is downloaded, except
where another PyTorch is the point; that test is the last one, because its compiler does all the work again.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from environments import (
    CPU_TORCH,
    ROOT,
    cpu_torch,
    environment,
    pip_install,
    pip_refuses,
    report,
    run,
    site_packages,
    smoke,
)

pytestmark = pytest.mark.install

NO_SUCH_PLACE = "/no/such/toolkit"

needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is not a CUDA build")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked sdist, shared because its object files save later builds most of their time."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = run(sys.executable, "-c", build, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (packed,) = folder.glob("armor-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("venv"), sees_torch=True)


def test_the_sdist_holds_all_sources_and_nothing_built(sources):
    for folder in ("csrc", "armor_kernels", "python/armor"):
        kept, packed = (
            {str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file()}
            for root in (ROOT, sources)
        )
        built = {path for path in kept if "__pycache__" in path or path.endswith((".so", "_build.json"))}
        assert packed == kept - built


def test_bare_install(python, sources):
    pip_install(python, sources)
    assert python.parent.parent in smoke(python).parents
    assert "ARMOR_CUDA=0 was set when armor was built" in report(python)
    # Nothing outside the two packages, and no tests or benchmarks, in the caller's environment.
    (installed,) = site_packages(python).glob("armor-*.dist-info/RECORD")
    tops = {line.split("/")[0].split(",")[0] for line in installed.read_text().splitlines()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"armor", "armor_kernels", ".."}


def test_a_stale_module_is_left_out(python, sources):
    stale = sources / "python/armor/_C_cuda.abi3.so"
    stale.write_bytes(b"of an earlier editable install")
    try:
        pip_install(python, sources)
        assert sorted(path.name for path in (site_packages(python) / "armor").glob("_C*")) == ["_C.abi3.so"]
    finally:
        stale.unlink()


def test_editable_install(python, sources):
    pip_install(python, "-e", sources)
    assert smoke(python) == sources / "python/armor/__init__.py"
    # The second build finds its object files: the compiler is not started.
    modified = max(path.stat().st_mtime_ns for path in (sources / "build/objects").rglob("*.o"))
    pip_install(python, "-e", sources)
    assert modified == max(path.stat().st_mtime_ns for path in (sources / "build/objects").rglob("*.o"))


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
    assert json.loads((site_packages(python) / "armor/_build.json").read_text())["architectures"] == "9.0"
    assert "cuda (armor/_C_cuda)     available" in report(python)
    assert "cuda by cuda" in report(python)


def test_bare_install_on_cpu_only_torch(tmp_path_factory, sources):
    python = cpu_torch(tmp_path_factory)
    pip_install(python, sources, ARMOR_CUDA="")
    smoke(python)
    said = report(python)
    assert f"torch                    {CPU_TORCH} (CPU only)" in said
    assert f"cuda (armor/_C_cuda)     missing; torch {CPU_TORCH} is not a CUDA build" in said

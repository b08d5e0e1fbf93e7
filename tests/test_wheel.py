"""The wheels of `make wheel`: what they hold, what they ask of a machine, and that they run in fresh environments.

Nothing is compiled: the wheels are packed from the objects that this environment was built from. Without a CUDA
toolkit there is the wheel for the CPU alone. `make compat` tries a wheel on other versions of PyTorch.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from environments import CPU_TORCH, ROOT, cpu_torch, environment, pip_install, report, run, site_packages, smoke

import armor
from armor.library import build_info

pytestmark = pytest.mark.install

CPU = f"{armor.__version__}+cpu"
CUDA = "{}+cu{}{}".format(armor.__version__, *build_info().get("cuda", "0.0").split("."))
RELEASED = "8.0;9.0;10.0;12.0+PTX"
COMPILED = build_info().get("architectures", "no CUDA module")
needs_cuda = pytest.mark.skipif(
    COMPILED != RELEASED, reason=f"a CUDA wheel is packed where {RELEASED} are compiled, here: {COMPILED}"
)
each_wheel = pytest.mark.parametrize("version", [CPU, pytest.param(CUDA, marks=needs_cuda)])


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make wheel` leaves in dist/, with this environment in place of .venv."""
    folder = tmp_path_factory.mktemp("dist")
    only_cpu = {"ARMOR_CUDA": "0"} if COMPILED != RELEASED else {}
    result = subprocess.run(
        ["make", "-o", ".venv/installed", "wheel", f"BIN={Path(sys.executable).parent}", f"DIST={folder}"],
        cwd=ROOT,
        env=os.environ | only_cpu,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def modules(dist, tmp_path_factory):
    """The compiled modules of a version's wheel, by name."""

    def unpacked(version):
        folder = tmp_path_factory.mktemp("unpacked")
        with zipfile.ZipFile(*dist.glob(f"armor-{version}-*.whl")) as archive:
            archive.extractall(folder)
        return {path.name: path for path in folder.rglob("*.so")}

    return unpacked


def test_a_wheel_for_the_cpu_and_one_for_cuda(dist):
    names = [path.name.split("-") for path in dist.iterdir()]
    assert sorted(version for _, version, *_ in names) == ([CPU, CUDA] if COMPILED == RELEASED else [CPU])
    for _, _, *tags in names:
        # Every Python since 3.10, and every Linux whose C library is that of this machine or newer.
        assert tags[:2] == ["cp310", "abi3"]
        assert re.fullmatch(rf"(manylinux_2_\d+_{os.uname().machine}\.)+whl", tags[2])


@each_wheel
def test_modules_ask_for_the_stable_abi_alone(modules, version):
    cuda = ["_C_cuda.abi3.so"] if version == CUDA else []
    found = modules(version)
    assert sorted(found) == ["_C.abi3.so", *cuda]
    for path in found.values():
        symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
        asked = {line.split()[1] for line in symbols.stdout.splitlines() if line.split()[0] == "U"}
        # What has a version comes from the C and C++ libraries or libcudart; all else from torch, nothing from Python.
        unversioned = {symbol for symbol in asked if "@" not in symbol}
        assert {"aoti_torch_get_data_ptr", "torch_library_impl"} < unversioned
        assert {symbol for symbol in unversioned if not symbol.startswith(("aoti_torch_", "torch_"))} == set()


@each_wheel
def test_modules_find_their_libraries_and_name_no_folder_of_this_machine(modules, version):
    for name, path in modules(version).items():
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        needed = {library.partition(".so")[0] for library in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)}
        with_cuda = {"libtorch_cuda", "libcudart"} if name == "_C_cuda.abi3.so" else set()
        assert with_cuda <= needed <= with_cuda | {"libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc"}
        content = path.read_bytes()
        assert b"csrc/include/" in content or b"torch/include/" in content
        for folder in (ROOT, sys.prefix, Path(torch.__file__).parent):
            assert os.fsencode(folder) not in content


@needs_cuda
def test_the_cuda_module_has_code_for_the_released_architectures(modules):
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    module = modules(CUDA)["_C_cuda.abi3.so"]
    listed = subprocess.run([cuobjdump, "-lelf", "-lptx", module], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(sm_\d+)\.cubin", listed)) == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert set(re.findall(r"(sm_\d+)\.ptx", listed)) == {"sm_120"}


@each_wheel
def test_in_a_fresh_environment(dist, tmp_path, version):
    python = environment(tmp_path / "venv", sees_torch=True)
    pip_install(python, "--no-index", "--no-deps", "--find-links", dist, f"armor=={version}")
    assert site_packages(python) in smoke(python).parents
    said = report(python)
    if version == CUDA:
        assert f"architectures {RELEASED}" in said
        assert "cuda by cuda" in said
    else:
        assert "cuda (armor/_C_cuda)     missing; ARMOR_CUDA=0 was set when armor was built" in said
    asked = "import importlib.metadata; print(importlib.metadata.version('armor'))"
    assert run(python, "-c", asked, cwd="/").stdout.strip() == version


@each_wheel
def test_on_a_torch_of_another_version_without_cuda(dist, tmp_path_factory, version):
    python = cpu_torch(tmp_path_factory)
    pip_install(python, "--no-index", "--no-deps", "--force-reinstall", "--find-links", dist, f"armor=={version}")
    smoke(python)
    said = report(python)
    assert f"torch                    {CPU_TORCH} (CPU only)" in said
    assert f"built with               torch {torch.__version__}" in said
    if version == CUDA:
        assert f"but torch {CPU_TORCH} is not a CUDA build" in said

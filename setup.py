"""Compiles armor's extension modules: `armor._C` always, `armor._C_cuda` where torch and a toolkit allow it.

What was built, and why anything was left out, goes to armor/_build.json, which `python -m armor` prints.
ARMOR_CUDA=0|1 forbids or requires CUDA, CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the architectures,
MAX_JOBS the number of compiler processes. Metadata lives in pyproject.toml. docs/install.md is for those who install.
"""

import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# pip's build isolation hides the torch that armor will run with: look where this interpreter keeps packages.
for folder in [*site.getsitepackages(), sysconfig.get_path("purelib")]:
    if importlib.util.find_spec("torch") is None:
        site.addsitedir(folder)
if importlib.util.find_spec("torch") is None:
    sys.exit(
        "armor is compiled against the PyTorch that it will run with, and this build sees none: "
        "install torch, setuptools and ninja first, then run `pip install --no-build-isolation .`"
    )

import torch  # noqa: E402

ARMOR_CUDA = os.environ.get("ARMOR_CUDA", "")
if ARMOR_CUDA not in ("", "0", "1"):
    sys.exit(f"ARMOR_CUDA must be 0, 1 or unset, got {ARMOR_CUDA!r}")


def cuda_homes():
    """Where a toolkit may be, best first; one that the user names is the only one."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return [named]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"  # on PATH it may be a shim outside its toolkit
    return [
        *(str(Path(path).parent.parent) for path in (nvcc, os.path.realpath(nvcc))),
        os.environ.get("CONDA_PREFIX", "/usr/local/cuda"),
        *("/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"),
        *glob.glob(f"{Path(torch.__file__).parent.parent}/nvidia/cu*"),  # where pip puts it
    ]


def cuda_version(home):
    """(major, minor) of the toolkit at `home`, None unless its headers and its compiler are there."""
    if not (Path(home, "include/cuda_runtime.h").is_file() and Path(home, "bin/nvcc").is_file()):
        return None
    header = Path(home, "include/cuda_runtime_api.h").read_text(errors="replace")
    number = int(re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)[1])
    return number // 1000, number % 1000 // 10


def find_cuda():
    """The toolkit to build with, or None, and the reason why the CUDA module is left out."""
    if ARMOR_CUDA == "0":
        return None, "ARMOR_CUDA=0 was set when armor was built"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    major = torch.version.cuda.split(".")[0]
    found = {home: version for home in cuda_homes() if (version := cuda_version(home))}
    for home, version in found.items():
        if str(version[0]) == major:
            return home, ""
    seen = ", ".join("{} (CUDA {}.{})".format(home, *version) for home, version in found.items())
    wanted = f"a CUDA {major} toolkit with include/cuda_runtime.h and bin/nvcc"
    where = dict.fromkeys(cuda_homes())
    return None, f"torch {torch.__version__} needs {wanted}; found {seen or 'none in ' + ', '.join(where)}"


cuda_home, no_cuda = find_cuda()
if cuda_home:
    os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension looks for it as soon as it is imported
    if not (os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
        new = cuda_version(cuda_home) >= (12, 8)
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0;12.0+PTX" if new else "8.0;9.0+PTX"
elif ARMOR_CUDA == "1":
    sys.exit(f"ARMOR_CUDA=1 requires the CUDA module, but {no_cuda}")

# A build that is told what to hold says so, as those of PyTorch do: 0.1.0+cpu, 0.1.0+cu130.
label = {"0": "+cpu", "1": cuda_home and "+cu{}{}".format(*cuda_version(cuda_home))}
version = re.search('__version__ = "(.+)"', Path("python/armor/__init__.py").read_text())[1]

from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths  # noqa: E402


def extension(name, sources, device, **options):
    return Extension(
        name,
        sorted(glob.glob(sources)),
        include_dirs=[os.path.abspath("csrc/include"), *include_paths(device)],
        library_dirs=library_paths(device),
        # The stable ABI of torch 2.10 and no Python API: one build serves every later torch and Python.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        py_limited_api=True,
        language="c++",
        **options,
    )


# Loops are to become vectors: no errno and no exception flags from arithmetic, and `omp simd` without OpenMP itself.
VECTORS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wno-psabi"]
# A message that names a source file gives its place here or in torch, not on the machine that compiled it.
PLACES = [f"-ffile-prefix-map={folder}/=" for folder in (os.getcwd(), Path(torch.__file__).parent.parent)]
modules = [
    extension(
        "armor._C",
        "csrc/cpu/*.cpp",
        "cpu",
        extra_compile_args={"cxx": ["-O3", "-g0", *VECTORS, *PLACES]},
        libraries=["torch_cpu"],
    )
]
if cuda_home:
    threads = os.environ.get("MAX_JOBS") or str(os.cpu_count())  # nvcc takes one per architecture
    host = [word for place in PLACES for word in ("--compiler-options", shlex.quote(place))]  # nvcc asks a shell
    cuda_module = extension(
        "armor._C_cuda",
        "csrc/cuda/*.cu",
        "cuda",
        extra_compile_args={"nvcc": ["-O3", "-DUSE_CUDA", "--threads", threads, *host]},
        libraries=["torch_cpu", "torch_cuda"],
        # By its path, because the toolkit that pip installs has libcudart.so.13 but no libcudart.so.
        extra_objects=sorted(glob.glob(f"{cuda_home}/lib*/libcudart.so*"))[:1],
    )
    modules.append(cuda_module)


class Build(BuildExtension):
    """Compiles one module after the other, so that a failing nvcc costs CUDA only, and notes the outcome."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = "build/objects"  # kept: an editable install, too, compiles only what has changed

    def run(self):
        folders = [Path(self.build_lib, "armor"), *([Path("python/armor")] if self.inplace else [])]
        for stale in (module for folder in folders for module in folder.glob("_C*.so")):
            stale.unlink()
        super().run()
        for folder in folders:
            Path(folder, "_build.json").write_text(json.dumps(self.outcome, indent=2) + "\n")

    def build_extensions(self):
        compiler = subprocess.run([get_cxx_compiler(), "--version"], capture_output=True, text=True).stdout
        self.outcome = {"torch": torch.__version__, "compiler": compiler.partition("\n")[0], "missing": {}}
        cpu, *cuda = self.extensions
        self.extensions = [cpu]
        super().build_extensions()
        if not cuda:
            self.outcome["missing"]["_C_cuda"] = no_cuda
            return
        try:
            self.extensions = cuda
            super().build_extensions()
        except Exception as error:
            if ARMOR_CUDA == "1":
                raise
            self.outcome["missing"]["_C_cuda"] = f"nvcc of {cuda_home} failed ({error}); ARMOR_CUDA=1 shows how"
            self.extensions = [cpu]
        else:
            self.outcome["cuda"] = "{}.{}".format(*cuda_version(cuda_home))
            self.outcome["architectures"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "visible GPUs"
            self.extensions = [cpu, *cuda]


setup(
    version=version + label.get(ARMOR_CUDA, ""),
    ext_modules=modules,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

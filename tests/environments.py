"""Fresh virtual environments, pip in them, and the few lines that show that an installed armor works.

Their users are tests/test_install.py, tests/test_wheel.py and tests/compat.py.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_TORCH = "2.13.0+cpu"

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
    if sees_torch:
        here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site_packages(folder / "bin/python") / "parent.pth").write_text("\n".join(here) + "\n")
    return folder / "bin/python"


def cpu_torch(tmp_path_factory):
    """The python of an environment with a CPU-only PyTorch of another version than the newest, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "cpu-torch"
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        environment(folder, sees_torch=False)
        found = run(python, "-m", "pip", "install", f"torch=={CPU_TORCH}", cwd="/")
        if found.returncode:
            pytest.skip(f"no index that pip was told of has torch=={CPU_TORCH}: {found.stderr.splitlines()[-1]}")
        (folder / "complete").touch()
    return python


def site_packages(python):
    (folder,) = Path(python).parent.parent.glob("lib/python*/site-packages")
    return folder


def run(python, *arguments, cwd, **variables):
    ours = ("ARMOR_CUDA", "ARMOR_BACKEND", "TRITON_INTERPRET", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
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
    """What `python -m armor` prints."""
    result = run(python, "-m", "armor", cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout

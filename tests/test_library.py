"""Schemas, fake kernels, the choice of backends, and what `python -m armor` prints.

The choice is made once, when armor is imported, so most tests import it in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armor import library

PACKAGE = Path(library.__file__).parent
COMPILED = pytest.mark.skipif(
    "cpp" in library.backends()["dual"][1],
    reason=f"no C++ module: {library.backends()['dual'][1].get('cpp')}",
)

# KL over losses 0 and 1 at radius log(2) and above: all weight goes to the worst sample.
SATURATED = "torch.ops.armor.dual(torch.tensor([[0., 1.]]), None, None, 0, 0., 1., 0., 1e6)"


def run(code, *, path=None, **environment):
    """The last line that `code` prints in a fresh interpreter, with armor imported from `path` if given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("ARMOR_BACKEND", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture
def bare_package(tmp_path):
    """A copy of the Python files alone, as on a machine where nothing could be compiled."""
    shutil.copytree(PACKAGE, tmp_path / "armor", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    return tmp_path


def test_schemas():
    # The contract between Python, C++, CUDA and Triton; a change here is a change of all four.
    assert str(torch.ops.armor.dual.default._schema) == (
        "armor::dual(Tensor losses, Tensor? costs, Tensor? clean_losses, int divergence, float alpha, "
        "float radius, float kappa, float max_dual) -> "
        "(Tensor value, Tensor lam, Tensor nu, Tensor weights, Tensor status, Tensor passes)"
    )
    assert str(torch.ops.armor.dual_backward.default._schema) == (
        "armor::dual_backward(Tensor grad_value, Tensor mu, Tensor weights, Tensor losses, Tensor? costs, "
        "Tensor? clean_losses) -> (Tensor grad_losses, Tensor grad_costs, Tensor grad_clean)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inputs", ["losses", "costs", "clean"])
def test_fake_kernels_promise_what_real_kernels_return(dtype, inputs):
    losses = torch.tensor([[0.25, 1.0, 2.0], [3.0, 1.0, 0.5]], dtype=dtype)
    costs = None if inputs == "losses" else torch.full_like(losses, 0.125)
    clean = losses / 2 if inputs == "clean" else None
    solve = (losses, costs, clean, 0, 0.0, 0.1, 0.0, 1e6)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.armor.dual.default, solve, test_utils=utilities)

    value, lam, _, weights, _, _ = torch.ops.armor.dual(*solve)
    backward = (torch.ones_like(value), lam, weights, losses, costs, clean)
    torch.library.opcheck(torch.ops.armor.dual_backward.default, backward, test_utils=utilities)


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()


def test_import_touches_no_device_and_no_kernel_language():
    code = (
        "import sys, torch; old = set(sys.modules); import armor; new = set(sys.modules) - old; "
        "print(torch.cuda.is_initialized(), [m for m in new if 'triton' in m or m == 'armor.reference'])"
    )
    assert run(code) == "False []"


@COMPILED
def test_the_compiled_module_serves_the_cpu_by_default():
    code = "import armor.library as l; print({op: chosen['cpu'] for op, (chosen, _) in l.backends().items()})"
    families = {
        "dual": ["dual", "dual_backward"],
        "rowloss": ["rowloss", "rowloss_backward", "rowloss_dual"],
        "transport": ["transport_init", "transport_step", "transport_cost"],
    }
    assert run(code) == str({op: "cpp" for ops in families.values() for op in ops})


def test_the_reference_can_be_asked_for():
    code = "import torch, armor.library as l; print(l.backends()['dual'][0], " + SATURATED + "[0].item())"
    assert run(code, ARMOR_BACKEND="reference") == "{'cpu': 'reference', 'cuda': 'reference'} 1.0"


def test_triton_can_be_asked_for():
    pytest.importorskip("triton")
    code = "import torch, armor.library as l; print(l.backends()['dual'][0], " + SATURATED + "[0].item())"
    assert run(code, ARMOR_BACKEND="triton", TRITON_INTERPRET="1") == "{'cpu': 'triton', 'cuda': 'triton'} 1.0"
    # Compiled Triton kernels cannot run on CPU tensors: there the choice stays what it would have been.
    assert run("import armor.library as l; print(l.backends()['dual'][0])", ARMOR_BACKEND="triton") in (
        "{'cpu': 'cpp', 'cuda': 'triton'}",
        "{'cpu': 'reference', 'cuda': 'triton'}",
    )


def test_an_unknown_backend_is_refused():
    code = "\ntry:\n import armor.library\nexcept ValueError as error:\n print(error)"
    assert run(code, ARMOR_BACKEND="cudnn") == (
        "ARMOR_BACKEND must be one of cpp, cuda, triton, reference, got 'cudnn'"
    )


def test_without_compiled_modules_the_reference_serves_and_the_reason_is_kept(bare_package):
    code = (
        "import torch, armor.library as l; chosen, missing = l.backends()['dual']; "
        "print(l.HERE.parent, chosen['cpu'], missing['cpp'], " + SATURATED + "[0].item(), sep=' | ')"
    )
    assert run(code, path=bare_package) == f"{bare_package} | reference | armor/_C.abi3.so was not built | 1.0"


def test_a_module_that_does_not_load_is_no_import_error(bare_package):
    (bare_package / "armor/_C.abi3.so").write_bytes(b"not a shared object")
    code = "import torch, armor.library as l; c, m = l.backends()['dual']; print(c['cpu'], m['cpp'], sep=' | ')"
    answer = run(code, path=bare_package)
    assert answer.startswith("reference | armor/_C.abi3.so does not load: ")
    assert "file too short" in answer or "invalid ELF header" in answer


def test_a_module_for_another_major_version_of_cuda_is_not_loaded(bare_package):
    (bare_package / "armor/_C_cuda.abi3.so").write_bytes(b"not a shared object, but nobody looks")
    (bare_package / "armor/_build.json").write_text('{"cuda": "9.2"}')
    code = "import armor.library as l; print(l.backends()['dual'][1]['cuda'])"
    has = f"has CUDA {torch.version.cuda}" if torch.version.cuda else "is not a CUDA build"
    expected = f"armor/_C_cuda.abi3.so was built for CUDA 9.2, but torch {torch.__version__} {has}"
    assert run(code, path=bare_package) == expected


def test_what_setup_noted_is_the_reason_given(bare_package):
    (bare_package / "armor/_build.json").write_text('{"missing": {"_C_cuda": "the dog ate it"}}')
    code = "import armor.library as l; print(l.backends()['dual'][1]['cuda'])"
    assert run(code, path=bare_package) == "the dog ate it"


def test_a_missing_backend_that_was_asked_for_is_an_error_with_its_reason(bare_package):
    code = (
        "import torch, armor.library as l; print(l.backends()['dual'][0]['cpu'])\n"
        f"try:\n {SATURATED}\nexcept RuntimeError as error:\n print(error)"
    )
    assert run(code, path=bare_package, ARMOR_BACKEND="cpp") == (
        "armor::dual has no kernel for cpu tensors: ARMOR_BACKEND=cpp, but armor/_C.abi3.so was not built"
    )


def test_environment_report(bare_package):
    report = subprocess.run(
        [sys.executable, "-m", "armor"],
        cwd=bare_package,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert f"torch                    {torch.__version__}" in report
    assert "built with               not built" in report
    assert "cpp (armor/_C)           missing; armor/_C.abi3.so was not built" in report
    assert "armor::dual              cpu by reference" in report
    assert ("cuda by" in report) == torch.cuda._is_compiled()

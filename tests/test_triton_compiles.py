"""The Triton kernels, compiled ahead of time for real architectures without a device: what the interpreter accepts the
compiler may not, and a kernel that spills is a slow one. tests/test_dual_triton.py says what they compute.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles, so Triton must not interpret", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from armor_kernels import dual as kernels  # noqa: E402
from armor_kernels.launch import block_of  # noqa: E402

TARGETS = [*(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)), GPUTarget("hip", "gfx942", 64)]


def compile_for(target, kernel, n, real, **constants):
    """The compiled kernel for rows of n samples of dtype `real`, all pointers aligned to 16 bytes."""
    block, warps = block_of(n)
    constants = {**constants, "BLOCK": block}
    integers = {"status_ptr": "*i32", "passes_ptr": "*i32", "n": "i32", "total": "i32"}
    signature = {
        name: "constexpr" if name in constants else integers.get(name, f"*{real}" if name.endswith("_ptr") else "fp64")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": warps})


def spilled_bytes(compiled, target, folder):
    if target.backend == "hip":
        return 4 * int(re.search(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


# The least and the most that a row can ask for, the family with the longest formulas, and both block sizes.
@pytest.mark.parametrize(
    ("n", "real", "constants"),
    [
        (128, "fp32", {"KIND": 0, "COSTS": False, "CLEAN": False}),
        (4096, "fp32", {"KIND": 1, "COSTS": False, "CLEAN": False}),
        (30, "fp64", {"KIND": 2, "COSTS": True, "CLEAN": True}),
    ],
    ids=["kl", "alpha", "renyi-costs-clean"],
)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_dual_compiles(target, n, real, constants, tmp_path):
    compiled = compile_for(target, kernels._dual, n, real, **constants)
    # The scalar machine keeps some 60 float64 alive; a few spilled words per round cost nothing beside its loops.
    assert spilled_bytes(compiled, target, tmp_path) <= 128


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_dual_backward_compiles(target, tmp_path):
    compiled = compile_for(target, kernels._dual_backward, 100_000, "fp32", COSTS=True, CLEAN=True)
    assert spilled_bytes(compiled, target, tmp_path) == 0

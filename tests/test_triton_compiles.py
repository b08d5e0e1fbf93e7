"""The Triton kernels, compiled ahead of time for real architectures without a device: what the interpreter accepts the
compiler may not, and a kernel that spills is a slow one. tests/test_*_triton.py say what they compute.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles, so Triton must not interpret", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from armor.library import ROWLOSS_STATS  # noqa: E402
from armor_kernels import dual as dual_kernels  # noqa: E402
from armor_kernels import rowloss as rowloss_kernels  # noqa: E402
from armor_kernels import transport as transport_kernels  # noqa: E402
from armor_kernels.launch import block_of  # noqa: E402

TARGETS = [*(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)), GPUTarget("hip", "gfx942", 64)]
SM_90, GFX942 = TARGETS[1], TARGETS[-1]
on_every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))


def compile_for(target, kernel, types, constants, **options):
    """The compiled kernel for arguments of these types and constants (None: not given), by name. What is in neither is
    a float64 number; all pointers are aligned to 16 bytes. `options` are those of a launch, such as num_warps."""
    unknown = {*types, *constants} - {*kernel.arg_names}
    assert not unknown, f"{kernel.__name__} has no {unknown}"
    signature = {name: "constexpr" if name in constants else types.get(name, "fp64") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def spilled_bytes(compiled, target, folder):
    if target.backend == "hip":
        return 4 * int(re.search(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return int(re.search(r"STACK:(\d+)", tool("cuobjdump", "-res-usage", cubin))[1])


def vector_accesses(compiled, target):
    """How many loads and stores of 16 bytes the kernel has."""
    if target.backend == "hip":
        patterns = (r"(?:buffer|global)_load_dwordx4", r"(?:buffer|global)_store_dwordx4")
        return tuple(len(re.findall(pattern, compiled.asm["amdgcn"])) for pattern in patterns)
    patterns = (rf"{access}\.global[.\w:]*\.(?:v4\.b32|v2\.b64)" for access in ("ld", "st"))
    return tuple(len(re.findall(pattern, compiled.asm["ptx"])) for pattern in patterns)


# ---- dual -----------------------------------------------------------------------------------------------------------


def compile_dual(target, kernel, n, real, **constants):
    """The kernel for rows of n samples of dtype `real`."""
    block, warps = block_of(n)
    constants["BLOCK"] = block
    types = {name: f"*{real}" for name in kernel.arg_names if name.endswith("_ptr")}
    integers = {"status_ptr": "*i32", "passes_ptr": "*i32", "n": "i32", "total": "i32"}
    types |= {name: integers[name] for name in kernel.arg_names if name in integers}
    return compile_for(target, kernel, types, constants, num_warps=warps)


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
@on_every_target
def test_dual_compiles(target, n, real, constants, tmp_path):
    compiled = compile_dual(target, dual_kernels._dual, n, real, **constants)
    # The scalar machine keeps some 60 float64 alive; a few spilled words per round cost nothing beside its loops.
    assert spilled_bytes(compiled, target, tmp_path) <= 128


@on_every_target
def test_dual_backward_compiles(target, tmp_path):
    compiled = compile_dual(target, dual_kernels._dual_backward, 100_000, "fp32", COSTS=True, CLEAN=True)
    assert spilled_bytes(compiled, target, tmp_path) == 0


# ---- transport ------------------------------------------------------------------------------------------------------

# Kind, norm and variant of every branch of a step, and what its launch may be given.
STEPS = {
    "linf": (0, 0, 0),
    "l2": (1, 0, 0),
    "l1": (2, 0, 0),
    "norm_power-inf-sign": (3, 0, 0),
    "norm_power-1-normalised": (3, 1, 1),
    "norm_power-2-normalised": (3, 2, 1),
    "soft_ball-before": (4, 0, 1),
    "binary": (5, 0, 0),
}
GIVEN = {"mu_ptr", "radii_ptr", "active_ptr", "seeds_ptr", "mean_ptr", "std_ptr", "feed_ptr", "costs_ptr"}
CIFAR, IMAGENET = (2, 3, 32, 32), (2, 3, 224, 224)
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def compile_transport(target, kernel, shape, dtype="fp32", given=GIVEN, layout=torch.contiguous_format, **constants):
    """The kernel as its launcher asks for it at samples of that shape, with those of the optional tensors; gradient,
    feed and x have one dtype."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    x = torch.empty(shape, dtype=kinds[dtype], device="meta", memory_format=layout)
    geometry = transport_kernels._geometry(x)
    options = {name: geometry.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    real = "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(("units", "channels", "spatial"), "i32")
    types |= dict.fromkeys(("costs_ptr", "mu_ptr", "radii_ptr", "mean_ptr", "std_ptr"), f"*{real}")
    types |= dict.fromkeys(("x_adv_ptr", "grad_ptr", "x_ptr", "x_next_ptr", "feed_ptr"), f"*{dtype}")
    types |= {"status_ptr": "*i32", "active_ptr": "*i1", "seeds_ptr": "*i64"}
    constants |= {name: geometry[name] for name in ("UNIT", "LAST", "SINGLE", "BLOCK")}
    constants |= dict.fromkeys(GIVEN - given)
    # Triton makes a constant of every integer that is 1, unless told not to
    constants |= {name: 1 for name in ("channels", "spatial") if geometry[name] == 1} | {"mu_stride": 1}
    wanted = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in wanted}
    types = {name: value for name, value in types.items() if name in wanted and name not in constants}
    return compile_for(target, kernel, types, constants, **options)


def compile_step(target, step, shape, dtype="fp32", given=GIVEN, layout=torch.contiguous_format, targeted=True):
    kind, norm, variant = step
    if kind not in (3, 4):
        given = given - {"costs_ptr"}
    numbers = {"KIND": kind, "NORM": norm, "VARIANT": variant, "TARGETED": targeted, "ROUND": kind == 5}
    return compile_transport(target, transport_kernels._step, shape, dtype, given, layout, **numbers)


# A CIFAR image is held in registers: 16 elements a thread are four vectors of each tensor that is read or written.
@every_step
@on_every_target
def test_step_with_everything_compiles(target, step, tmp_path):
    compiled = compile_step(target, step, CIFAR)
    assert spilled_bytes(compiled, target, tmp_path) == 0
    lanes = 2 if target.backend == "hip" else 4  # warps of 64 threads hold half as much in each
    assert vector_accesses(compiled, target) == (3 * lanes, 2 * lanes)


# Larger samples are read in blocks of 8 elements a thread, in every pass again.
@every_step
@pytest.mark.parametrize("target", [SM_90, GFX942], ids=lambda target: str(target.arch))
def test_step_of_a_large_sample_compiles(target, step, tmp_path):
    compiled = compile_step(target, step, IMAGENET)
    assert spilled_bytes(compiled, target, tmp_path) == 0
    loads, stores = vector_accesses(compiled, target)
    assert loads >= 4
    assert stores >= 2


# Half precision has 8 elements in a vector and float64 two; 2700 is a multiple of 4 but not of 8 or 16.
@pytest.mark.parametrize(
    ("dtype", "shape", "loads"),
    [("fp16", CIFAR, 6), ("bf16", CIFAR, 6), ("fp64", CIFAR, 24), ("fp32", (2, 3, 30, 30), 12)],
    ids=["fp16", "bf16", "fp64", "2700"],
)
@pytest.mark.parametrize("step", [STEPS["linf"], STEPS["l1"]], ids=["linf", "l1"])
def test_step_of_other_samples_compiles(step, dtype, shape, loads, tmp_path):
    compiled = compile_step(SM_90, step, shape, dtype=dtype, given=set(), targeted=False)
    assert spilled_bytes(compiled, SM_90, tmp_path) == 0
    assert vector_accesses(compiled, SM_90)[0] == loads


# Images of one channel and rows, whose sizes become constants; and the layout in which channels are innermost.
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 1, 28, 28), torch.contiguous_format), ((2, 784), torch.contiguous_format), (CIFAR, torch.channels_last)],
    ids=["mnist", "rows", "channels_last"],
)
@pytest.mark.parametrize("step", [STEPS["l2"], STEPS["binary"]], ids=["l2", "binary"])
def test_step_of_other_layouts_compiles(step, shape, layout, tmp_path):
    compiled = compile_step(SM_90, step, shape, layout=layout)
    assert spilled_bytes(compiled, SM_90, tmp_path) == 0
    loads, stores = vector_accesses(compiled, SM_90)
    assert (min(loads, 12), stores) == (12, 8)  # of rows, whose every entry is a channel, also mean and std are vectors


def test_a_step_of_cifar_leaves_room_for_two_programs(tmp_path):
    """Programs that share a multiprocessor load while others compute; an A100 or H100 has 65536 registers on each.
    Triton 3.8 leaves room for three, with 80 registers; Triton 3.9 takes 104."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_step(SM_90, STEPS["linf"], CIFAR, given={"mean_ptr", "std_ptr", "feed_ptr"}).asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage", cubin))[1])
    assert 2 * 8 * 32 * registers <= 65536


@pytest.mark.parametrize("start", range(5), ids=["linf", "l2", "l1", "gaussian", "clean"])
@on_every_target
def test_start_compiles(target, start, tmp_path):
    given = GIVEN - {"seeds_ptr"} if start == 4 else GIVEN
    compiled = compile_transport(target, transport_kernels._init, CIFAR, given=given, START=start)
    assert spilled_bytes(compiled, target, tmp_path) == 0
    lanes = 2 if target.backend == "hip" else 4
    assert vector_accesses(compiled, target) == (lanes, 2 * lanes)


@every_step
def test_cost_compiles(step, tmp_path):
    kind, norm, _ = step
    for target in (SM_90, GFX942):
        compiled = compile_transport(target, transport_kernels._cost, CIFAR, KIND=kind, NORM=norm)
        assert spilled_bytes(compiled, target, tmp_path) == 0
        assert vector_accesses(compiled, target)[0] == (4 if target is GFX942 else 8)


# ---- rowloss --------------------------------------------------------------------------------------------------------


def compile_rowloss(target, kernel, classes, dtype, **constants):
    """The kernel for rows of that many classes and logits of `dtype`, with every output that its kind has."""
    real = "fp64" if dtype == "fp64" else "fp32"
    rows, block, warps = rowloss_kernels.tile_of(classes, 8 if real == "fp64" else 4)
    constants |= {"CLASSES": classes, "ROWS": rows, "BLOCK": block, "COLUMNS": ROWLOSS_STATS[constants["KIND"]]}
    types = {name: f"*{real}" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: f"*{dtype}" for name in types if name.endswith(("logits_ptr", "natural_ptr"))}
    integers = {"target_ptr": "*i64", "rows": "i32", "n": "i32", "tiles": "i32", "ignore_index": "i64"}
    types |= {name: integers[name] for name in kernel.arg_names if name in integers}
    return compile_for(target, kernel, types, constants, num_warps=warps)


# Several rows to a program, one row, and a row of many blocks, each where it needs most registers.
@pytest.mark.parametrize(("classes", "dtype"), [(10, "fp32"), (4096, "fp32"), (50_000, "fp16"), (50_000, "fp64")])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["ce", "trades", "mart"])
@on_every_target
def test_rowloss_compiles(target, kind, classes, dtype, tmp_path):
    constants = {"KIND": kind, "SMOOTH": kind == 0}
    compiled = compile_rowloss(target, rowloss_kernels._rowloss, classes, dtype, **constants)
    # ptxas gives up one register where another block fits on a multiprocessor for it.
    assert spilled_bytes(compiled, target, tmp_path) <= 8
    constants = {"KIND": kind, "WEIGHTED": True, "NATURAL_GRAD": kind > 0}
    compiled = compile_rowloss(target, rowloss_kernels._rowloss_backward, classes, dtype, **constants)
    assert spilled_bytes(compiled, target, tmp_path) <= 8


# A thread holds 8 logits: one load of bfloat16 and two of float32. More would mean that a row is read twice.
@pytest.mark.parametrize(("classes", "dtype", "per_tensor"), [(1000, "bf16", 1), (1000, "fp32", 2), (4096, "fp32", 2)])
@pytest.mark.parametrize("kind", [0, 1, 2, 3], ids=["ce", "trades", "mart", "kl"])
@pytest.mark.parametrize("target", TARGETS[:4], ids=lambda target: str(target.arch))
def test_rowloss_reads_logits_once_and_wide(target, kind, classes, dtype, per_tensor):
    tensors = 1 if kind == 0 else 2
    compiled = compile_rowloss(target, rowloss_kernels._rowloss, classes, dtype, KIND=kind, SMOOTH=kind == 0)
    assert vector_accesses(compiled, target) == (tensors * per_tensor, 0)
    constants = {"KIND": kind, "WEIGHTED": True, "NATURAL_GRAD": kind > 0}
    compiled = compile_rowloss(target, rowloss_kernels._rowloss_backward, classes, dtype, **constants)
    assert vector_accesses(compiled, target) == (tensors * per_tensor, tensors * per_tensor)

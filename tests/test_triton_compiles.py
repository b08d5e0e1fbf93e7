"""The Triton kernels, compiled ahead of time for real architectures without a device: what the interpreter accepts the
compiler may not, and a kernel that spills is a slow one. tests/test_*_triton.py say what they compute; `make audit`
asks of every architecture what is asked of two here.
"""

import fnmatch
import inspect
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles, so Triton must not interpret", allow_module_level=True)
import triton.language as tl  # noqa: E402
from kernelcheck import compiled, launches, representative, toolchain  # noqa: E402
from kernelcheck.compiled import Facts, check, facts_of_launch  # noqa: E402
from kernelcheck.launches import TARGETS, launches_of  # noqa: E402

from armor import reference  # noqa: E402
from armor_kernels import dual, rowloss, transport  # noqa: E402

LAUNCHES = {
    f"{launch.kernel.__name__} {variant}": (launch, {"sm_90", "gfx942"}.intersection(archs))
    for variant, launch, archs in representative.triton_launches()
}
on = pytest.mark.parametrize("arch", TARGETS)


@pytest.mark.parametrize("name", LAUNCHES)
def test_budget(name):
    launch, archs = LAUNCHES[name]
    assert "sm_90" in archs
    assert [wrong for arch in archs for wrong in check(facts_of_launch(launch, arch), name, arch)] == []


def test_every_kernel_has_a_representative():
    modules = (dual, rowloss, transport)
    functions = [each for module in modules for each in vars(module).values() if isinstance(each, triton.JITFunction)]
    kernels = {each.__name__ for each in functions if "tl.program_id(" in inspect.getsource(each.fn)}
    assert {launch.kernel.__name__ for launch, _ in LAUNCHES.values()} == kernels


def test_every_exception_is_used():
    patterns = {entry["kernel"] for entry in compiled.budgets() if entry["kernel"].startswith("_")}
    assert len(patterns) > 10
    assert [pattern for pattern in patterns if not fnmatch.filter(LAUNCHES, pattern)] == []


# ---- budgets name what is wrong ------------------------------------------------------------------------------------


@triton.jit
def _transpose(from_ptr, to_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, BLOCK // 64)[None, :]
    tl.store(to_ptr + row + 64 * column, tl.load(from_ptr + row * (BLOCK // 64) + column))


def images(*shape, offset=0):
    return torch.empty(offset + torch.Size(shape).numel(), device="meta")[offset:].view(shape)


def step_of(x):
    none = [None] * 6
    (launch,) = launches_of(
        transport.transport_step, x, x, x, *none, 0, 0.1, 0.1, 1.0, 1.0, 0, 0, 0.0, 1.0, False, False, None
    )
    return launch


def wrong(launch, name, arch):
    return [violation.partition(": ")[2] for violation in check(facts_of_launch(launch, arch), name, arch)]


# One warp for a sample that eight, or on AMD sixteen, hold in their registers.
@pytest.mark.parametrize(("arch", "shape"), [("sm_90", (2, 3, 32, 32)), ("gfx942", (2, 4, 64, 64))])
def test_a_kernel_that_spills_is_named(arch, shape):
    launch, name = step_of(images(*shape)), "_step soft_ball bare"
    assert wrong(launch, name, arch) == []
    crowded = replace(launch, options=launch.options | {"num_warps": 1})
    facts = facts_of_launch(crowded, arch)
    assert facts.spills > 10
    found = wrong(crowded, name, arch)
    assert f"local {facts.local}, not at most 0" in found
    assert f"registers {facts.registers}, not at most 128" in found


# A slice of a larger tensor, of which the result is none, and images whose rows do not end at a multiple of 16 bytes.
@on
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (images(2, 3, 32, 32, offset=1), ["reads 0, not at least 3"]),
        (images(2, 3, 31, 31), ["reads 0, not at least 3", "writes 0, not at least 1"]),
    ],
    ids=["offset", "odd"],
)
def test_scalar_accesses_are_named(arch, x, found):
    assert wrong(step_of(x), "_step linf 3x32x32 bare", arch) == found


@on
def test_shared_memory_is_named(arch):
    square = images(64 * 512)
    with launches.given_to(lambda launch: found.append(launch)):
        found = []
        _transpose[(1,)](square, square, BLOCK=64 * 512)
    facts = facts_of_launch(found[0], arch)
    assert f"shared {facts.shared}, not at most 16384" in wrong(found[0], "_transpose", arch)


def test_occupancy():
    """By hand: registers come in portions of 256 a warp, and every block loses 1 KiB of shared memory."""
    facts = Facts(registers=128, local=0, spills=0, shared=0, threads=256, reads=0, writes=0)
    assert [facts.blocks(arch) for arch in ("sm_80", "sm_120")] == [2, 2]
    assert replace(facts, registers=129).blocks("sm_90") == 1
    assert replace(facts, registers=32).blocks("sm_90") == 8
    assert replace(facts, registers=32).warps("sm_120") == 48
    assert [replace(facts, registers=16, threads=32).blocks(arch) for arch in ("sm_80", "sm_120")] == [32, 24]
    assert [replace(facts, shared=48 * 1024).blocks(arch) for arch in ("sm_80", "sm_120")] == [2, 2]
    assert [replace(facts, shared=99 * 1024).blocks(arch) for arch in ("sm_80", "sm_90", "sm_120")] == [1, 2, 1]
    assert replace(facts, shared=164 * 1024).blocks("sm_80") == 0
    assert "blocks 0, not at least 1" in check(replace(facts, shared=164 * 1024), "_any", "sm_80")[-1]


# The path that CUDA kernels take; `make audit` asks it of all of them.
SPILLING = r"""
__global__ void __launch_bounds__(256) crowd(const double* from, double* to, int n) {
  __shared__ double kept[2048 + 64];
  double many[300];
  for (int i = 0; i < 300; ++i) many[i] = from[i * n + threadIdx.x];
  kept[threadIdx.x] = many[n % 300];
  __syncthreads();
  to[threadIdx.x] = kept[n] + many[(n + 7) % 300];
}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cuda_kernels_are_read_alike(arch, tmp_path):
    source = tmp_path / "crowd.cu"
    source.write_text(SPILLING)
    cubin = toolchain.cubin(source, int(arch.removeprefix("sm_"))).read_bytes()
    ((name, facts),) = compiled.facts_of_cubin(cubin, arch, 256).items()
    assert (name, facts.shared) == ("crowd", 8 * (2048 + 64))
    assert facts.local >= 8 * 300
    assert facts.spills > 100
    assert len(check(facts, name, arch)) == 2


# ---- launches are compiled as for a device -------------------------------------------------------------------------


def test_specialisation():
    """Types and hints follow Triton's rules: pointers and integers that 16 divides are marked, 1 and None are constants
    unless the kernel says otherwise, and Python numbers go over as the annotation or their size asks."""
    x = torch.empty(2, 1, 32, 32)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape)
    mu, active = torch.ones(2), torch.ones(2, dtype=torch.bool)
    given = x, shifted, x, mu, None, active, None, None, None
    (launch,) = launches_of(transport.transport_step, *given, 0, 0.1, 0.1, 1.0, 1.0, 0, 0, 0.0, 1.0, False, False, None)
    source = launch.compiled(TARGETS["sm_90"]).src
    names = launch.kernel.arg_names
    types = {name: type for name, type in source.signature.items() if type != "constexpr"}
    assert types == {
        **dict.fromkeys(("x_adv_ptr", "grad_ptr", "x_ptr", "x_next_ptr", "mu_ptr"), "*fp32"),
        **{"status_ptr": "*i32", "active_ptr": "*u1", "units": "i32", "spatial": "i32"},
        **dict.fromkeys(("radius", "step_size", "weight", "power", "lo", "hi"), "fp64"),
    }
    hinted = {names[path[0]] for path, hints in source.attrs.items() if ["tt.divisibility", 16] in hints}
    assert hinted == {"x_adv_ptr", "x_ptr", "x_next_ptr", "status_ptr", "mu_ptr", "active_ptr", "spatial"}
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    assert constants["mu_stride"] == constants["channels"] == 1
    assert constants["costs_ptr"] is constants["seeds_ptr"] is None
    assert constants["UNIT"] == 16


def test_alike_launches_are_compiled_once():
    def step(rows):
        return step_of(images(rows, 3, 32, 32)).compiled(TARGETS["sm_90"])

    assert step(2) is step(3)
    assert step(2) is not step_of(images(2, 3, 31, 31)).compiled(TARGETS["sm_90"])


# ---- and may be executed -------------------------------------------------------------------------------------------

SM_90 = TARGETS["sm_90"]


def assert_executed(launcher, *arguments, kernels):
    """The compiled kernels answer as the reference does."""
    with launches.executed(SM_90) as launched:
        found = launcher(*arguments)
    assert [name for name, _ in launched] == kernels
    known = getattr(reference, launcher.__name__)(*arguments)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)


def test_executed_dual():
    losses = torch.tensor([[0.5, -1.0, 2.0, 0.25, 1.0], [3.0, 3.0, -1.0, 0.0, 0.5]])
    with launches.executed(SM_90) as launched:
        value, lam, nu, weights, status, _ = dual.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)
    assert [name for name, _ in launched] == ["_dual"]
    known = reference.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)
    torch.testing.assert_close((value, lam, nu, weights), known[:4], rtol=1e-5, atol=1e-6)
    assert status.tolist() == known[4].tolist()


def test_executed_rowloss():
    logits, target = torch.linspace(-3, 3, 50).view(5, 10).sin(), torch.arange(5)
    assert_executed(rowloss.rowloss, logits, target, None, 0, 1.0, 0.1, -100, kernels=["_rowloss"])


def test_executed_step():
    x = torch.linspace(0, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    given = x, (37 * x).sin(), x, *[None] * 6
    assert_executed(
        transport.transport_step, *given, 0, 0.1, 0.02, 1.0, 1.0, 0, 0, 0.0, 1.0, False, False, None, kernels=["_step"]
    )


def test_only_ptx_is_executed():
    losses = torch.zeros(1, 5)
    with pytest.raises(ValueError, match="gfx942"), launches.executed(TARGETS["gfx942"]):
        dual.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)

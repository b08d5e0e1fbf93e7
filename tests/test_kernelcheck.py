"""The host shim of tests/kernelcheck itself: each kernel of bugs.cpp holds one bug, which must be caught by the build
that is there for its kind, and must pass every build once the bug is repaired.
"""

import ctypes
import functools
import math
import os
import re
import subprocess

import pytest
import torch
from kernelcheck import toolchain

WRONG, REFUSED = 1, 2  # exit statuses of bugs.cpp

# A wrong result under some schedule, or a launch that the shim refuses with such a message.
PLAIN = {
    "missing_barrier": (WRONG, ""),
    "reused_too_early": (WRONG, ""),
    "missing_warp_barrier": (WRONG, ""),
    "unwritten_shared": (WRONG, ""),
    "missing_grid_barrier": (WRONG, ""),
    "early_ticket": (WRONG, ""),
    "divergent_barrier": (REFUSED, r"__syncthreads at .*bugs\.cpp:\d+ .* while others are at __syncthreads at "),
    "partial_barrier": (REFUSED, r"thread \d+ of block \d+ waits for ever for others: __syncthreads at .*bugs\.cpp"),
    "partial_shuffle": (REFUSED, r"waits for ever for others: __shfl_xor_sync at .*bugs\.cpp:\d+"),
    "mismatched_shuffle": (REFUSED, r"__syncwarp at .*bugs\.cpp:\d+ .* while others are at __shfl_xor_sync at "),
    "grid_barrier_of_waiting_blocks": (REFUSED, r"__grid_sync, but not every block of the grid is resident"),
}
# What only sanitizers see, and how they call it. A data race is one even where fibers always give the right result.
SANITIZED = {
    "address": {
        "beyond_shared": "AddressSanitizer: use-after-poison",
        "beyond_global": "AddressSanitizer: heap-buffer-overflow",
        "misaligned": "runtime error: load of misaligned address",
    },
    "thread": {
        "missing_barrier": "ThreadSanitizer: data race",
        "reused_too_early": "ThreadSanitizer: data race",
        "missing_warp_barrier": "ThreadSanitizer: data race",
        "missing_grid_barrier": "ThreadSanitizer: data race",
        "unfenced_ticket": "ThreadSanitizer: data race",
        "plain_ticket": "ThreadSanitizer: data race",
    },
}


def run(program, bug, state, schedules):
    first_report = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, bug, state, str(schedules)]
    result = subprocess.run(command, capture_output=True, text=True, env=first_report)
    return result.returncode, result.stdout + result.stderr


@functools.cache
def plain():
    return toolchain.host_shim("bugs.cpp", "-O2")


@pytest.mark.parametrize("bug", PLAIN)
def test_schedules_find(bug):
    status, message = PLAIN[bug]
    found, output = run(plain(), bug, "broken", 30)
    assert found == status, output
    assert re.search(message, output)


@pytest.mark.parametrize("bug", dict.fromkeys([*PLAIN, *SANITIZED["address"], *SANITIZED["thread"]]))
def test_repaired_bugs_pass(bug):
    assert run(plain(), bug, "right", 30) == (0, "")


@pytest.mark.parametrize(("sanitizer", "bug"), [(name, bug) for name, bugs in SANITIZED.items() for bug in bugs])
def test_sanitizers_find(sanitizer, bug):
    program = toolchain.host_shim("bugs.cpp", *toolchain.SANITIZERS[sanitizer])
    status, output = run(program, bug, "broken", 2)
    assert status != 0
    assert SANITIZED[sanitizer][bug] in output
    assert run(program, bug, "right", 2) == (0, "")


# The way to change fibers where there is no assembly for it.
def test_other_processors():
    program = toolchain.host_shim("bugs.cpp", "-O1", "-DCUEMU_UCONTEXT")
    assert run(program, "missing_grid_barrier", "broken", 3) == (WRONG, "")
    assert run(program, "missing_grid_barrier", "right", 3) == (0, "")


# Every 16-bit number there is, and roundings of float32 to them: ties, carries, subnormals and overflow among them.
@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_16_bit_types(name, dtype):
    library = ctypes.CDLL(str(toolchain.host_shim("conversions.cpp", "-O2", "-shared", "-fPIC")))

    def convert(function, given, to):
        converted = torch.zeros(given.shape, dtype=to)
        getattr(library, function)(*(ctypes.c_void_p(t.data_ptr()) for t in (given, converted)), given.numel())
        return converted

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = convert(f"{name}_to_float", every, torch.float32)
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide[~every.isnan()], every[~every.isnan()].float())

    exact = wide[wide.isfinite()]
    above = exact.nextafter(torch.tensor(math.inf))
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    steps = torch.linspace(-1, 2, 4001)
    between = [exact[:-1].lerp(exact[1:], share) for share in (0.25, 0.5, 0.75)]
    given = torch.cat([anything, steps, 1e-6 * steps, 1e5 * steps, above, *between])
    rounded, expected = convert(f"float_to_{name}", given, dtype), given.to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(rounded[kept].view(torch.int16), expected[kept].view(torch.int16))

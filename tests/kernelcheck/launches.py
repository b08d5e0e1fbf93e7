"""Launches of Triton kernels without a device. The launchers of armor_kernels are called on CPU tensors as they are;
what they launch is compiled exactly as for a GPU, because Triton's own code decides on types, alignment and constants,
and may be run: the compiled PTX by executor.py, whose results appear in the CPU tensors.

    with launches.executed(GPUTarget("cuda", 90, 32)):
        value, *_ = armor_kernels.dual.dual(losses, ...)  # what an H100 would compute
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

# Whatever the shipped CUDA module is compiled for, and AMD's MI300.
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

_run = JITFunction.run


@dataclass(frozen=True)
class Launch:
    """kernel[grid](**arguments, **constants, **options): its run-time arguments, its tl.constexpr, and the compiler's
    options, such as num_warps."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def compiled(self, target: GPUTarget) -> Any:
        """Triton's CompiledKernel for a GPU of this kind. Triton compiles once for launches that it takes for alike."""
        given = self.arguments | self.constants | self.options
        with _device(target):
            return _run(self.kernel, grid=self.grid, warmup=True, **given)

    def run(self, target: GPUTarget, **options: Any) -> Any:
        """Executes what is compiled for an NVIDIA target on the tensors; `options` and the result are those of
        executor.launch."""
        from kernelcheck import executor

        if target.backend != "cuda":
            raise ValueError(f"only PTX can be executed, and {target.arch} has none")
        compiled = self.compiled(target)
        module, entry = _module(compiled.asm["ptx"]), compiled.metadata.name
        types = compiled.src.signature
        arguments = [value for name, value in self.arguments.items() if types[name] != "constexpr"]
        # Triton appends pointers to scratch memory, which it leaves empty unless a kernel asks for some.
        scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
        if scratch:
            raise NotImplementedError(f"{entry} wants {scratch} bytes of scratch memory, which nobody gives it here")
        pointers = len(module.entries[entry].parameters) - len(arguments)
        assert 0 <= pointers <= 2, f"{entry} has {pointers} parameters more than the launch has arguments"
        arguments += [None] * pointers
        threads = compiled.metadata.num_warps * target.warp_size
        return executor.launch(module, entry, self.grid, threads, arguments, shared=compiled.metadata.shared, **options)


@contextlib.contextmanager
def given_to(run: Callable[[Launch], Any]) -> Iterator[None]:
    """Kernels that are launched inside are handed to `run` instead of a device."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET=1 nothing is compiled: unset it before triton is imported")

    def intercept(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kwargs if name not in options})
        bound.apply_defaults()
        fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        constants = {name: value for name, value in bound.arguments.items() if name in fixed}
        arguments = {name: value for name, value in bound.arguments.items() if name not in fixed}
        grid = grid(bound.arguments) if callable(grid) else grid
        return run(Launch(kernel, tuple(grid), arguments, constants, options))

    with mock.patch.object(JITFunction, "run", intercept):
        yield


@contextlib.contextmanager
def executed(target: GPUTarget, **options: Any) -> Iterator[list]:
    """Kernels that are launched inside are compiled for the target and executed by executor.py, with its options. Gives
    a list that grows by (name of the kernel, the executor's counters) with every launch."""
    launched = []
    with given_to(lambda launch: launched.append((launch.kernel.__name__, launch.run(target, **options)))):
        yield launched


def launches_of(launcher: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """What a launcher launches for these arguments. Nothing is run: its outputs stay as they were allocated."""
    launched: list[Launch] = []
    with given_to(launched.append):
        launcher(*arguments)
    return launched


@contextlib.contextmanager
def _device(target: GPUTarget) -> Iterator[None]:
    """Triton asks this in place of a driver; compiled kernels are kept by device, which is the target itself."""
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: target,
        get_current_stream=lambda device: None,
    )
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        yield


@functools.lru_cache(maxsize=64)
def _module(ptx: str) -> Any:
    from kernelcheck.executor import Module

    return Module(ptx)

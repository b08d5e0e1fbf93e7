"""The operators of csrc/cuda without a GPU: the host code of dual.cu and rowloss.cu as it is, for CPU tensors
(device.h), and under it either the kernels' source in the threads of cuemu.h or their PTX in executor.py.

    operators = on_shim(order="random", seed=1)  # or on_executor(80)
    value, lam, nu, weights, status, passes = operators.dual(losses, None, None, 0, 0.0, 0.1, 0.0, 1e6)
    assert operators.launches == 1

Every tensor that an operator is given or allocates lies between guards of huge numbers, what it allocates starts as
NaN, and whatever it writes beyond its outputs is an error.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernelcheck import executor, toolchain
from kernelcheck.faults import OutOfBounds
from kernelcheck.ptx import Module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import armor  # noqa: F401  whose schemas the operators share

ORDERS = ("forward", "reverse", "random")
SOURCES = {"dual": ("dual", "dual_backward"), "rowloss": ("rowloss", "rowloss_backward", "rowloss_dual")}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
RUN_IN_THREADS, DONE, FAILED = range(3)


class _Launch(ctypes.Structure):  # of device.h
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("cooperative", ctypes.c_bool),
        ("count", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
    ]


_LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


class Launch(NamedTuple):
    kernel: str  # its mangled name
    blocks: int
    threads: int
    cooperative: bool
    arguments: list[bytes]


def on_shim(order: str = "random", seed: int = 1, *, processors: int = 3, sources: Path = toolchain.CSRC) -> Operators:
    """Operators whose kernels run in the threads of cuemu.h, by one schedule. Each processor holds one block."""
    return Operators(lambda *_: RUN_IN_THREADS, order, seed, processors, sources)


def on_executor(
    arch: int, order: str = "forward", seed: int = 0, *, processors: int = 2, sources: Path = toolchain.CSRC
) -> Operators:
    """Operators whose kernels run as the PTX that nvcc makes of them for compute_`arch`."""

    def execute(source: str, launch: Launch, memory: list[Tensor]) -> int:
        module = _module(toolchain.operators_ptx(f"{source}.cu", arch, sources))
        executor.launch(
            *(module, launch.kernel, (launch.blocks, 1, 1), launch.threads, launch.arguments),
            memory=memory,
            cooperative=launch.cooperative,
            order=order,
            seed=seed,
        )
        return DONE

    return Operators(execute, order, seed, processors, sources)


class Operators:
    """The raw operators `dual`, `dual_backward`, `rowloss`, `rowloss_backward` and `rowloss_dual`."""

    launched: Sequence[Launch] = ()  # by the latest call

    def __init__(
        self,
        run: Callable[[str, Launch, list[Tensor]], int],
        order: str,
        seed: int,
        processors: int,
        sources: Path,
    ) -> None:
        self.run = run
        self.device = processors, ORDERS.index(order), seed
        self.sources = sources
        for source, names in SOURCES.items():
            for name in names:
                setattr(self, name, functools.partial(self._call, source, name))

    @property
    def launches(self) -> int:
        """How many kernels the latest call launched."""
        return len(self.launched)

    def _call(self, source: str, name: str, *arguments: Any) -> Any:
        library, namespace = _loaded(toolchain.operators(f"{source}.cu", self.sources), source)
        operator = getattr(getattr(torch.ops, namespace), name).default
        self.launched, errors, memory = [], [], Guarded(name)

        @_LAUNCHED
        def launched(call: Any) -> int:
            try:
                self.launched.append(_launch(call.contents))
                return self.run(source, self.launched[-1], memory.tensors)
            except BaseException as error:  # one of pytest's, too; none can pass through C++
                errors.append(error)
                return FAILED

        library.set_device(*self.device, launched)
        given = [
            memory.guard(value, parameter.name, given=True) if isinstance(value, Tensor) else value
            for value, parameter in zip(arguments, operator._schema.arguments, strict=True)
        ]
        try:
            with memory:
                results = operator.redispatch(CPU, *given)
        except RuntimeError:
            if errors:
                raise errors[0] from None
            raise
        memory.check()
        return results


class Guarded(TorchDispatchMode):
    """Moves tensors, and what operators allocate inside of the mode, to memory of its own between guards."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.tensors: list[Tensor] = []  # all of them, without holes
        self.checks: list[tuple[str, Tensor, Tensor]] = []  # what must stay as it is, and as it was

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.is_mutable or any(output.alias_info for output in function._schema.returns):
            return result
        empty = "empty" in function.__name__
        return self.guard(result, f"what {function} allocates", fill=not empty)

    def guard(self, tensor: Tensor, name: str, *, given: bool = False, fill: bool = True) -> Tensor:
        """The tensor as a copy with the same strides and the same alignment."""
        length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        length *= tensor.element_size() if tensor.numel() else 0
        guard = max(1024, length)
        # Guards are about 2e37: a NaN that is read there and written there again would leave them as they are.
        buffer = torch.full((guard + length + guard + 64,), 0x7D, dtype=torch.uint8)
        start = guard + (tensor.data_ptr() - buffer.data_ptr() - guard) % 64
        buffer[start : start + length] = 0xFF
        flat = buffer[start : start + length].view(tensor.dtype)
        copy = flat.as_strided(tensor.shape, tensor.stride())
        if fill:
            copy.copy_(tensor.detach())
        self.tensors.append(flat)
        kept = [buffer[:start], buffer[start + length :]]
        self.checks += [(f"beside {name}", part, part.clone()) for part in kept]
        if given:
            self.checks.append((f"to {name}", flat.view(torch.uint8), flat.view(torch.uint8).clone()))
        return copy

    def check(self) -> None:
        for where, memory, before in self.checks:
            if not torch.equal(memory, before):
                raise OutOfBounds(f"armor::{self.operator} writes {where}")


def _launch(call: Any) -> Launch:
    arguments = [ctypes.string_at(call.arguments[i], call.sizes[i]) for i in range(call.count)]
    return Launch(call.kernel.decode(), call.blocks, call.threads, call.cooperative, arguments)


@functools.cache
def _loaded(path: Path, source: str) -> tuple[ctypes.CDLL, str]:
    """The library of a .cu, and the namespace in which its operators have the schemas of armor's own."""
    library = ctypes.CDLL(str(path))
    library.set_device.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_uint64, _LAUNCHED
    namespace = f"armor_{path.name.replace('-', '_')}"
    for name in SOURCES[source]:
        schema = str(getattr(torch.ops.armor, name).default._schema)
        torch.library.define(f"{namespace}::{name}", schema.partition(name)[2])
    library.register_operators(namespace.encode())
    return library, namespace


@functools.cache
def _module(path: Path) -> Module:
    return Module(path.read_text())

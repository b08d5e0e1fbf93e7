"""A strict mode of Triton's interpreter, for kernels that must be right without having seen a GPU.

The interpreter computes what a kernel says, but forgives what a device does not: it runs programs one after another and
always in the same order, reads memory that is not the kernel's, takes masked lanes for zero, cuts floats off where they
become bfloat16, and adds bfloat16 by their bit patterns. Inside of `checking`, all of that raises a StrictError or is
done as a device does it. The process must have been started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from kernelcheck.accesses import Accesses, OutOfBounds, Race, StrictError
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

__all__ = ["ORDERS", "Bfloat16Arithmetic", "OutOfBounds", "Race", "StrictError", "checking"]

ORDERS = ("forward", "reverse", "random")


class Bfloat16Arithmetic(StrictError):
    """The interpreter does not compute in bfloat16; kernels convert to float32 after a load."""


@contextmanager
def checking(order: str = "forward", seed: int = 0) -> Iterator[list[str]]:
    """Checks every launch inside: bounds, races, bfloat16. Masked lanes without `other` hold NaN or a large integer,
    numbers have the dtypes of their parameters, tl.max and tl.min pass over NaN, and the programs of a launch run in
    this order. Yields the list of kernels that were launched."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles in this process; start it with TRITON_INTERPRET=1")
    checker = _Checker(order, seed)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    hooks: list[tuple[Any, str, Callable[..., Any]]] = [
        (executor, "__call__", checker.run),
        (executor, "_init_args_hst", checker.begin),
        (interpreter, "_patch_lang", checker.prepare),
        (interpreter, "_implicit_cvt", checker.argument),
        (builder, "set_grid_dim", checker.set_grid),
        (builder, "set_grid_idx", checker.next_program),
        *((builder, f"create_{name}", checker.derived) for name in ("addptr", "splat", "broadcast", "expand_dims")),
        (builder, "create_masked_load", checker.load),
        (builder, "create_masked_store", checker.store),
        (builder, "create_atomic_rmw", checker.atomic_rmw),
        (builder, "create_atomic_cas", checker.atomic_cas),
        (builder, "create_barrier", checker.barrier),
        (builder, "cast_impl", checker.cast),
        *((builder, name, checker.arithmetic) for name in ("unary_op", "binary_op", "ternary_op", "create_fma")),
        (interpreter.ReduceScanOpInterface, "apply", checker.reduction),
        (interpreter.ReduceOps, "min_max", checker.extreme),
    ]
    missing = [name for owner, name, _ in hooks if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} cannot be checked: it has no {missing}")
    with ExitStack() as stack:
        for owner, name, hook in hooks:
            stack.enter_context(_hooked(owner, name, hook))
        yield checker.launched


def _hooked(owner: Any, name: str, hook: Callable[..., Any]) -> Any:
    """hook(original, *arguments) in place of the function `name` of a class or module."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return mock.patch.object(owner, name, call)


class _Checker:
    """What takes the place of the interpreter's own functions: each hook is given the original and its arguments."""

    def __init__(self, order: str, seed: int):
        self.order, self.random = order, random.Random(seed)
        self.launched: list[str] = []
        self._end_launch()

    def _end_launch(self) -> None:
        self.accesses: Accesses | None = None
        self.programs: list[tuple[int, int, int]] = []  # that have not run yet, the next one last
        self.grid = (0, 0, 0)
        self.prepared: set[int] = set()

    # ---- launches and programs

    def run(self, original: Any, executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel = executor.fn.__name__
        try:
            with np.errstate(all="ignore"):  # where() computes both of its sides
                original(executor, *args, **kwargs)
            if self.programs or not self.accesses.writes:
                raise RuntimeError(f"the interpreter of Triton {triton.__version__} evades the checks of {kernel}")
            self.launched.append(kernel)
        except InterpreterError as error:  # around it is one for every function that was called
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, StrictError):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            self._end_launch()

    def begin(self, original: Any, executor: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = original(executor, args, kwargs)
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        self.accesses = Accesses(executor.fn.__name__, tensors)
        for name in named.keys() - executor.constexprs:
            named[name] = _typed(named[name], executor.fn.__annotations__.get(name))
        return [named[name] for name in executor.arg_names[: len(args)]], {name: named[name] for name in kwargs}

    def prepare(self, original: Any, fn: Any) -> Any:
        """The interpreter replaces the functions of triton.language anew for every function that a kernel calls."""
        if self.accesses is not None:
            if id(fn.__globals__) in self.prepared:
                return None
            self.prepared.add(id(fn.__globals__))
        return original(fn)

    def set_grid(self, original: Any, builder: Any, *grid: int) -> None:
        original(builder, *grid)
        self.grid = grid
        self.programs = list(itertools.product(*map(range, grid)))[::-1]
        if self.order == "reverse":
            self.programs.reverse()
        elif self.order == "random":
            self.random.shuffle(self.programs)

    def next_program(self, original: Any, builder: Any, *_: int) -> None:
        x, y, z = self.programs.pop()
        self.accesses.begin_program(x + self.grid[0] * (y + self.grid[1] * z), (x, y, z))
        original(builder, x, y, z)

    # ---- memory

    def argument(self, original: Any, value: Any) -> Any:
        converted = original(value)
        if isinstance(value, torch.Tensor):
            converted.handle.set_attr("origin", value.data_ptr())
        return converted

    def derived(self, original: Any, builder: Any, *args: Any) -> TensorHandle:
        """A pointer remembers the argument that it came from."""
        result = original(builder, *args)
        for given in args:
            if isinstance(given, TensorHandle) and "origin" in given.attr:
                result.set_attr("origin", given.attr["origin"])
        return result

    def load(self, original: Any, builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **more: Any) -> Any:
        self.accesses.read(ptrs.data, mask.data, ptrs.attr.get("origin"))
        if other is None:
            other = _poison(ptrs)
        return original(builder, ptrs, mask, other, *rest, **more)

    def store(self, original: Any, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        self.accesses.write(ptrs.data, mask.data, ptrs.attr.get("origin"))
        return original(builder, ptrs, value, mask, *rest, **more)

    def atomic_rmw(
        self, original: Any, builder: Any, op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        self.accesses.change(ptr.data, mask.data, ptr.attr.get("origin"), sem.name, scope.name)
        return original(builder, op, ptr, value, mask, sem, scope)

    def atomic_cas(self, original: Any, builder: Any, ptr: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        everywhere = np.ones(ptr.data.shape, bool)
        self.accesses.change(ptr.data, everywhere, ptr.attr.get("origin"), sem.name, scope.name)
        return original(builder, ptr, expected, value, sem, scope)

    def barrier(self, original: Any, builder: Any) -> None:
        self.accesses.barrier()
        original(builder)

    # ---- numbers

    def cast(self, original: Any, builder: Any, source: TensorHandle, target: Any) -> TensorHandle:
        """To and from bfloat16 by way of float32, rounded to the nearest, as devices do."""
        given, wanted = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (given, wanted) or given == wanted:
            return original(builder, source, target)
        if given == tl.bfloat16:
            wide = torch.from_numpy(np.array(source.data)).view(torch.bfloat16).float().numpy()
            source = TensorHandle(wide, tl.float32)
            return source if wanted == tl.float32 else original(builder, source, target)
        single = source if given == tl.float32 else original(builder, source, tl.float32)
        narrow = torch.from_numpy(np.array(single.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(narrow, tl.bfloat16)

    def arithmetic(self, original: Any, builder: Any, *args: Any) -> TensorHandle:
        if args[-1] is not np.where:
            for operand in args:
                if isinstance(operand, TensorHandle):
                    self._refuse(operand.dtype)
        return original(builder, *args)

    def reduction(self, original: Any, reduce: Any, given: Any) -> Any:
        for operand in given if isinstance(given, tuple) else (given,):
            self._refuse(operand.dtype)
        return original(reduce, given)

    def extreme(self, original: Any, reduce: Any, given: Any, val_reduce_op: Any = None, **more: Any) -> Any:
        """Devices find the largest or smallest number among NaN."""
        numbers = {np.max: np.fmax.reduce, np.min: np.fmin.reduce}
        return original(reduce, given, val_reduce_op=numbers.get(val_reduce_op, val_reduce_op), **more)

    def _refuse(self, dtype: Any) -> None:
        if dtype.scalar == tl.bfloat16:
            raise Bfloat16Arithmetic(
                f"{self.accesses.program()} computes in bfloat16: convert to float32 after the load"
            )


def _typed(value: Any, annotation: Any) -> Any:
    """A number as a device is given it: in the dtype of the annotation, and else float32 or an integer that fits."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        return value
    name = str(annotation).removeprefix("tl.")
    dtype = {"float64": tl.float64, "fp64": tl.float64, "int64": tl.int64}.get(name)
    if dtype is None:
        if isinstance(value, int):
            return value
        dtype = tl.float32
    return tl.tensor(TensorHandle(np.array([value], interpreter._get_np_dtype(dtype)), dtype), dtype)


def _poison(ptrs: TensorHandle) -> TensorHandle:
    """What masked lanes hold that were given no other value."""
    dtype = ptrs.get_element_ty()
    stored = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value = 0x7FC0  # NaN
    elif stored.kind == "f":
        value = np.nan
    else:
        value = True if stored.kind == "b" else np.iinfo(stored).max - 1
    return TensorHandle(np.full(ptrs.data.shape, value, stored), dtype)

"""What every public function asks of its arguments; errors name the argument and the value."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """`value` as a finite float, at least `least` or greater than `above`, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not -math.inf < number < math.inf:  # not math.isfinite, which torch.compile cannot trace on a symbolic float
        raise ValueError(f"{name} must be finite, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value!r}")
    if above is not None and number <= above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value!r}")
    return number


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def choice(name: str, value: Any, choices: Any) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def tensor(name: str, value: Any) -> None:
    """A plain tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value) is not Tensor and any(base.__name__ == "DTensor" for base in type(value).__mro__):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: gather it with full_tensor()")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def matches(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Shape and device of another argument."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name} {tuple(other.shape)}, got {tuple(value.shape)}")
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def like(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """A tensor with the shape, device and dtype of another argument."""
    tensor(name, value)
    matches(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {value.dtype}")


def readable(t: Tensor) -> bool:
    """Whether it has values that can be looked at for free: on the CPU, outside torch.compile and torch.func."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(t, FakeTensor):
        return False
    return not torch._C._are_functorch_transforms_active()

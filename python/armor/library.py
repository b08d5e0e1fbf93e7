"""The one place where armor's operators meet PyTorch: schemas, fake kernels, and who serves which device.

The compiled modules bring the C++ and CUDA kernels; Triton (`armor_kernels`) and the float64 reference fill
what they leave open, or what ARMOR_BACKEND=cpp|cuda|triton|reference assigns to them. `armor.ops` imports it;
no device is touched, and neither Triton nor the reference is imported before an operator needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
MODULES = {"cpp": "_C", "cuda": "_C_cuda"}
# Best first. Device types that are not named here are served by the reference.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
SERVES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "reference": ("cpu", "cuda")}
if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter computes on CPU tensors
    SERVES["triton"] = ("cpu", "cuda")

_chosen: dict[str, dict[str, str]] = {}
_missing: dict[str, dict[str, str]] = {}


def backends() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """For every operator: device type -> the backend that serves it, and backend -> why it cannot serve any.

    A device type whose backend was asked for by ARMOR_BACKEND and is missing is served by "none": its
    operators raise RuntimeError with the reason.
    """
    return {op: (dict(_chosen[op]), dict(_missing[op])) for op in _chosen}


def build_info() -> dict[str, Any]:
    """What setup.py noted when it compiled the modules; empty where armor was never built."""
    path = HERE / "_build.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def define(op: str, schema: str) -> Callable[[Callable[..., Any]], None]:
    """Declares armor::<op>; decorates its fake kernel, which allocates the outputs and computes nothing."""

    def register(fake: Callable[..., Any]) -> None:
        torch.library.define(f"armor::{op}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"armor::{op}", fake)
        torch.library.register_vmap(f"armor::{op}", lambda *call: _vmap(getattr(torch.ops.armor, op), *call))
        _chosen[op], _missing[op] = {}, {}

    return register


@define(
    "dual",
    "(Tensor losses, Tensor? costs, Tensor? clean_losses, int divergence, float alpha, float radius, "
    "float kappa, float max_dual) "
    "-> (Tensor value, Tensor lam, Tensor nu, Tensor weights, Tensor status, Tensor passes)",
)
def _(losses: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
    value, lam, nu = (losses.new_empty(losses.shape[:-1], dtype=dtype) for _ in range(3))
    status, passes = (losses.new_empty(losses.shape[:-1], dtype=torch.int32) for _ in range(2))
    return value, lam, nu, losses.new_empty(losses.shape, dtype=dtype), status, passes


@define(
    "dual_backward",
    "(Tensor grad_value, Tensor mu, Tensor weights, Tensor losses, Tensor? costs, Tensor? clean_losses) "
    "-> (Tensor grad_losses, Tensor grad_costs, Tensor grad_clean)",
)
def _(
    grad_value: Tensor,
    mu: Tensor,
    weights: Tensor,
    losses: Tensor,
    costs: Tensor | None,
    clean: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(
        losses.new_empty((0,)) if given is None else given.new_empty(given.shape) for given in (losses, costs, clean)
    )


def _vmap(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Operators work on the last dimension and keep those in front, so a vmapped one becomes the first."""
    front = [
        (arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0))
        if isinstance(arg, Tensor)
        else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    outputs = op(*front)
    # an output for an input that was not given has no dimension to be mapped over
    return outputs, tuple(0 if output.shape[:1] == (info.batch_size,) else None for output in outputs)


def _register(requested: str | None) -> None:
    """Gives every operator one backend per device type: the requested one if it can serve, else the best."""
    if requested is not None and requested not in SERVES:
        raise ValueError(f"ARMOR_BACKEND must be one of {', '.join(SERVES)}, got {requested!r}")
    wanted = {
        device: (requested,) if requested and device in SERVES[requested] else preference
        for device, preference in PREFERENCE.items()
    }
    used = {backend for candidates in wanted.values() for backend in candidates}
    failures = {
        backend: _load(backend) if backend in used else f"ARMOR_BACKEND={requested} leaves it no device"
        for backend in SERVES
    }
    for op in _chosen:
        _missing[op] = {backend: reason for backend, reason in failures.items() if reason}
        torch.library.impl(f"armor::{op}", "default", _lazy("armor.reference", op))
        for device, candidates in wanted.items():
            _chosen[op][device] = _assign(op, device, candidates)


def _load(backend: str) -> str:
    """Makes a backend's kernels available; returns why that failed, or an empty string."""
    if backend == "triton":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    if backend not in MODULES:
        return ""
    name = MODULES[backend]
    path = HERE / f"{name}.abi3.so"
    if not path.exists():
        return str(build_info().get("missing", {}).get(name, f"armor/{path.name} was not built"))
    try:
        torch.ops.load_library(path)
    except OSError as error:  # built for another PyTorch, or damaged: armor must still import
        return f"armor/{path.name} does not load: {error.__cause__ or error}"
    return ""


def _assign(op: str, device: str, candidates: tuple[str, ...]) -> str:
    """Registers the first of `candidates` that has `op` for `device` and returns its name."""
    for backend in candidates:
        if backend in _missing[op]:
            continue
        if backend == "triton":
            torch.library.impl(f"armor::{op}", device, _lazy(f"armor_kernels.{op.removesuffix('_backward')}", op))
        elif backend in MODULES and not _has_kernel(op, device):
            _missing[op][backend] = f"armor/{MODULES[backend]} has no {op}"
            continue
        return backend
    torch.library.impl(f"armor::{op}", device, _refusal(op, device, candidates[0]))
    return "none"


def _has_kernel(op: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"armor::{op}", device.upper()))


def _lazy(module: str, op: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*args)

    return kernel


def _refusal(op: str, device: str, backend: str) -> Callable[..., Any]:
    def kernel(*_: Any) -> Any:
        reason = f"ARMOR_BACKEND={backend}, but {_missing[op][backend]}"
        raise RuntimeError(f"armor::{op} has no kernel for {device} tensors: {reason}")

    return kernel


_register(os.environ.get("ARMOR_BACKEND") or None)

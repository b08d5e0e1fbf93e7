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
        if not op.startswith("transport"):  # its samples are the first dimension, not the last one
            torch.library.register_vmap(f"armor::{op}", lambda *call: _vmap(getattr(torch.ops.armor, op), *call))
        _chosen[op], _missing[op] = {}, {}

    return register


def real(t: Tensor) -> torch.dtype:
    """The dtype in which operators compute and answer: float64 for float64, float32 for all others."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@define(
    "dual",
    "(Tensor losses, Tensor? costs, Tensor? clean_losses, int divergence, float alpha, float radius, "
    "float kappa, float max_dual) "
    "-> (Tensor value, Tensor lam, Tensor nu, Tensor weights, Tensor status, Tensor passes)",
)
def _(losses: Tensor, *_: Any) -> tuple[Tensor, ...]:
    value, lam, nu = (losses.new_empty(losses.shape[:-1], dtype=real(losses)) for _ in range(3))
    status, passes = (losses.new_empty(losses.shape[:-1], dtype=torch.int32) for _ in range(2))
    return value, lam, nu, losses.new_empty(losses.shape, dtype=real(losses)), status, passes


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


# What the backward pass of a row loss remembers of a row, by kind: cross-entropy, TRADES, MART, KL.
ROWLOSS_STATS = (2, 5, 7, 5)
IGNORE_NOTHING = -(2**63)  # the ignore_index of a row loss that ignores no target


@define(
    "rowloss",
    "(Tensor logits, Tensor target, Tensor? natural, int kind, float beta, float smoothing, int ignore_index) "
    "-> (Tensor losses, Tensor stats)",
)
def _(logits: Tensor, target: Tensor, natural: Tensor | None, kind: int, *_: Any) -> tuple[Tensor, ...]:
    shape, dtype = logits.shape[:-1], real(logits)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((*shape, ROWLOSS_STATS[kind]), dtype=dtype)


@define(
    "rowloss_backward",
    "(Tensor grad, Tensor? weights, Tensor logits, Tensor target, Tensor? natural, Tensor stats, int kind, "
    "float beta, float smoothing, int ignore_index, bool natural_grad) -> (Tensor grad_logits, Tensor grad_natural)",
)
def _(grad: Tensor, weights: Tensor | None, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    natural_grad = rest[-1]
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape if natural_grad else (0,))


@define(
    "rowloss_dual",
    "(Tensor logits, Tensor target, Tensor? natural, Tensor? costs, int kind, float beta, float smoothing, "
    "int divergence, float alpha, float radius, float kappa, float max_dual) "
    "-> (Tensor value, Tensor losses, Tensor stats, Tensor lam, Tensor nu, Tensor weights, Tensor status, "
    "Tensor passes)",
)
def _(
    logits: Tensor, target: Tensor, natural: Tensor | None, costs: Tensor | None, kind: int, *_: Any
) -> tuple[Tensor, ...]:
    samples, dtype = logits.shape[:-1], real(logits)
    losses, weights = (logits.new_empty(samples, dtype=dtype) for _ in range(2))
    value, lam, nu = (logits.new_empty(samples[:-1], dtype=dtype) for _ in range(3))
    status, passes = (logits.new_empty(samples[:-1], dtype=torch.int32) for _ in range(2))
    stats = logits.new_empty((*samples, ROWLOSS_STATS[kind]), dtype=dtype)
    return value, losses, stats, lam, nu, weights, status, passes


@define(
    "transport_init",
    "(Tensor x, Tensor? seeds, Tensor? radii, Tensor? mean, Tensor? std, int start, float radius, float lo, float hi, "
    "ScalarType? feed_dtype) -> (Tensor x_adv, Tensor status, Tensor feed)",
)
def _(x: Tensor, seeds: Tensor | None, radii: Tensor | None, mean: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    x_adv = dense_like(x)
    return x_adv, x.new_empty(x.shape[0], dtype=torch.int32), _feed(x_adv, mean, rest[-1])


@define(
    "transport_step",
    "(Tensor x_adv, Tensor grad, Tensor x, Tensor? mu, Tensor? radii, Tensor? active, Tensor? seeds, Tensor? mean, "
    "Tensor? std, int kind, float radius, float step_size, float weight, float power, int norm, int variant, "
    "float lo, float hi, bool targeted, bool final, ScalarType? feed_dtype) "
    "-> (Tensor x_next, Tensor status, Tensor costs, Tensor feed)",
)
def _(x_adv: Tensor, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, kind, final, feed_dtype = rest[4], rest[6], rest[-2], rest[-1]
    x_next = dense_like(x, x_adv, grad)
    costs = x.new_empty(x.shape[0] if final and kind in COSTLY else 0, dtype=real(x))
    return x_next, x.new_empty(x.shape[0], dtype=torch.int32), costs, _feed(x_next, mean, feed_dtype)


@define(
    "transport_cost",
    "(Tensor x_adv, Tensor x, Tensor? radii, int kind, float radius, float weight, float power, int norm, float lo, "
    "float hi) -> Tensor costs",
)
def _(x_adv: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=real(x))


COSTLY = (3, 4)  # transport kinds that are costs (norm_power, soft_ball); the others are sets


def forgiven(dtype: torch.dtype) -> float:
    """The relative rounding of an entry that a ball forgives; float64 has no wider type to compute its steps in."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def dense_like(x: Tensor, *others: Tensor) -> Tensor:
    """An empty tensor like x in the layout of a transport: channels_last if all are, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    kept = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    kept = kept and all(t.stride() == x.stride() for t in others)
    return torch.empty_like(x, memory_format=last if kept else torch.contiguous_format)


def _feed(x: Tensor, mean: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(0) if mean is None and dtype is None else torch.empty_like(x, dtype=dtype or x.dtype)


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
    here, built = torch.version.cuda, build_info().get("cuda", torch.version.cuda)
    if backend == "cuda" and str(here).partition(".")[0] != str(built).partition(".")[0]:
        # It might load all the same, with a second CUDA runtime beside torch's, and fail at the first launch.
        has = f"has CUDA {here}" if here else "is not a CUDA build"
        return f"armor/{path.name} was built for CUDA {built}, but torch {torch.__version__} {has}"
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
            torch.library.impl(f"armor::{op}", device, _lazy(f"armor_kernels.{op.partition('_')[0]}", op))
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

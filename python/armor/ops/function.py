"""How an operator of `armor.library` becomes a differentiable function: once for plain autograd, once for torch.func,
and first order only. Used by dual.py and rowloss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    compute: Callable[..., Any], remember: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The function `compute`, a tuple of tensors of its arguments, with the gradient `backward(ctx, *grads)`.

    remember(ctx, inputs, outputs) saves what backward needs.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = compute(*inputs)
            remember(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    class UnderTransforms(Plain):
        # torch.func wants forward apart from its context. Applying such a function costs more than a small solve, so
        # plain autograd does without. The vmap rule comes from those of the operators (armor.library).
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:  # type: ignore[override]
            return compute(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            remember(ctx, inputs, output)

    def apply(*inputs: Any) -> Any:
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return (UnderTransforms if transformed else Plain).apply(*inputs)

    return apply


def first_order(compute: Callable[..., tuple[Tensor, ...]], refusal: str) -> Callable[..., tuple[Tensor, ...]]:
    """The gradient operator `compute`, whose own derivative raises RuntimeError(refusal) instead of being wrong."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return compute(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> None:
            raise RuntimeError(refusal)

    def apply(*inputs: Any) -> tuple[Tensor, ...]:
        # Grad mode is on where somebody may differentiate again: create_graph=True and torch.func.
        return (Backward.apply if torch.is_grad_enabled() else compute)(*inputs)

    return apply

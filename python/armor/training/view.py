"""The model as the attack sees it: its weights frozen, its BatchNorm folded into the layers before it. step.py makes an
`AttackView` per run and refreshes it once per step.

An attack wants the gradient in the input alone, K times for the same weights. On the model itself autograd would keep
what weight gradients need, and BatchNorm in eval mode, which is an affine map, would cost passes over every activation.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from armor.attacks import modes
from armor.training.models import Normalized

# A layer and the norm that reads what it wrote along the same axis. Subclasses may compute something else.
FOLDS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


class AttackView:
    """Frozen picture of a model: `view(x)` are its logits, differentiable in x alone.

    A plain callable and no module: `armor.attacks.Transport` leaves it in the mode of `eval_mode`. Call `refresh`
    after the weights or statistics of the model have changed; until then what is folded is that of the earlier model.

    What is not folded shares its storage with the model. Folded is a BatchNorm with running statistics that alone reads
    what one convolution or linear layer writes, each called once and by the modules' own forward pass. Where torch.fx
    cannot follow the model (control flow that depends on the data), or hooks or parametrizations do part of its work,
    nothing is folded: the model itself runs, on detached parameters, and `why_unfolded` has the reason.
    A model that is folded must not change what it is made of: its modules are copied once.

    Args:
        model: the bare model, neither compiled nor wrapped. Of a `Normalized` one the view is that of the inner model,
            and `normalize` is the (mean, std) for `Transport`, which then feeds it; otherwise None.
        fold: fold BatchNorm; needs eval_mode
        compile: torch.compile, apart from the trained model. A refresh does not compile anew, another batch size does
            so once, with and without gradient each.
        eval_mode: the view is in eval mode whatever the model is in. False runs the model in the mode that every module
            is in, and BatchNorm in train mode updates the model's own statistics, as some published scripts do.

    Raises: ValueError if fold is asked for without eval_mode.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True, compile: bool = False, eval_mode: bool = True) -> None:
        if fold and not eval_mode:
            raise ValueError("fold needs eval_mode, because BatchNorm in train mode is no affine map")
        self.normalize: tuple[Tensor, Tensor] | None = None
        if isinstance(model, Normalized):
            self.normalize, model = (model.mean, model.std), model.model
        self.model, self.eval_mode = model, eval_mode
        self.folds: list[Fold] = []
        self.why_unfolded: str | None = "not asked for"
        twins = self._fold() if fold else {}
        self._twins = twins
        self._forward: Callable[[Tensor], Tensor] = twins[model] if twins else self._unfolded
        if compile:
            self._forward = torch.compile(self._forward)
        self.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        if self._twins:
            return self._forward(x)
        with modes(self.model, self.eval_mode):
            return self._forward(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes up the model's current weights and statistics. Nothing waits for the device, and what is folded stays
        where it is in memory, so that a CUDA graph can hold this."""
        if not self._twins:
            # By module, because functional_call would swap one of two names twice and leave it frozen.
            by_module = (module.named_parameters(at, recurse=False) for at, module in self.model.named_modules())
            self._frozen = {name: parameter.detach() for pairs in by_module for name, parameter in pairs}
            return
        for module, twin in self._twins.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:  # mostly the same storage as before, but the model may have got another
                    twin._parameters[name].data = parameter.data  # type: ignore[union-attr]
        if self.folds:
            refold(self.folds)

    def _unfolded(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self._frozen, (x,), tie_weights=False)

    def _fold(self) -> dict[nn.Module, nn.Module]:
        """The modules of the model and their frozen twins, the folded layers among them; empty if that cannot be."""
        for name, module in self.model.named_modules():
            if obstacle := _obstacle(module):
                self.why_unfolded = f"{name or 'the model'} has {obstacle}"
                return {}
        try:
            pairs = _pairs(self.model)
        except Exception as error:  # whatever a forward pass raises that is not given a tensor
            self.why_unfolded = f"torch.fx cannot trace it: {error}".splitlines()[0]
            return {}
        self.why_unfolded = None
        twins: dict[nn.Module, nn.Module] = {}
        _freeze(self.model, twins)
        instead: dict[nn.Module | None, nn.Module] = {}
        for layer, norm in pairs:
            fold = Fold.of(layer, norm)
            folded = copy.copy(twins[layer])
            folded._parameters = {"weight": nn.Parameter(fold.weight, False), "bias": nn.Parameter(fold.bias, False)}
            is_linear = isinstance(layer, nn.Linear)
            instead[twins[layer]] = _LinearNorm(folded, twins[layer], twins[norm]) if is_linear else folded
            instead[twins[norm]] = nn.Identity()
            self.folds.append(fold)
        for parent in twins.values():
            parent._modules = {name: instead.get(child, child) for name, child in parent._modules.items()}
        twins[self.model].eval()
        return twins


class Fold(NamedTuple):
    """A layer of the model, the norm after it, and weight and bias of the layer that is both."""

    layer: Any
    norm: Any
    weight: Tensor
    bias: Tensor
    scale: Tensor
    ones: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, layer: Any, norm: Any) -> Fold:
        var = norm.running_var
        weight = torch.empty_like(layer.weight, requires_grad=False)
        bias, scale = torch.empty_like(var), torch.empty_like(var)
        return cls(layer, norm, weight, bias, scale, torch.ones_like(var), torch.zeros_like(var))


def refold(folds: list[Fold]) -> None:
    """Folded weight w * scale and bias (b - mean) * scale + beta for scale = gamma / sqrt(var + eps), in place.

    It is the formula of torch.nn.utils.fusion, for all layers at once and without new memory.
    """
    norms = [fold.norm for fold in folds]
    scales, biases = [fold.scale for fold in folds], [fold.bias for fold in folds]
    torch._foreach_copy_(scales, [norm.running_var for norm in norms])
    torch._foreach_add_(scales, [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [_or(fold.norm.weight, fold.ones) for fold in folds])
    torch._foreach_copy_(biases, [_or(fold.layer.bias, fold.zeros) for fold in folds])
    torch._foreach_sub_(biases, [norm.running_mean for norm in norms])
    torch._foreach_mul_(biases, scales)
    torch._foreach_add_(biases, [_or(fold.norm.bias, fold.zeros) for fold in folds])
    for fold in folds:
        weight = fold.layer.weight
        torch.mul(weight, fold.scale.view(-1, *(1,) * (weight.dim() - 1)), out=fold.weight)


class _LinearNorm(nn.Module):
    """The folded layer for [B, features]; with an axis between the two BatchNorm would normalise that one."""

    def __init__(self, folded: nn.Module, linear: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.folded, self.linear, self.norm = folded, linear, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(x) if x.dim() == 2 else self.norm(self.linear(x))


def _freeze(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Shallow copy with detached parameters and the very buffers of the module, its children likewise."""
    if module not in twins:
        twin = twins[module] = copy.copy(module)
        twin._parameters = {
            name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
        twin._modules = {
            name: None if child is None else _freeze(child, twins) for name, child in module._modules.items()
        }
    return twins[module]


def _pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The layers and norms that can be folded. Raises whatever the model raises when it is traced."""
    # On a copy but for the tensors, because a forward pass may store what it is given in attributes; and buffers are
    # traced as well, because it may count in them.
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    optional = list(inspect.signature(copied.forward).parameters.values())[1:]
    defaults = {other.name: other.default for other in optional if other.default is not other.empty}
    nodes = list(tracer.trace(copied, defaults or None).nodes)

    by_name = dict(model.named_parameters()) | dict(model.named_buffers())
    # What a forward pass reads of its own accord must be the model's. It may have several names, so its id is taken.
    read = {id(by_name.get(str(node.target))) for node in nodes if node.op == "get_attr"}
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        if calls[before.target] == calls[node.target] == 1:
            layer, norm = (model.get_submodule(str(name)) for name in (before.target, node.target))
            if _fit(layer, norm, read):
                pairs.append((layer, norm))
    return pairs


def _fit(layer: Any, norm: Any, read: set[int]) -> bool:
    if type(norm) is not FOLDS.get(type(layer)) or norm.running_var is None:
        return False
    tensors = [layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    given = [tensor for tensor in tensors if tensor is not None]
    one_kind = len({(tensor.dtype, tensor.device) for tensor in given}) == 1
    return one_kind and not any(id(tensor) in read for tensor in given)


def _obstacle(module: nn.Module) -> str | None:
    """What makes more of a module than its class and its parameters."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "hooks"
    return "parametrizations" if parametrize.is_parametrized(module) else None


def _or(tensor: Any, default: Tensor) -> Tensor:
    return default if tensor is None else tensor

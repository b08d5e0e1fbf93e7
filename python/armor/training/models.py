"""The models that `armor train` knows by name, and the way to any other: `build`, which step.py calls.

The networks of the literature come first, then how a name is read, then what every model must pass. docs/training.md
says which data set trains which model.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armor.attacks import modes
from armor.training.config import ConfigError

Shape = tuple[int, ...]


def build(name: str, input_shape: Shape, classes: int, **options: Any) -> nn.Module:
    """A freshly initialised model, drawn from torch's global generator.

    Args:
        name: one of
            mlp: linear layers 128-128 with ReLU
            mlp-300: linear layers 300-300-300 with ReLU
            mnist-cnn: four convolutions and two linear layers, without BatchNorm
            small-cnn: two convolutions and two linear layers, likewise
            resnet18: ResNet-18 with the stem for small images, of torchvision's parts
            preact-resnet18: PreAct-ResNet-18 with the same stem
            wrn-DEPTH-WIDTH: WideResNet, e.g. wrn-34-10
            torchvision:NAME: a classifier of torchvision as it is, e.g. torchvision:resnet50; it takes 3 channels.
                (googlenet and inception_v3 return no tensor in training unless told aux_logits=False)
            timm:NAME: a model of timm, for the channels of input_shape
            package.module:callable: whatever that function or class makes. Python must find the module (PYTHONPATH).
                It is called once, with keywords alone: the options, and of `classes` or `num_classes` and
                `input_shape` those that its signature names. It returns the model, freshly initialised.
        input_shape: of one sample, (channels, height, width) for images
        classes: number of classes, the logits of a sample
        options: further keyword arguments of what makes the model, such as hidden=[500, 500] of an mlp

    Returns: the model in train mode on the default device; that of images is in channels_last.

    Raises: ConfigError if the name is unknown or cannot be imported, the options do not fit, or the model in eval mode
        does not turn [2, *input_shape] into logits [2, classes].
    """
    model = _make(name, _builder(name), options, classes=classes, num_classes=classes, input_shape=input_shape)
    if len(input_shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    _check_logits(name, model, input_shape, classes)
    return model


class Normalized(nn.Module):
    """The model behind (x - mean) / std per channel: it takes pixels, as attacks, judges and users give them.

    Args:
        mean, std: [C], of the data; std > 0
        model: takes what is normalised
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, model: nn.Module) -> None:
        super().__init__()
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std must have one entry per channel, got {[*mean.shape]} and {[*std.shape]}")
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 2))
        return self.model((x - self.mean.view(shape)) / self.std.view(shape))


# ---- networks ------------------------------------------------------------------------------------------------------


def mlp(input_shape: Shape = (1, 8, 8), classes: int = 10, hidden: Iterable[int] = (128, 128)) -> nn.Sequential:
    """Linear layers with ReLU between them, of the flattened sample; 64-128-128-10 for 8x8 digits."""
    model, width = nn.Sequential(nn.Flatten()), math.prod(input_shape)
    for units in hidden:
        model.extend([nn.Linear(width, units), nn.ReLU()])
        width = units
    return model.append(nn.Linear(width, classes))


def mnist_cnn(input_shape: Shape = (1, 28, 28), classes: int = 10) -> nn.Sequential:
    """3x3 convolutions 32, 32 (stride 2), 64, 64 (stride 2), linear 100; 3136-100-10 at its end for 28x28 images."""
    channels, height, width = _image("mnist-cnn", input_shape)
    model = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * math.ceil(height / 4) * math.ceil(width / 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
    return _he(model)


def small_cnn(input_shape: Shape = (1, 28, 28), classes: int = 10) -> nn.Sequential:
    """4x4 convolutions 16 and 32 of stride 2, linear 100 (Wong and Kolter 2018); 1568-100-10 for 28x28 images."""
    channels, height, width = _image("small-cnn", input_shape)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 4, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
    return _he(model)


def resnet18(input_shape: Shape = (3, 32, 32), classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: a 3x3 convolution of stride 1, and no max-pooling."""
    channels, _, _ = _image("resnet18", input_shape)
    model: nn.Module = _library("resnet18", "torchvision").models.resnet18(num_classes=classes)
    model.conv1 = _convolution(channels, 64)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # torchvision's, as elsewhere
    model.maxpool = nn.Identity()
    return model


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, BatchNorm and ReLU before each (He et al. 2016, Identity Mappings).

    Where the shape changes, the skip is a 1x1 convolution of what the first ReLU returns.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = _convolution(channels, out, stride)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = _convolution(out, out)
        same = stride == 1 and channels == out
        self.skip = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (x if self.skip is None else self.skip(active))


def preact_resnet18(input_shape: Shape = (3, 32, 32), classes: int = 10) -> nn.Sequential:
    """PreAct-ResNet-18 as github.com/kuangliu/pytorch-cifar has it, which CIFAR scripts copy; PyTorch's own start.

    Unlike He et al.'s, it averages the last block's sum as it is, without a further BatchNorm and ReLU.
    """
    channels, _, _ = _image("preact-resnet18", input_shape)
    stages = [_stage(64, 64, 2, 1), _stage(64, 128, 2, 2), _stage(128, 256, 2, 2), _stage(256, 512, 2, 2)]
    return nn.Sequential(_convolution(channels, 64), *stages, *_head(512, classes))


def wide_resnet(depth: int, width: int, input_shape: Shape = (3, 32, 32), classes: int = 10) -> nn.Sequential:
    """WideResNet of Zagoruyko and Komodakis 2016 without dropout, started as in TRADES' scripts (He et al., fan out).

    Those hold a further stage that their forward pass never uses; here it is left out.
    """
    name = f"wrn-{depth}-{width}"
    channels, _, _ = _image(name, input_shape)
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or width < 1:
        raise ConfigError(f"model {name}: the depth must be 10, 16, 22, 28, 34 ... and the width at least 1")
    stages = [
        _stage(16, 16 * width, blocks, 1),
        _stage(16 * width, 32 * width, blocks, 2),
        _stage(32 * width, 64 * width, blocks, 2),
    ]
    model = nn.Sequential(
        _convolution(channels, 16), *stages, nn.BatchNorm2d(64 * width), nn.ReLU(), *_head(64 * width, classes)
    )
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return model


def _he(model: nn.Sequential) -> nn.Sequential:
    """Starts the layers as He et al. do. PyTorch's own start shrinks the signal from layer to layer: against an attack
    mnist-cnn then stays at chance for more than a hundred steps longer."""
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def _stage(channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(channels, out, stride), *(PreActBlock(out, out, 1) for _ in range(blocks - 1)))


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _image(name: str, input_shape: Shape) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ConfigError(f"model {name} takes images (channels, height, width), got samples of shape {input_shape}")
    channels, height, width = input_shape
    return channels, height, width


# ---- names ---------------------------------------------------------------------------------------------------------

BY_NAME: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "mlp-300": functools.partial(mlp, hidden=(300, 300, 300)),
    "mnist-cnn": mnist_cnn,
    "small-cnn": small_cnn,
    "resnet18": resnet18,
    "preact-resnet18": preact_resnet18,
}


def _builder(name: str) -> Callable[..., nn.Module]:
    """What makes the model of that name."""
    if name in BY_NAME:
        return BY_NAME[name]
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return functools.partial(wide_resnet, int(match[1]), int(match[2]))
    source, colon, rest = name.partition(":")
    if not colon:
        known = [*BY_NAME, "wrn-34-10"]
        forms = "wrn-DEPTH-WIDTH, torchvision:NAME, timm:NAME and package.module:callable"
        raise ConfigError(f"unknown model {name!r}{nearest(name, known)}; there are {', '.join(BY_NAME)}, {forms}")
    if source in ("torchvision", "timm"):
        return _of_library(name, source, rest)
    return _of_user(name, source, rest)


def _of_library(name: str, package: str, model: str) -> Callable[..., nn.Module]:
    library = _library(name, package)
    if package == "timm":
        known, create, is_known = library.list_models(), library.create_model, library.is_model(model)
    else:
        known, create = library.models.list_models(module=library.models), library.models.get_model
        is_known = model in known  # the classifiers alone
    if not is_known:
        raise ConfigError(f"{package} has no classifier {model!r}{nearest(model, known)}")

    def make(num_classes: int, input_shape: Shape, **options: Any) -> nn.Module:
        channels = {"in_chans": input_shape[0]} if package == "timm" else {}
        try:
            return create(model, **{"num_classes": num_classes, **channels, **options})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model {name} cannot be made with {options}: {error}") from error

    return make


def _of_user(name: str, module_name: str, attribute: str) -> Callable[..., nn.Module]:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # Not found is one thing, a module that is found and imports what is not there another.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"{error}; is its folder in PYTHONPATH?"
        else:
            reason = f"importing it raised {type(error).__name__}: {error}"
        raise ConfigError(f"model {name}: module {module_name!r} cannot be imported: {reason}") from error
    if not hasattr(module, attribute):
        meant = nearest(attribute, dir(module))
        raise ConfigError(f"model {name}: module {module_name!r} has no {attribute!r}{meant}")
    made: Callable[..., nn.Module] = getattr(module, attribute)
    if isinstance(made, nn.Module) or not callable(made):
        kind = type(made).__name__
        raise ConfigError(f"model {name}: {attribute!r} must be a function or class that makes a model, got a {kind}")
    return made


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = f"which cannot be imported ({error}): pip install {package}"
        raise ConfigError(f"model {name} needs {package}, {reason}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """What the user may have meant by a name that is not known, to be put behind it."""
    found = difflib.get_close_matches(name, list(known), cutoff=0.6)
    return f" (do you mean {' or '.join(found)}?)" if found else ""


# ---- checks --------------------------------------------------------------------------------------------------------


def _make(name: str, builder: Callable[..., nn.Module], options: dict[str, Any], **offered: Any) -> nn.Module:
    """Calls the builder with the options and with what its signature names of the offered arguments."""
    signature = inspect.signature(builder)
    arguments = {key: value for key, value in offered.items() if key in signature.parameters} | options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model {name} cannot be made with {arguments}: {error}") from None
    model = builder(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name} must be a torch.nn.Module, got a {type(model).__name__}")
    return model


def _check_logits(name: str, model: nn.Module, input_shape: Shape, classes: int) -> None:
    device = next((parameter.device for parameter in model.parameters()), None)
    x = torch.zeros(2, *input_shape, device=device)
    try:
        # The check must not show: no running statistics, no random numbers.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), modes(model):
            logits = model(x)
    except Exception as error:
        raise ConfigError(f"model {name} does not take a batch of shape {tuple(x.shape)}: {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if shape != (2, classes):
        given = tuple(x.shape)
        raise ConfigError(f"model {name} must turn a batch {given} into logits {(2, classes)}, got {shape}")

"""Launches that stand for all others of the Triton kernels: every kernel, every branch that the compiler takes, and
sizes that models have. Tensors are on the meta device, which has no memory, so that nothing can be run by mistake.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from kernelcheck.launches import TARGETS, Launch, launches_of
from torch import Tensor

from armor.library import ROWLOSS_STATS, real
from armor_kernels import dual, rowloss, transport

EVERYWHERE = tuple(TARGETS)
SOME = ("sm_90", "gfx942")  # for what differs from a case that is compiled everywhere in size only
ONE = ("sm_90",)

CIFAR, IMAGENET = (128, 3, 32, 32), (128, 3, 224, 224)
# Kind, norm and variant of every branch of a step.
STEPS = {
    "linf": (0, 0, 0),
    "l2": (1, 0, 0),
    "l1": (2, 0, 0),
    "norm_power inf": (3, 0, 0),
    "norm_power 1 normalised": (3, 1, 1),
    "norm_power 2 normalised": (3, 2, 1),
    "soft_ball": (4, 0, 1),
    "binary": (5, 0, 0),
}
STARTS = ["linf", "l2", "l1", "gaussian", "clean"]
DIVERGENCES = ["kl", "alpha", "renyi"]
KINDS = ["ce", "trades", "mart", "kl"]


def triton_launches(family: str = "") -> Iterator[tuple[str, Launch, tuple[str, ...]]]:
    """What varies, the launch, and for which architectures it is worth compiling: of one family, or of all."""
    families = {"dual": (_dual, _dual_backward), "transport": (_steps, _starts, _costs), "rowloss": (_rowlosses,)}
    for cases in families[family] if family else chain(*families.values()):
        for variant, launched, archs in cases():
            (launch,) = launched
            yield variant, launch, archs


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(*words: object) -> str:
    return " ".join(str(word).removeprefix("torch.") for word in words if word)


# ---- dual ----------------------------------------------------------------------------------------------------------


def _rows(n: int, dtype: torch.dtype, costs: bool, clean: bool) -> list[Tensor | None]:
    return [_empty(2, n, dtype=dtype) if given else None for given in (True, costs, clean)]


# The least and the most that a row can ask for, both block sizes, and the longest formulas.
def _dual():
    for divergence, n, dtype, costs, clean in (
        ("kl", 128, torch.float32, False, False),
        ("kl", 4096, torch.float32, True, True),
        ("alpha", 4096, torch.float32, True, False),
        ("renyi", 4096, torch.float64, False, True),
        ("renyi", 30, torch.float64, True, True),
    ):
        settings = DIVERGENCES.index(divergence), 2.0, 0.1, 0.0, 1e6
        launched = launches_of(dual.dual, *_rows(n, dtype, costs, clean), *settings)
        yield _name(divergence, n, dtype, costs and "costs", clean and "clean"), launched, EVERYWHERE


def _dual_backward():
    for n, dtype, costs in ((100_000, torch.float32, True), (4096, torch.float64, False)):
        row, scalar = _empty(2, n, dtype=dtype), _empty(2, dtype=dtype)
        launched = launches_of(dual.dual_backward, scalar, scalar, row, *_rows(n, dtype, costs, costs))
        yield _name(n, dtype, costs and "costs clean"), launched, EVERYWHERE


# ---- transport -----------------------------------------------------------------------------------------------------


def _step(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    everything: bool = True,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Launch]:
    """With everything: a last step of samples that have a mu, radius, seed of their own, and a feed."""
    x = _empty(*shape, dtype=dtype).to(memory_format=layout)
    per_sample = [_empty(shape[0], dtype=real(x)) for _ in range(2)]  # mu and radii
    per_sample += [_empty(shape[0], dtype=torch.bool), _empty(shape[0], dtype=torch.int64)]  # active and seeds
    per_channel = [_empty(shape[1], dtype=real(x))] * 2  # mean and std
    given = [*per_sample, *per_channel] if everything else [None] * 6
    kind, norm, variant = STEPS[name]
    numbers = kind, 0.1, 0.01, 0.5, 2.0, norm, variant, 0.0, 1.0, everything, everything
    return launches_of(transport.transport_step, x, x, x, *given, *numbers, None)


def _steps():
    for name in STEPS:
        yield _name(name, "3x32x32"), _step(name, CIFAR), EVERYWHERE
        yield _name(name, "4x64x64"), _step(name, (128, 4, 64, 64)), SOME  # the longest that is held in registers
        yield _name(name, "3x224x224"), _step(name, IMAGENET), SOME
    # Half precision has 8 elements in a vector and float64 two; 2700 is a multiple of 4 but not of 8 or 16.
    for name in ("linf", "l1"):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            yield _name(name, "3x32x32 bare", dtype), _step(name, CIFAR, dtype, everything=False), ONE
        yield _name(name, "3x30x30 bare"), _step(name, (128, 3, 30, 30), everything=False), ONE
    # Images of one channel and rows, whose sizes become constants; and the layout in which channels are innermost.
    for name in ("l2", "binary"):
        yield _name(name, "1x28x28"), _step(name, (128, 1, 28, 28)), ONE
        yield _name(name, "784"), _step(name, (128, 784)), ONE
        yield _name(name, "3x32x32 channels_last"), _step(name, CIFAR, layout=torch.channels_last), ONE


def _starts():
    x, mean = _empty(*CIFAR), _empty(3)
    seeds, radii = _empty(CIFAR[0], dtype=torch.int64), _empty(CIFAR[0])
    for start, name in enumerate(STARTS):
        given = None if name == "clean" else seeds, radii, mean, mean
        launched = launches_of(transport.transport_init, x, *given, start, 0.1, 0.0, 1.0, None)
        yield _name(name, "3x32x32"), launched, EVERYWHERE


def _costs():
    x, radii = _empty(*CIFAR), _empty(CIFAR[0])
    for name, (kind, norm, _) in STEPS.items():
        launched = launches_of(transport.transport_cost, x, x, radii, kind, 0.1, 0.5, 2.0, norm, 0.0, 1.0)
        yield _name(name, "3x32x32"), launched, EVERYWHERE if name in ("linf", "l2") else SOME


# ---- rowloss -------------------------------------------------------------------------------------------------------


# Several rows to a program, one row, and a row of many blocks, each where it needs most registers.
def _rowlosses():
    for kind, name in enumerate(KINDS):
        for classes, dtype, archs in (
            (10, torch.float32, EVERYWHERE),
            (1000, torch.bfloat16, EVERYWHERE),
            (1000, torch.float32, SOME),
            (4096, torch.float32, EVERYWHERE),
            (50_000, torch.float16, EVERYWHERE),
            (50_000, torch.float64, SOME),
        ):
            logits, target = _empty(128, classes, dtype=dtype), _empty(128, dtype=torch.int64)
            natural = logits if kind else None
            losses = _empty(128, dtype=real(logits))
            stats = _empty(128, ROWLOSS_STATS[kind], dtype=losses.dtype)
            settings = kind, 6.0, 0.0 if kind else 0.1, -100
            forward = launches_of(rowloss.rowloss, logits, target, natural, *settings)
            given = losses.sum(), losses, logits, target, natural, stats
            backward = launches_of(rowloss.rowloss_backward, *given, *settings, kind > 0)
            yield _name(name, classes, dtype), forward, archs
            yield _name(name, classes, dtype), backward, archs

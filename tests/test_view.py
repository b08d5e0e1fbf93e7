"""The attack's view of a model against the model itself in eval mode, and what the view may not touch."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from armor import attacks
from armor.training import models
from armor.training.view import AttackView

try:
    import torchvision  # noqa: F401
except ImportError:
    has_torchvision = False
else:
    has_torchvision = True
IMAGE = (3, 8, 8)


class Net(nn.Module):
    """A forward pass of (model, x) over modules by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.of, self.m = forward, nn.ModuleDict(modules)

    def forward(self, x):
        return self.of(self.m, x)


class WithFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x, features=False, scale=2.0):
        x = self.norm(self.conv(x)).relu().mean((2, 3)) * scale
        return x if features else self.head(x)


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def layers(*blocks, size):
    return nn.Sequential(*blocks, nn.ReLU(), nn.Flatten(), nn.Linear(size, 5))


def two_names():
    """One convolution under two names, each of which is called."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return Net(lambda m, x: m["norm"](m["b"](m["a"](x).relu())).mean((2, 3)), a=conv, b=conv, norm=nn.BatchNorm2d(3))


def two_names_of_a_pair():
    """A convolution and a norm under two names each, called once: they fold, whichever name torch.fx takes."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    return Net(lambda m, x: m["d"](m["c"](x)).relu().mean((2, 3)), a=conv, b=norm, c=conv, d=norm)


def tied():
    """Two convolutions have one weight, which is read of the second, whose norm must not fold; a third folds."""
    model = Net(
        lambda m, x: pooled(m["a"](x)) * pooled(m["n"](m["b"](x))) * m["b"].weight.mean() + pooled(m["l"](m["c"](x))),
        **{"a": conv(), "b": conv(), "c": conv(), "n": norm(), "l": norm()},
    )
    model.m["b"].weight = model.m["a"].weight
    return model


def hooked():
    model = layers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), size=144)
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def weight_normed(norm):
    return layers(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), size=144)


def without_gradient(m, x):
    with torch.no_grad():
        offset = m["conv"](x).mean((1, 2, 3))
    return m["norm"](m["other"](x)).relu().mean((2, 3)) + offset[:, None]


def conv(out=4, **options):
    return nn.Conv2d(3, out, 3, **options)


def norm(channels=4, **options):
    return nn.BatchNorm2d(channels, **options)


def pooled(x):
    return x.relu().mean((2, 3))


# Of each: how to make it, the shape of a sample, and how many norms the view folds.
OURS = {
    # ResNet: all, the skips included. Pre-activation: the second norm of each block, the only one that alone reads a
    # convolution.
    "resnet18": (functools.partial(models.build, "resnet18", (3, 32, 32), 10), (3, 16, 16), 20),
    "preact-resnet18": (functools.partial(models.build, "preact-resnet18", (3, 32, 32), 10), (3, 16, 16), 8),
    "wrn-10-1": (functools.partial(models.build, "wrn-10-1", (3, 32, 32), 10), (3, 16, 16), 3),
    "mnist-cnn": (functools.partial(models.build, "mnist-cnn", (1, 28, 28), 10), (1, 28, 28), 0),
    "mlp": (functools.partial(models.build, "mlp", (1, 8, 8), 10), (1, 8, 8), 0),
}
FOLDED = {
    "bias": (lambda: layers(conv(), norm(), size=144), IMAGE, 1),
    "no bias": (lambda: layers(conv(bias=False), norm(eps=0.1), size=144), IMAGE, 1),
    "not affine": (lambda: layers(conv(), norm(affine=False), size=144), IMAGE, 1),
    "groups": (lambda: layers(nn.Conv2d(4, 8, 3, groups=2), norm(8), size=288), (4, 8, 8), 1),
    "depthwise, dilated": (lambda: layers(conv(6, groups=3, dilation=2), norm(6), size=96), IMAGE, 1),
    "padding by reflection": (lambda: layers(conv(padding=1, padding_mode="reflect"), norm(), size=256), IMAGE, 1),
    "1d": (lambda: layers(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), size=24), (3, 8), 1),
    "3d": (lambda: layers(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), size=32), (3, 4, 4, 4), 1),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)), (6,), 1),
    "linear at the end": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)), (6,), 1),
    # Of 4 tokens with 4 features BatchNorm1d normalises the tokens, the linear layer makes features.
    "tokens": (lambda: layers(nn.Linear(6, 4), nn.BatchNorm1d(4), size=16), (4, 6), 1),
    "dropout": (lambda: layers(conv(), norm(), nn.Dropout(0.5), size=144), IMAGE, 1),
    "two names of a pair": (two_names_of_a_pair, IMAGE, 1),
    "optional arguments": (WithFlag, IMAGE, 1),
    "gradient switched off": (
        lambda: Net(without_gradient, conv=conv(), other=conv(), norm=norm()),
        IMAGE,
        1,
    ),
}
UNFOLDED = {
    "two convolutions": (
        lambda: Net(lambda m, x: pooled(m["n"](m["a"](x))) + pooled(m["n"](m["b"](x))), a=conv(), b=conv(), n=norm()),
        IMAGE,
        0,
    ),
    "two readers": (
        lambda: Net(lambda m, x: (lambda y: pooled(m["n"](y)) + pooled(y))(m["a"](x)), a=conv(), n=norm()),
        IMAGE,
        0,
    ),
    "called twice": (
        lambda: Net(lambda m, x: pooled(m["n"](m["a"](m["a"](x)))), a=conv(3, padding=1), n=norm(3)),
        IMAGE,
        0,
    ),
    "two names": (two_names, IMAGE, 0),
    # The weight that is read belongs to two convolutions, of which the other has the name that torch.fx knows.
    "tied weight read": (tied, IMAGE, 1),
    "weight read": (
        lambda: Net(lambda m, x: pooled(m["n"](m["a"](x))) * m["a"].weight.mean(), a=conv(), n=norm()),
        IMAGE,
        0,
    ),
    "statistics read": (
        lambda: Net(lambda m, x: pooled(m["n"](m["a"](x))) * m["n"].running_var, a=conv(), n=norm()),
        IMAGE,
        0,
    ),
    "no statistics": (lambda: layers(conv(), norm(track_running_stats=False), size=144), IMAGE, 0),
    "own norm": (lambda: layers(conv(), Own(4), size=144), IMAGE, 0),
    "activation between": (lambda: layers(conv(), nn.ReLU(), norm(), size=144), IMAGE, 0),
    "norm first": (lambda: layers(norm(3), conv(), size=144), IMAGE, 0),
    "transposed": (lambda: layers(nn.ConvTranspose2d(3, 4, 3), norm(), size=400), IMAGE, 0),
}
UNTRACEABLE = {
    "control flow": (
        lambda: Net(lambda m, x: pooled(m["n"](m["a"](x))) * (1 if x.sum() > 0 else 2), a=conv(), n=norm()),
        IMAGE,
        "torch.fx cannot trace it: ",
    ),
    "hook": (hooked, IMAGE, "0 has hooks"),
    "weight norm": (lambda: weight_normed(nn.utils.parametrizations.weight_norm), IMAGE, "0 has parametrizations"),
    "old weight norm": (lambda: weight_normed(nn.utils.weight_norm), IMAGE, "0 has hooks"),
    "spectral norm": (lambda: weight_normed(nn.utils.parametrizations.spectral_norm), IMAGE, "0 has parametrizations"),
}
ALL = OURS | FOLDED | UNFOLDED | {name: (make, shape, 0) for name, (make, shape, _) in UNTRACEABLE.items()}


def made(name, dtype=torch.float64):
    """The model in train mode, away from where BatchNorm starts, where it is close to nothing."""
    if name == "resnet18" and not has_torchvision:
        pytest.skip("torchvision is not installed")
    torch.manual_seed(0)
    model = ALL[name][0]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, least in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, least, least + 1)
    return model.train()


def samples(name, count=3, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.rand(count, *ALL[name][1], dtype=dtype)


def look(view, x):
    """Logits and the input gradient of a loss of them, both scaled to 1, so that a tolerance says something."""
    x = x.clone().requires_grad_()
    logits = view(x)
    target = torch.arange(len(x)) % logits.shape[1]
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, target), x)
    return logits.detach() / logits.detach().abs().max(), grad / grad.abs().max()


def in_eval_mode(model, x):
    """The oracle: a copy of the model in eval mode."""
    oracle = copy.deepcopy(model).eval()
    return look(oracle, x)


def assert_same(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def step(model, x):
    """An optimiser step in train mode, which moves weights and statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]).backward()
    optimizer.step()


# --- equal to the model


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fold", [True, False])
def test_view_equals_the_model_in_eval_mode(name, fold):
    model, x = made(name), samples(name)
    view = AttackView(model, fold=fold)
    assert len(view.folds) == (ALL[name][2] if fold else 0)
    for _ in range(3):
        assert_same(look(view, x), in_eval_mode(model, x))
        step(model, samples(name, 4))
        view.refresh()


@pytest.mark.parametrize("name", OURS)
def test_in_float32(name):
    """Folding rounds otherwise than the model: logits within 1e-5 of the largest. Of the gradient a ReLU that an entry
    near 0 is now on the other side of changes a patch, so it is held to 1 % of its length."""
    model, x = made(name, torch.float32), samples(name, dtype=torch.float32)
    (logits, grad), (expected, expected_grad) = look(AttackView(model), x), in_eval_mode(model, x)
    assert (logits - expected).abs().max() < 1e-5
    assert (grad - expected_grad).norm() < 0.01 * expected_grad.norm()


@pytest.mark.parametrize("name", ["resnet18", "bias", "not affine", "linear"])
def test_a_view_that_is_not_refreshed_is_of_the_earlier_model(name):
    model, x = made(name), samples(name)
    view = AttackView(model)
    step(model, samples(name, 4))
    stale, fresh = look(view, x), in_eval_mode(model, x)
    assert (stale[0] - fresh[0]).abs().max() > 1e-3
    assert (stale[1] - fresh[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["resnet18", "bias", "control flow", "hook"])
def test_weights_that_come_from_elsewhere(name):
    """From a checkpoint, in place, or in another place, as from `nn.utils.vector_to_parameters`."""
    model, x = made(name), samples(name)
    view, before = AttackView(model), look(AttackView(model), x)
    state = {key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    view.refresh()
    assert_same(look(view, x), in_eval_mode(model, x))
    assert (look(view, x)[1] - before[1]).abs().max() > 1e-3
    for parameter in model.parameters():
        parameter.data = 0.9 * parameter.data
    view.refresh()
    assert_same(look(view, x), in_eval_mode(model, x))


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_why_nothing_is_folded(name):
    make, _, reason = UNTRACEABLE[name]
    assert AttackView(make()).why_unfolded.startswith(reason)
    assert AttackView(make(), fold=False).why_unfolded == "not asked for"
    assert AttackView(made("bias")).why_unfolded is None


# --- what is left alone


@pytest.mark.parametrize("name", ["resnet18", "bias", "linear", "dropout", "control flow", "hook", "weight norm"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_model_is_left_alone(name, fold):
    model, x = made(name), samples(name)
    modules = list(model.modules())
    modules[-1].eval()  # as if frozen on purpose
    kept = next(iter(model.parameters()))
    kept.requires_grad_(False)
    grads = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    for key, parameter in model.named_parameters():
        parameter.grad = grads[key].clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    training = [module.training for module in modules]

    view = AttackView(model, fold=fold)
    view(x.clone().requires_grad_()).sum().backward()
    view.refresh()
    attacks.pgd(0.1, 2, 0.05)(view, x, torch.tensor([0, 1, 2]))

    assert list(model.modules()) == modules
    assert [module.training for module in modules] == training == [True] * (len(modules) - 1) + [False]
    assert [p.requires_grad for p in model.parameters()] == flags == [False] + [True] * (len(flags) - 1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, grads[key])


def test_tracing_leaves_buffers_alone():
    """A model that counts its calls in a buffer cannot be traced, and nothing is counted in the attempt."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    model = Counting()
    view = AttackView(model)
    assert model.calls == 0
    view(torch.rand(2, 6))
    assert model.calls == 1


@pytest.mark.parametrize("name", ["resnet18", "mnist-cnn", "linear", "control flow", "weight norm"])
@pytest.mark.parametrize("fold", [True, False])
def test_only_x_is_differentiated(name, fold):
    """Of all leaves of the graph one is left: x."""
    view, x = AttackView(made(name), fold=fold), samples(name).requires_grad_()
    leaves, seen, nodes = [], set(), [view(x).grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            leaves.append(node.variable)
    assert len(leaves) == 1
    assert leaves[0] is x


def test_storage_is_shared_but_for_what_is_folded():
    """preact-resnet18 folds the first convolution of each block: of 11 million numbers, 3.8 million are its own."""
    model = models.build("preact-resnet18", (3, 32, 32), 10)
    view = AttackView(model)
    twin = view._forward
    shared = {p.data_ptr() for p in model.parameters()}
    own = [p for p in twin.parameters() if p.data_ptr() not in shared]
    folded = [module for name, module in model.named_modules() if name.endswith("conv1")]
    assert sorted(p.numel() for p in own) == sorted(
        n for module in folded for n in (module.weight.numel(), module.out_channels)
    )
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) for p in twin.parameters() if p.dim() == 4 and p.shape[2] > 1
    )
    buffers = {b.data_ptr() for b in model.buffers()}
    assert all(b.data_ptr() in buffers for b in twin.buffers())


def test_dropout_is_silent_in_the_view_of_a_model_in_train_mode():
    view, x = AttackView(made("dropout")), samples("dropout")
    assert torch.equal(view(x), view(x))


# --- train mode, as published


@pytest.mark.parametrize("name", ["resnet18", "bias", "control flow"])
def test_train_mode_updates_the_statistics_of_the_model(name):
    model, x = made(name), samples(name)
    frozen = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][-1]
    if name == "resnet18":
        frozen.eval()  # stays in the mode it is in
    oracle = copy.deepcopy(model)
    view = AttackView(model, fold=False, eval_mode=False)
    for _ in range(2):
        assert_same(look(view, x), look(oracle, x), 0)
    assert model.state_dict().keys() == oracle.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, oracle.state_dict()[key]), key
    counts = {int(b) for key, b in model.named_buffers() if key.endswith("num_batches_tracked")}
    assert counts == ({0, 2} if name == "resnet18" else {2})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_folding_needs_eval_mode():
    with pytest.raises(ValueError, match="fold needs eval_mode"):
        AttackView(made("bias"), fold=True, eval_mode=False)


# --- in an attack


@pytest.mark.parametrize(
    "attack", [attacks.pgd(0.1, 3, 0.05), attacks.trades(0.1, 3, 0.05), attacks.pgd(1, 3, 0.5, "l2")]
)
@pytest.mark.parametrize("name", ["wrn-10-1", "control flow"])
def test_attacks_go_where_they_go_on_the_model(name, attack):
    model, x = made(name), samples(name)
    y, seeds = torch.tensor([0, 1, 2]), torch.arange(3)
    expected = attack(model, x, y, seeds=seeds)
    assert (expected - x).abs().max() > 0.01
    torch.testing.assert_close(attack(AttackView(model), x, y, seeds=seeds), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fold", [True, False])
def test_the_attack_normalises_for_the_inner_model(fold):
    inner, x, y = made("wrn-10-1"), samples("wrn-10-1"), torch.tensor([0, 1, 2])
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.1]).double()
    model = models.Normalized(mean, std, inner)
    view = AttackView(model, fold=fold)
    assert view.normalize[0] is model.mean
    assert view.normalize[1] is model.std
    assert_same(look(view, x), in_eval_mode(inner, x))
    attack = functools.partial(attacks.pgd, 1.0, 3, 0.5, "l2")
    got = attack(normalize=view.normalize)(view, x, y, seeds=torch.arange(3))
    expected = attack()(model, x, y, seeds=torch.arange(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    assert AttackView(inner).normalize is None


# --- on the device


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, out))
        return out


def test_refresh_is_a_few_operators_in_place():
    """Of 20 folded layers eight operators over lists, and one pass over each weight. None makes a tensor or reads one
    back, so that a CUDA graph can hold them."""
    model = made("resnet18", torch.float32)
    view = AttackView(model)
    before = [(fold.weight.data_ptr(), fold.bias.data_ptr()) for fold in view.folds]
    with Recorded() as recorded:
        view.refresh()
    names = [name for name, _ in recorded.calls if name not in ("detach", "view", "alias")]
    assert names == [
        "_foreach_copy_",
        "_foreach_add_",
        "_foreach_rsqrt_",
        "_foreach_mul_",
        "_foreach_copy_",
        "_foreach_sub_",
        "_foreach_mul_",
        "_foreach_add_",
        *["mul"] * 20,
    ]
    assert [(fold.weight.data_ptr(), fold.bias.data_ptr()) for fold in view.folds] == before


# --- compiled


# A parametrized layer has a class of its own, of which torch.compile makes one more graph.
@pytest.mark.parametrize(
    ("name", "fold", "of_the_second"), [("bias", True, 0), ("bias", False, 0), ("weight norm", True, 1)]
)
def test_compiled_once_per_kind_of_batch(monkeypatch, name, fold, of_the_second):
    """Neither a refresh nor another model of the kind compiles anew; of a batch of another size, at most one graph
    more comes of it, which then fits all sizes."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")  # as inductor sees it, without the time that it takes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiled = []
    for _ in range(2):
        model = made(name)
        view = AttackView(model, fold=fold, compile=True)
        for count in (8, 8, 5, 8, 3, 7):
            x = samples(name, count)
            assert_same(look(view, x), in_eval_mode(model, x))
            compiled.append(counter.frame_count)
            step(model, x)
            view.refresh()
    assert compiled == [1, 1, 2, 2, 2, 2, *[2 + of_the_second] * 6]

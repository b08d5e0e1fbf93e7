"""Rule 10 of the architecture: armor's operators inside torch.compile, export, vmap, torch.func, autocast,
checkpointing, and on fake and meta tensors. Values are judged by the eager call, which test_dual.py judges.
"""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import CODES
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from armor.losses import DCLoss, LearnedDual
from armor.ops import dc_loss

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS = [
    {"divergence": "kl", "radius": 0.1},
    {"divergence": "alpha", "alpha": 2.0, "radius": 0.1, "kappa": 0.2},
    {"divergence": "renyi", "alpha": 1.25, "radius": 0.05},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda option: option["divergence"])
given = pytest.mark.parametrize("given", ["losses", "costs", "clean"])


def rows(given, shape=(3, 8), dtype=torch.float32, seed=0, requires_grad=False):
    """losses, costs, clean_losses; None where `given` has none."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(shape, generator=generator, dtype=torch.float64)
    costs = 0.05 * torch.rand(shape, generator=generator, dtype=torch.float64)
    clean = losses - torch.rand(shape, generator=generator, dtype=torch.float64)
    parts = (losses, costs if given != "losses" else None, clean if given == "clean" else None)
    return [None if t is None else t.to(dtype).requires_grad_(requires_grad) for t in parts]


def call(losses, costs=None, clean=None, **options):
    return dc_loss(losses, costs, clean_losses=clean, **options)


def present(tensors):
    return [t for t in tensors if t is not None]


def strided(tensor, layout):
    if tensor is None or layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    return tensor.repeat_interleave(2, 1)[:, ::2]


# ----------------------------------------------------------------------------------------------------
# registration


@given
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(given, layout, dtype):
    losses, costs, clean = (strided(t, layout) for t in rows(given, dtype=dtype))
    numbers = (CODES["alpha"], 1.5, 0.1, 0.0, 1e6)
    torch.library.opcheck(torch.ops.armor.dual.default, (losses, costs, clean, *numbers))
    grad, mu, weights = torch.ones(3, dtype=dtype), torch.rand(3, dtype=dtype), torch.rand(3, 8, dtype=dtype)
    arguments = (grad, mu, strided(weights, layout), losses, costs, clean)
    torch.library.opcheck(torch.ops.armor.dual_backward.default, arguments)


def test_opcheck_of_an_expanded_gradient():
    # What sum().backward() hands to the op: a gradient of stride zero.
    losses = torch.randn(3, 8)
    arguments = (torch.ones(()).expand(3), torch.rand(3), torch.rand(3, 8), losses, None, None)
    torch.library.opcheck(torch.ops.armor.dual_backward.default, arguments)


@given
def test_meta_tensors(given):
    tensors = rows(given, requires_grad=True)
    on_meta = [None if t is None else t.detach().to("meta").requires_grad_() for t in tensors]
    value, dual = call(*on_meta, radius=0.1, return_dual=True)
    expected, expected_dual = call(*tensors, radius=0.1, return_dual=True)
    for one, other in zip((value, *dual), (expected, *expected_dual), strict=True):
        assert one.device.type == "meta"
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    value.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in present(on_meta))


def test_fake_tensors_of_both_devices():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            value, dual = dc_loss(torch.empty(4, 7, device=device), radius=0.1, return_dual=True)
            assert value.device.type == dual.weights.device.type == device
            assert value.shape == (4,)


# ----------------------------------------------------------------------------------------------------
# torch.compile and export


@given
@options
def test_compiled_gradients(options, given):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, graph = (rows(given, requires_grad=True) for _ in range(2))
    call(*eager, **options).sum().backward()
    compiled(*graph, **options).sum().backward()
    for one, other in zip(present(graph), present(eager), strict=True):
        assert torch.equal(one.grad, other.grad)


@options
def test_compiled_without_gradients(options):
    # Evaluation takes another road through torch.compile than training does.
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    losses = rows("losses")[0]
    assert torch.equal(compiled(losses, **options), call(losses, **options))
    with torch.no_grad():
        assert torch.equal(compiled(losses.requires_grad_(), **options), call(losses, **options))


def test_one_dynamic_graph_serves_every_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in [(3, 8), (5, 31), (2, 128), (16, 9)]:
        losses, costs, _ = rows("costs", shape)
        torch.testing.assert_close(compiled(losses, costs, radius=0.1), call(losses, costs, radius=0.1))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


# The whole of the default backend in a fresh process, as a user runs it: anything logged is a defect.
def test_training_step_compiles_without_a_word(tmp_path):
    script = """
        import torch
        from armor import DCLoss
        torch.manual_seed(0)
        model, robust = torch.nn.Linear(5, 3), DCLoss(radius=0.1, divergence="renyi", alpha=1.25)

        def step(x, y, costs):
            losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            return robust(losses, costs, losses.detach() * 0.9)

        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        for n in (16, 24, 7):
            x, y, costs = torch.randn(n, 5), torch.randint(3, (n,)), 0.01 * torch.rand(n)
            expected, value = step(x, y, costs), compiled(x, y, costs)
            torch.testing.assert_close(value, expected)
            expected_gradient = torch.autograd.grad(expected, model.weight)
            torch.testing.assert_close(torch.autograd.grad(value, model.weight), expected_gradient)
        print("agreed")
    """
    environment = {
        **os.environ,
        "TORCH_LOGS": "graph_breaks,recompiles",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agreed\n"
    # PyTorch's own remark on a machine with a CUDA toolkit and no GPU.
    assert [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line] == []


@pytest.mark.parametrize(
    "module",
    [DCLoss(radius=0.1), LearnedDual(radius=0.1, divergence="alpha", alpha=2.0)],
    ids=["DCLoss", "LearnedDual"],
)
def test_export(module):
    losses, costs, _ = rows("costs", (8,))
    dim = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (losses, costs), dynamic_shapes=({0: dim}, {0: dim}, None)[:2])
    losses, costs, _ = rows("costs", (21,), seed=1)
    torch.testing.assert_close(program.module()(losses, costs), module(losses, costs), rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------
# torch.func


@given
@options
def test_vmap(options, given):
    tensors = present(rows(given, (4, 3, 8)))
    mapped = func.vmap(lambda *row: call(*row, **options))(*tensors)
    torch.testing.assert_close(mapped, call(*tensors, **options), rtol=0, atol=0)
    twice = func.vmap(func.vmap(lambda *row: call(*row, **options)))(*tensors)
    torch.testing.assert_close(twice, call(*tensors, **options), rtol=0, atol=0)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0), (2, None)])
def test_vmap_over_some_inputs(in_dims):
    losses = torch.randn(4, 8, 6) if in_dims[0] is not None else torch.randn(3, 8)
    costs = 0.05 * torch.rand(losses.shape[in_dims[0] or 0] if in_dims[0] is not None else 6, *_rest(losses, in_dims))
    costs = costs if in_dims[1] == 0 else costs[0]
    mapped = func.vmap(lambda loss, cost: dc_loss(loss, cost, radius=0.1), in_dims=in_dims)(losses, costs)
    for i in range(mapped.shape[0]):
        loss = losses if in_dims[0] is None else losses.select(in_dims[0], i)
        cost = costs if in_dims[1] is None else costs[i]
        torch.testing.assert_close(mapped[i], dc_loss(loss, cost, radius=0.1), rtol=0, atol=0)


def _rest(losses, in_dims):
    """The shape of one mapped element of losses."""
    return losses.shape if in_dims[0] is None else losses.select(in_dims[0], 0).shape


def test_vmap_returns_the_duals():
    losses = torch.randn(4, 3, 8)
    mapped = func.vmap(lambda row: dc_loss(row, radius=0.1, dim=0, return_dual=True))(losses)
    direct = dc_loss(losses, radius=0.1, dim=1, return_dual=True)
    for one, other in zip((mapped[0], *mapped[1]), (direct[0], *direct[1]), strict=True):
        assert torch.equal(one, other)


@given
@options
def test_func_grad(options, given):
    tensors = present(rows(given, (8,), dtype=torch.float64))
    places = tuple(range(len(tensors)))
    transformed = func.grad(lambda *row: call(*row, **options), argnums=places)(*tensors)
    direct = torch.autograd.grad(call(*(leaves := [t.requires_grad_() for t in tensors]), **options), leaves)
    for one, other in zip(transformed, direct, strict=True):
        assert torch.equal(one, other)


@given
@options
def test_vmap_of_grad(options, given):
    tensors = present(rows(given, (5, 8), dtype=torch.float64))
    places = tuple(range(len(tensors)))
    per_row = func.vmap(func.grad(lambda *row: call(*row, **options), argnums=places))(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    direct = torch.autograd.grad(call(*leaves, **options).sum(), leaves)
    for one, other in zip(per_row, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_jacrev_is_diagonal_over_rows():
    losses = torch.randn(3, 8, dtype=torch.float64)
    jacobian = func.jacrev(lambda rows: dc_loss(rows, radius=0.1))(losses)
    weights = dc_loss(losses, radius=0.1, return_dual=True)[1].weights
    expected = torch.einsum("ij,ik->ijk", torch.eye(3, dtype=torch.float64), weights)
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=0)


def test_per_sample_gradients_of_a_model():
    model = torch.nn.Linear(4, 1).double()
    parameters = dict(model.named_parameters())
    x = torch.randn(6, 10, 4, dtype=torch.float64)

    def loss(parameters, x):
        return dc_loss(func.functional_call(model, parameters, (x,)).squeeze(-1).square(), radius=0.2)

    mapped = func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(6):
        direct = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for one, other in zip(mapped.values(), direct, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------
# the rest of a training loop


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    eager, cast = (rows("clean", dtype=dtype, requires_grad=True) for _ in range(2))
    expected = call(*eager, radius=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        value = call(*cast, radius=0.1)
        value.sum().backward()
    expected.sum().backward()
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)
    for one, other in zip(cast, eager, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_autocast_losses_of_a_model():
    model = torch.nn.Linear(6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.randn(32, 6)).squeeze(-1)
        assert losses.dtype == torch.bfloat16
        value = dc_loss(losses, radius=0.1)
    value.backward()
    assert value.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    plain, saved = (rows("clean", requires_grad=True) for _ in range(2))
    call(*plain, radius=0.1).sum().backward()
    checkpoint(lambda *t: call(*t, radius=0.1), *saved, use_reentrant=reentrant).sum().backward()
    for one, other in zip(saved, plain, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_second_order_is_refused_with_a_reason():
    losses = torch.randn(8, requires_grad=True)
    (gradient,) = torch.autograd.grad(dc_loss(losses, radius=0.1), losses, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.square().sum().backward()


def test_forward_mode_is_refused():
    with pytest.raises((RuntimeError, NotImplementedError)):
        func.jvp(lambda losses: dc_loss(losses, radius=0.1), (torch.randn(8),), (torch.ones(8),))


def test_duals_carry_no_gradient():
    losses = torch.randn(3, 8, requires_grad=True)
    value, dual = dc_loss(losses, radius=0.1, return_dual=True)
    assert value.requires_grad
    assert not any(entry.requires_grad for entry in dual)


def test_inference_mode_and_no_grad():
    losses = torch.randn(3, 8, requires_grad=True)
    expected = dc_loss(losses, radius=0.1)
    with torch.no_grad():
        assert torch.equal(dc_loss(losses, radius=0.1), expected)
    with torch.inference_mode():
        assert torch.equal(dc_loss(losses, radius=0.1), expected)


def test_inputs_are_left_alone():
    tensors = rows("clean")
    before = copy.deepcopy(tensors)
    call(*tensors, radius=0.1)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_float64_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert dc_loss(torch.randn(8), radius=0.1).dtype == torch.float64
        assert dc_loss(torch.randn(8, dtype=torch.float32), radius=0.1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)

"""The strict mode of Triton's interpreter, tests/kernelcheck/strict.py: each kernel below holds one bug, which must be
caught, and must pass once it is repaired. The kernels of armor run under it in `make audit`. `make test` starts this
file in a process of its own, because the interpreter must be chosen before Triton is imported.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
import triton.language as tl  # noqa: E402
from kernelcheck import cases_gpu, strict  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from armor_kernels import dual, rowloss, transport  # noqa: E402

nan = float("nan")
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KERNELS = SimpleNamespace(
    dual=dual.dual,
    dual_backward=dual.dual_backward,
    rowloss=rowloss.rowloss,
    rowloss_backward=rowloss.rowloss_backward,
    rowloss_dual=rowloss.rowloss_dual,
    transport_init=transport.transport_init,
    transport_step=transport.transport_step,
    transport_cost=transport.transport_cost,
)
orders = pytest.mark.parametrize("order", strict.ORDERS)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in kernels that run unchecked


# ---- seeded bugs: `RIGHT` repairs them ---------------------------------------------------------------------------


@triton.jit
def _one_too_many(x, out, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    here = i < n if RIGHT else i <= n
    tl.store(out + i, tl.load(x + i, mask=here, other=0.0), mask=i < n)


@triton.jit
def _no_mask(x, out, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    value = tl.load(x + i, mask=i < n, other=0.0)
    if RIGHT:
        tl.store(out + i, value, mask=i < n)
    else:
        tl.store(out + i, value)


@triton.jit
def _neighbour(x, y, out, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    there = y + i if RIGHT else x + n + i  # where y lies
    tl.store(out + i, tl.load(there, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _overlap(x, out, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * (32 if RIGHT else 31) + tl.arange(0, 32)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _in_place(x, out, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    source = x if RIGHT else out
    before = tl.load(source + (i + 32) % n, mask=i < n, other=0.0)
    tl.store(out + i, before, mask=i < n)


@triton.jit
def _accumulate(x, total, n, RIGHT: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    part = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if RIGHT:
        tl.atomic_add(total, part)
    else:
        tl.store(total, tl.load(total) + part)


@triton.jit
def _last_program_sums(x, total, parts, ticket, n, programs, SEM: tl.constexpr, SCOPE: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(parts + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    if tl.atomic_add(ticket, 1, sem=SEM, scope=SCOPE) == programs - 1:
        j = tl.arange(0, 8)
        tl.store(total, tl.sum(tl.load(parts + j, mask=j < programs, other=0.0), 0))


@triton.jit
def _reset(ticket, done, programs, RIGHT: tl.constexpr):
    if tl.atomic_add(ticket, 1) == programs - 1:
        tl.store(done, 1)
        if RIGHT:
            tl.atomic_xchg(ticket, 0)
        else:
            tl.store(ticket, 0)


@triton.jit
def _two_lanes(out, RIGHT: tl.constexpr):
    i = tl.arange(0, 32)
    tl.store(out + (i if RIGHT else i // 2), i)


@triton.jit
def _no_barrier(x, out, RIGHT: tl.constexpr):
    i = tl.arange(0, 32)
    tl.store(out + i, tl.load(x + i))
    if RIGHT:
        tl.debug_barrier()
    other = tl.load(out + 31 - i)
    tl.debug_barrier()
    tl.store(out + i, other)


@triton.jit
def _no_other(x, out, n, RIGHT: tl.constexpr):
    i = tl.arange(0, 32)
    v = tl.load(x + i, mask=i < n, other=0) if RIGHT else tl.load(x + i, mask=i < n)
    tl.store(out, tl.sum(v.to(tl.float64), 0))


@triton.jit
def _narrow(x, out, OP: tl.constexpr, RIGHT: tl.constexpr):
    i = tl.arange(0, 32)
    v = tl.load(x + i)
    if RIGHT:
        v = v.to(tl.float32)
    if OP == "add":
        v = v + v
    elif OP == "compare":
        v = tl.where(v < v, 1.0, 2.0)
    elif OP == "negate":
        v = -v
    else:
        v = tl.sum(v, 0) + tl.zeros((32,), tl.float32)
    tl.store(out + i, v.to(tl.float32))


@triton.jit
def _convert(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    tl.store(out + i, tl.load(x + i, mask=here, other=0.0).to(out.dtype.element_ty), mask=here)


@triton.jit
def _numbers(out, single, double: tl.float64, whole: tl.int64):
    zero = tl.program_id(0).to(tl.float64) * 0.0
    tl.store(out, zero + single)
    tl.store(out + 1, zero + double)
    tl.store(out + 2, (zero + (whole << 40)))


@triton.jit
def _extremes(x, out):
    v = tl.load(x + tl.arange(0, 32))
    tl.store(out, tl.max(v, 0))
    tl.store(out + 1, tl.min(v, 0))


@triton.jit
def _queue(ticket, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(ticket, 1))


@triton.jit
def _idle(out):
    tl.load(out)


X = torch.arange(100.0)


def launch(kernel, *arguments, grid=4, **options):
    kernel[(grid,)](*arguments, **options)


def fails_until_repaired(run, error, message, order):
    with strict.checking(order), pytest.raises(error, match=message):
        run(False)
    with strict.checking(order):
        return run(True)


@orders
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (_one_too_many, r"_one_too_many: program \(3, 0, 0\) reads element 100 of x, which has 100"),
        (_no_mask, r"_no_mask: program \(3, 0, 0\) writes element 100 of out, which has 100"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bounds(kernel, message, order):
    def run(right):
        out = torch.full((100,), nan)
        launch(kernel, X, out, 100, RIGHT=right)
        return out

    assert torch.equal(fails_until_repaired(run, strict.OutOfBounds, message, order), X)


def test_bounds_are_those_of_the_tensor_that_the_pointer_came_from():
    both, out = torch.arange(100.0), torch.zeros(50)
    x, y = both[:50], both[50:]
    message = r"_neighbour: program \(0, 0, 0\) reads element 50 of x, which has 50"
    fails_until_repaired(
        lambda right: launch(_neighbour, x, y, out, 50, grid=2, RIGHT=right), strict.OutOfBounds, message, "forward"
    )
    assert torch.equal(out, y)


def test_bounds_of_views_and_of_tensors_without_elements():
    out = torch.zeros(100)
    with strict.checking():
        launch(_one_too_many, torch.arange(200.0)[50:150], out[10:43], 33, grid=2, RIGHT=True)
    assert torch.equal(out[10:43], torch.arange(50.0, 83))
    assert out[:10].count_nonzero() == out[43:].count_nonzero() == 0
    with strict.checking(), pytest.raises(strict.OutOfBounds, match="element 0 of x, which has 0"):
        launch(_one_too_many, torch.zeros(0), out, 1, grid=1, RIGHT=True)


@orders
@pytest.mark.parametrize("kernel", [_overlap, _in_place], ids=["overlap", "in_place"])
def test_programs_that_touch_the_same_element(kernel, order):
    def run(right):
        out = torch.full((100,), nan)
        launch(kernel, X, out, 100, RIGHT=right)
        return out

    # which of the two comes first depends on the order
    message = rf"{kernel.__name__}: program \(\d, 0, 0\) (writes|reads) out\[\d+\], which program \(\d, 0, 0\) "
    result = fails_until_repaired(run, strict.Race, message, order)
    assert torch.equal(result, X if kernel is _overlap else X.roll(-32))


@orders
def test_accumulation_that_is_not_atomic(order):
    def run(right):
        total = torch.zeros(1)
        launch(_accumulate, X, total, 100, RIGHT=right)
        return total

    assert fails_until_repaired(run, strict.Race, r"reads total\[0\], which program .* wrote", order) == 4950


def last_program_sums(sem, scope="gpu"):
    total, parts, ticket = torch.zeros(1), torch.full((4,), nan), torch.zeros(1, dtype=torch.int32)
    launch(_last_program_sums, X, total, parts, ticket, 100, 4, SEM=sem, SCOPE=scope)
    return total


@orders
def test_tickets_release_and_acquire(order):
    for broken in [("relaxed",), ("acquire",), ("release",), ("acq_rel", "cta")]:
        with (
            strict.checking(order),
            pytest.raises(strict.Race, match=r"reads parts\[\d\], which program \(\d, 0, 0\) wrote"),
        ):
            last_program_sums(*broken)
    with strict.checking(order):
        assert last_program_sums("acq_rel") == last_program_sums("acq_rel", "sys") == 4950


def test_what_is_changed_atomically_is_not_written_otherwise():
    def run(right):
        launch(_reset, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 4, RIGHT=right)

    message = r"writes ticket\[0\], which several programs changed atomically"
    fails_until_repaired(run, strict.Race, message, "forward")


def test_lanes_that_write_the_same_element():
    out = torch.full((32,), -1, dtype=torch.int32)
    message = r"_two_lanes: program \(0, 0, 0\) writes out\[0\], which another lane of it writes"
    fails_until_repaired(lambda right: launch(_two_lanes, out, grid=1, RIGHT=right), strict.Race, message, "forward")
    assert torch.equal(out, torch.arange(32, dtype=torch.int32))


def test_lanes_that_read_what_others_wrote():
    out = torch.zeros(32)
    message = r"reads out\[31\], which another lane of it wrote, without a barrier"
    fails_until_repaired(
        lambda right: launch(_no_barrier, X, out, grid=1, RIGHT=right), strict.Race, message, "forward"
    )
    assert torch.equal(out, X[:32].flip(0))


# The poison must reach the result; nothing is raised.
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32, FLOAT64, torch.int32, torch.int64], ids=str)
def test_masked_lanes_hold_no_zero(dtype):
    out = torch.zeros(1, dtype=FLOAT64)
    with strict.checking():
        launch(_no_other, torch.ones(20, dtype=dtype), out, 20, grid=1, RIGHT=False)
        assert out.isnan() if dtype.is_floating_point else out > 1e9
        launch(_no_other, torch.ones(20, dtype=dtype), out, 20, grid=1, RIGHT=True)
    assert out == 20


@pytest.mark.parametrize("op", ["add", "compare", "negate", "sum"])
def test_arithmetic_in_bfloat16(op):
    x, out = X[:32].to(BFLOAT16), torch.zeros(32)
    message = r"_narrow: program \(0, 0, 0\) computes in bfloat16"
    fails_until_repaired(
        lambda right: launch(_narrow, x, out, grid=1, OP=op, RIGHT=right), strict.Bfloat16Arithmetic, message, "forward"
    )
    expected = {"add": 2 * x.float(), "compare": torch.full((32,), 2.0), "negate": -x.float()}
    assert torch.equal(out, expected.get(op, torch.full((32,), 496.0)))


# ---- numbers -----------------------------------------------------------------------------------------------------


# Ties, carries, subnormals, overflow, infinities; every bfloat16 there is.
def test_bfloat16_is_rounded_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (5000,), generator=generator).to(torch.int32).view(FLOAT32)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BFLOAT16)
    exact = every.float()[every.isfinite()]
    given = torch.cat([anything, exact, exact.nextafter(torch.tensor(torch.inf)), exact[:-1].lerp(exact[1:], 0.5)])
    for source, dtype in (
        (given, BFLOAT16),
        (every, FLOAT32),
        (every, FLOAT64),
        (every, FLOAT16),
        (exact.half(), BFLOAT16),
        (exact.double(), BFLOAT16),
    ):
        out = torch.zeros(source.shape, dtype=dtype)
        with strict.checking():
            launch(_convert, source, out, source.numel(), grid=triton.cdiv(source.numel(), 65536), BLOCK=65536)
        expected = source.to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[~out.isnan()], expected[~out.isnan()])


def test_numbers_have_the_dtypes_of_their_parameters():
    out = torch.zeros(3, dtype=FLOAT64)
    with strict.checking():
        launch(_numbers, out, 0.1, 0.1, 3, grid=1)
    assert out.tolist() == [np.float32(0.1).item(), 0.1, 3 * 2.0**40]


def test_extremes_pass_over_nan():
    x, out = X[:32].clone(), torch.zeros(2)
    x[[0, 7, 31]] = nan
    with strict.checking():
        launch(_extremes, x, out, grid=1)
    assert out.tolist() == [30, 1]


# ---- the mode itself -----------------------------------------------------------------------------------------------


def queue(order, seed=0):
    out = torch.zeros(20, dtype=torch.int32)
    with strict.checking(order, seed):
        launch(_queue, torch.zeros(1, dtype=torch.int32), out, grid=20)
    return out.tolist()


def test_orders():
    assert queue("forward") == list(range(20))
    assert queue("reverse") == list(range(19, -1, -1))
    shuffled = [queue("random", seed) for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(shuffled[2]) == list(range(20))
    with pytest.raises(ValueError, match="order must be one of"), strict.checking("sideways"):
        pass


def state():
    owners = (
        interpreter,
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor,
        interpreter.ReduceScanOpInterface,
        tl,
        tl.core,
        tl.math,
        tl.tensor,
    )
    return [dict(vars(owner)) for owner in owners]


def test_everything_is_restored():
    before = state()
    with strict.checking():
        launch(_two_lanes, torch.zeros(32, dtype=torch.int32), grid=1, RIGHT=True)
        assert state() != before
    assert state() == before
    with pytest.raises(strict.Race), strict.checking():
        launch(_two_lanes, torch.zeros(32, dtype=torch.int32), grid=1, RIGHT=False)
    assert state() == before
    launch(_two_lanes, torch.zeros(32, dtype=torch.int32), grid=1, RIGHT=False)  # forgiven


def test_other_errors_stay_what_they_are():
    with strict.checking(), pytest.raises(InterpreterError, match="'str' object"):
        launch(_numbers, torch.zeros(3, dtype=FLOAT64), 0.1, "no number", 3, grid=1)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (interpreter.InterpreterBuilder, "create_masked_load"),
        (interpreter.GridExecutor, "_init_args_hst"),
        (interpreter, "_implicit_cvt"),
    ],
    ids=str,
)
def test_another_interpreter_is_refused(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"cannot be checked: it has no \['{name}'\]"), strict.checking():
        pass


def test_launches_that_evade_the_checks(monkeypatch):
    with strict.checking(), pytest.raises(RuntimeError, match="evades the checks"):
        launch(_idle, torch.zeros(1), grid=1)
    # an interpreter that stores by another function
    plain = interpreter.InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_store",
        lambda self, ptr, value, *rest: plain(
            self, ptr, value, interpreter.TensorHandle(np.ones(ptr.data.shape, bool), tl.int1), *rest
        ),
    )
    with strict.checking(), pytest.raises(RuntimeError, match="evades the checks"):
        launch(_two_lanes, torch.zeros(32, dtype=torch.int32), grid=1, RIGHT=True)


def test_compiled_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="start it with TRITON_INTERPRET=1"), strict.checking():
        pass


# ---- the kernels of armor -----------------------------------------------------------------------------------------


def test_names_are_unique():
    names = [case.name for case in cases_gpu.cases()]
    assert len(set(names)) == len(names)


# Such a row has no strongest wrong class, whose logit the gradient would read.
def test_gradient_of_a_row_of_nan():
    logits, natural = torch.rand(2, 5, 10)
    logits[2] = nan
    target, numbers = torch.zeros(5, dtype=torch.int64), (2, 1.0, 0.0, -100)
    with strict.checking():
        losses, stats = KERNELS.rowloss(logits, target, natural, *numbers)
        grads = KERNELS.rowloss_backward(torch.ones(5), None, logits, target, natural, stats, *numbers, True)
    for t in (losses, *grads):
        assert t[2].isnan().all()
        assert t[[0, 1, 3, 4]].isfinite().all()


# The checks must be able to tell: the last entry of the first output is wrong, or its dtype.
@pytest.mark.parametrize("op", sorted(vars(KERNELS)))
def test_checks_can_fail(op):
    case = next(case for case in cases_gpu.cases(core=True, large=False) if case.op == op)

    def broken(change):
        def call(*arguments):
            result = getattr(KERNELS, op)(*arguments)
            first, *rest = [result] if isinstance(result, torch.Tensor) else result
            return change(first.clone()), *rest

        return SimpleNamespace(**{op: call})

    def wrong_entry(t):
        t.view(-1)[-1] = 7.25
        return t

    case.run(broken(lambda t: t))
    for change in (wrong_entry, torch.Tensor.long):
        with pytest.raises(AssertionError):
            case.run(broken(change))


def test_inputs_that_change_are_noticed():
    case = next(case for case in cases_gpu.cases(core=True) if case.op == "rowloss")
    engine = SimpleNamespace(rowloss=lambda logits, *rest: KERNELS.rowloss(logits.neg_(), *rest))
    with pytest.raises(AssertionError, match="rowloss writes to one of its inputs"):
        case.run(engine)


def test_what_is_not_written_is_noticed():
    with cases_gpu.poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()

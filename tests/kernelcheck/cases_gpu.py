"""What every GPU kernel is asked to compute, whoever runs it: calls of raw operators on CPU tensors, each with a check
against `armor.reference` in float64. An engine is anything with operators of these names: torch.ops.armor, a module of
armor_kernels, or a simulator of the compiled code.

Sizes are those at which kernels change: one element, one less and one more than a warp, several programs, and, marked
`large`, samples that one program reads in several blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from cases import CODES as DIVERGENCES
from cases import FAMILIES, Solution
from poison import poisoned_memory
from torch import Tensor
from transport_cases import RULES, STARTS, Moved, Rule, Start, Step, assert_accurate, laid_out, random_step, truth

from armor import reference
from armor.library import IGNORE_NOTHING, real

inf, nan = math.inf, math.nan
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMS = ["losses", "costs", "clean"]  # what a dual is given: losses, costs as well, clean losses as well
ROW_LOSSES = ["ce", "trades", "mart", "kl"]
MAX_DUAL = 2  # the status of a row whose transport overspends the radius
# One rule for every branch of the transport kernels.
BRANCHES = [RULES[i] for i in (0, 1, 2, 4, 5, 9, 14, 15, 16, 17, 18, 19)]


@dataclass(frozen=True)
class Case:
    """A call of the raw operator `op`, which launches `kernels`; `check` raises AssertionError at a wrong result.

    The `core` cases take each branch of each kernel once, for engines that need a second or more a launch.
    """

    name: str
    op: str
    arguments: tuple[Any, ...]
    check: Callable[[tuple[Tensor, ...]], None]
    core: bool = True
    large: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the Triton kernels."""
        if self.op == "rowloss_dual":
            return ("_rowloss", "_dual")
        return ("_" + self.op.removeprefix("transport_"),)

    def run(self, engine: Any) -> tuple[Tensor, ...]:
        """The engine's result, checked; memory that it does not write is NaN, and its inputs must stay as they are."""
        given = tuple(t.clone() if isinstance(t, Tensor) else t for t in self.arguments)
        with poisoned_memory():
            result = getattr(engine, self.op)(*given)
        for before, after in zip(self.arguments, given, strict=True):
            if isinstance(before, Tensor):
                assert bits(before).equal(bits(after)), f"{self.op} writes to one of its inputs"
        result = (result,) if isinstance(result, Tensor) else tuple(result)
        self.check(result)
        return result


def cases(*, core: bool = False, large: bool = True) -> list[Case]:
    """All cases; only the `core` ones; without the `large` ones."""
    builders = (_dual, _dual_backward, _rowloss, _rowloss_backward, _rowloss_dual, _init, _step, _cost)
    every = [case for builder in builders for case in builder()]
    return [case for case in every if case.core >= core and case.large <= large]


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals NaN, and -0 differs from 0."""
    return t.contiguous().view(-1).view(torch.uint8)


def name_of(*parts: Any) -> str:
    return " ".join(
        "x".join(map(str, part)) if isinstance(part, tuple) else str(part).removeprefix("torch.") for part in parts
    )


def doubled(*tensors: Any) -> tuple[Any, ...]:
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def assert_near(ours: Tensor, exact: Tensor, slack: float) -> None:
    """Within `slack` of the exact entry or of the largest one, and rounded to nearest where stored in 16 bits."""
    narrow = ours.dtype in (FLOAT16, BFLOAT16)
    unit = 0.5 * torch.finfo(ours.dtype).eps if narrow else 0.0
    smallest = 0.5 * torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps if narrow else 0.0
    finite = exact[exact.isfinite()]
    largest = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=unit + slack, atol=slack * largest + smallest, equal_nan=True
    )


# ---- dual ------------------------------------------------------------------------------------------------------------


def _dual() -> Iterator[Case]:
    sizes = [33, 1, 513, 31, 257]
    for i, (family, form, dtype) in enumerate(product(FAMILIES, FORMS, (FLOAT32, FLOAT64))):
        shape, kappa = (2, sizes[i % 5]), (0.0, 0.02, 3.0)[i % 3]
        core = (i // 2 + i // 6) % 2 == i % 2
        yield _dual_case(family, form, dtype, shape, kappa, core=core)
    for i, form in enumerate(FORMS):
        for j, (family, shape) in enumerate([(FAMILIES[2 * i], (2, 1300)), (FAMILIES[0], (1, 17_000))]):
            yield _dual_case(family, form, (FLOAT32, FLOAT64)[(i + j) % 2], shape, 0.0, core=j == 1, large=True)
    for i, (family, form) in enumerate(product(FAMILIES[:6:2], FORMS)):
        dtype = (FLOAT32, FLOAT64)[i % 2]
        given, numbers = _odd_rows(form, dtype), _numbers(family, 0.1, 0.0)
        name = name_of("dual", f"{family[0]}-{family[1]}", form, dtype, "odd rows")
        yield Case(name, "dual", (*given, *numbers), partial(_check_dual, given, numbers), core=i < 3)


def _dual_case(family, form, dtype, shape, kappa, **marks) -> Case:
    generator = torch.Generator().manual_seed(shape[1])
    losses, costs, drop = (torch.randn(shape, generator=generator, dtype=FLOAT64) for _ in range(3))
    costs = 0.1 * costs.abs().clamp(max=1.5)
    costs[-1] += 0.2  # overspends the radius
    given = (losses.to(dtype), costs.to(dtype), (losses - drop.abs()).to(dtype))
    given = tuple(t if i <= FORMS.index(form) else None for i, t in enumerate(given))
    numbers = _numbers(family, 0.1, kappa)
    name = name_of("dual", f"{family[0]}-{family[1]}", form, f"kappa{kappa}", dtype, shape)
    return Case(name, "dual", (*given, *numbers), partial(_check_dual, given, numbers), **marks)


def _odd_rows(form, dtype, n=45) -> tuple[Tensor | None, ...]:
    """Rows that need no search or cannot be searched: equal, tied, not finite, huge; without a way to transport."""
    generator = torch.Generator().manual_seed(n)
    losses, costs, drop = (torch.rand(11, n, generator=generator, dtype=FLOAT64) for _ in range(3))
    clean, costs = losses - drop, 0.1 * costs
    losses[1] = 2.5
    losses[2, ::4] = 3.0
    losses[3, n // 3] = nan
    losses[4, ::7] = inf
    losses[5, 1], losses[5, 2] = -inf, inf
    losses[6, n - 1] = clean[6, n - 1] = -inf
    losses[7] *= 1e30 if form == "losses" else 1e4
    costs[8, 1::2] = inf
    costs[9, n // 2] = nan
    costs[10] = inf
    given = (losses.to(dtype), costs.to(dtype), clean.to(dtype))
    return tuple(t if i <= FORMS.index(form) else None for i, t in enumerate(given))


def _numbers(family, radius, kappa) -> tuple[Any, ...]:
    return DIVERGENCES[family[0]], family[1] or 0.0, radius, kappa, 1e6


def _check_dual(given, numbers, result) -> None:
    ours, losses = Solution(*result), given[0]
    exact, single = Solution(*reference.dual(*doubled(*given), *numbers)), losses.dtype == FLOAT32
    assert [t.dtype for t in ours] == [real(losses)] * 4 + [torch.int32] * 2
    assert ours.status.tolist() == exact.status.tolist()
    assert (ours.passes > 0).all()
    finite = torch.where(losses.isfinite(), losses, 0).double()
    spread = (finite.amax(-1) - finite.amin(-1)).clamp(min=1e-30)
    kinks = given[2] is not None  # there the weights are those of one side
    stopped = exact.status == MAX_DUAL  # mu is a million there, and so is the rounding of the budget
    for i in range(len(spread)):
        slack = 1e-6 if single else (1e-9 if stopped[i] else 1e-12)
        value, lam, nu = (
            {"actual": a[i].double(), "expected": b[i].to(a.dtype).double(), "equal_nan": True}
            for a, b in zip(ours[:3], exact[:3], strict=True)
        )
        torch.testing.assert_close(**value, rtol=slack, atol=slack * spread[i].item())
        # the value is flat at the optimum, and has a kink there with clean losses
        torch.testing.assert_close(**lam, rtol=3e-4 if single and kinks else 1e-5, atol=1e-9 * spread[i].item())
        if not kinks:
            torch.testing.assert_close(**nu, rtol=1e-5, atol=1e-5)
    n = losses.shape[-1]
    if not kinks:
        # docs/math.md, section 2: what is known of a weight that leaves zero with a vertical tangent
        slack = 1e-3 if numbers[0] == DIVERGENCES["alpha"] and numbers[1] > 2 else 1e-5
        weights = n * ours.weights.double()
        torch.testing.assert_close(weights, n * exact.weights, rtol=1e-5, atol=slack, equal_nan=True)
    else:
        known = ~exact.weights.isnan().any(-1)
        sums = ours.weights.double().sum(-1)
        torch.testing.assert_close(sums[known], torch.ones_like(sums[known]), rtol=0, atol=1e-6 if single else 1e-12)
        assert ours.weights[~known].isnan().all()


def _dual_backward() -> Iterator[Case]:
    # 1200 and 21 entries of programs of 512 and 32, and a single one
    for i, (form, dtype, shape) in enumerate(product(FORMS, (FLOAT32, FLOAT64), [(3, 400), (3, 7), (1, 1)])):
        generator = torch.Generator().manual_seed(i)
        weights, losses, costs = (torch.rand(shape, generator=generator, dtype=FLOAT64) for _ in range(3))
        weights[:, 1::5], costs[:, 1::10] = 0, inf
        clean = losses - 0.3
        clean[:, ::3] = losses[:, ::3]
        costs[:, ::6] = 0  # it moves where it might as well stay
        up, mu = torch.tensor([1.7, -2.0, 1.0])[: shape[0]], torch.tensor([0.3, 0.7, 0.0])[: shape[0]]
        given = (up, mu, weights, losses, costs if form != "losses" else None, clean if form == "clean" else None)
        arguments = tuple(None if t is None else t.to(dtype) for t in given)
        check = partial(_check_dual_backward, arguments)
        yield Case(name_of("dual_backward", form, dtype, shape), "dual_backward", arguments, check, core=i % 3 < 2)


def _check_dual_backward(arguments, result) -> None:
    dtype = arguments[3].dtype
    exact = reference.dual_backward(*doubled(*arguments))
    for ours, expected, given in zip(result, exact, arguments[3:], strict=True):
        assert ours.dtype == dtype
        assert ours.shape == ((0,) if given is None else given.shape)
        torch.testing.assert_close(ours.double(), expected, rtol=2e-7 if dtype == FLOAT32 else 1e-15, atol=0)


# ---- rowloss ---------------------------------------------------------------------------------------------------------

# Several rows a program, rows of odd length, rows that fill a program, and, large, rows in several blocks.
LOGITS = [(33, 10), (5, 33), (3, 1000), (4, 2)]
LARGE_LOGITS = [(2, 4097), (1, 9000)]


def _rowloss_arguments() -> Iterator[tuple[tuple[Any, ...], str, dict[str, bool]]]:
    """The arguments of `rowloss` with their name and marks."""
    for kind, dtype, shape in product(ROW_LOSSES, DTYPES, LOGITS):
        core = (DTYPES.index(dtype) + ROW_LOSSES.index(kind) + LOGITS.index(shape)) % 4 == 0
        smoothing = 0.1 if shape[1] != 33 else 0.0
        yield _draw(kind, shape, dtype, smoothing), name_of(kind, dtype, shape), {"core": core}
    for i, (kind, shape) in enumerate(product(ROW_LOSSES, LARGE_LOGITS)):
        dtype = DTYPES[(i + i // 2) % 4]
        yield _draw(kind, shape, dtype, 0.1), name_of(kind, dtype, shape), {"core": shape[0] > 1, "large": True}
    yield _draw("ce", (300, 1), FLOAT32, 0.1), name_of("ce", FLOAT32, (300, 1)), {}
    for i, kind in enumerate(ROW_LOSSES):
        logits, target, natural, *numbers = _draw(kind, (9, 19), DTYPES[i], 0.1)
        target.clamp_(min=2)
        logits[1, 18] = (logits if natural is None else natural)[2, 0] = nan
        target[3], target[4], target[5] = -1, 19, -100
        logits[6, 0] = -inf
        if natural is not None:
            natural[6, 0] = -inf
        logits[5, 4] = nan
        numbers[-1] = -100
        yield (logits, target, natural, *numbers), name_of(kind, DTYPES[i], "odd rows"), {}


def _draw(kind, shape, dtype, smoothing=0.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(shape[-1])
    logits, natural = ((3.0 * torch.randn(shape, generator=generator, dtype=FLOAT64)).to(dtype) for _ in range(2))
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    natural = None if kind == "ce" else natural
    return logits, target, natural, ROW_LOSSES.index(kind), 2.5, smoothing, IGNORE_NOTHING


def _slack(logits: Tensor) -> float:
    return 1e-13 if logits.dtype == FLOAT64 else 2e-6


def _rowloss() -> Iterator[Case]:
    for arguments, name, marks in _rowloss_arguments():
        yield Case(f"rowloss {name}", "rowloss", arguments, partial(_check_rowloss, arguments), **marks)


def _check_rowloss(arguments, result) -> None:
    logits = arguments[0]
    exact = reference.rowloss(*doubled(*arguments))
    assert [t.dtype for t in result] == [real(logits)] * 2
    assert [t.shape for t in result] == [t.shape for t in exact]
    assert_near(result[0], exact[0], _slack(logits))
    # the others of an odd row only serve to give it no gradient
    usual = exact[0].isfinite() & exact[1].isfinite().all(-1)
    assert_near(result[1][usual], exact[1][usual], _slack(logits))


def _rowloss_backward() -> Iterator[Case]:
    for arguments, name, marks in _rowloss_arguments():
        logits, natural = arguments[0], arguments[2]
        up = (torch.arange(len(logits)) % 4 - 1.5).to(real(logits))
        up[3::7] = 0.0
        yield _backward_case(up, None, arguments, natural is not None, name, **marks)
        if natural is not None and logits.shape == (5, 33):
            yield _backward_case(up, None, arguments, False, f"{name} logits alone", core=logits.dtype == FLOAT32)
    # 70 and 3 samples of each of six duals, which take five programs and one
    for i, (kind, n) in enumerate(product(ROW_LOSSES, [70, 3])):
        arguments = _draw(kind, (2, 3, n, 10), DTYPES[(i + i // 2) % 4])
        generator = torch.Generator().manual_seed(i)
        up, weights = torch.randn(2, 3, generator=generator), torch.rand(2, 3, n, generator=generator)
        weights[..., ::5] = 0.0
        dtype = real(arguments[0])
        name = name_of(kind, arguments[0].dtype, tuple(arguments[0].shape), "weighted")
        yield _backward_case(up.to(dtype), weights.to(dtype), arguments, arguments[2] is not None, name)


def _backward_case(up, weights, rows, natural_grad, name, **marks) -> Case:
    logits, target, natural, *numbers = rows
    stats = reference.rowloss(*rows)[1]
    arguments = (up, weights, logits, target, natural, stats, *numbers, natural_grad)
    check = partial(_check_rowloss_backward, arguments)
    return Case(f"rowloss_backward {name}", "rowloss_backward", arguments, check, **marks)


def _check_rowloss_backward(arguments, result) -> None:
    up, weights, logits = arguments[:3]
    exact = reference.rowloss_backward(*doubled(*arguments))
    for ours, expected in zip(result, exact, strict=True):
        assert ours.dtype == logits.dtype
        assert ours.shape == expected.shape
        assert_near(ours, expected, _slack(logits))
        if ours.numel():
            assert (ours[up == 0 if weights is None else weights == 0] == 0).all()


# CUDA solves rows of up to 256 by a warp, of up to 16384 by a block, and longer ones by the grid.
LONG = 16400


def _rowloss_dual() -> Iterator[Case]:
    settings = [("ce", "kl", None, False), ("trades", "alpha", 2.0, True), ("mart", "renyi", 1.25, False)]
    for (kind, *family, with_costs), dtype in product(settings, (FLOAT32, FLOAT64)):
        yield _rowloss_dual_case(kind, family, with_costs, (3, 20, 10), dtype)
    for i, dtype in enumerate(DTYPES):
        kind, *family, with_costs = settings[i % 3]
        yield _rowloss_dual_case(kind, family, with_costs, (1, 30, 10), dtype, core=i < 2)
        yield _rowloss_dual_case(kind, family, with_costs, (2, 300, 10), dtype)
        yield _rowloss_dual_case("ce", family, False, (1, LONG, 2), dtype, large=True)


def _rowloss_dual_case(kind, family, with_costs, shape, dtype, **marks) -> Case:
    logits, target, natural, *numbers = _draw(kind, shape, dtype)
    costs = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(4))
    costs = (0.01 * costs).to(real(logits)) if with_costs else None
    arguments = (logits, target, natural, costs, *numbers[:-1], *_numbers(family, 0.1, 0.01))
    name = name_of("rowloss_dual", kind, family[0], dtype, shape)
    return Case(name, "rowloss_dual", arguments, partial(_check_rowloss_dual, arguments), **marks)


def _check_rowloss_dual(arguments, result) -> None:
    logits, target, natural, costs, *numbers = arguments
    _check_rowloss((logits, target, natural, *numbers[:3], IGNORE_NOTHING), result[1:3])
    solution = (result[0], *result[3:])
    # the kernel's own losses, which differ from the exact ones by rounding
    _check_dual((result[1], costs, None), tuple(numbers[3:]), solution)


# ---- transport -------------------------------------------------------------------------------------------------------

SEEDS = torch.tensor([1, -7, 2**40 + 5])
SHAPES = [(3, 33), (2, 1), (2, 31), (2, 513), (1, 3, 8, 8), (1, 4097)]
SEVERAL_BLOCKS = {FLOAT32: (2, 3, 75, 75), FLOAT64: (1, 8200)}  # more than 64 KiB a sample
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def _init() -> Iterator[Case]:
    for start, dtype, shape in product(STARTS, DTYPES, SHAPES):
        core = DTYPES.index(dtype) == STARTS[start] % 4 and shape in (SHAPES[0], SHAPES[4])
        yield _init_case(start, dtype, shape, core=core)
    for start, layout in product(STARTS, ["contiguous", "channels_last"]):
        yield _init_case(start, FLOAT32, (3, 3, 5, 4), layout, mean=MEAN, std=STD, feed_dtype=FLOAT16, hi=0.8)
    for start, (dtype, shape) in product(STARTS, SEVERAL_BLOCKS.items()):
        yield _init_case(start, dtype, shape, core=dtype == FLOAT32, large=True)


def _init_case(
    start, dtype, shape, layout="", *, mean=None, std=None, feed_dtype=None, lo=-5.0, hi=5.0, **marks
) -> Case:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64).to(dtype)
    x = laid_out(x, layout) if layout else x
    seeds = None if start == "clean" else SEEDS[: shape[0]]
    radii = torch.tensor([0.3, 0.1, 2.0], dtype=real(x))[: shape[0]]
    arguments = (x, seeds, radii, mean, std, STARTS[start], 0.0, lo, hi, feed_dtype)
    name = name_of("transport_init", start, dtype, shape, *filter(None, [layout]))
    return Case(name, "transport_init", arguments, partial(_check_init, arguments), **marks)


def _check_init(arguments, result) -> None:
    ours, exact = Start(*result), Start(*reference.transport_init(*doubled(*arguments[:5]), *arguments[5:]))
    x, start, dtype = arguments[0], arguments[5], arguments[0].dtype
    assert ours.x_adv.dtype == dtype
    assert ours.x_adv.stride() == exact.x_adv.stride()
    assert ours.status.tolist() == exact.status.tolist()
    rounding = 0.5 * torch.finfo(dtype).eps * exact.x_adv.abs() if dtype != FLOAT64 else 0.0
    slack = 0.0 if start == STARTS["clean"] else 2e-6 * (exact.x_adv - x.double()).abs() + 2e-7
    assert ((ours.x_adv.double() - exact.x_adv).abs() <= rounding + slack).all()
    if start == STARTS["linf"]:  # torch in the dtype of the computation is the definition, to the last bit
        radii = arguments[2].view(-1, *(1,) * (x.dim() - 1))
        u = reference.transport.uniform(
            reference.transport.random_words(arguments[1], x[0].numel(), reference.transport.NOISE)
        )
        noise = (2 * u.to(real(x)) - 1).view(x.shape) * radii
        assert torch.equal(ours.x_adv, (x.to(real(x)) + noise).clamp(*arguments[7:9]).to(dtype))
    _check_feed(ours, *arguments[3:5], arguments[-1])


def _check_feed(ours: Start | Moved, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype | None) -> None:
    """The normalisation of what was stored, in its layout and the dtype that the model takes."""
    x = ours.x_adv
    assert ours.feed.dtype == (dtype or x.dtype)
    if mean is None and dtype is None:
        assert ours.feed.shape == (0,)
        return
    assert ours.feed.shape == x.shape
    assert ours.feed.stride() == x.stride()
    fed = x.double()
    if mean is not None:
        shape = (-1, *(1,) * (x.dim() - 2))
        fed = (fed - mean.double().view(shape)) / std.double().view(shape)
    eps = torch.finfo(real(x)).eps
    rounding = max(eps, 0.5 * torch.finfo(ours.feed.dtype).eps + 2 * eps)
    torch.testing.assert_close(ours.feed.double(), fed, rtol=rounding, atol=2 * eps)


def _step() -> Iterator[Case]:
    for i, rule in enumerate(RULES):
        for j, dtype in enumerate(DTYPES):
            step = random_step(rule, SHAPES[(i + j) % 6], dtype, per_sample=True, final=True)
            yield _step_case(step, core=i % 4 == j)
    everything = {"mean": MEAN, "std": STD, "targeted": True, "final": True, "feed_dtype": BFLOAT16, "seeds": SEEDS}
    active = torch.tensor([True, False, True])
    for i, rule in enumerate(BRANCHES):
        shape = (3, 3, 4, 5)
        step = random_step(rule, shape, FLOAT32, grad_dtype=FLOAT16, per_sample=True, active=active, **everything)
        yield _step_case(step, "everything")
        last = {name: laid_out(getattr(step, name), "channels_last") for name in ("x_adv", "grad", "x")}
        yield _step_case(replace(step, **last), "channels_last", core=rule.kind in ("linf", "l1", "binary"))
        bad = random_step(rule, (4, 150), DTYPES[i % 4], active=torch.tensor([True, True, False, True]), final=True)
        bad.grad[0, 140], bad.grad[2, 3], bad.grad[3, 3] = nan, inf, -inf
        yield _step_case(bad, "bad gradients", core=i % 2 == 0)
        still = random_step(rule, (2, 40), FLOAT32, mu=torch.tensor(0.7))
        still.grad[0] = 0
        still.x_adv[0] = still.x[0]
        still.x[1, 39] = 1.01
        yield _step_case(still, "flat, outside", core=False)
        for dtype, shape in SEVERAL_BLOCKS.items():
            step = random_step(rule, shape, dtype, per_sample=True, final=True)
            yield _step_case(step, core=dtype == FLOAT32, large=True)
    step = random_step(Rule("linf"), (3, *SEVERAL_BLOCKS[FLOAT32][1:]), FLOAT32, active=active)
    step.grad[1:, 2, 70, 70] = nan
    yield _step_case(step, "bad gradients", large=True)


def _step_case(step: Step, detail: str = "", **marks) -> Case:
    name = name_of("transport_step", step.rule, step.x.dtype, tuple(step.x.shape), *filter(None, [detail]))
    return Case(name, "transport_step", step.raw(), partial(check_step, step), **marks)


def check_step(step: Step, result: tuple[Tensor, ...]) -> None:
    """x_next, status, costs and feed against the reference, which takes x_next as it was rounded to its dtype."""
    ours, exact = Moved(*result), truth(step)
    assert_accurate(step, ours.x_adv)
    assert ours.x_adv.stride() == exact.x_adv.stride()
    assert ours.status.dtype == torch.int32
    assert ours.status.tolist() == exact.status.tolist()
    assert ours.costs.dtype == real(step.x)
    assert ours.costs.shape == exact.costs.shape
    if ours.costs.numel():
        costs = reference.transport_cost(*doubled(*step.cost(ours.x_adv)))
        _assert_costs(ours.costs, costs)
    _check_feed(ours, step.mean, step.std, step.feed_dtype)


def _assert_costs(ours: Tensor, exact: Tensor) -> None:
    rounding = 1e-6 if ours.dtype == FLOAT32 else 1e-14
    torch.testing.assert_close(ours.double(), exact.double(), rtol=rounding, atol=rounding * 1e-3, equal_nan=True)


def _cost() -> Iterator[Case]:
    for i, (rule, dtype) in enumerate(product(RULES, DTYPES)):
        step = random_step(rule, SHAPES[i % 6], dtype, per_sample=True)
        yield _cost_case(step, step.x_adv, core=i // 4 % 4 == i % 4)
    for i, rule in enumerate(BRANCHES):
        step = random_step(rule, (4, 70), DTYPES[i % 4])
        x_adv = step.x.clone()
        x_adv[0, 69], x_adv[1, 3], x_adv[2, 69] = nan, 1.01, -0.5
        yield _cost_case(step, x_adv, "odd", core=False)
        for dtype, shape in SEVERAL_BLOCKS.items():
            step = random_step(rule, shape, dtype, per_sample=True)
            yield _cost_case(step, step.x_adv, core=dtype == FLOAT32, large=True)


def _cost_case(step: Step, x_adv: Tensor, detail: str = "", **marks) -> Case:
    arguments = step.cost(x_adv)
    name = name_of("transport_cost", step.rule, step.x.dtype, tuple(step.x.shape), *filter(None, [detail]))
    return Case(name, "transport_cost", arguments, partial(_check_cost, arguments), **marks)


def _check_cost(arguments, result) -> None:
    (ours,), x = result, arguments[1]
    assert ours.dtype == real(x)
    # a ball forgives the rounding of the dtype of x, so that the reference is told it
    _assert_costs(ours, reference.transport_cost(*arguments))

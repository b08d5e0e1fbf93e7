"""Markdown tables of the recorded csv: every time with its ratios, what an operator moves, and whether the targets
were reached.

`python -m benchmarks table` prints them, or renews them in the files it is given, between the markers
`<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->` with NAME a kernel, for all of its tables, or summary, for
the short ones of every kernel, so that no number in README.md or docs/ is typed by hand. Called by
benchmarks/__main__.py; reads only the csv.
"""

from functools import partial
from typing import NamedTuple

from benchmarks import markdown

PROVIDERS = ["published", "scipy", "brent", "torchattacks", "backward", "autograd", "eager", "compile"]
PROVIDERS += ["armor", "armor_op", "mean", "passes"]
OURS = {"armor", "armor_op", "mean"}


class Target(NamedTuple):
    """A promise: times faster than a baseline, or at most us or % above it, at a shape and for the given cases or all.
    metric: of the time, or of the peak of the memory."""

    shape: tuple | None
    provider: str
    mode: str
    against: str
    unit: str
    limit: float
    cases: tuple = ()
    metric: str = "time"


class Kernel(NamedTuple):
    """How a kernel is shown: what its cases are and are called, what is in its tensors, and the summary's part."""

    case: str
    titles: dict
    data: str
    targets: list
    mode: str
    cases: tuple = ()


CIFAR = (128, 3 * 32 * 32)
NETS = ("resnet18", "mnist-cnn", "resnet8")
TRAINED = ("trades", "mart", "renyi", "penalised-ot")
SHOWN = {
    "dual": Kernel(
        "divergence",
        {"kl": "KL", "alpha": "alpha", "renyi": "Rényi"},
        "losses",
        [
            Target((1, 128), "armor", "forward+backward", "scipy", "times", 20),
            Target((1, 128), "armor", "forward+backward", "eager", "times", 20),
            Target((1, 128), "armor", "forward+backward", "mean", "us", 100),
            Target((1, 128), "armor_op", "forward", "scipy", "times", 100),
            Target((1, 262144), "armor", "forward+backward", "scipy", "times", 8),
        ],
        mode="forward+backward",
        cases=("kl",),
    ),
    "transport": Kernel(
        "cost",
        {name: name for name in ("linf", "l2", "l1", "norm_power", "soft_ball", "binary")},
        "images",
        [
            Target(CIFAR, "armor", "step", "eager", "times", 3),
            Target(CIFAR, "armor", "step", "compile", "times", 1),
            Target(CIFAR, "armor", "step", "compile", "times", 1.5, ("l2", "l1")),
        ],
        mode="step",
    ),
    "rowloss": Kernel(
        "loss",
        {name: name for name in ("cross_entropy", "trades_loss", "mart_loss", "dc_trades")},
        "logits",
        [
            Target((128, 10), "armor", "forward+backward", "eager", "times", 5, ("dc_trades",)),
            Target((128, 1000), "armor", "forward+backward", "eager", "times", 2, ("dc_trades",)),
        ],
        mode="forward+backward",
    ),
    "attack": Kernel(
        "net",
        {"mnist_cnn": "mnist_cnn", "resnet": "resnet"},
        "images",
        [
            Target(None, "armor", "pgd-10", "torchattacks", "times", 1),
            Target(None, "armor", "pgd-10", "backward", "times", 1.3),
        ],
        mode="pgd-10",
    ),
    "train": Kernel(
        "net",
        {f"{net} {kind}": f"{net} {kind}" for net in NETS for kind in ("fp32", "tf32", "bf16")},
        "images",
        [
            *(Target(None, "armor", mode, "published", "times", 1.7) for mode in ("trades", "mart")),
            *(Target(None, "armor", mode, "published", "times", 1.5) for mode in ("renyi", "penalised-ot")),
            *(Target(None, "armor", mode, "passes", "%", 3) for mode in TRAINED),
            *(Target(None, "armor", mode, "published", "%", 0, metric="peak") for mode in TRAINED),
        ],
        mode="trades",
    ),
}


def full(records):
    """Provenance, targets, the table of times of every thread count and mode, memory, and what an operator moves."""
    kernel, times = SHOWN[records[0]["kernel"]], _medians(records, "time")
    sections = dict.fromkeys((key[0], key[4]) for key in times)
    parts = [_provenance(kernel, records), _targets(kernel, records)]
    parts += [_section(kernel, times, *section) for section in sections]
    return _join([*parts, *_memory(kernel, records), *_traffic(kernel, records)])


def summary(records):
    """Provenance, targets, and the kernel's most telling times on the fewest threads."""
    kernel, times = SHOWN[records[0]["kernel"]], _medians(records, "time")
    telling = {key: time for key, time in times.items() if not kernel.cases or key[1] in kernel.cases}
    section = _section(kernel, telling, min(key[0] for key in times), kernel.mode)
    return _join([_provenance(kernel, records), _targets(kernel, records), section])


def insert(text, recorded):
    """`text` with every marked table renewed; ValueError where it has none or a marker is not closed."""

    def short():
        return "\n".join(summary(recorded[name]) for name in SHOWN if name in recorded)

    def long(name):
        return full(recorded[name]) if name in recorded else ""

    return markdown.renew(text, "benchmarks", {"summary": short} | {name: partial(long, name) for name in SHOWN})


def _medians(records, metric):
    names = ("threads", "case", "rows", "n", "mode", "provider")
    return {tuple(r[name] for name in names): r["p50"] for r in records if r["metric"] == metric}


def _join(parts):
    return "\n\n".join(parts) + "\n"


def _provenance(kernel, records):
    one = records[0]
    versions = f"torch {one['torch']}, armor {one['armor']}"
    return f"Medians on {one['device']}, {versions}, float32 {kernel.data}, {one['time'][:10]}."


def _targets(kernel, records):
    medians = {metric: _medians(records, metric) for metric in ("time", "peak")}
    titles = {case: title for case, title in kernel.titles.items() if any(key[1] == case for key in medians["time"])}
    lines = []
    for target in kernel.targets:
        found = medians[target.metric]
        for threads in sorted({key[0] for key in found}):
            pairs = [
                _pair(found, threads, case, target) if not target.cases or case in target.cases else None
                for case in titles
            ]
            reached = [_reached(target, *pair) for pair in pairs if pair]
            if reached:
                cells = ["" if pair is None else _figure(target, *pair) for pair in pairs]
                verdict = "yes" if all(reached) else "no"
                lines.append(markdown.line([_promise(target), str(threads), *cells, verdict]))
    if not lines:
        return "No targets."
    return "\n".join([*markdown.head(["target", "threads", *titles.values(), "reached"]), *lines])


def _pair(medians, threads, case, target):
    """What is measured of armor and of what it is held against, or None."""
    found = {
        key[5]: median
        for key, median in medians.items()
        if (key[0], key[1], key[4]) == (threads, case, target.mode) and target.shape in (None, key[2:4])
    }
    return (found[target.provider], found[target.against]) if {target.provider, target.against} <= set(found) else None


def _reached(target, ours, theirs):
    if target.unit == "times":
        return theirs >= target.limit * ours
    if target.unit == "%":
        return ours <= (1 + target.limit / 100) * theirs
    return ours - theirs <= target.limit


def _figure(target, ours, theirs):
    if target.unit == "times":
        return f"{theirs / ours:.3g}x"
    return f"{100 * (ours / theirs - 1):+.1f} %" if target.unit == "%" else markdown.duration(ours - theirs)


def _promise(target):
    if target.unit != "times":
        promise = f"at most {target.limit} {target.unit} above"
    else:
        promise = "at least as fast as" if target.limit == 1 else f"at least {target.limit} times faster than"
    where = [target.provider, target.mode]
    if target.shape:
        where.append(f"n = {target.shape[1]}" if target.shape[0] == 1 else "{} x {}".format(*target.shape))
    what = "memory at most that of" if target.metric == "peak" and target.limit == 0 else promise
    return f"{', '.join(where)}: {what} {target.against}"


def _section(kernel, times, threads, mode):
    times = {key: time for key, time in times.items() if (key[0], key[4]) == (threads, mode)}
    shown = _shown(key[5] for key in times)
    others = [p for p in shown if p not in OURS]
    lines = [f"{mode}, {threads} thread{'s' if threads > 1 else ''}:", ""]
    lines += markdown.head([kernel.case, "rows x n", *shown, *(f"{p} / armor" for p in others)])
    for problem in dict.fromkeys(key[:5] for key in times):
        found = {p: times.get((*problem, p)) for p in shown}
        cells = [problem[1], f"{problem[2]} x {problem[3]}", *map(markdown.duration, found.values())]
        for p in others:
            both = found[p] is not None and found.get("armor") is not None
            cells.append(f"{found[p] / found['armor']:.3g}x" if both else "")
        lines.append(markdown.line(cells))
    return "\n".join(lines)


def _memory(kernel, records):
    """The table of the peaks of memory, which do not depend on the threads; none for a kernel without them."""
    peaks = {key[1:]: peak for key, peak in _medians(records, "peak").items()}
    shown = _shown(key[4] for key in peaks)
    others = [p for p in shown if p not in OURS]
    lines = ["The most memory that a step needs, weights and the state of the optimizer included:", ""]
    lines += markdown.head([kernel.case, "rows x n", "mode", *shown, *(f"{p} / armor" for p in others)])
    for problem in dict.fromkeys(key[:4] for key in peaks):
        found = {p: peaks[(*problem, p)] for p in shown if (*problem, p) in peaks}
        cells = [problem[0], f"{problem[1]} x {problem[2]}", problem[3]]
        cells += [markdown.size(found[p]) if p in found else "" for p in shown]
        cells += [f"{found[p] / found['armor']:.3g}x" if {p, "armor"} <= set(found) else "" for p in others]
        lines.append(markdown.line(cells))
    return ["\n".join(lines)] if peaks else []


def _traffic(kernel, records):
    """The table of operators, syncs and bytes, which do not depend on the threads; none for a kernel without them."""
    counts = {}
    for r in records:
        if r["metric"] in ("operators", "syncs", "bytes"):
            problem = (r["case"], r["rows"], r["n"], r["mode"])
            counts.setdefault(problem, {}).setdefault(r["provider"], {})[r["metric"]] = r["p50"]
    if not counts:
        return []
    shown = _shown(provider for found in counts.values() for provider in found)
    others = [p for p in shown if p not in OURS]
    lines = ["Operators that compute, times that the host waits for a GPU, and bytes that the operators touch:", ""]
    lines += markdown.head([kernel.case, "rows x n", "mode", *shown, *(f"bytes, {p} / armor" for p in others)])
    for (case, rows, n, mode), found in counts.items():
        cells = [case, f"{rows} x {n}", mode]
        for p in shown:
            one = found.get(p)
            cells.append(f"{one['operators']:g}, {one['syncs']:g}, {markdown.size(one['bytes'])}" if one else "")
        for p in others:
            both = p in found and "armor" in found
            cells.append(f"{found[p]['bytes'] / found['armor']['bytes']:.3g}x" if both else "")
        lines.append(markdown.line(cells))
    return ["\n".join(lines)]


def _shown(providers):
    found = set(providers)
    return [p for p in PROVIDERS if p in found]

"""Markdown tables of a recorded csv: every time with its ratios, and whether the targets were reached.

`python -m benchmarks table` prints them, or renews them in the files it is given, between the markers
`<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->` with NAME summary or full, so that no number in
README.md or docs/ is typed by hand. Called by benchmarks/__main__.py; reads only the csv.
"""

PROVIDERS = ["scipy", "brent", "eager", "compile", "armor", "armor_op", "mean"]
OURS = {"armor", "armor_op", "mean"}

# Row length, what is timed, in which mode, against what, and the promise: times faster, or at most us above.
TARGETS = [
    (128, "armor", "forward+backward", "scipy", "times", 20),
    (128, "armor", "forward+backward", "eager", "times", 20),
    (128, "armor", "forward+backward", "mean", "us", 100),
    (128, "armor_op", "forward", "scipy", "times", 100),
    (262144, "armor", "forward+backward", "scipy", "times", 8),
]


def full(records):
    """Provenance, targets, and the table of times of every thread count and mode."""
    times = _times(records)
    sections = dict.fromkeys((key[0], key[4]) for key in times)
    return _join([_provenance(records), _targets(times), *(_section(times, *section) for section in sections)])


def summary(records):
    """Provenance, targets, and forward+backward of the KL divergence on the fewest threads."""
    times = {key: time for key, time in _times(records).items() if key[1] == "kl"}
    threads = min(key[0] for key in times)
    targets = _targets(_times(records))
    return _join([_provenance(records), targets, _section(times, threads, "forward+backward")])


def insert(text, records):
    """`text` with every marked table renewed; ValueError where it has none or a marker is not closed."""
    found = 0
    for name, render in {"summary": summary, "full": full}.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        if begin not in text:
            continue
        head, _, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not closed:
            raise ValueError(f"{begin} is not closed by {end}")
        text = f"{head}{begin}\n{render(records)}{end}{tail}"
        found += 1
    if not found:
        raise ValueError("no marker <!-- benchmarks:summary --> or <!-- benchmarks:full --> in the text")
    return text


def _times(records):
    names = ("threads", "divergence", "rows", "n", "mode", "provider")
    return {tuple(r[name] for name in names): r["p50"] for r in records if r["metric"] == "time"}


def _join(parts):
    return "\n\n".join(parts) + "\n"


def _provenance(records):
    one = records[0]
    versions = f"torch {one['torch']}, armor {one['armor']}"
    return f"Medians on {one['device']}, {versions}, float32 losses, {one['time'][:10]}."


def _targets(times):
    lines = ["| target | threads | KL | alpha | Rényi | reached |", "|---|---|---|---|---|---|"]
    for n, provider, mode, against, unit, limit in TARGETS:
        promise = f"at least {limit} times faster than" if unit == "times" else f"at most {limit} us above"
        for threads in sorted({key[0] for key in times}):
            cells, reached = [], []
            for divergence in ("kl", "alpha", "renyi"):
                problem = (threads, divergence, 1, n, mode)
                ours, theirs = times.get((*problem, provider)), times.get((*problem, against))
                if ours is None or theirs is None:
                    cells.append("")
                elif unit == "times":
                    cells.append(f"{theirs / ours:.3g}x")
                    reached.append(theirs >= limit * ours)
                else:
                    cells.append(_duration(ours - theirs))
                    reached.append(ours - theirs <= limit)
            if reached:
                name = f"{provider}, {mode}, n = {n}: {promise} {against}"
                lines.append(_line([name, str(threads), *cells, "yes" if all(reached) else "no"]))
    return "\n".join(lines)


def _section(times, threads, mode):
    times = {key: time for key, time in times.items() if (key[0], key[4]) == (threads, mode)}
    shown = [p for p in PROVIDERS if any(key[5] == p for key in times)]
    others = [p for p in shown if p not in OURS]
    header = ["divergence", "rows x n", *shown, *(f"{p} / armor" for p in others)]
    lines = [
        f"{mode}, {threads} thread{'s' if threads > 1 else ''}:",
        "",
        _line(header),
        "|---" * len(header) + "|",
    ]
    for problem in dict.fromkeys(key[:5] for key in times):
        found = {p: times.get((*problem, p)) for p in shown}
        cells = [problem[1], f"{problem[2]} x {problem[3]}", *map(_duration, found.values())]
        for p in others:
            both = found[p] is not None and found.get("armor") is not None
            cells.append(f"{found[p] / found['armor']:.3g}x" if both else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _duration(microseconds):
    if microseconds is None:
        return ""
    for unit, size in (("us", 1), ("ms", 1e3)):
        if abs(microseconds) < 999.5 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds / 1e6:.3g} s"

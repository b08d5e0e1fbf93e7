"""One page about a GPU run, made of what its steps left in the folder. Called by benchmarks/gpu.py after every step."""

import re
from collections import Counter
from xml.etree import ElementTree

from benchmarks import markdown, records
from benchmarks.tables import OURS, PROVIDERS

SEND = """To send it, please pack this folder (`tar czf gpu-report.tgz gpu-report`) and open an issue in the repository
of armor with the archive attached and this page as its text. In it are this page, logs, csv and plots."""
# What stands for the rest of a kernel's table: (case, rows and n, mode), None for any.
TELLING = {
    "train": [(None, None, None)],
    "dual": [(None, (1, 128), "forward+backward"), ("kl", (1, 262144), "forward+backward")],
    "rowloss": [("dc_trades", None, "forward+backward"), ("cross_entropy", (128, 1000), "forward+backward")],
    "transport": [(None, (128, 3072), "step"), ("linf", None, "step and feed")],
    "attack": [(None, None, None)],
}
SHOWN = 12  # failures, and reasons of skipped tests


def page(out, outcomes):
    parts = ["# armor on a GPU", _environment(out), SEND, "## Steps", _steps(outcomes), *_tests(out), *_speed(out)]
    return "\n\n".join(parts) + "\n"


def _environment(out):
    log = out / "environment.txt"
    blocks = log.read_text().split("\n\n")[:2] if log.exists() else ["not known"]  # versions and backends
    return "\n".join(["```", *(block.strip() for block in blocks), "```"])


def _steps(outcomes):
    lines = markdown.head(["step", "result", "seconds", "what it said"])
    lines += [markdown.line([o.name, o.state, f"{o.seconds:.0f}", o.note.replace("|", "/")]) for o in outcomes]
    return "\n".join(lines)


def _tests(out):
    """How many tests passed by step and backend, how failures began, and why tests were skipped."""
    counts, failures, reasons = {}, [], Counter()
    for file in sorted(out.glob("*.xml")):
        for case in _cases(file):
            found = [case.find(kind) for kind in ("failure", "error", "skipped")]
            state = "passed" if found == [None] * 3 else "skipped" if found[2] is not None else "failed"
            backend = re.search(r"\[.*\b(compiled|triton)\b", case.get("name", ""))
            key = f"{file.stem}{f', {backend[1]}' if backend else ''}"
            counts.setdefault(key, Counter())[state] += 1
            if state == "skipped":
                reasons[found[2].get("message", "")] += 1
            elif state == "failed":
                said = next(x for x in found if x is not None).get("message", "").strip()
                failures.append(f"- `{file.stem}`: `{case.get('name')}`: {(said.splitlines() or [''])[0][:160]}")
    if not counts:
        return []
    lines = markdown.head(["tests", "passed", "failed", "skipped"])
    lines += [
        markdown.line([key, *(str(c[state]) for state in ("passed", "failed", "skipped"))]) for key, c in counts.items()
    ]
    parts = ["## Tests", "\n".join(lines)]
    if failures:
        parts.append("\n".join(["Failed:", "", *failures[:SHOWN], *_more(failures)]))
    if reasons:
        listed = [f"- {count}: {reason}" for reason, count in reasons.most_common()]
        parts.append("\n".join(["Skipped:", "", *listed[:SHOWN], *_more(listed)]))
    return parts


def _cases(file):
    try:
        return list(ElementTree.parse(file).iter("testcase"))
    except ElementTree.ParseError:  # of a step that was killed
        return []


def _more(entries):
    return [f"- and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []


def _speed(out):
    """Of the telling problems, armor's time with its spread, and how many times longer the others take."""
    lines = markdown.head(["kernel", "case", "rows x n", "mode", "armor", "20th to 80th percentile", "times armor's"])
    for file in sorted([*out.glob("*.csv"), *out.glob("*/*.csv")]):
        times = {}
        for r in records.read(file):
            if r["metric"] == "time" and _is_telling(r):
                times.setdefault((r["kernel"], r["case"], r["rows"], r["n"], r["mode"]), {})[r["provider"]] = r
        for (kernel, case, rows, n, mode), found in times.items():
            if "armor" in found:
                ours = found["armor"]
                spread = f"{markdown.duration(ours['p20'])} to {markdown.duration(ours['p80'])}"
                ratios = [f"{p} {found[p]['p50'] / ours['p50']:.3g}" for p in PROVIDERS if p in found and p not in OURS]
                cells = [kernel, case, f"{rows} x {n}", mode, markdown.duration(ours["p50"]), spread, ", ".join(ratios)]
                lines.append(markdown.line(cells))
    return ["## Speed", "\n".join(lines)] if len(lines) > 2 else []


def _is_telling(record):
    at = (record["case"], (record["rows"], record["n"]), record["mode"])
    return any(
        all(want in (None, have) for want, have in zip(wanted, at, strict=True)) for wanted in TELLING[record["kernel"]]
    )

"""Draws a recorded csv as SVG: for the dual, time against row length; for the others, multiples of armor's time.

It reads nothing but the csv, so the picture can be redrawn without a run. Called by benchmarks/__main__.py.
"""

import matplotlib

matplotlib.use("svg")
# The same csv gives the same bytes, so that a diff of the SVG means a change of the numbers.
matplotlib.rcParams.update({"svg.hashsalt": "armor", "svg.fonttype": "none"})

from matplotlib import pyplot  # noqa: E402

from benchmarks.tables import SHOWN  # noqa: E402

STYLES = {
    "published": ("#d55e00", "published scripts"),
    "scipy": ("#d55e00", "SciPy on the host"),
    "brent": ("#cc79a7", "SciPy, tuned"),
    "torchattacks": ("#d55e00", "torchattacks"),
    "backward": ("#cc79a7", "loss.backward()"),
    "autograd": ("#e69f00", "autograd.grad()"),
    "eager": ("#e69f00", "torch"),
    "compile": ("#56b4e9", "the same, torch.compile"),
    "armor": ("#0072b2", "armor.ops"),
    "armor_op": ("#009e73", "bare op, forward only"),
    "mean": ("#999999", "losses.mean()"),
    "passes": ("#999999", "passes of the net alone"),
}


def draw(records, path):
    """Writes the figure of `records` (records.read) to `path`: medians, and the 20th to 80th percentile."""
    kernel = records[0]["kernel"]
    times = [record for record in records if record["metric"] == "time"]
    threads = sorted({record["threads"] for record in times})
    if kernel == "dual":
        figure, legend = _lines([record for record in times if record["rows"] == 1], threads)
    else:
        modes = {record["mode"] for record in times}
        mode = SHOWN[kernel].mode if SHOWN[kernel].mode in modes else times[0]["mode"]
        figure, legend = _bars([record for record in times if record["mode"] == mode], threads)
    figure.legend(*legend, loc="lower center", ncols=max(1, len(legend[0])), frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0.05 if kernel == "dual" else 0.08, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _lines(times, threads):
    """A panel for each divergence and thread count; returns the figure and its legend's handles and labels."""
    titles = SHOWN["dual"].titles
    size = {"figsize": (12, 0.8 + 3.4 * len(threads))}
    figure, axes = pyplot.subplots(len(threads), 3, sharex=True, sharey=True, squeeze=False, **size)
    for row, count in enumerate(threads):
        for panel, divergence in zip(axes[row], titles, strict=True):
            _line_panel(panel, [r for r in times if r["threads"] == count and r["case"] == divergence])
            panel.set_title(f"{titles[divergence]}, {count} thread{'s' if count > 1 else ''}")
        axes[row][0].set_ylabel("forward + backward, microseconds")
    for panel in axes[-1]:
        panel.set_xlabel("samples in the row")
    return figure, axes[0][0].get_legend_handles_labels()


def _line_panel(panel, records):
    for provider, (color, label) in STYLES.items():
        mode = "forward" if provider == "armor_op" else "forward+backward"
        chosen = [r for r in records if r["provider"] == provider and r["mode"] == mode]
        if chosen:
            line = sorted((r["n"], r["p50"], r["p20"], r["p80"]) for r in chosen)
            n, median, low, high = zip(*line, strict=True)
            panel.loglog(n, median, color=color, label=label, marker="o", markersize=3, linewidth=1.5)
            panel.fill_between(n, low, high, color=color, alpha=0.2, linewidth=0)
    panel.grid(alpha=0.3)


def _bars(times, threads):
    """A panel for each thread count, in it a group for each problem: its providers' times as multiples of armor's."""
    ours = {_problem(r): r["p50"] for r in times if r["provider"] == "armor"}
    problems = list(dict.fromkeys(key[1:] for key in ours))
    providers = [p for p in STYLES if p != "armor" and any(r["provider"] == p for r in times)]
    size = {"figsize": (12, 0.8 + 3.4 * len(threads))}
    figure, axes = pyplot.subplots(len(threads), 1, sharex=True, sharey=True, squeeze=False, **size)
    for panel, count in zip(axes[:, 0], threads, strict=True):
        for place, provider in enumerate(providers):
            chosen = [r for r in times if (r["threads"], r["provider"]) == (count, provider) and _problem(r) in ours]
            at = [problems.index(_problem(r)[1:]) + 0.8 * (place + 0.5) / len(providers) for r in chosen]
            low, median, high = ([r[name] / ours[_problem(r)] for r in chosen] for name in ("p20", "p50", "p80"))
            spread = [
                [m - x for m, x in zip(median, low, strict=True)],
                [x - m for m, x in zip(median, high, strict=True)],
            ]
            color, label = STYLES[provider]
            style = {"color": color, "label": label, "ecolor": "#555555"}
            # From 1 up or down: on a logarithmic axis a bar has no other natural foot.
            bars = panel.bar(at, [m - 1 for m in median], 0.8 / len(providers), bottom=1, yerr=spread, **style)
            panel.bar_label(bars, [f"{m:.3g}x" for m in median], padding=2, fontsize="x-small")
        panel.axhline(1, color=STYLES["armor"][0], label="armor")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}x")
        panel.yaxis.set_minor_formatter("")
        panel.margins(y=0.15)
        panel.set_title(f"{times[0]['mode']}, {count} thread{'s' if count > 1 else ''}")
        panel.set_ylabel("time / time of armor")
        panel.grid(axis="y", alpha=0.3)
    names = ["{}\n{} x {}".format(*problem) for problem in problems]
    axes[-1][0].set_xticks([place + 0.4 for place in range(len(problems))], names, fontsize="small")
    return figure, axes[0][0].get_legend_handles_labels()


def _problem(record):
    return tuple(record[name] for name in ("threads", "case", "rows", "n"))

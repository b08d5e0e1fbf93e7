"""Draws a recorded csv as SVG: time against row length, a panel for each divergence and thread count.

It reads nothing but the csv, so the picture can be redrawn without a run. Called by benchmarks/__main__.py.
"""

import matplotlib

matplotlib.use("svg")
# The same csv gives the same bytes, so that a diff of the SVG means a change of the numbers.
matplotlib.rcParams.update({"svg.hashsalt": "armor", "svg.fonttype": "none"})

from matplotlib import pyplot  # noqa: E402

STYLES = {
    "scipy": ("#d55e00", "SciPy on the host"),
    "brent": ("#cc79a7", "SciPy, tuned"),
    "eager": ("#e69f00", "torch, 12 Newton steps"),
    "compile": ("#56b4e9", "the same, torch.compile"),
    "armor": ("#0072b2", "armor.ops.dc_loss"),
    "armor_op": ("#009e73", "bare op, forward only"),
    "mean": ("#999999", "losses.mean()"),
}
TITLES = {"kl": "KL", "alpha": "alpha", "renyi": "Rényi"}


def draw(records, path):
    """Writes the figure of `records` (records.read) to `path`: medians, and the 20th to 80th percentile."""
    times = [record for record in records if record["metric"] == "time" and record["rows"] == 1]
    threads = sorted({record["threads"] for record in times})
    size = {"figsize": (12, 0.8 + 3.4 * len(threads))}
    figure, axes = pyplot.subplots(len(threads), 3, sharex=True, sharey=True, squeeze=False, **size)
    for row, count in enumerate(threads):
        for panel, divergence in zip(axes[row], TITLES, strict=True):
            _panel(panel, [r for r in times if r["threads"] == count and r["divergence"] == divergence])
            panel.set_title(f"{TITLES[divergence]}, {count} thread{'s' if count > 1 else ''}")
        axes[row][0].set_ylabel("forward + backward, microseconds")
    for panel in axes[-1]:
        panel.set_xlabel("samples in the row")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel, records):
    for provider, (color, label) in STYLES.items():
        mode = "forward" if provider == "armor_op" else "forward+backward"
        chosen = [r for r in records if r["provider"] == provider and r["mode"] == mode]
        if chosen:
            line = sorted((r["n"], r["p50"], r["p20"], r["p80"]) for r in chosen)
            n, median, low, high = zip(*line, strict=True)
            panel.loglog(n, median, color=color, label=label, marker="o", markersize=3, linewidth=1.5)
            panel.fill_between(n, low, high, color=color, alpha=0.2, linewidth=0)
    panel.grid(alpha=0.3)

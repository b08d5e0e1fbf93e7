"""What a person looks at after a run: the table, one plain sentence per finding, and the plots.

Reads the runs' entries and checkpoints that loop.py wrote; called by run.py. Every number and every word
about where re-weighting helps comes from the runs.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from armor.training import checkpoint
from armor.training.config import ResolvedConfig
from armor.training.evaluate import METRICS
from armor.training.loop import METHODS, Job, checkpoint_path

COLOURS = {"mean": "#5b6b7f", "dc": "#d1601f"}
DIVERGENCES = {"kl": "KL", "alpha": "alpha-divergence", "renyi": "Rényi"}
LABELS = {"mean": "uniform weights (mean)", "dc": "re-weighted (dc_loss)"}


def summarize(runs: Sequence[dict]) -> list[dict]:
    """One entry per setting and metric: both means, the paired difference dc - mean and its standard error.

    Accuracies are shares; standard_error and interval (95 %, Student t) are None with a single seed.
    """
    summary = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        final = {method: _by_seed(runs, setting, method) for method in METHODS}
        seeds = sorted(final["dc"])
        for metric in METRICS:
            pairs = [(final["mean"][seed][metric], final["dc"][seed][metric]) for seed in seeds]
            differences = [dc - mean for mean, dc in pairs]
            error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
            summary.append(
                {
                    "setting": setting,
                    "metric": metric,
                    "mean": statistics.fmean(mean for mean, _ in pairs),
                    "dc": statistics.fmean(dc for _, dc in pairs),
                    "difference": statistics.fmean(differences),
                    "standard_error": error,
                    "interval": None if error is None else error * float(stdtrit(len(seeds) - 1, 0.975)),
                    "won": sum(difference > 0 for difference in differences),
                    "tied": sum(difference == 0 for difference in differences),
                    "seeds": len(seeds),
                }
            )
    return summary


def table(summary: Sequence[dict], config: ResolvedConfig) -> str:
    """Markdown table in percent, and below it what it says in words."""
    header = ["setting", "accuracy, %", "mean", "dc_loss", "difference", "seeds won"]
    rows = []
    for setting in dict.fromkeys(entry["setting"] for entry in summary):
        for entry in (entry for entry in summary if entry["setting"] == setting):
            rows.append(
                [
                    setting if entry["metric"] == METRICS[0] else "",
                    metric_name(entry["metric"], config),
                    f"{100 * entry['mean']:.1f}",
                    f"{100 * entry['dc']:.1f}",
                    _difference(entry),
                    f"{entry['won']} of {entry['seeds']}" + (f", {entry['tied']} tied" if entry["tied"] else ""),
                ]
            )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    align = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    rule = "|".join(
        ("-" * (width + 1) + ":") if pad is str.rjust else "-" * (width + 2)
        for width, pad in zip(widths, align, strict=True)
    )
    lines = [
        "| " + " | ".join(pad(cell, width) for cell, width, pad in zip(row, widths, align, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, f"|{rule}|")
    notes = [
        f"Linf radius {config.attack.eps}, {config.evaluate_on} part. "
        f"Robust: survives PGD-{config.eval_steps} and margin PGD-{config.eval_steps}. "
        "Worst class: robust accuracy of each model's worst class.",
        "Difference: dc_loss - mean, paired by seed (same data, initial weights, batches and attack noise), "
        "+- standard error.",
    ]
    return "\n".join([*lines, "", *notes, "", *findings(summary), ""])


def findings(summary: Sequence[dict]) -> list[str]:
    """Where re-weighting helps, hurts or does neither clearly, by the robust difference and its interval."""
    groups: dict[str, list[str]] = {
        "helps": [],
        "hurts": [],
        "makes no clear difference": [],
        "cannot be judged": [],
    }
    for entry in (entry for entry in summary if entry["metric"] == "robust"):
        if entry["interval"] is None:
            groups["cannot be judged"].append(
                f"{entry['setting']} (one seed has no spread; {_difference(entry)} points)"
            )
            continue
        clear = abs(entry["difference"]) > entry["interval"]
        verdict = ("helps" if entry["difference"] > 0 else "hurts") if clear else "makes no clear difference"
        won = f"better on {entry['won']} of {entry['seeds']} seeds"
        groups[verdict].append(f"{entry['setting']} ({_difference(entry)} points, {won})")
    return [
        f"In robust accuracy re-weighting {verdict}: {'; '.join(found)}." for verdict, found in groups.items() if found
    ]


def metric_name(metric: str, config: ResolvedConfig) -> str:
    names = {
        "clean": "clean",
        "fgsm": "FGSM",
        "pgd": f"PGD-{config.eval_steps}",
        "margin": f"margin PGD-{config.eval_steps}",
        "robust": "robust",
        "worst_class": "worst class",
    }
    return names[metric]


def plot(folder: pathlib.Path, runs: Sequence[dict], config: ResolvedConfig) -> None:
    """curves and dual as PNG and SVG, and samples-SETTING.png, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("curves", _curves(runs, config)), ("dual", _dual(runs, config))):
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=130)
    for setting in config.settings:
        content = checkpoint.load(checkpoint_path(config, Job(setting, config.first_seed, "dc")))
        _samples(content["samples"], setting, config).savefig(folder / f"samples-{setting}.png", dpi=130)


def _curves(runs: Sequence[dict], config: ResolvedConfig) -> Figure:
    """Validation accuracy over the epochs: mean over the seeds, band of one standard error."""
    rows = (("clean", "clean accuracy, %"), ("pgd", f"PGD-{config.attack.steps} accuracy, %"))
    figure, axes = _grid(rows, config)
    for row, (name, label) in enumerate(rows):
        for column, setting in enumerate(config.settings):
            for method in METHODS:
                _line(
                    axes[row, column],
                    _history(runs, setting, method, name) * 100,
                    COLOURS[method],
                    LABELS[method],
                )
        axes[row, 0].set_ylabel(label)
    figure.suptitle(f"{config.data}: accuracy on the validation part, {_seeds(config)}", fontsize=11)
    _legend(figure, axes)
    return figure


def _dual(runs: Sequence[dict], config: ResolvedConfig) -> Figure:
    """Temperature lambda + kappa and effective sample size of dc_loss over the epochs."""
    rows = (("lam", "λ + κ"), ("effective_share", "effective sample size, %"))
    figure, axes = _grid(rows, config)
    for column, setting in enumerate(config.settings):
        _line(
            axes[0, column],
            _history(runs, setting, "dc", "lam") + config.dual.kappa,
            COLOURS["dc"],
            LABELS["dc"],
        )
        axes[0, column].axhline(
            config.dual.kappa, color="black", linewidth=0.8, linestyle=":", label=f"κ = {config.dual.kappa:g}"
        )
        for method in METHODS:
            _line(
                axes[1, column],
                _history(runs, setting, method, "effective_share") * 100,
                COLOURS[method],
                LABELS[method],
            )
        axes[1, column].set_ylim(0, 105)
    for row, (_, label) in enumerate(rows):
        axes[row, 0].set_ylabel(label)
    figure.suptitle(
        f"{config.data}: the dual of each batch, epoch means, {_seeds(config)} "
        f"({DIVERGENCES[config.dual.divergence]} radius {config.dual.radius:g})",
        fontsize=11,
    )
    _legend(figure, axes)
    return figure


def _samples(samples: dict, setting: str, config: ResolvedConfig) -> Figure:
    """Two rows of attacked training images: the most and the least weighted of the final model."""
    count = len(samples["weight"]) // 2
    figure = Figure(figsize=(1.05 * count + 0.6, 3.8), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for index, axis in enumerate(axes.flat):
        label, true_label, predicted = (int(samples[name][index]) for name in ("label", "true_label", "predicted"))
        axis.imshow(samples["x_adv"][index, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        noisy = f" (true {true_label})" if label != true_label else ""
        weight = float(samples["weight"][index])
        axis.set_title(f"×{weight:.1f}" if weight >= 1 else f"×{weight:.2f}", fontsize=10, color=COLOURS["dc"])
        axis.set_xlabel(
            f"label {label}{noisy}\npredicted {predicted}",
            fontsize=7.5,
            color="#b00020" if predicted != label else "black",
        )
    for row, name in enumerate(("most weighted", "least weighted")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(
        f"{config.data}, {setting}, seed {config.first_seed}: attacked training samples and how many times "
        "the uniform weight they get",
        fontsize=10,
    )
    return figure


def _grid(rows: Sequence, config: ResolvedConfig) -> tuple[Figure, np.ndarray]:
    columns = len(config.settings)
    figure = Figure(figsize=(max(3.4 * columns, 6.0) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(len(rows), columns, sharex=True, sharey="row", squeeze=False)
    for column, setting in enumerate(config.settings):
        axes[0, column].set_title(setting, fontsize=10)
        axes[-1, column].set_xlabel("epoch")
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axis: Axes, values: np.ndarray, colour: str, label: str) -> None:
    """values [seeds, epochs]"""
    epochs = np.arange(1, values.shape[1] + 1)
    middle = values.mean(0)
    axis.plot(epochs, middle, color=colour, linewidth=1.8, label=label, marker="o" if len(epochs) == 1 else None)
    if len(values) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(values))
        axis.fill_between(epochs, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def _legend(figure: Figure, axes: np.ndarray) -> None:
    # From the last row up, because the first row of the dual's plot lacks the control.
    found = {
        label: line for axis in axes.flat[::-1] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False, fontsize=9)


def _seeds(config: ResolvedConfig) -> str:
    return "one seed" if config.seeds == 1 else f"mean of {config.seeds} seeds with standard error"


def _difference(entry: dict) -> str:
    error = "" if entry["standard_error"] is None else f" +- {100 * entry['standard_error']:.1f}"
    return f"{100 * entry['difference']:+.1f}{error}"


def _by_seed(runs: Sequence[dict], setting: str, method: str) -> dict[int, dict]:
    return {run["seed"]: run["final"] for run in runs if (run["setting"], run["method"]) == (setting, method)}


def _history(runs: Sequence[dict], setting: str, method: str, name: str) -> np.ndarray:
    return np.array([run["history"][name] for run in runs if (run["setting"], run["method"]) == (setting, method)])

"""What a person looks at after a run: the table, one plain sentence per finding, and the plots; and runs side by side.

Reads the runs' entries and checkpoints that loop.py wrote; called by run.py and by `armor report`. Every number and
every word about where re-weighting helps comes from the runs.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit
from torch import Tensor

from armor.training import checkpoint
from armor.training.config import ConfigError, DualConfig, ResolvedConfig
from armor.training.evaluate import METRICS
from armor.training.loop import Job, checkpoint_path

COLOURS = {"mean": "#5b6b7f", "dc": "#d1601f"}
COLUMNS = {"mean": "mean", "dc": "dc_loss"}
LABELS = {"mean": "uniform weights (mean)", "dc": "re-weighted (dc_loss)"}
DIVERGENCES = {"kl": "KL", "alpha": "alpha-divergence", "renyi": "Rényi"}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
ATTACKS = {"fgsm": "FGSM", "pgd": "PGD", "margin": "margin PGD"}


def summarize(runs: Sequence[dict]) -> list[dict]:
    """One entry per setting and metric; accuracies are shares.

    Of runs with both weightings: both means over the seeds, the paired difference dc - mean, its standard error and the
    half width of its interval (95 %, Student t). Of runs with one: its mean over the seeds, under the name of the
    weighting, and the standard error of that. Errors and intervals are None with a single seed.
    """
    summary = []
    weightings = _weightings(runs)
    for setting in dict.fromkeys(run["setting"] for run in runs):
        final = {weighting: _by_seed(runs, setting, weighting) for weighting in weightings}
        seeds = sorted(final[weightings[0]])
        for metric in METRICS:
            values = {weighting: [final[weighting][seed][metric] for seed in seeds] for weighting in weightings}
            entry = {"setting": setting, "metric": metric, "seeds": len(seeds)}
            entry |= {weighting: statistics.fmean(of_seeds) for weighting, of_seeds in values.items()}
            if len(weightings) == 1:
                summary.append({**entry, "standard_error": _standard_error(values[weightings[0]])})
                continue
            differences = [dc - mean for mean, dc in zip(values["mean"], values["dc"], strict=True)]
            error = _standard_error(differences)
            summary.append(
                {
                    **entry,
                    "difference": statistics.fmean(differences),
                    "standard_error": error,
                    "interval": None if error is None else error * float(stdtrit(len(seeds) - 1, 0.975)),
                    "won": sum(difference > 0 for difference in differences),
                    "tied": sum(difference == 0 for difference in differences),
                }
            )
    return summary


def table(summary: Sequence[dict], config: ResolvedConfig) -> str:
    """Markdown table in percent, and below it what it says in words."""
    paired = "difference" in summary[0]
    weightings = [weighting for weighting in COLUMNS if weighting in summary[0]]
    header = ["setting", "accuracy, %", *(COLUMNS[weighting] for weighting in weightings)]
    header += ["difference", "seeds won"] if paired else ["seeds"]
    rows, previous = [], None
    for entry in summary:
        row = ["" if entry["setting"] == previous else entry["setting"], metric_name(entry["metric"], config)]
        previous = entry["setting"]
        if paired:
            tied = f", {entry['tied']} tied" if entry["tied"] else ""
            row += [f"{100 * entry[weighting]:.1f}" for weighting in weightings]
            row += [_points(entry["difference"], entry["standard_error"], "+")]
            row += [f"{entry['won']} of {entry['seeds']}{tied}"]
        else:
            row += [_points(entry[weightings[0]], entry["standard_error"]), str(entry["seeds"])]
        rows.append(row)
    names = _attack_names(config)
    notes = [
        f"{ball(config)}, {config.evaluate.on} part. Robust: survives {names['pgd']} and {names['margin']}. "
        "Worst class: robust accuracy of each model's worst class."
    ]
    if paired:
        notes.append(
            "Difference: dc_loss - mean, paired by seed (same data, initial weights, batches and attack noise), "
            "+- standard error."
        )
    else:
        seeds = summary[0]["seeds"]
        spread = f"mean of {seeds} seeds +- standard error" if seeds > 1 else "one seed, which has no spread"
        notes.append(f"{config.method}, weights {weights_name(config.dual, weightings[0])}: {spread}.")
    verdicts = ["", *findings(summary)] if paired else []
    align = "llrrrl" if paired else "llrl"
    return "\n".join([markdown(header, rows, align), "", *notes, *verdicts, ""])


def findings(summary: Sequence[dict]) -> list[str]:
    """Where re-weighting helps, hurts or does neither clearly, by the robust difference and its interval."""
    groups: dict[str, list[str]] = {
        "helps": [],
        "hurts": [],
        "makes no clear difference": [],
        "cannot be judged": [],
    }
    for entry in summary:
        if entry["metric"] != "robust" or "difference" not in entry:
            continue
        shown = _points(entry["difference"], entry["standard_error"], "+")
        if entry["interval"] is None:
            groups["cannot be judged"].append(f"{entry['setting']} (one seed has no spread; {shown} points)")
            continue
        clear = abs(entry["difference"]) > entry["interval"]
        verdict = ("helps" if entry["difference"] > 0 else "hurts") if clear else "makes no clear difference"
        won = f"better on {entry['won']} of {entry['seeds']} seeds"
        groups[verdict].append(f"{entry['setting']} ({shown} points, {won})")
    return [
        f"In robust accuracy re-weighting {verdict}: {'; '.join(found)}." for verdict, found in groups.items() if found
    ]


# ---- runs side by side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run as its folder has it."""

    folder: pathlib.Path
    config: ResolvedConfig
    entries: list[dict]


def read(folder: pathlib.Path) -> Run:
    """Raises ConfigError if the folder is not that of a finished run."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.json, so it is no finished run of `armor train`")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        entries, config = metrics["runs"], metrics["config"]
        for entry in entries:
            _ = entry["setting"], entry["seed"], entry["weighting"], entry["history"], *map(entry["final"].get, METRICS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another version of armor ({_reason(error)})") from None
    if not entries:
        raise ConfigError(f"{path} holds no model")
    return Run(folder, checkpoint.stored_config(config, path, ResolvedConfig), entries)


def compare(folders: Iterable[pathlib.Path]) -> str:
    """One markdown table of finished runs: a row per run, setting and weighting, and below it how they were judged.

    Accuracies in percent, mean ± standard deviation over the seeds. A re-weighted model gets, if
    its control is in the same run, the paired difference of robust accuracy ± its standard error. Raises ConfigError.
    """
    runs = [read(pathlib.Path(folder)) for folder in folders]
    methods, settings = [run.config.method for run in runs], {entry["setting"] for run in runs for entry in run.entries}
    # What tells no two rows apart is left out: tables are to fit a page.
    named, with_settings = len(set(methods)) < len(methods), settings != {"balanced"}
    header = [*(["run"] if named else []), "method", "weights", *(["setting"] if with_settings else [])]
    header += ["clean", *ATTACKS.values(), "robust", "worst class", "difference"]
    rows = []
    for run in runs:
        robust = {entry["setting"]: entry for entry in summarize(run.entries) if entry["metric"] == "robust"}
        for setting, paired in robust.items():
            for weighting in _weightings(run.entries):
                final = list(_by_seed(run.entries, setting, weighting).values())
                row = [run.folder.resolve().name] if named else []
                row += [run.config.method, weights_name(run.config.dual, weighting)]
                row += [setting] if with_settings else []
                row += [with_spread([of_seed[metric] for of_seed in final]) for metric in METRICS]
                has_control = weighting == "dc" and "difference" in paired
                row += [_points(paired["difference"], paired["standard_error"], "+", "±") if has_control else ""]
                rows.append(row)
    align = "l" * (len(header) - len(METRICS) - 1) + "r" * (len(METRICS) + 1)
    return "\n".join([markdown(header, rows, align), "", *_how_judged(runs), ""])


def redraw(folder: pathlib.Path) -> None:
    """The plots of a finished run once more, wherever its folder is now. Raises ConfigError."""
    run = read(folder)
    here = folder.resolve()
    plot(here / "plots", run.entries, replace(run.config, runs_dir=str(here.parent), name=here.name))


def _how_judged(runs: Sequence[Run]) -> list[str]:
    """One line for each way in which runs were judged, with the names of the runs if there are several."""
    ways: dict[str, list[str]] = {}
    for run in runs:
        config, count = run.config, len({entry["seed"] for entry in run.entries})
        names = _attack_names(config)
        way = (
            f"{config.data}, {config.model}, {config.evaluate.on} part, {ball(config)}, {names['pgd']} and "
            f"{names['margin']} with step {config.evaluate_step_size:.3g}; {count} {'seed' if count == 1 else 'seeds'}"
        )
        ways.setdefault(way, []).append(run.folder.resolve().name)
    lines = [f"{way}." if len(ways) == 1 else f"{', '.join(names)}: {way}." for way, names in ways.items()]
    return [
        *lines,
        "Percent, mean ± standard deviation over the seeds. Robust: survives both PGD attacks.",
        "Worst class: robust accuracy of each model's worst class.",
        "Difference: robust accuracy, re-weighted - uniform of the same run, paired by seed, ± standard error.",
    ]


# ---- words ---------------------------------------------------------------------------------------------------------


def metric_name(metric: str, config: ResolvedConfig) -> str:
    return {**_attack_names(config), "worst_class": "worst class"}.get(metric, metric)


def weights_name(dual: DualConfig, weighting: str) -> str:
    """Such as "KL 0.2, kappa 1": the divergence with its order, its radius, and kappa."""
    if weighting == "mean":
        return "uniform"
    order = "" if dual.alpha is None else f"({dual.alpha:g})"
    solve = "" if dual.solve == "exact" else f", {dual.solve}"
    return f"{DIVERGENCES[dual.divergence].partition('-')[0]}{order} {dual.radius:g}, kappa {dual.kappa:g}{solve}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A table whose columns line up; align has l or r for each of them."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = "|".join(
        "-" * (width + 1) + (":" if side == "r" else "-") for width, side in zip(widths, align, strict=True)
    )
    lines = [
        " | ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        )
        for row in [header, *rows]
    ]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _attack_names(config: ResolvedConfig) -> dict[str, str]:
    steps = config.evaluate.steps
    if config.evaluate.norm == "binary":
        return {"fgsm": "rFGSM", "pgd": f"rFGSM^{steps}", "margin": f"margin rFGSM^{steps}"}
    return {"fgsm": ATTACKS["fgsm"], "pgd": f"{ATTACKS['pgd']}-{steps}", "margin": f"{ATTACKS['margin']}-{steps}"}


def ball(config: ResolvedConfig) -> str:
    if config.evaluate.norm == "binary":
        return "Binary features"
    return f"{NORMS[config.evaluate.norm or 'linf']} radius {config.evaluate.eps}"


def _points(share: float, error: float | None, sign: str = "", between: str = "+-") -> str:
    """A share in percent with its error, such as 58.5 +- 0.8."""
    return f"{100 * share:{sign}.1f}" + ("" if error is None else f" {between} {100 * error:.1f}")


def with_spread(shares: Sequence[float]) -> str:
    return _points(statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else None, between="±")


def _seeds(config: ResolvedConfig) -> str:
    return "one seed" if config.seeds == 1 else f"mean of {config.seeds} seeds with standard error"


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot(folder: pathlib.Path, runs: Sequence[dict], config: ResolvedConfig) -> None:
    """In `folder`, as PNG and SVG: curves and, of re-weighted models, dual; as PNG the samples-SETTING of images."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"curves": _curves(runs, config)}
    if "dc" in config.weightings:
        figures["dual"] = _dual(runs, config)
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=130)
    for setting in config.settings if "dc" in config.weightings else []:
        content = checkpoint.load(checkpoint_path(config, Job(setting, config.first_seed, "dc")))
        if _are_images(content["samples"]["x_adv"]):
            _samples(content["samples"], setting, config).savefig(folder / f"samples-{setting}.png", dpi=130)


def _curves(runs: Sequence[dict], config: ResolvedConfig) -> Figure:
    """Validation accuracy over the epochs: mean over the seeds, band of one standard error."""
    rows = (("clean", "clean accuracy, %"), ("robust", "robust accuracy, %"))
    figure, axes = _grid(rows, config)
    for row, (name, label) in enumerate(rows):
        for column, setting in enumerate(config.settings):
            for weighting in config.weightings:
                values = _history(runs, setting, weighting, name) * 100
                _line(axes[row, column], values, COLOURS[weighting], LABELS[weighting])
        axes[row, 0].set_ylabel(label)
    figure.suptitle(f"{_title(config)}: accuracy on the validation part, {_seeds(config)}", fontsize=11)
    _legend(figure, axes)
    return figure


def _dual(runs: Sequence[dict], config: ResolvedConfig) -> Figure:
    """Temperature lambda + kappa of the re-weighted models and effective sample size over the epochs."""
    rows = (("mu", "λ + κ"), ("effective_share", "effective sample size, %"))
    figure, axes = _grid(rows, config)
    for column, setting in enumerate(config.settings):
        _line(axes[0, column], _history(runs, setting, "dc", "mu"), COLOURS["dc"], LABELS["dc"])
        axes[0, column].axhline(
            config.dual.kappa, color="black", linewidth=0.8, linestyle=":", label=f"κ = {config.dual.kappa:g}"
        )
        for weighting in config.weightings:
            values = _history(runs, setting, weighting, "effective_share") * 100
            _line(axes[1, column], values, COLOURS[weighting], LABELS[weighting])
        axes[1, column].set_ylim(0, 105)
    for row, (_, label) in enumerate(rows):
        axes[row, 0].set_ylabel(label)
    figure.suptitle(
        f"{_title(config)}: the dual of each batch, epoch means, {_seeds(config)} "
        f"({DIVERGENCES[config.dual.divergence]} radius {config.dual.radius:g})",
        fontsize=11,
    )
    _legend(figure, axes)
    return figure


def _are_images(x: Tensor) -> bool:
    """Of one or three channels, in contrast to tables of features."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


def _samples(samples: dict, setting: str, config: ResolvedConfig) -> Figure:
    """Two rows of attacked training images: the most and the least weighted of the final model."""
    count = len(samples["weight"]) // 2
    figure = Figure(figsize=(1.05 * count + 0.6, 3.8), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for index, axis in enumerate(axes.flat):
        label, true_label, predicted = (int(samples[name][index]) for name in ("label", "true_label", "predicted"))
        picture = samples["x_adv"][index].permute(1, 2, 0).squeeze(2).numpy()
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)  # a picture in colour has no need of the map
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
        f"{_title(config)}, {setting}, seed {config.first_seed}: attacked training samples and how many times "
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
    """values [seeds, epochs]; NaN after the end of a run that its monitor stopped."""
    epochs, known = np.arange(1, values.shape[1] + 1), np.ma.masked_invalid(values)
    middle = known.mean(0)
    axis.plot(epochs, middle, color=colour, linewidth=1.8, label=label, marker="o" if len(epochs) == 1 else None)
    if len(values) > 1:
        error = known.std(0, ddof=1) / np.sqrt(known.count(0))
        axis.fill_between(epochs, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def _legend(figure: Figure, axes: np.ndarray) -> None:
    # From the last row up, because the first row of the dual's plot lacks the control.
    found = {
        label: line for axis in axes.flat[::-1] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False, fontsize=9)


def _title(config: ResolvedConfig) -> str:
    return config.data if config.method == "pgd" else f"{config.data}, {config.method}"


# ---- entries -------------------------------------------------------------------------------------------------------


def _weightings(runs: Sequence[dict]) -> list[str]:
    """Those that occur, uniform weights first."""
    return [weighting for weighting in COLUMNS if any(run["weighting"] == weighting for run in runs)]


def _by_seed(runs: Sequence[dict], setting: str, weighting: str) -> dict[int, dict]:
    return {run["seed"]: run["final"] for run in _of(runs, setting, weighting)}


def _history(runs: Sequence[dict], setting: str, weighting: str, name: str) -> np.ndarray:
    """[seeds, epochs]"""
    curves = [run["history"][name] for run in _of(runs, setting, weighting)]
    longest = max(len(curve) for curve in curves)
    return np.array([curve + [None] * (longest - len(curve)) for curve in curves], dtype=float)


def _of(runs: Sequence[dict], setting: str, weighting: str) -> list[dict]:
    return [run for run in runs if (run["setting"], run["weighting"]) == (setting, weighting)]


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"

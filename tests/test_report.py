"""The table, the sentences, the comparison of runs and the plots, of runs whose numbers are written out here."""

import json
import pathlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib import image

from armor.training import (
    AttackConfig,
    ConfigError,
    DualConfig,
    TrainConfig,
    checkpoint,
    report,
)
from armor.training.config import EvaluateConfig, OptimizerConfig
from armor.training.loop import Job, checkpoint_path
from armor.training.resolve import resolve

# A plot of nothing but missing values is drawn all the same, with a warning.
pytestmark = pytest.mark.filterwarnings("error")


def config(root, **changes):
    evaluate = {"evaluate": EvaluateConfig(steps=20)}
    return resolve(TrainConfig(**{"runs_dir": str(root), "name": "run", "device": "cpu", **evaluate, **changes}))


def entries(setting: str, epochs: int = 3, **values: list[float]) -> list[dict]:
    """Of each weighting one entry per seed, all of whose accuracies are the value."""
    found = []
    for weighting, shares in values.items():
        for seed, share in enumerate(shares):
            curve = [share * (epoch + 1) / epochs for epoch in range(epochs)]
            history = dict.fromkeys(("objective", "mean_loss", "clean", "robust"), curve)
            history |= {"effective_share": [1.0] * epochs, "mu": [None if weighting == "mean" else 1.2] * epochs}
            final = dict.fromkeys(report.METRICS, share)
            found.append(
                {
                    "setting": setting,
                    "seed": seed,
                    "weighting": weighting,
                    "final": final,
                    "history": history,
                    "selected_epoch": epochs,
                }
            )
    return found


def write(c, runs: list[dict]):
    """What run.py leaves of a run, the checkpoints aside; its folder."""
    c.folder.mkdir(parents=True)
    (c.folder / "metrics.json").write_text(json.dumps({"config": asdict(c), "recorded": {}, "runs": runs}))
    return c.folder


# --- summary and table


def test_summary_pairs_the_seeds():
    # Differences 0.1, 0.2, 0.0: mean 0.1, standard deviation 0.1, error 0.1 / sqrt 3; t(0.975, 2) = 4.3027.
    entry = report.summarize(entries("balanced", mean=[0.5, 0.4, 0.6], dc=[0.6, 0.6, 0.6]))[0]
    assert entry["metric"] == "clean"
    assert entry["seeds"] == 3
    assert (entry["won"], entry["tied"]) == (2, 1)
    assert [entry[key] for key in ("mean", "dc", "difference")] == pytest.approx([0.5, 0.6, 0.1])
    assert entry["standard_error"] == pytest.approx(0.0577350)
    assert entry["interval"] == pytest.approx(0.0577350 * 4.302653)


@pytest.mark.parametrize("weighting", ["mean", "dc"])
def test_summary_of_one_weighting_has_the_error_of_its_mean(weighting):
    found = report.summarize(entries("balanced", **{weighting: [0.5, 0.6, 0.7]}))
    assert [entry["metric"] for entry in found] == list(report.METRICS)
    # Standard deviation 0.1 over sqrt 3.
    assert found[4] == {
        "setting": "balanced",
        "metric": "robust",
        "seeds": 3,
        weighting: pytest.approx(0.6),
        "standard_error": pytest.approx(0.0577350),
    }


def test_findings_follow_the_numbers():
    runs = [
        *entries("long-tail", mean=[0.50, 0.52, 0.51], dc=[0.60, 0.61, 0.62]),
        *entries("balanced", mean=[0.80, 0.82, 0.81], dc=[0.81, 0.81, 0.82]),
        *entries("label-noise", mean=[0.70, 0.72, 0.71], dc=[0.60, 0.61, 0.62]),
    ]
    helps, hurts, unclear = report.findings(report.summarize(runs))
    assert helps == "In robust accuracy re-weighting helps: long-tail (+10.0 +- 0.6 points, better on 3 of 3 seeds)."
    assert hurts == "In robust accuracy re-weighting hurts: label-noise (-10.0 +- 0.6 points, better on 0 of 3 seeds)."
    assert "makes no clear difference: balanced (+0.3 +- 0.7 points, better on 2 of 3 seeds)" in unclear

    (single,) = report.findings(report.summarize(entries("balanced", mean=[0.8], dc=[0.9])))
    assert "cannot be judged: balanced (one seed has no spread; +10.0 points)" in single


def test_table_of_a_pair(tmp_path):
    runs = entries("long-tail", mean=[0.5, 0.7], dc=[0.6, 0.7]) + entries("balanced", mean=[0.8, 0.9], dc=[0.8, 0.7])
    c = config(tmp_path, settings=["long-tail", "balanced"], seeds=2, control=True, attack=AttackConfig(eps="8/255"))
    assert report.table(report.summarize(runs), c) == (
        "| setting   | accuracy, %   | mean | dc_loss |    difference | seeds won      |\n"
        "|-----------|---------------|-----:|--------:|--------------:|----------------|\n"
        "| long-tail | clean         | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "|           | FGSM          | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "|           | PGD-20        | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "|           | margin PGD-20 | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "|           | robust        | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "|           | worst class   | 60.0 |    65.0 |   +5.0 +- 5.0 | 1 of 2, 1 tied |\n"
        "| balanced  | clean         | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "|           | FGSM          | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "|           | PGD-20        | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "|           | margin PGD-20 | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "|           | robust        | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "|           | worst class   | 85.0 |    75.0 | -10.0 +- 10.0 | 0 of 2, 1 tied |\n"
        "\n"
        "Linf radius 8/255, test part. Robust: survives PGD-20 and margin PGD-20. "
        "Worst class: robust accuracy of each model's worst class.\n"
        "Difference: dc_loss - mean, paired by seed (same data, initial weights, batches and attack noise), "
        "+- standard error.\n"
        "\n"
        "In robust accuracy re-weighting makes no clear difference: "
        "long-tail (+5.0 +- 5.0 points, better on 1 of 2 seeds); "
        "balanced (-10.0 +- 10.0 points, better on 0 of 2 seeds).\n"
    )


def test_table_of_one_weighting(tmp_path):
    c = config(
        tmp_path,
        method="trades",
        seeds=2,
        dual=DualConfig(divergence="mean"),
        evaluate=EvaluateConfig(on="validation", norm="l2", eps=0.5, steps=7),
    )
    assert report.table(report.summarize(entries("balanced", mean=[0.5, 0.7])), c) == (
        "| setting  | accuracy, %  |         mean | seeds |\n"
        "|----------|--------------|-------------:|-------|\n"
        "| balanced | clean        | 60.0 +- 10.0 | 2     |\n"
        "|          | FGSM         | 60.0 +- 10.0 | 2     |\n"
        "|          | PGD-7        | 60.0 +- 10.0 | 2     |\n"
        "|          | margin PGD-7 | 60.0 +- 10.0 | 2     |\n"
        "|          | robust       | 60.0 +- 10.0 | 2     |\n"
        "|          | worst class  | 60.0 +- 10.0 | 2     |\n"
        "\n"
        "L2 radius 0.5, validation part. Robust: survives PGD-7 and margin PGD-7. "
        "Worst class: robust accuracy of each model's worst class.\n"
        "trades, weights uniform: mean of 2 seeds +- standard error.\n"
    )
    single = report.table(report.summarize(entries("balanced", dc=[0.5])), replace(c, dual=DualConfig()))
    assert "| balanced | clean        |    50.0 | 1     |" in single
    assert "trades, weights KL 0.2, kappa 1: one seed, which has no spread.\n" in single


def test_binary_features_have_names_of_their_own(tmp_path):
    c = config(tmp_path, data="npz", data_dir="x.npz", attack=AttackConfig(norm="binary"))
    text = report.table(report.summarize(entries("balanced", dc=[0.5])), c)
    assert "Binary features, test part. Robust: survives rFGSM^20 and margin rFGSM^20." in text
    assert "|          | rFGSM           |" in text


# --- several runs


def test_comparison_is_one_table_with_the_paired_difference_of_each_run(tmp_path):
    trades = config(
        tmp_path,
        name="t",
        method="trades",
        seeds=3,
        control=True,
        dual=DualConfig(radius=0.02, kappa=0.1),
    )
    udr = config(
        tmp_path,
        name="u",
        method="udr",
        seeds=2,
        dual=DualConfig(divergence="alpha", alpha=6.0, radius=0.5, kappa=0.0, solve="learned"),
    )
    plain = config(tmp_path, name="p", seeds=1, dual=DualConfig(divergence="mean"))
    folders = [
        write(trades, entries("balanced", mean=[0.5, 0.6, 0.7], dc=[0.5, 0.7, 0.7])),
        write(udr, entries("balanced", dc=[0.25, 0.75])),
        write(plain, entries("balanced", mean=[0.875])),
    ]
    # Trades: standard deviations 10 and 11.547; differences 0, 10, 0: 3.33, error 5.774 / sqrt 3 = 3.33.
    lines = report.compare(folders).splitlines()
    assert [" ".join(line.split()) for line in lines[:6]] == [
        "| method | weights | clean | FGSM | PGD | margin PGD | robust | worst class | difference |",
        f"|--------|{'-' * 32}|{'------------:|' * 6}-----------:|",
        f"| trades | uniform | {'60.0 ± 10.0 | ' * 6}|",
        f"| trades | KL 0.02, kappa 0.1 | {'63.3 ± 11.5 | ' * 6}+3.3 ± 3.3 |",
        f"| udr | alpha(6) 0.5, kappa 0, learned | {'50.0 ± 35.4 | ' * 6}|",
        f"| pgd | uniform | {'87.5 | ' * 6}|",
    ]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[7] == ("t: digits, mlp, test part, Linf radius 0.1, PGD-20 and margin PGD-20 with step 0.01; 3 seeds.")
    assert lines[8].startswith("u: digits, mlp, test part, Linf radius 0.1,")
    assert lines[8].endswith("; 2 seeds.")
    assert lines[9].endswith("; 1 seed.")
    assert "Difference: robust accuracy, re-weighted - uniform of the same run, paired by seed" in lines[-1]


def test_comparison_tells_runs_of_one_method_and_their_settings_apart(tmp_path):
    first, second = (config(tmp_path, name=name, settings=["long-tail", "balanced"]) for name in ("first", "second"))
    runs = entries("long-tail", dc=[0.5]) + entries("balanced", dc=[0.75])
    lines = report.compare([write(first, runs), write(second, runs)]).splitlines()
    assert [line.split("|")[1:5] for line in lines[2:6]] == [
        [f" {name} ", " pgd    ", " KL 0.2, kappa 1 ", f" {setting} "]
        for name in ("first ", "second")
        for setting in ("long-tail", "balanced ")
    ]
    # Judged alike, which one line says of both.
    assert lines[7] == "digits, mlp, test part, Linf radius 0.1, PGD-20 and margin PGD-20 with step 0.01; 1 seed."


def test_a_stored_configuration_is_the_one_that_was_stored(tmp_path):
    c = config(
        tmp_path,
        attack=AttackConfig(eps="8/255"),
        model_options={"hidden": [5, 6]},
        optimizer=OptimizerConfig(schedule="piecewise", drops={3: 0.1, 10: 0.01}),
    )
    folder = write(c, entries("balanced", dc=[0.5]))
    assert report.read(folder).config == c
    assert checkpoint.stored_config(asdict(c), "here", TrainConfig).optimizer.drops == {3: 0.1, 10: 0.01}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "has no metrics.json, so it is no finished run of `armor train`"),
        ("{", r"metrics.json is damaged or of another version of armor \(JSONDecodeError"),
        ("[]", "metrics.json is damaged or of another version of armor"),
        ('{"config": {}, "runs": [{"setting": "balanced", "seed": 0}]}', r"\(no 'weighting'\)"),
        ('{"config": {}, "runs": []}', "metrics.json holds no model"),
        ('{"config": {"eval_steps": 5}, "runs": ENTRIES}', r"another version of armor \(unknown option eval_steps\)"),
        ('{"config": {"attack": {"q": 5}}, "runs": ENTRIES}', r"another version of armor \(unknown option q\)"),
        ('{"config": {"attack": 5}, "runs": ENTRIES}', "another version of armor"),
    ],
)
def test_folders_that_are_no_finished_run_are_refused(tmp_path, text, sentence):
    if text is not None:
        runs = json.dumps(entries("balanced", dc=[0.5]))
        (tmp_path / "metrics.json").write_text(text.replace("ENTRIES", runs))
    with pytest.raises(ConfigError, match=sentence):
        report.compare([tmp_path])


# --- plots


def shown(shape: tuple[int, ...]) -> dict:
    """Samples as loop.py stores them: red in the first row of pictures, green in the second."""
    x_adv = torch.zeros(20, *shape)
    if len(shape) == 3:
        x_adv[:10, 0] = 1
        x_adv[10:, shape[0] // 2] = 1
    labels = torch.arange(20) % 10
    weight = torch.linspace(3, 0.1, 20)
    return {"x_adv": x_adv, "weight": weight, "label": labels, "true_label": labels, "predicted": labels}


def save_samples(c, shape, setting="balanced"):
    path = checkpoint_path(c, Job(setting, c.first_seed, "dc"))
    checkpoint.save({"samples": shown(shape)}, path)


def colours(path) -> set[tuple[int, ...]]:
    """The RGB colours of a picture."""
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {(code >> 16, code >> 8 & 255, code & 255) for code in np.unique(pixels @ [1 << 16, 1 << 8, 1]).tolist()}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4, 4), {(255, 0, 0), (0, 255, 0)}), ((1, 4, 4), {(255, 255, 255)}), ((30,), None), ((5, 4, 4), None)],
)
def test_pictures_of_samples_are_in_their_colours_and_of_images_alone(tmp_path, shape, expected):
    c = config(tmp_path)
    save_samples(c, shape)
    report.plot(tmp_path / "plots", entries("balanced", dc=[0.5]), c)
    names = {"curves.png", "curves.svg", "dual.png", "dual.svg"}
    found = {path.name for path in (tmp_path / "plots").iterdir()}
    assert found == (names if expected is None else names | {"samples-balanced.png"})
    if expected is not None:
        assert expected <= colours(tmp_path / "plots" / "samples-balanced.png")


MEAN, DC = (91, 107, 127), (209, 96, 31)  # the colours of the two weightings


@pytest.mark.parametrize(("weightings", "epochs"), [(("mean",), 1), (("dc",), 1), (("mean", "dc"), 1), (("dc",), 4)])
def test_curves_of_any_weightings_and_of_a_single_epoch(tmp_path, weightings, epochs):
    settings = ["long-tail", "balanced"]
    dual = DualConfig(divergence="mean") if weightings == ("mean",) else DualConfig()
    c = config(tmp_path, settings=settings, seeds=2, control=len(weightings) == 2, dual=dual)
    assert c.weightings == weightings
    runs = []
    for setting in settings:
        runs += entries(setting, epochs, **{weighting: [0.5, 0.6] for weighting in weightings})
        save_samples(c, (30,), setting)
    report.plot(tmp_path / "plots", runs, c)
    drawn = colours(tmp_path / "plots" / "curves.png")
    assert [colour in drawn for colour in (MEAN, DC)] == ["mean" in weightings, "dc" in weightings]
    assert (tmp_path / "plots" / "dual.png").exists() == ("dc" in weightings)


def test_curves_of_a_run_that_its_monitor_stopped_end_there(tmp_path):
    runs = [*entries("balanced", 5, dc=[0.5]), {**entries("balanced", 2, dc=[0.9])[0], "seed": 1}]
    curves = report._history(runs, "balanced", "dc", "robust")
    assert curves.shape == (2, 5)
    assert curves[1, :2].tolist() == [0.45, 0.9]
    assert all(value != value for value in curves[1, 2:])
    c = config(tmp_path, seeds=2)
    save_samples(c, (30,))
    report.plot(tmp_path / "plots", runs, c)
    assert DC in colours(tmp_path / "plots" / "curves.png")


def test_plots_are_drawn_again_wherever_the_folder_is_now(tmp_path, monkeypatch):
    c = config(tmp_path / "there")
    save_samples(c, (1, 4, 4))
    (c.folder / "metrics.json").write_text(
        json.dumps({"config": asdict(c), "recorded": {}, "runs": entries("balanced", dc=[0.5])})
    )
    (tmp_path / "there").rename(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here" / "run")
    report.redraw(pathlib.Path("."))
    assert (tmp_path / "here" / "run" / "plots" / "samples-balanced.png").exists()

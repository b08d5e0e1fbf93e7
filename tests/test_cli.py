"""The `armor` command from the outside: a tiny run end to end, presets, wrong use, Ctrl-C, real-image files."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from matplotlib import image
from test_data import write_images

from armor import cli
from armor.training import options as command_line
from armor.training import report, workers

TINY = ["--epochs", "2", "--train-size", "200", "--test-size", "80", "--evaluate.steps", "5", "--attack.steps", "3"]


def armor(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "armor.cli", *arguments]


def numbers(table: str) -> dict[tuple[str, str], list[str]]:
    """(setting, metric) -> the other cells of the printed row."""
    found, setting = {}, ""
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "setting":
            setting = cells[0] or setting
            found[setting, cells[1]] = cells[2:]
    return found


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One run in two worker processes, as a user starts it; (its folder, its output)."""
    root = tmp_path_factory.mktemp("runs")
    options = ["--preset", "demo", "--seeds", "2", "--workers", "2", "--name", "tiny", "--attack.eps", "8/255"]
    command = armor("train", *TINY, *options, "--runs-dir", str(root))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return root / "tiny", done.stdout


def test_printed_table_is_metrics_json(tiny_run):
    folder, output = tiny_run
    metrics = json.loads((folder / "metrics.json").read_text())
    printed = numbers(output)
    assert len(printed) == len(metrics["summary"]) == 18
    names = {
        "clean": "clean",
        "fgsm": "FGSM",
        "pgd": "PGD-5",
        "margin": "margin PGD-5",
        "robust": "robust",
        "worst_class": "worst class",
    }
    for setting, metric in [(s, m) for s in ("long-tail", "balanced", "label-noise") for m in names]:
        # Recomputed from the single runs, so that neither the table nor the summary is taken at its word.
        final = {
            weighting: np.array(
                [r["final"][metric] for r in metrics["runs"] if (r["setting"], r["weighting"]) == (setting, weighting)]
            )
            for weighting in ("mean", "dc")
        }
        assert len(final["mean"]) == len(final["dc"]) == 2
        difference = 100 * (final["dc"] - final["mean"])
        mean, dc, shown, won = printed[setting, names[metric]]
        assert mean == f"{100 * final['mean'].mean():.1f}"
        assert dc == f"{100 * final['dc'].mean():.1f}"
        assert [float(part) for part in shown.split("+-")] == pytest.approx(
            [difference.mean(), difference.std(ddof=1) / np.sqrt(2)], abs=0.051
        )
        assert won.startswith(f"{(difference > 0).sum()} of 2")
    assert (folder / "table.md").read_text() in output
    assert output.count("In robust accuracy re-weighting") >= 1


def test_run_folder_is_complete(tiny_run):
    folder, _ = tiny_run
    jobs = [
        f"{s}-seed{i}-{w}" for s in ("long-tail", "balanced", "label-noise") for i in (0, 1) for w in ("mean", "dc")
    ]
    assert sorted(path.stem for path in (folder / "checkpoints").iterdir()) == sorted(jobs)
    for job in jobs:
        content = torch.load(folder / "checkpoints" / f"{job}.pt", weights_only=True)
        assert content["model"]["1.weight"].shape == (128, 64)
        assert content["model"]["1.weight"].isfinite().all()

    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["attack"]["eps"] == "8/255"
    assert stored["recorded"]["eps"] == 8 / 255
    assert stored["recorded"]["seeds"] == [0, 1]
    assert stored["recorded"]["versions"]["torch"] == torch.__version__
    assert stored["epochs"] == 2
    assert stored["batch_size"] == 64
    assert stored["preset"] == "demo"

    plots = {
        "curves.png",
        "curves.svg",
        "dual.png",
        "dual.svg",
        "samples-long-tail.png",
        "samples-balanced.png",
        "samples-label-noise.png",
    }
    assert {path.name for path in (folder / "plots").iterdir()} == plots
    for name in plots:
        if name.endswith("png"):
            picture = image.imread(folder / "plots" / name)[..., :3]
            assert min(picture.shape[:2]) > 300
            assert picture.std() > 0.05


def test_stored_config_repeats_the_run_in_one_process(tiny_run, tmp_path, capsys):
    folder, _ = tiny_run
    again = ["--config", str(folder / "config.yaml"), "--runs-dir", str(tmp_path), "--name", "again", "--workers", "1"]
    assert cli.main(["train", *again]) == 0
    runs = [json.loads((path / "metrics.json").read_text())["runs"] for path in (folder, tmp_path / "again")]
    for first, second in zip(*runs, strict=True):
        del first["seconds"], second["seconds"]
        assert first == second


def test_config_file_and_override(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 7\nattack:\n  eps: 0.05\ndual:\n  radius: 0.3\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--dual.radius", "0.4", "--print-config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["attack"]["eps"], printed["dual"]["radius"]) == (7, 0.05, 0.4)


# --- presets


def printed(capsys, *arguments: str) -> dict:
    """What --print-config says of the arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments, "--print-config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """Two presets of this test's own; their folder."""
    folder = tmp_path / "presets"
    folder.mkdir()
    drops = "optimizer: {schedule: piecewise, drops: {75: 0.1, 90: 0.01}}"
    (folder / "slow.yaml").write_text(f"# Ours: slow and\n# long.\n# Traps: none.\nepochs: 7\nseeds: 3\n{drops}\n")
    (folder / "fast.yaml").write_text("# Ours: fast.\nepochs: 2\nattack: {p: inf, eps: 8/255}\n")
    monkeypatch.setattr(command_line, "PRESETS", folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "slow"], ("slow", 7, 3, {75: 0.1, 90: 0.01})),
        (["--preset=slow"], ("slow", 7, 3, {75: 0.1, 90: 0.01})),
        (["--seeds", "4", "--preset", "slow"], ("slow", 7, 4, {75: 0.1, 90: 0.01})),
        (["--preset", "slow", "--epochs", "5"], ("slow", 5, 3, {75: 0.1, 90: 0.01})),
        (["--config", "FILE", "--preset", "slow"], ("slow", 9, 3, {75: 0.1, 90: 0.01})),
        (["--epochs", "5", "--config", "FILE", "--preset", "slow"], ("slow", 9, 3, {75: 0.1, 90: 0.01})),
        (["--preset", "slow", "--config", "FILE", "--epochs", "5"], ("slow", 5, 3, {75: 0.1, 90: 0.01})),
        (["--preset", "slow", "--optimizer.drops", "{50: 0.5}"], ("slow", 7, 3, {50: 0.5})),
        (["--preset", "slow", "--optimizer.drops", "{}"], ("slow", 7, 3, {})),
        (["--preset", "fast"], ("fast", 2, 1, {})),
        (["--config", "FILE"], (None, 9, 1, {})),
        (["--config", "WITH_PRESET"], ("slow", 9, 3, {75: 0.1, 90: 0.01})),
        (["--config", "WITH_PRESET", "--preset", "fast"], ("fast", 9, 1, {})),
    ],
)
def test_a_preset_comes_before_all_other_options(presets, tmp_path, capsys, arguments, expected):
    (tmp_path / "c.yaml").write_text("epochs: 9\n")
    (tmp_path / "d.yaml").write_text("epochs: 9\npreset: slow\n")
    names = {"FILE": str(tmp_path / "c.yaml"), "WITH_PRESET": str(tmp_path / "d.yaml")}
    found = printed(capsys, *(names.get(argument, argument) for argument in arguments))
    drops = {int(epoch): factor for epoch, factor in found["optimizer"]["drops"].items()}
    assert (found["preset"], found["epochs"], found["seeds"], drops) == expected


def test_a_printed_configuration_is_one_to_start_from(presets, tmp_path, capsys):
    first = printed(capsys, "--preset", "slow", "--seeds", "4")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", str(tmp_path / "mine.yaml")) == first
    assert first["seeds"] == 4


def test_presets_are_listed_with_what_their_files_say_of_them(presets, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for arguments in (["--preset", "help"], ["--seeds", "2", "--preset=help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *arguments])
        assert stop.value.code == 0
        assert capsys.readouterr().out == (
            "fast                  Ours: fast.\nslow                  Ours: slow and long.\n"
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "slwo"], "there is no preset 'slwo' (do you mean slow?); there are fast, slow"),
        (["--preset", "../presets/slow"], "there is no preset '../presets/slow'"),
        (["--preset"], "--preset needs a name; there are fast, slow"),
        (["--config", "FILE"], "there is no preset 'cifar'; there are fast, slow"),
    ],
)
def test_an_unknown_preset_lists_those_there_are(presets, tmp_path, capsys, arguments, sentence):
    (tmp_path / "c.yaml").write_text("preset: cifar\n")
    names = {"FILE": str(tmp_path / "c.yaml")}
    assert cli.main(["train", *(names.get(argument, argument) for argument in arguments)]) == 2
    assert capsys.readouterr().err.startswith(f"armor: {sentence}")


# --- help and wrong use


def test_help_has_every_option_once_with_hyphens_and_nothing_of_python(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: armor train [--preset NAME] [--config FILE] [options]\n")
    assert max(map(len, text.splitlines())) <= 100
    for option in ("--preset", "--data-dir", "--attack.step-size", "--optimizer.drops", "--dual.radius", "--seeds"):
        assert len(re.findall(rf"^  {option}\b(?![-.])", text, re.MULTILINE)) == 1
    assert "one of balanced, long-tail, label-noise or a list" in " ".join(text.split())
    for noise in ("Literal", "Union", "null, default", "type:", "--settings+", "recorded", "[default"):
        assert noise not in text
    assert not re.search(r"--[\w.]+_", text)
    # What is meant by leaving an option out is said once, by its text or by its value.
    assert "(default: 10)" in text
    assert not re.search(r"\(default[^)]*\)\s+\(default", text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "cifar11"], "data must be one of digits, mnist, fashion-mnist, cifar10, cifar100, svhn,"),
        (["--settings", "tail"], "settings must be a list or one of balanced, long-tail, label-noise, got 'tail'"),
        (["--settings", "[balanced, tail]"], "settings must be one of balanced, long-tail, label-noise, got"),
        (["--epochs", "many"], "epochs must be a whole number, got 'many'"),
        (["--seeds", "1.5"], "seeds must be a whole number, got '1.5'"),
        (["--beta", "many"], "beta must be a number, got 'many'"),
        (["--control", "maybe"], "control must be true or false, got 'maybe'"),
        (["--control"], "--control needs true or false"),
        (["--attack.steps"], "--attack.steps needs a value"),
        (["--attack.steps", "many"], "attack.steps must be a whole number, got 'many'"),
        (["--attack.norm", "l3"], "attack.norm must be one of linf, l2, l1, binary, got 'l3'"),
        (["--evaluate.norm", "l3"], "evaluate.norm must be one of linf, l2, l1, binary, got 'l3'"),
        (["--attack", "3"], "attack is a group of options, such as --attack.NAME VALUE"),
        (["--optimizer.drops", "3"], "optimizer.drops must be a mapping {KEY: VALUE, ...}, got '3'"),
        (["--optimizer.drops", "{a: 0.1}"], "optimizer.drops must have whole numbers as its keys, got 'a'"),
        (["--optimizer.drops", "{75: a}"], "optimizer.drops must be a number, got 'a'"),
        (["--optimizer.drops", "{75: 0.1}"], "optimizer.drops and schedule piecewise need each other"),
        (["--model-options", "3"], "model_options must be a mapping {KEY: VALUE, ...}, got '3'"),
        (["--epoch", "3"], "there is no option --epoch (do you mean --epochs?)"),
        (["--attack.stepsize=3"], "there is no option --attack.stepsize (do you mean --attack.step-size or"),
        (["digits"], "unexpected argument 'digits'"),
        (["--attack.eps", "1.5"], "attack.eps must lie in (0, 1] because pixels lie in [0, 1], got '1.5'"),
        (["--dual.radius=-1"], "radius"),
        (["--data", "mnist"], "data mnist needs --data-dir, the folder with its four idx files: `npm pack"),
        (
            ["--data", "fashion-mnist", "--data-dir", "/nowhere"],
            "is neither in /nowhere nor in /nowhere/FashionMNIST/raw",
        ),
        (["--train-size", "2000"], "the train part has 1140 samples, fewer than the 2000 asked for"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--config"], "--config needs a value"),
        (["--print-config=foo"], 'Invalid option "foo"'),
        (["--name", "a/b"], "name must be one folder name"),
    ],
)
def test_wrong_use_is_one_sentence_before_anything_is_made(tmp_path, capsys, arguments, sentence):
    assert cli.main(["train", "--runs-dir", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("armor: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attack:\n  stepz: 3\n", "there is no option attack.stepz (do you mean attack.steps or attack.step_size"),
        ("epoch: 3\n", "there is no option epoch (do you mean epochs?)"),
        ("epochs: many\n", "epochs must be a whole number, got 'many'"),
        ("attack: {norm: l3}\n", "attack.norm must be one of linf, l2, l1, binary, got 'l3'"),
        ("attack: [\n", "c.yaml is no YAML: while parsing a flow node expected the node content"),
        ("- epochs\n", "c.yaml must hold options, each as NAME: VALUE"),
        ("", "c.yaml must hold options, each as NAME: VALUE"),
    ],
)
def test_a_wrong_file_is_one_sentence_too(tmp_path, capsys, text, sentence):
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("armor: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "armor needs a command, train, eval, report or info\n"),
        (["trian"], "armor needs a command, train, eval, report or info, got 'trian' (do you mean train?)\n"),
        (["info", "x"], "unexpected argument 'x'\n"),
        (["report"], "armor report needs the folders of finished runs\n"),
    ],
)
def test_a_command_is_needed(capsys, arguments, sentence):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"armor: {sentence}"


# --- report


def test_report_prints_and_writes_the_comparison_and_draws_the_plots(tiny_run, tmp_path, capsys):
    folder, _ = tiny_run
    for path in (folder / "plots").iterdir():
        path.unlink()
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "table.md"), "--plots"]) == 0
    table = (tmp_path / "table.md").read_text()
    assert table == report.compare([folder])
    assert capsys.readouterr().out == f"{table}\n"
    # Two weightings of three settings, below two lines of heading.
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 8
    assert len(list((folder / "plots").iterdir())) == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "/nowhere"], "/nowhere has no metrics.json, so it is no finished run of `armor train`"),
        (["RUN", "--out", "/nowhere/table.md"], "/nowhere/table.md cannot be written"),
        (["RUN", "--output", "x"], "there is no option --output (do you mean --out?)"),
    ],
)
def test_wrong_reports_are_one_sentence(tiny_run, capsys, arguments, sentence):
    assert cli.main(["report", *(argument.replace("RUN", str(tiny_run[0])) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"armor: {sentence}")
    assert captured.out == ""


# --- runs


def test_a_run_folder_is_not_overwritten_unasked(tmp_path, capsys):
    command = ["train", *TINY, "--workers", "1", "--runs-dir", str(tmp_path)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for options, reason in (
        ([], "exists; choose another --name or pass --overwrite"),
        (["--overwrite"], "is no earlier run"),
    ):
        assert cli.main([*command, "--name", "mine", *options]) == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"

    assert cli.main([*command, "--name", "run"]) == 0
    (tmp_path / "run" / "checkpoints" / "stale.pt").touch()
    assert cli.main([*command, "--name", "run", "--overwrite"]) == 0
    assert not (tmp_path / "run" / "checkpoints" / "stale.pt").exists()


def test_a_diverging_run_says_so(tmp_path, capsys):
    command = ["train", *TINY, "--workers", "1", "--runs-dir", str(tmp_path), "--optimizer.lr", "1e30"]
    assert cli.main([*command, "--name", "wild"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("armor: balanced-seed0-dc failed: FloatingPointError: the loss is nan in epoch")
    assert not (tmp_path / "wild" / "metrics.json").exists()


@pytest.mark.parametrize(("data", "suffix"), [("mnist", ""), ("fashion-mnist", ".gz")])
def test_images_train_the_cnn(tmp_path, capsys, data, suffix):
    write_images(tmp_path / "data", suffix)
    options = [
        "--epochs",
        "1",
        "--train-size",
        "100",
        "--test-size",
        "20",
        "--evaluate.steps",
        "2",
        "--attack.steps",
        "2",
        "--control",
        "true",
    ]
    command = ["train", "--data", data, "--data-dir", str(tmp_path / "data"), *options, "--workers", "1"]
    assert cli.main([*command, "--runs-dir", str(tmp_path), "--name", "images"]) == 0
    assert "cannot be judged: balanced (one seed has no spread" in capsys.readouterr().out
    model = torch.load(tmp_path / "images" / "checkpoints" / "balanced-seed0-dc.pt", weights_only=True)["model"]
    # The published CNN: 3x3 convolutions 32, 32, 64, 64 and linear 3136-100-10.
    shapes = [tuple(weight.shape) for name, weight in model.items() if name.endswith("weight")]
    assert shapes == [(32, 1, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (100, 3136), (10, 100)]


def test_a_reader_that_leaves_is_no_error():
    """`armor train --preset help | head`"""
    command = armor("train", "--preset", "help")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_ends_every_process(tmp_path, ctrl_c_works):
    options = ["--epochs", "100000", "--workers", "2", "--seeds", "2", "--name", "long", "--runs-dir"]
    command = armor("train", *options, str(tmp_path))
    # A session of its own stands for the terminal: Ctrl-C there reaches parent and workers alike.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline().startswith("2 models on cpu: digits, pgd, balanced x 2 seeds x dc")
        wait_until(lambda: len(members(process.pid)) >= 3, 60)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "armor: interrupted; the checkpoints of finished jobs stay in the run folder"
    assert "Traceback" not in error
    wait_until(lambda: not members(process.pid), 10)


def test_ctrl_c_while_workers_start_is_not_lost(ctrl_c_works):
    def start():
        with workers._sigint_held():
            os.kill(os.getpid(), signal.SIGINT)
            started.append("to the end")

    started = []
    with pytest.raises(KeyboardInterrupt):
        start()
    assert started == ["to the end"]


def members(group: int) -> list[int]:
    """Processes of a group that are not zombies, from /proc."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("command", ["train", "eval", "report"])
def test_missing_extra_is_one_sentence(monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "armor.training.options")
    assert cli.main([command, "x"]) == 2
    assert f"armor {command} needs jsonargparse; install armor with its `train` extra" in capsys.readouterr().err


def test_info_is_the_environment_report(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert "armor::dual" in output

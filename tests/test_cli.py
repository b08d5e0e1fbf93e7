"""The `armor` command from the outside: a tiny run end to end, wrong use, Ctrl-C, real-image files."""

import json
import os
import pathlib
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
from test_training import write_images

from armor import cli
from armor.training import workers

TINY = [
    "--epochs",
    "2",
    "--train-size",
    "200",
    "--test-size",
    "80",
    "--eval-steps",
    "5",
    "--attack.steps",
    "3",
]


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
    command = armor(
        "train",
        *TINY,
        "--seeds",
        "2",
        "--workers",
        "2",
        "--runs-dir",
        str(root),
        "--name",
        "tiny",
        "--attack.eps",
        "8/255",
    )
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
            method: np.array(
                [r["final"][metric] for r in metrics["runs"] if (r["setting"], r["method"]) == (setting, method)]
            )
            for method in ("mean", "dc")
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
        f"{s}-seed{i}-{m}" for s in ("long-tail", "balanced", "label-noise") for i in (0, 1) for m in ("mean", "dc")
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
    again = [
        "--config",
        str(folder / "config.yaml"),
        "--runs-dir",
        str(tmp_path),
        "--name",
        "again",
        "--workers",
        "1",
    ]
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "cifar11"], "data must be one of 'digits', 'mnist', 'fashion-mnist', got 'cifar11'"),
        (["--settings", "tail"], "must be list or one of 'long-tail', 'balanced', 'label-noise', got 'tail'"),
        (["--epochs", "many"], "epochs must be int, got 'many'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--attack.eps", "1.5"], "attack.eps must lie in (0, 1] because pixels lie in [0, 1], got '1.5'"),
        (["--dual.radius=-1"], "radius"),
        (["--data", "mnist"], "data mnist needs --data-dir, the folder with its four idx files: `npm pack"),
        (
            ["--data", "fashion-mnist", "--data-dir", "/nowhere"],
            "is neither in /nowhere nor in /nowhere/FashionMNIST/raw",
        ),
        (["--train-size", "2000"], "the train part has 1140 samples, fewer than the 2000 asked for"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--name", "a/b"], "name must be one folder name"),
    ],
)
def test_wrong_use_is_one_sentence_before_anything_is_made(tmp_path, capsys, options, sentence):
    assert cli.main(["train", *options, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("armor: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_unknown_command(capsys, arguments):
    assert cli.main(arguments) == 2
    assert "train" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten_unasked(tmp_path, capsys):
    command = [
        "train",
        *TINY,
        "--settings",
        "balanced",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--runs-dir",
        str(tmp_path),
    ]
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
    command = [
        "train",
        *TINY,
        "--settings",
        "balanced",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--runs-dir",
        str(tmp_path),
        "--lr",
        "1e30",
    ]
    assert cli.main([*command, "--name", "wild"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("armor: balanced-seed0-mean failed: FloatingPointError: the loss is nan in epoch")
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
        "--eval-steps",
        "2",
        "--attack.steps",
        "2",
    ]
    command = ["train", "--data", data, "--data-dir", str(tmp_path / "data"), *options, "--workers", "1"]
    assert cli.main([*command, "--runs-dir", str(tmp_path), "--name", "images"]) == 0
    assert "cannot be judged: balanced (one seed has no spread" in capsys.readouterr().out
    model = torch.load(tmp_path / "images" / "checkpoints" / "balanced-seed0-dc.pt", weights_only=True)["model"]
    # The published CNN: 3x3 convolutions 32, 32, 64, 64 and linear 3136-100-10.
    shapes = [tuple(weight.shape) for name, weight in model.items() if name.endswith("weight")]
    assert shapes == [(32, 1, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (100, 3136), (10, 100)]


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_ends_every_process(tmp_path):
    command = armor(
        "train",
        "--epochs",
        "100000",
        "--workers",
        "2",
        "--seeds",
        "1",
        "--runs-dir",
        str(tmp_path),
        "--name",
        "long",
    )
    # A session of its own stands for the terminal: Ctrl-C there reaches parent and workers alike.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline().startswith("6 models on cpu: long-tail, balanced, label-noise x 1 seeds")
        wait_until(lambda: len(members(process.pid)) >= 3, 60)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "armor: interrupted; the checkpoints of finished jobs stay in the run folder"
    assert "Traceback" not in error
    wait_until(lambda: not members(process.pid), 10)


def test_ctrl_c_while_workers_start_is_not_lost():
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


def test_missing_extra_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["train"]) == 2
    assert "armor train needs jsonargparse; install armor with its `train` extra" in capsys.readouterr().err


def test_info_is_the_environment_report(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert "armor::dual" in output

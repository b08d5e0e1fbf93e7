"""`armor eval`: a model judged again from its file alone, other attacks on it, and files that are none of ours."""

import hashlib
import json

import numpy as np
import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from test_data import table, write_images

from armor import cli
from armor.training import AttackConfig, ConfigError, TrainConfig, checkpoint, data, judge, loop
from armor.training.config import EvaluateConfig
from armor.training.evaluate import METRICS, evaluate
from armor.training.judge import JudgeConfig
from armor.training.resolve import resolve
from armor.training.step import stream


def train(root, *jobs: tuple[str, int, str], **changes):
    """Trains the jobs for one epoch; the run's configuration."""
    small = {
        "runs_dir": str(root),
        "name": "run",
        "device": "cpu",
        "epochs": 1,
        "train_size": 200,
        "test_size": 60,
        "attack": AttackConfig(steps=2),
        "evaluate": EvaluateConfig(steps=3),
    }
    c = resolve(TrainConfig(**{**small, **changes}))
    for job in jobs or [("balanced", 0, "dc")]:
        loop.run_job(loop.Job(*job), lambda images: None, c)
    return c


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of four models on digits; its folder."""
    jobs = [("balanced", seed, weighting) for seed in (3, 10) for weighting in ("mean", "dc")]
    return train(tmp_path_factory.mktemp("runs"), *jobs, first_seed=3, seeds=8, control=True).folder


def only(folder):
    (path,) = (folder / "checkpoints").iterdir()
    return path


CASES = {
    "digits": {},
    "images": {"data": "mnist", "model": "small-cnn", "normalize": True},
    "table": {"data": "npz", "model_options": {"hidden": [8]}, "attack": AttackConfig(norm="binary", steps=2)},
    "another ball": {"evaluate": EvaluateConfig(on="validation", norm="l2", eps="1/2", steps=3, step_size=0.2)},
}


@pytest.mark.parametrize("case", CASES)
def test_its_own_settings_give_the_accuracies_of_the_run_again(tmp_path, case, capsys):
    changes = dict(CASES[case])
    if changes.get("data") == "mnist":
        write_images(tmp_path / "data", "", train=480)
        changes["data_dir"] = str(tmp_path / "data")
    if changes.get("data") == "npz":
        np.savez(tmp_path / "set.npz", **table())
        changes |= {"data_dir": str(tmp_path / "set.npz"), "train_size": None, "test_size": None}
    c = train(tmp_path, **changes)
    path = only(c.folder)
    torch.rand(5)  # whatever the global generator does must not matter
    (found,) = judge.judge(path, JudgeConfig(device="cpu"))["models"]
    assert found["final"] == checkpoint.load(path)["final"] == found["final_of_run"]
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["job"] == {"setting": "balanced", "seed": 0, "weighting": "dc"}
    settings = found["settings"]
    assert settings["norm"] == c.evaluate.norm
    assert (settings["eps"], settings["eps_float"]) == (c.evaluate.eps, c.evaluate_eps)
    assert (settings["steps"], settings["step_size"]) == (3, c.evaluate_step_size)
    assert settings["samples"] == len(getattr(data.load(c, stream(0, "split")), c.evaluate.on))
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    assert row == ["balanced-seed0-dc", *(f"{100 * found['final'][metric]:.1f}" for metric in METRICS)]


def test_a_folder_is_all_its_models_in_the_order_of_the_run_and_means_of_their_seeds(digits, capsys):
    found = judge.judge(digits, JudgeConfig(device="cpu"))["models"]
    assert all(model["final"] == model["final_of_run"] for model in found)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| b")]
    names = [f"balanced-seed{seed}-{weighting}" for seed in (3, 10) for weighting in ("mean", "dc")]
    assert [row[0].strip() for row in rows] == [*names, "balanced, mean: 2 seeds", "balanced, dc: 2 seeds"]
    clean = 100 * np.array([found[0]["final"]["clean"], found[2]["final"]["clean"]])
    assert rows[4][1].strip() == f"{clean.mean():.1f} ± {clean.std(ddof=1):.1f}"


def test_options_change_the_judgement_and_are_recorded(digits, tmp_path, capsys):
    path = digits / "checkpoints" / "balanced-seed3-mean.pt"
    options = ["--on", "validation", "--norm", "l2", "--eps", "1/4", "--steps", "4", "--step-size", "0.1"]
    options += ["--test-size", "all", "--seed", "7", "--batch-size", "50", "--device", "cpu"]
    assert cli.main(["eval", str(path), *options, "--json", str(tmp_path / "found.json")]) == 0
    assert "200 samples of the validation part of digits, L2 radius 1/4, steps of 0.1, noise of seed 7." in (
        capsys.readouterr().out
    )
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["versions"]["torch"] == torch.__version__
    (found,) = written["models"]
    assert found["checkpoint"] == str(path)
    assert found["settings"] == {
        "data": "digits",
        "data_dir": None,
        "on": "validation",
        "samples": 200,
        "norm": "l2",
        "eps": "1/4",
        "eps_float": 0.25,
        "steps": 4,
        "step_size": 0.1,
        "seed": 7,
        "batch_size": 50,
        "device": "cpu",
    }
    # The same by hand: the model from its state dict, the validation part of the model's own seed, the noise of seed 7.
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    model.load_state_dict(checkpoint.load(path)["model"])
    part = data.load(resolve(TrainConfig()), stream(3, "split")).validation
    noise = stream(7, "evaluate")
    assert found["final"] == evaluate(model, part, norm="l2", eps=0.25, steps=4, step_size=0.1, generator=noise)


def test_the_seed_is_that_of_the_noise_and_never_that_of_the_split(digits, monkeypatch):
    def recording(model, part, *, generator, **_):
        seen.append((part.x, generator.initial_seed()))
        return dict.fromkeys(METRICS, 0.5)

    seen = []
    monkeypatch.setattr(judge, "evaluate", recording)
    path = digits / "checkpoints" / "balanced-seed3-dc.pt"
    for seed in (None, 3, 4):
        judge.judge(path, JudgeConfig(device="cpu", seed=seed))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], seen[2][0])
    assert [number for _, number in seen] == [stream(seed, "evaluate").initial_seed() for seed in (3, 3, 4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("linf", "0.1", 3, 0.03)),
        ({"steps": 9}, ("linf", "0.1", 9, 0.03)),
        ({"eps": "8/255"}, ("linf", "8/255", 3, 0.8 / 255)),  # the step of another ball is a tenth of its radius
        ({"norm": "linf"}, ("linf", "0.1", 3, 0.03)),
        ({"norm": "l1", "eps": 2.0}, ("l1", 2.0, 3, 0.2)),
        ({"norm": "l1", "eps": 2.0, "step_size": "1/2"}, ("l1", 2.0, 3, 0.5)),
        ({"step_size": 0.01}, ("linf", "0.1", 3, 0.01)),
    ],
)
def test_what_is_left_out_stays_as_it_was(options, expected):
    stored = TrainConfig(evaluate=EvaluateConfig(norm="linf", eps="0.1", steps=3, step_size=0.03))
    c = judge._changed(stored, JudgeConfig(device="cpu", **options))
    assert (c.evaluate.norm, c.evaluate.eps, c.evaluate.steps) == expected[:3]
    assert c.evaluate_step_size == pytest.approx(expected[3])


# --- what is refused


def copy_of(digits, path, **changes):
    """The checkpoint of a model with other entries, None for none."""
    content = checkpoint.load(digits / "checkpoints" / "balanced-seed3-dc.pt") | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def broken(digits, kind: str, path) -> None:
    whole = (digits / "checkpoints" / "balanced-seed3-dc.pt").read_bytes()
    content = checkpoint.load(digits / "checkpoints" / "balanced-seed3-dc.pt")
    if kind == "truncated":
        path.write_bytes(whole[:-300])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("weights")
    elif kind == "code":
        torch.save(torch.nn.Linear(2, 2), path)  # a pickled object, which is not run
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "state dict":
        torch.save(content["model"], path)
    elif kind == "no job":
        copy_of(digits, path, job=None)
    elif kind == "other job":
        copy_of(digits, path, job={"setting": "balanced", "seed": 3, "method": "dc"})
    elif kind == "unknown option":
        copy_of(digits, path, config=content["config"] | {"eval_steps": 5})
    elif kind == "unknown model":
        copy_of(digits, path, config=content["config"] | {"model": "mpl"})
    elif kind == "fewer weights":
        copy_of(digits, path, model={name: w for name, w in content["model"].items() if name != "5.bias"})
    elif kind == "other weights":
        copy_of(digits, path, model={name: w[:3] for name, w in content["model"].items()})


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "cannot be read: it is damaged or no checkpoint of armor"),
        ("empty", "cannot be read: it is damaged or no checkpoint of armor"),
        ("text", "cannot be read: it is damaged or no checkpoint of armor"),
        ("code", "cannot be read: it is damaged or no checkpoint of armor"),
        ("tensor", "is no checkpoint of `armor train`: it lacks model, config, job, final, input_shape, classes"),
        ("state dict", "is no checkpoint of `armor train`: it lacks model, config, job"),
        ("no job", "is no checkpoint of `armor train`: it lacks job"),
        ("other job", "holds a job of another version of armor"),
        ("unknown option", "holds a configuration of another version of armor (unknown option eval_steps)"),
        ("unknown model", "unknown model 'mpl' (do you mean mlp"),
        ("fewer weights", "do not fit model mlp: Error(s) in loading state_dict for Sequential: Missing key(s)"),
        ("other weights", "do not fit model mlp: Error(s) in loading state_dict for Sequential: size mismatch for 1."),
        ("missing", "there is no"),
        ("folder", "has no checkpoints/*.pt, so it is no folder of a run with models in it"),
    ],
)
def test_files_that_hold_no_model_of_ours_are_named_in_one_sentence(digits, tmp_path, capsys, kind, sentence):
    path = tmp_path / "model.pt"
    if kind == "folder":
        path.mkdir()
    broken(digits, kind, path)
    assert cli.main(["eval", str(path), "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("armor: ")
    assert len(error.splitlines()) == 1
    assert str(path) in error or kind == "unknown model"
    assert sentence in error
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "armor eval needs the checkpoint or the folder of a run"),
        (["PATH", "--stepz", "3"], "there is no option --stepz (do you mean --steps or --step-size"),
        (["PATH", "--steps", "many"], "steps must be a whole number, got 'many'"),
        (["PATH", "--steps", "0"], "evaluate.steps must be at least 1, got 0"),
        (["PATH", "--eps", "2"], "evaluate.eps must lie in (0, 1] because pixels lie in [0, 1], got '2'"),
        (["PATH", "--norm", "l3"], "norm must be one of linf, l2, l1, binary, got 'l3'"),
        (["PATH", "--norm", "l2"], "norm l2 needs --eps, because the run's radius 0.1 is one of linf"),
        (["PATH", "--norm", "binary"], "norm binary needs features that are 0 or 1"),
        (["PATH", "--test-size", "401"], "the test part has 400 samples, fewer than the 401 asked for"),
        (["PATH", "--test-size", "some"], "test_size must be a whole number or one of all, got 'some'"),
        (["PATH", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["PATH", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["PATH", "--data-dir", "x"], "data_dir has no use with data digits"),
        (["PATH", "--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
        (["PATH", "PATH"], "unexpected argument"),
    ],
)
def test_wrong_use_is_one_sentence_before_any_work(digits, capsys, monkeypatch, options, sentence):
    monkeypatch.setattr(judge, "evaluate", None)
    assert cli.main(["eval", *(option.replace("PATH", str(digits)) for option in options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("armor: ")
    assert sentence in error.splitlines()[-1]
    assert "Traceback" not in error


def test_data_of_another_shape_are_refused(tmp_path):
    content = table()
    np.savez(tmp_path / "set.npz", **content)
    c = train(tmp_path, data="npz", data_dir=str(tmp_path / "set.npz"), train_size=None, test_size=None)
    wider = {name: np.repeat(x, 2, axis=1) if x.ndim == 2 else x for name, x in content.items()}
    np.savez(tmp_path / "wider.npz", **wider)
    expected = r"is a model of samples \(5,\) of 2 classes, but the data have samples \(10,\) of 2 classes"
    with pytest.raises(ConfigError, match=expected):
        judge.judge(only(c.folder), JudgeConfig(device="cpu", data_dir=str(tmp_path / "wider.npz")))

"""`armor eval`: models that `armor train` left on disk, judged again with the attacks of their run or with others.

Model, data and attacks are those of the configuration in the checkpoint. What no option changes stays as it was, and if
none does, the result is the one that the run recorded.
"""

from __future__ import annotations

import dataclasses
import json as json_files
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from armor.training import checkpoint, data, report
from armor.training.config import ConfigError, Norm, ResolvedConfig, SpeedConfig, TrainConfig
from armor.training.evaluate import BATCH, METRICS, evaluate, image_passes
from armor.training.loop import Job, judging
from armor.training.resolve import resolve
from armor.training.run import environment
from armor.training.step import make_model, precision, stream

NEEDED = ("model", "config", "job", "final", "input_shape", "classes")


@dataclass
class JudgeConfig:
    """Judge trained models once more.

    Args:
        data_dir: folder of the data set; of npz, the file (default: that of the run)
        device: auto, cpu, cuda or cuda:N
        on: judge on the test part or on the validation part (default: that of the run)
        norm: of the ball: linf, l2, l1 or binary (default: that of the run)
        eps: radius of the ball, a number or a fraction such as 8/255 (default: that of the run)
        steps: of the two PGD attacks, one on cross-entropy and one on the margin loss (default: those of the run)
        step_size: of both (default: that of the run; of another ball eps / 10)
        test_size: evaluate on this many samples, or on all (default: as many as the run)
        seed: of the attacks' noise (default: the seed that the model was trained with)
        batch_size: samples that are attacked at once; it changes speed and memory, but not the attacks' noise
        json: file for the results and all settings
    """

    data_dir: str | None = None
    device: str = "auto"
    on: Literal["test", "validation"] | None = None
    norm: Norm | None = None
    eps: str | float | None = None
    steps: int | None = None
    step_size: str | float | None = None
    test_size: int | Literal["all"] | None = None
    seed: int | None = None
    batch_size: int = BATCH
    json: str | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint, with the options of `armor eval` in its configuration; the network is on the CPU."""

    path: pathlib.Path
    sha256: str
    config: ResolvedConfig
    job: Job
    final: dict[str, float]
    input_shape: tuple[int, ...]
    classes: int
    network: nn.Module


def judge(path: pathlib.Path, given: JudgeConfig) -> dict[str, Any]:
    """Judges the model of a checkpoint, or all models of a run folder; prints a table.

    Returns what the JSON file holds. Raises ConfigError, before a model is judged if a file or an option will not do.
    """
    for name, least in (("batch_size", 1), ("seed", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if given.json is not None:
        check_writable(pathlib.Path(given.json))
    models = sorted((_open(file, given) for file in _files(path)), key=_place)
    results = [_judge(model, given, f"{number} of {len(models)}") for number, model in enumerate(models, 1)]

    config = models[0].config
    found = {"models": results, **environment(config)}
    if given.json is not None:
        pathlib.Path(given.json).write_text(json_files.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(_table(results, config))
    return found


def check_writable(path: pathlib.Path) -> None:
    """Raises ConfigError if no file can be written there, so that nobody finds out after the work."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: it must be a file in an existing folder that may be written to")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.exists():
        raise ConfigError(f"there is no {path}; give the checkpoint or the folder of a run")
    if not path.is_dir():
        return [path]
    files = sorted((path / "checkpoints").glob("*.pt"))
    if not files:
        raise ConfigError(f"{path} has no checkpoints/*.pt, so it is no folder of a run with models in it")
    return files


class Stored(NamedTuple):
    """What the file knows of the data."""

    shape: tuple[int, ...]
    classes: int
    mean: Tensor
    std: Tensor


def _place(model: Model) -> tuple[int, int, bool]:
    """In the order of the run."""
    settings: list[str] = [*model.config.settings]
    return settings.index(model.job.setting), model.job.seed, model.job.weighting == "dc"


def _open(path: pathlib.Path, given: JudgeConfig) -> Model:
    """Raises ConfigError if the file holds no model that these options can judge."""
    content = checkpoint.load(path, needed=NEEDED)
    config = _changed(checkpoint.stored_config(content["config"], path, TrainConfig), given)
    try:
        job, shape, classes = Job(**content["job"]), tuple(content["input_shape"]), content["classes"]
    except TypeError as error:
        raise ConfigError(f"{path} holds a job of another version of armor ({error})") from None
    # The mean and deviation that count are among the weights.
    problem = Stored(shape, classes, torch.zeros(shape[0]), torch.ones(shape[0]))
    with torch.random.fork_rng(devices=[]):
        network = make_model(config, problem)
    try:
        network.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the weights in {path} do not fit model {config.model}: {reason}") from None
    return Model(path, checkpoint.sha256(path), config, job, content["final"], shape, classes, network.eval())


def _changed(stored: TrainConfig, given: JudgeConfig) -> ResolvedConfig:
    """The configuration of the run with the options of `armor eval` in it."""
    before, changes = stored.evaluate, {}
    for name in ("on", "norm", "steps"):
        changes[name] = getattr(before if getattr(given, name) is None else given, name)
    other_norm = given.norm is not None and given.norm != before.norm
    if other_norm and given.eps is None and given.norm != "binary":
        raise ConfigError(
            f"norm {given.norm} needs --eps, because the run's radius {before.eps} is one of {before.norm}"
        )
    if other_norm or given.eps is not None:
        changes |= {"eps": before.eps if given.eps is None else given.eps, "step_size": given.step_size}
    else:
        changes |= {"eps": before.eps, "step_size": before.step_size if given.step_size is None else given.step_size}
    test_size = None if given.test_size == "all" else stored.test_size if given.test_size is None else given.test_size
    # How it was trained may not be possible here; TensorFloat-32 was what it was judged in, too.
    on_gpu = given.device.startswith("cuda") or (given.device == "auto" and torch.cuda.is_available())
    return resolve(
        replace(
            stored,
            data_dir=stored.data_dir if given.data_dir is None else given.data_dir,
            device=given.device,
            evaluate=replace(before, **changes),
            test_size=test_size,
            speed=SpeedConfig(
                channels_last=stored.speed.channels_last,
                precision="tf32" if on_gpu and stored.speed.precision == "tf32" else "fp32",
            ),
            workers=None,
            threads=None,
        )
    )


def _judge(model: Model, given: JudgeConfig, title: str) -> dict[str, Any]:
    config, job = model.config, model.job
    seed = job.seed if given.seed is None else given.seed
    splits = data.load(config, stream(job.seed, "split"))  # never by another seed: that may hold what was trained on
    if (tuple(splits.shape), splits.classes) != (model.input_shape, model.classes):
        raise ConfigError(
            f"{model.path} is a model of samples {model.input_shape} of {model.classes} classes, but the data have "
            f"samples {tuple(splits.shape)} of {splits.classes} classes"
        )
    samples = getattr(splits, config.evaluate.on).to(config.device)
    network = model.network.to(config.device)
    passes = image_passes(len(samples), config.evaluate.steps)
    bar_format = "{percentage:3.0f}% |{bar:30}| {elapsed} < {remaining} {desc}"
    with precision(config), tqdm(total=passes, desc=f"{job}, {title}", bar_format=bar_format) as bar:
        try:
            final = evaluate(
                network,
                samples,
                **judging(config),
                generator=stream(seed, "evaluate", config.device),
                batch_size=given.batch_size,
                progress=bar.update,
            )
        except ValueError as error:  # such as a norm that the data do not allow
            raise ConfigError(f"{model.path} cannot be judged so: {error}") from None
    network.to("cpu")  # or the models of a run would gather on the device
    settings = {
        "data": config.data,
        "data_dir": config.data_dir,
        "on": config.evaluate.on,
        "samples": len(samples),
        "norm": config.evaluate.norm,
        "eps": config.evaluate.eps,
        "eps_float": config.evaluate_eps,
        "steps": config.evaluate.steps,
        "step_size": config.evaluate_step_size,
        "seed": seed,
        "batch_size": given.batch_size,
        "device": config.device,
    }
    return {
        "checkpoint": str(model.path),
        "sha256": model.sha256,
        "model": config.model,
        "method": config.method,
        "job": dataclasses.asdict(job),
        "settings": settings,
        "final": final,
        "final_of_run": model.final,
    }


def _table(results: Sequence[dict], config: ResolvedConfig) -> str:
    """A row per model and, of several seeds, their mean."""
    rows = [[pathlib.Path(result["checkpoint"]).stem, *_shares([result])] for result in results]
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["job"]["setting"], result["job"]["weighting"]), []).append(result)
    rows += [
        [f"{setting}, {weighting}: {len(group)} seeds", *_shares(group)]
        for (setting, weighting), group in groups.items()
        if len(group) > 1
    ]
    header = ["accuracy, %", *(report.metric_name(metric, config) for metric in METRICS)]
    settings = results[0]["settings"]
    seed = f"seed {settings['seed']}" if len({result["settings"]["seed"] for result in results}) == 1 else "their seeds"
    note = (
        f"{settings['samples']} samples of the {settings['on']} part of {config.data}, {report.ball(config)}, steps of "
        f"{settings['step_size']:.3g}, noise of {seed}."
    )
    spread = ["Of several seeds: mean ± standard deviation."] if len(rows) > len(results) else []
    return "\n".join([report.markdown(header, rows, "l" + "r" * len(METRICS)), "", note, *spread])


def _shares(results: Sequence[dict]) -> list[str]:
    return [report.with_spread([result["final"][metric] for result in results]) for metric in METRICS]

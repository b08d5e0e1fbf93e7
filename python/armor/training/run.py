"""A whole run: check, load, train every job, write the run folder, print the table.

Called by `armor train` and usable from Python as `armor.training.run(TrainConfig(...))`.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
import yaml

import armor
from armor.training import data, loop, report
from armor.training.config import ConfigError, ResolvedConfig, TrainConfig
from armor.training.loop import Job
from armor.training.resolve import resolve
from armor.training.step import make_model, make_view, stream
from armor.training.workers import run_jobs


def run(given: TrainConfig, *, overwrite: bool = False) -> dict:
    """Trains all jobs of the configuration and returns what metrics.json holds.

    Writes RUNS_DIR/NAME: config.yaml, metrics.json, table.md, checkpoints/*.pt and plots/; a folder that
    exists is replaced only if `overwrite` is true. Raises ConfigError before anything is trained or written
    if the run cannot work, JobError if a job fails.
    """
    config = resolve(given)
    splits = data.load(config, stream(config.first_seed, "split"))
    with torch.random.fork_rng(devices=[]):  # only to see that the model fits the data, before anything is made
        view = make_view(config, make_model(config, splits))
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    jobs = [Job(*job) for job in itertools.product(config.settings, seeds, config.weightings)]
    work: dict[str, int] = {
        setting: _work(setting, splits, config) for setting in config.settings
    }  # the same for every seed
    folder = _make_folder(config, overwrite)
    facts = _facts(config, seeds)
    _write(folder / "config.yaml", yaml.safe_dump({**asdict(config), "recorded": facts}, sort_keys=False))

    print(_announcement(config, len(jobs)), flush=True)
    if config.speed.fold and view.why_unfolded:
        print(f"The attack runs the model unfolded, because {view.why_unfolded}", flush=True)
    amounts = [work[job.setting] for job in jobs]
    runs = run_jobs(functools.partial(loop.run_job, config=config), jobs, amounts, config.workers, config.threads)

    summary = report.summarize(runs)
    metrics = {"config": asdict(config), "recorded": facts, "summary": summary, "runs": runs}
    table = report.table(summary, config)
    # allow_nan=False: NaN is not JSON, and other readers than Python's refuse the file.
    _write(folder / "metrics.json", json.dumps(_nan_to_none(metrics), indent=1, allow_nan=False))
    _write(folder / "table.md", table)
    report.plot(folder / "plots", runs, config)
    print(f"\n{table}\nWritten to {folder}: config.yaml, metrics.json, table.md, checkpoints/, plots/")
    return metrics


def _work(setting: str, splits: data.Splits, config: ResolvedConfig) -> int:
    train = data.apply_setting(splits.train, setting, config, stream(config.first_seed, "setting"))
    judged = getattr(splits, config.evaluate.on)
    return loop.image_passes(len(train), len(splits.validation), len(judged), config)


def _announcement(config: ResolvedConfig, count: int) -> str:
    models = "1 model" if count == 1 else f"{count} models"
    settings, seeds = ", ".join(config.settings), "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    names = " and ".join(config.weightings)
    return f"{models} on {config.device}: {config.data}, {config.method}, {settings} x {seeds} x {names}"


def _make_folder(config: ResolvedConfig, overwrite: bool) -> pathlib.Path:
    folder = config.folder
    if folder.exists() and not overwrite:
        raise ConfigError(f"the run folder {folder} exists; choose another --name or pass --overwrite")
    if folder.exists():
        # Only a folder that a run made is ever removed.
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder} has no config.yaml, so it is no earlier run and is not overwritten")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be made: {error.strerror}") from None
    return folder


def _facts(config: ResolvedConfig, seeds: range) -> dict:
    """What a reader needs to judge or repeat the run beside its configuration."""
    return {
        "eps": config.eps,
        "step_size": config.step_size,
        "evaluate_eps": config.evaluate_eps,
        "evaluate_step_size": config.evaluate_step_size,
        "seeds": list(seeds),
        **environment(config),
    }


def environment(config: ResolvedConfig) -> dict:
    """Versions, device and commit, of `armor train` and of `armor eval`."""
    packages = ["numpy"] + (["scikit-learn"] if config.data == "digits" else [])
    return {
        "versions": {
            "armor": armor.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in packages},
        },
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else "cpu",
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the repository the command runs in, with -dirty if it has changes; None outside of one."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _write(path: pathlib.Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and value != value else value

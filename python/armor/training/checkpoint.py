"""The file of a trained model: written whole or not at all, read without running code from it.

`stored_config` makes a configuration of the plain values that a checkpoint and metrics.json keep of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import tempfile
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from armor.training.config import ConfigError, TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def save(content: dict, path: pathlib.Path) -> None:
    """Writes tensors, numbers, strings and containers of them to `path`, replacing it in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because only within one file system is the renaming atomic.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: pathlib.Path, device: str = "cpu", needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of the file. Raises ConfigError if it cannot be read or lacks one of the needed entries."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of a file of any kind, the readers of zip and pickle raise nearly anything
        reason = error.strerror if isinstance(error, OSError) else "it is damaged or no checkpoint of armor"
        raise ConfigError(f"{path} cannot be read: {reason}") from error
    missing = [name for name in needed if name not in content] if isinstance(content, dict) else list(needed)
    if missing:
        raise ConfigError(f"{path} is no checkpoint of `armor train`: it lacks {', '.join(missing)}")
    return content


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal digest of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stored_config(values: Mapping[str, Any], source: object, kind: type[Config]) -> Config:
    """The configuration of which `dataclasses.asdict`, and perhaps JSON, made these values. Raises ConfigError."""
    try:
        return typing.cast(Config, _build(kind, values))
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{source} holds a configuration of another version of armor ({error})") from None


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    types, known = typing.get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}")
    arguments = dict(values)
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            arguments[name] = _build(types[name], value)
        elif types[name] == dict[int, float]:  # JSON has no other keys than strings
            arguments[name] = {int(key): number for key, number in value.items()}
    return kind(**arguments)

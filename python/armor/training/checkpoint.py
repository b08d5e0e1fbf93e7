"""The file of a trained model: written whole or not at all, read without running code from it."""

from __future__ import annotations

import os
import pathlib
import tempfile

import torch


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


def load(path: pathlib.Path, device: str = "cpu") -> dict:
    return torch.load(path, map_location=device, weights_only=True)

"""The `armor` command: `armor train`, `armor eval`, `armor report` and `armor info`.

What the user got wrong is answered with one sentence and exit status 2; armor/training/options.py reads the options.
"""

from __future__ import annotations

import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 a job failed, 2 wrong use, 130 interrupted, 141 unread."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["info"]:
        # Before any import of an extra, because a broken installation is what `info` is asked about.
        return _info({})
    try:
        status = _command(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `| head`; what is still buffered must not be written at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("armor"):
            raise
        command = " ".join(["armor", *arguments[:1]])
        return _say(f"{command} needs {error.name}; install armor with its `train` extra, pip install '.[train]'", 2)


def _command(arguments: list[str]) -> int:
    from armor.training import ConfigError
    from armor.training.options import parse
    from armor.training.workers import JobError

    try:
        command, options = parse(arguments)
        return {"train": _train, "eval": _eval, "report": _report, "info": _info}[command](options)
    except ConfigError as error:
        return _say(str(error), 2)
    except JobError as error:
        traceback.print_exception(error.__cause__)
        return _say(str(error), 1)
    except KeyboardInterrupt:
        kept = "; the checkpoints of finished jobs stay in the run folder" if arguments[0] == "train" else ""
        return _say(f"interrupted{kept}", 130)


def _train(options: dict[str, Any]) -> int:
    from armor.training import run

    run(options["config"], overwrite=options["overwrite"])
    return 0


def _eval(options: dict[str, Any]) -> int:
    from armor.training.judge import judge

    judge(pathlib.Path(options["path"]), options["config"])
    return 0


def _report(options: dict[str, Any]) -> int:
    from armor.training import report
    from armor.training.judge import check_writable

    folders = [pathlib.Path(folder) for folder in options["runs"]]
    if options["out"] is not None:
        check_writable(pathlib.Path(options["out"]))
    table = report.compare(folders)
    if options["out"] is not None:
        pathlib.Path(options["out"]).write_text(table, encoding="utf-8")
    print(table)
    if options["plots"]:
        for folder in folders:
            report.redraw(folder)
    return 0


def _info(options: dict[str, Any]) -> int:
    from armor.__main__ import main as print_environment

    print_environment()
    return 0


def _say(sentence: str, status: int) -> int:
    print(f"armor: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

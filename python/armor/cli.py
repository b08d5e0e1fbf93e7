"""The `armor` command: `armor train` and `armor info`.

Options, YAML files and --print_config come from the typed dataclasses of armor.training.config through
jsonargparse; what the user got wrong is answered with one sentence and exit status 2.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 a job failed, 2 wrong use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["info"]:
        # Before any import of an extra, because a broken installation is what `info` is asked about.
        return _info()
    try:
        return _train_command(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("armor"):
            raise
        return _say(f"armor train needs {error.name}; install armor with its `train` extra, pip install '.[train]'", 2)


def _train_command(arguments: list[str]) -> int:
    import jsonargparse

    from armor.training import ConfigError, TrainConfig, run
    from armor.training.workers import JobError

    # An abbreviation that is unique today is another option's tomorrow.
    strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    train = jsonargparse.ArgumentParser(
        description="Train with uniform weights and with the D^c loss, several seeds, and compare.", **strict
    )
    train.add_argument("--config", action="config", help="YAML file with any of the options below; later options win")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")
    train.add_class_arguments(TrainConfig, as_group=False)
    parser = jsonargparse.ArgumentParser(
        prog="armor", description="Distributionally robust adversarial training.", **strict
    )
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train, help="train with and without the D^c loss and compare")
    commands.add_subcommand("info", jsonargparse.ArgumentParser(), help="versions, backends and what is missing")

    try:
        options = parser.parse_args([_underscored(argument) for argument in arguments]).train
        fields = vars(train.instantiate(options))
        overwrite = fields.pop("overwrite")
        del fields["config"]
        run(TrainConfig(**fields), overwrite=overwrite)
    except jsonargparse.ArgumentError as error:
        return _say(_sentence(str(error)), 2)
    except ConfigError as error:
        return _say(str(error), 2)
    except JobError as error:
        traceback.print_exception(error.__cause__)
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("interrupted; the checkpoints of finished jobs stay in the run folder", 130)
    return 0


def _info() -> int:
    from armor.__main__ import main as print_environment

    print_environment()
    return 0


def _underscored(argument: str) -> str:
    """--data-dir for --data_dir: jsonargparse takes only the field's own spelling."""
    return re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), argument)


def _sentence(message: str) -> str:
    """jsonargparse's report of a value of the wrong type in a user's words; other messages on one line."""
    message = " ".join(message.split())
    wrong = re.fullmatch(r'Parser key "(.+?)": (.*) (?:Got|Given) value: (.*)', message)
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])", message)
    if not wrong or not expected:
        return message
    kinds = [name or f"one of {choices}" for name, choices in expected if name != "NoneType"]
    return f"{wrong[1]} must be {' or '.join(dict.fromkeys(kinds))}, got {wrong[3]!r}"


def _say(sentence: str, status: int) -> int:
    print(f"armor: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

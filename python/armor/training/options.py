"""Command line, presets and YAML files to typed options, through jsonargparse. Called by armor/cli.py.

The dataclasses TrainConfig and JudgeConfig are the options, and their docstrings are the help. What jsonargparse finds
wrong comes out as a ConfigError of one sentence.
"""

from __future__ import annotations

import argparse
import importlib.resources
import pathlib
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import jsonargparse
import yaml

from armor.training.config import ConfigError, TrainConfig
from armor.training.judge import JudgeConfig
from armor.training.models import nearest

PRESETS = importlib.resources.files("armor") / "presets"
COMMANDS = ("train", "eval", "report", "info")
NEEDS = {"eval": "the checkpoint or the folder of a run", "report": "the folders of finished runs"}
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping {KEY: VALUE, ...}",
    "list": "a list",
}
QUOTE = "'"
OVERVIEW = "Distributionally robust adversarial training."
TRAIN = (
    "Trains a model, or several seeds with and without re-weighting, and prints a table. All options override the "
    "preset, and later ones earlier ones. `armor train --preset help` lists the presets; --print-config shows what a "
    "command line amounts to."
)
EVAL = "Judges models of `armor train` once more, with the attacks of their run or with others."
REPORT = "Prints one table of finished runs, with the paired difference where a run has its control."


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its options; those of a dataclass are one, `config`.

    Raises ConfigError, and SystemExit after --help, --print-config and `--preset help`.
    """
    arguments = [_underscored(argument) for argument in arguments]
    if arguments[:1] == ["train"]:
        arguments = _with_preset(arguments)
    parser, kinds = _parser()
    try:
        found = parser.parse_args(arguments)
        command = found.command
        options = vars(kinds[command][0].instantiate(found[command])) if command in kinds else {}
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_sentence(str(error), arguments, kinds)) from None
    options.pop("config", None)
    kind = kinds[command][1] if command in kinds else None
    if kind is not None:
        fields = {name: options.pop(name) for name in kind.__dataclass_fields__}
        options["config"] = kind(**fields)
    return command, options


Kinds = dict[str, tuple[jsonargparse.ArgumentParser, Any]]


def _parser() -> tuple[jsonargparse.ArgumentParser, Kinds]:
    """The parser, and of each command its own and the dataclass of its options, if it has one."""
    # An abbreviation that is unique today is another option's tomorrow.
    strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _Help}

    train = jsonargparse.ArgumentParser(
        description=TRAIN, usage="armor train [--preset NAME] [--config FILE] [options]", **strict
    )
    train.add_argument("--config", action="config", help="YAML file with any of the options below; several are allowed")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")
    train.add_class_arguments(TrainConfig, as_group=False)

    judge = jsonargparse.ArgumentParser(description=EVAL, usage="armor eval CHECKPOINT_OR_RUN [options]", **strict)
    judge.add_argument("path", type=str, help="checkpoint of a run, or the folder of a run for all of its checkpoints")
    judge.add_class_arguments(JudgeConfig, as_group=False)

    report = jsonargparse.ArgumentParser(
        description=REPORT, usage="armor report RUN... [--out FILE] [--plots]", **strict
    )
    report.add_argument("runs", type=str, nargs="+", help="folders of finished runs")
    report.add_argument("--out", type=str, help="file for the table")
    report.add_argument("--plots", action="store_true", help="draw the plots of the runs again")

    parser = jsonargparse.ArgumentParser(prog="armor", description=OVERVIEW, usage="armor COMMAND [options]", **strict)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train, help="train models and compare them")
    commands.add_subcommand("eval", judge, help="judge trained models once more")
    commands.add_subcommand("report", report, help="one table of several runs")
    commands.add_subcommand(
        "info", jsonargparse.ArgumentParser(**strict), help="versions, backends and what is missing"
    )
    return parser, {"train": (train, TrainConfig), "eval": (judge, JudgeConfig), "report": (report, None)}


class _Help(jsonargparse.DefaultHelpFormatter):
    """Options with hyphens, and neither types nor defaults that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "(default" in text or action.default in (None, {}, argparse.SUPPRESS) or action.default is False:
            return text
        return f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = re.sub(r", --\w+\+ \w+$", "", super()._format_action_invocation(action))
        return re.sub(r"--[\w.]+", lambda option: option[0].replace("_", "-"), text)

    def _format_action(self, action: argparse.Action) -> str:
        # A whole group from a file of its own, and the record of an earlier run: both belong in YAML.
        hidden = action.help == "Path to a configuration file." or action.dest == "recorded"
        return "" if hidden else super()._format_action(action)


# ---- presets -------------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir() if path.name.endswith(".yaml"))


def _with_preset(arguments: list[str]) -> list[str]:
    """The arguments with the preset's file in front of all others and its name behind them."""
    rest, names, values = [], [], iter(arguments)
    for argument in values:
        option, equals, value = argument.partition("=")
        if option == "--preset":
            names.append(value if equals else next(values, ""))
        else:
            rest.append(argument)
    names = names or list(_presets_of_files(arguments))
    if not names:
        return arguments
    name = names[-1]
    if name == "help":
        _list_presets()
        raise SystemExit(0)
    if name not in preset_names():
        known = preset_names()
        wrong = f"there is no preset {name!r}{nearest(name, known)}" if name else "--preset needs a name"
        raise ConfigError(f"{wrong}; there are {', '.join(known)}")
    return [rest[0], "--config", str(PRESETS / f"{name}.yaml"), *rest[1:], "--preset", name]


def _presets_of_files(arguments: list[str]) -> Iterator[str]:
    """What YAML files call their preset; a file that cannot be read is left to jsonargparse."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        if option != "--config":
            continue
        try:
            content = yaml.safe_load(pathlib.Path(value or following).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{value or following} is no YAML: {' '.join(str(error).split())}") from None
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict):
            raise ConfigError(f"{value or following} must hold options, each as NAME: VALUE")
        if isinstance(content.get("preset"), str):
            yield content["preset"]


def _list_presets() -> None:
    """Each with what its file says of it before its traps."""
    for name in preset_names():
        comment = re.match(r"(#.*\n)*", (PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
        text = " ".join(line.removeprefix("#").strip() for line in (comment[0] if comment else "").splitlines())
        width = max(60, shutil.get_terminal_size().columns)
        short = text.partition(" Traps:")[0]
        print(textwrap.fill(short, width, initial_indent=f"{name:<22}", subsequent_indent=" " * 22))


# ---- sentences -----------------------------------------------------------------------------------------------------


def _underscored(argument: str) -> str:
    """--data-dir for --data_dir: jsonargparse takes only the field's own spelling."""
    return re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), argument)


def _sentence(message: str, arguments: list[str], kinds: Kinds) -> str:
    """jsonargparse's report of what is wrong in a user's words."""
    message = " ".join(message.split())
    command = arguments[0] if arguments else None
    actions = kinds[command][0]._actions if command in kinds else []
    types = {name: getattr(action, "_typehint", None) for action in actions for name in action.option_strings}
    known = [name.removeprefix("--") for name in types if name.startswith("--")]
    if command not in COMMANDS:
        given = "" if command is None else f", got {command!r}{nearest(command, COMMANDS)}"
        return f"armor needs a command, {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}{given}"
    if "the following arguments are required" in message:
        return f"armor {command} needs {NEEDS[command]}"
    if wrong := re.fullmatch(r"unrecognized arguments: ([^\s=]+).*", message):
        name = wrong[1].removeprefix("--").replace("_", "-")
        if not wrong[1].startswith("--"):
            return f"unexpected argument {wrong[1]!r}"
        return f"there is no option --{name}" + nearest("--" + name, ["--" + own.replace("_", "-") for own in known])
    if wrong := re.fullmatch(r"Subcommand '\w+' does not accept option '(.+?)'", message):
        return f"there is no option {wrong[1]}{nearest(wrong[1], known)}"
    if wrong := re.fullmatch(r"argument (--\w[\w.]*)(?:/\S+)?: expected (?:one|at least one) argument", message):
        value = KINDS["bool"] if types.get(wrong[1]) is bool else "a value"
        return f"{wrong[1].replace('_', '-')} needs {value}"
    if wrong := re.fullmatch(r'Parser key "(.+?)": Unable to load config .*', message):
        return f"{wrong[1]} is a group of options, such as --{wrong[1]}.NAME VALUE"
    if wrong := re.fullmatch(r'Parser key "(.+?)": invalid literal for int\(\) .*: (.+)', message):
        return f"{wrong[1]} must have whole numbers as its keys, got {wrong[2]}"
    typed = re.fullmatch(r'Parser key "(.+?)": (.*) (?:Got|Given) value: (.*)', message)
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])", message)
    if typed and expected:
        wanted = [
            KINDS.get(kind, kind) or f"one of {choices.replace(QUOTE, '')}"
            for kind, choices in dict.fromkeys(expected)
            if kind != "NoneType"
        ]
        return f"{typed[1]} must be {' or '.join(wanted)}, got {typed[3]!r}"
    return re.sub(r'^Parser key "(.+?)":', r"\1:", message)

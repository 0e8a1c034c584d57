"""How every command reads its options and ends.

Options are dataclasses parsed by `transformers.HfArgumentParser`, as TRL users expect. A mistake of
the user's is one line on stderr and exit status 2; Ctrl-C is 130; a fault of ours keeps its traceback.
"""

import argparse
import copy
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers.hf_argparser import HfArgumentParser

from training.exceptions import LoraloomError, nearest
from training.interrupts import Terminated

_METAVARS = {int: "N", float: "X", str: "TEXT"}
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_REFUSED_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, shows defaults, and says "[options]" where argparse would list them all."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        names = [
            str(action.metavar or action.dest).upper() for action in actions if _is_free(action)
        ]
        super().add_usage(" ".join(["%(prog)s", *names, "[options]"]), [], [], prefix)


def _is_free(action: argparse.Action) -> bool:
    return not action.option_strings


class CommandParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line and suggest the nearest option."""

    @staticmethod
    def _parse_dataclass_field(
        parser: argparse.ArgumentParser, field: dataclasses.Field[Any]
    ) -> None:
        # HfArgumentParser hands all metadata to argparse; what begins with "_" is ours (limits).
        limits = field.metadata.get("_limits", {})
        field = copy.copy(field)
        field.metadata = {  # pyright: ignore[reportAttributeAccessIssue]
            key: value for key, value in field.metadata.items() if not key.startswith("_")
        }
        HfArgumentParser._parse_dataclass_field(parser, field)
        action = parser._actions[-1]
        # `--max-steps` works as `--max_steps` does, but a page that shows both is hard to read.
        action.option_strings = [text for text in action.option_strings if "-" not in text[2:]]
        if limits and action.help:
            bounds = ", ".join(f"{_SIGNS[key]} {value}" for key, value in limits.items())
            action.help = f"{action.help.removesuffix('.')}; {bounds}."
        if not action.choices and action.type in _METAVARS:
            action.metavar = _METAVARS[action.type]  # pyright: ignore[reportArgumentType]
        elif action.nargs == "?":
            action.metavar = "BOOL"
        if action.type is int:
            action.type = _integer

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0].split("=")[0]
            message = f"{unknown} is not an option" + nearest(unknown, self._option_string_actions)
        self.exit(2, f"{self.prog}: {message}\n")


def _integer(text: str) -> int:
    """W&B hands quantised integers over as `15.0`."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


_integer.__name__ = "int"  # argparse names it in its error


def make_parser(prog: str, description: str, options: Sequence[type] = ()) -> CommandParser:
    """Parser with one option per dataclass field; add positional arguments to it as to any parser."""
    return CommandParser(
        list(options),  # pyright: ignore[reportArgumentType]
        prog=f"python -m {prog}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def parse(parser: CommandParser, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of the parser's dataclasses, then a namespace if it has positional arguments."""
    *parsed, remaining = parser.parse_args_into_dataclasses(
        args=args, look_for_args_file=False, return_remaining_strings=True
    )
    if remaining:
        parser.error("unrecognized arguments: " + " ".join(remaining))
    return tuple(parsed)


def run_command(main: Callable[[], object]) -> NoReturn:
    """Runs `main` and ends the process: 0, 2 for what the user can change, 130 or 143 for a signal."""
    try:
        main()
    except LoraloomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    except (OSError, SafetensorError) as error:
        problem = _disk_problem(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _disk_problem(error: OSError | SafetensorError) -> str | None:
    """What a full disk or a forbidden path is to the user; None for a fault of ours."""
    if isinstance(error, SafetensorError):  # which has the system's error in its text alone
        is_full = any(f"os error {code}" in str(error) for code in _FULL_DISK)
        return "output: no space left on the disk" if is_full else None
    if error.errno in _FULL_DISK:
        return f"{error.filename or 'output'}: no space left on the disk"
    if error.errno in _REFUSED_PATH and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None

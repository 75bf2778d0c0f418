"""The command line: arguments in, exit status out.

Exit status: 0, 1 for a failure at run time, 2 for wrong usage, 78 for a wrong configuration
(EX_CONFIG of sysexits.h, which systemd shows by that name).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from lpechod import __version__
from lpechod.engine import clock
from lpechod.ops.config import (
    DEFAULT_PATH,
    ConfigError,
    Problem,
    dump_config,
    json_schema,
    load_config,
)
from lpechod.ops.credentials import load
from lpechod.ops.loglines import with_priority
from lpechod.ops.logs import is_journal
from lpechod.ops.toml import format_path, nearest_line
from lpechod.ops.validity import concerns
from lpechod.process.serve import serve


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; the manual page is made from it."""
    parser = argparse.ArgumentParser(
        prog="lpechod",
        allow_abbrev=False,
        description="Echo length-prefixed frames over TCP, to measure and test against.",
        epilog="Exit status: 0 success, 1 failure at run time, 2 usage, 78 configuration.",
    )
    parser.add_argument("--version", action="version", version=f"lpechod {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "run the daemon in the foreground"),
        ("check", "check the configuration and print OK, or every problem"),
        ("config", "print the effective configuration as TOML"),
    ):
        command = commands.add_parser(
            name, help=text, description=_sentence(text), allow_abbrev=False
        )
        command.add_argument(
            "--config",
            type=Path,
            default=DEFAULT_PATH,
            metavar="FILE",
            help="configuration file (default: %(default)s)",
        )
    text = "print the JSON Schema of the configuration file, for editors"
    commands.add_parser("schema", help=text, description=_sentence(text))
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as end:
        if not end.code:
            _print("")  # argparse leaves help and version in the buffer.
        raise
    try:
        if arguments.command == "schema":
            return _print(json.dumps(json_schema(), indent=2) + "\n")
        if arguments.command == "serve":
            return serve(arguments.config)
        if arguments.command == "check":
            return _check(arguments.config)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # As TOML has to be, whatever the locale.
        return _print(dump_config(load_config(arguments.config)))
    except ConfigError as error:
        text = str(error)
        if is_journal(2, os.environ):
            text = with_priority(text, "error")
        with suppress(OSError):  # Nobody reads them, or not all. The status tells enough.
            _write(text + "\n", sys.stderr)
        return os.EX_CONFIG


def _check(path: Path) -> int:
    """Print that a configuration can be used, and what should be looked after all the same."""
    loaded = load(path)
    for concern in concerns(loaded.config, loaded.credentials, clock.wall()):
        line = nearest_line(loaded.lines, concern.key)
        warning = Problem(str(path), line, format_path(concern.key), f"warning: {concern.text}")
        with suppress(OSError):
            _write(f"{warning}\n", sys.stderr)
    return _print("OK\n")


def _print(text: str) -> int:
    """Write to standard output; that nobody reads it to the end (``| head``) is no failure."""
    try:
        _write(text, sys.stdout)
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit(f"lpechod: cannot write to standard output: {error.strerror}")
    return 0


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:
        return  # It was closed when the interpreter started; print() would take the other one.
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        # The interpreter would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise

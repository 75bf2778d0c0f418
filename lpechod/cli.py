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
from pathlib import Path
from typing import TextIO

from lpechod import __version__
from lpechod.ops.config import (
    DEFAULT_PATH,
    ConfigError,
    dump_config,
    json_schema,
    load_config,
)
from lpechod.ops.loglines import with_priority
from lpechod.ops.logs import is_journal
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
    except SystemExit:
        _print("")  # argparse leaves help and version in the buffer.
        raise
    try:
        if arguments.command == "schema":
            return _print(json.dumps(json_schema(), indent=2) + "\n")
        if arguments.command == "serve":
            return serve(arguments.config)
        config = load_config(arguments.config)
        return _print("OK\n" if arguments.command == "check" else dump_config(config))
    except ConfigError as error:
        text = str(error)
        if is_journal(2, os.environ):
            text = with_priority(text, "error")
        with suppress(OSError):  # Nobody reads them, or not all. The status tells enough.
            _write(text + "\n", sys.stderr)
        return os.EX_CONFIG


def _print(text: str) -> int:
    """Write to standard output; that nobody reads it to the end (``| head``) is no failure."""
    try:
        _write(text, sys.stdout)
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit(f"lpechod: cannot write to standard output: {error.strerror}")
    return 0


def _write(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        # The interpreter would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise

"""Writes the completion of the command line for bash and zsh, at the time a package is built.

    python3 packaging/completions.py DIRECTORY

shtab asks the parser what there is to complete. It has to be installed for this, and only for this.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

# What is completed is the command line beside this file, whatever else may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shtab

from lpechod.cli import build_parser

FILES = {"bash": "lpechod.bash", "zsh": "_lpechod"}


def main(arguments: list[str]) -> None:
    """Write a file for each shell into the directory that is the only argument."""
    if len(arguments) != 1:
        sys.exit("usage: python3 packaging/completions.py DIRECTORY")
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    parser = build_parser()
    for action in _actions(parser):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # Where shtab looks for it.
    for shell, name in FILES.items():
        (directory / name).write_text(shtab.complete(parser, shell).rstrip() + "\n")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield what the parser takes, and the parsers of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


if __name__ == "__main__":
    main(sys.argv[1:])

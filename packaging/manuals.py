"""Writes the manual pages lpechod(8) and lpechod.toml(5), at the time a package is built.

    python3 packaging/manuals.py DIRECTORY

They carry the date of SOURCE_DATE_EPOCH, or none: the same code gives the same bytes.
"""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

# What is described is the code beside this file, whatever else may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from manpages import configuration, daemon

from lpechod.cli import build_parser
from lpechod.ops.config import Config


def main(arguments: list[str]) -> None:
    """Write the pages into the directory that is the only argument."""
    if len(arguments) != 1:
        sys.exit("usage: python3 packaging/manuals.py DIRECTORY")
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = datetime.fromtimestamp(int(epoch), UTC).date().isoformat() if epoch else ""
    (directory / "lpechod.8").write_text(daemon.page(build_parser(), date))
    (directory / "lpechod.toml.5").write_text(configuration.page(Config, date))


if __name__ == "__main__":
    main(sys.argv[1:])

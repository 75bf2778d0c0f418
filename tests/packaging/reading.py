"""Manual pages, written as a package has them written, and read through man(1)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATE = "2026-11-23"
EPOCH = "1795476600"
"""The end of that day: east of Greenwich it is the next one."""

PATIENCE_SECONDS = 30
"""How long a program may take. It turns a hang into a failure, and that is all."""


def program(name: str, package: str) -> str:
    """Return the path of a program, or say which package of Debian has it."""
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: apt install {package}"
    return path


def output(*command: str, cwd: Path) -> str:
    """Return all that a program prints."""
    run = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return run.stdout


def write_pages(directory: Path, **environ: str) -> dict[str, bytes]:
    """Return the pages as a package would have them."""
    subprocess.run(
        [sys.executable, ROOT / "packaging" / "manuals.py", directory],
        cwd=directory.parent,
        env={"PATH": os.environ["PATH"], **environ},
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rendered(source: str, *, columns: int = 2000) -> str:
    """Return a page as a terminal shows it, each paragraph on one line; there are no warnings."""
    run = subprocess.run(
        [program("man", "man-db"), "--warnings", "-E", "UTF-8", "-l", "-"],
        input=source,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": str(columns)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert run.stderr == ""
    return run.stdout


def section(page: str, title: str) -> str:
    """Return what stands under a heading of a rendered page."""
    found = re.search(rf"^{re.escape(title)}\n((?:[ \t].*\n|\n)+)", page, re.MULTILINE)
    assert found, f"there is no section {title}"
    return found[1]


def items(text: str) -> dict[str, str]:
    """Return what stands under each tag of a section, with single spaces between sentences."""
    tagged: dict[str, str] = {}
    for block in re.split(r"^ {7}(?=\S)", text, flags=re.MULTILINE)[1:]:
        tag, _, body = block.partition("\n")
        if not body.startswith(" "):  # A short tag has its text beside it.
            tag, _, body = block.partition(" ")
        lines = (" ".join(line.split()) for line in body.splitlines())
        tagged[tag] = "\n".join(line for line in lines if line)
    return tagged

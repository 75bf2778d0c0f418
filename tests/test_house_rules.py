"""Rules of the house that no linter knows: how tests are written, and what lies in the repository.

As with the architecture, each check is shown to fail on made-up files first.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "config.example.toml",
    "deploy",
    "lpechod",
    "packaging",
    "pyproject.toml",
    "tests",
}

RUNTIME_DEPENDENCIES = {"h11", "prometheus-client", "pydantic", "structlog"}
"""Each is one more thing to trust, to package and to update: a new one is a decision."""

PATCHES_OF_THE_SURROUNDINGS = {"chdir", "context", "delenv", "setenv", "syspath_prepend"}
"""What of pytest's monkeypatch changes no code."""

UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")

# How tests are written. Each check yields what is wrong with one file, as "line: what".

Check = Callable[[ast.Module], Iterator[str]]


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Each test states in one sentence the behaviour that it is about."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("test_"):
            continue
        text = ast.get_docstring(node) or ""
        if not text:
            yield f"{node.lineno}: {node.name} does not say what it is about"
        elif not text.endswith(".") or "\n\n" in text or re.search(r"[.!?]\s+[A-Z]", text):
            yield f"{node.lineno}: {node.name} is not described by one sentence"


def sleeps(tree: ast.Module) -> Iterator[str]:
    """A test waits for something that happens, never for time to pass."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            used = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in {"time.sleep", "asyncio.sleep"} & set(used):
            yield f"{node.lineno}: {name}"


def mocks(tree: ast.Module) -> Iterator[str]:
    """Code of ours is tested as it is, with real collaborators."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            used = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.arg):
            used = [node.arg]
        else:
            continue
        if any({"mock", "mocker"} & set(name.split(".")) for name in used):
            yield f"{node.lineno}: mocks"


def patches(tree: ast.Module) -> Iterator[str]:
    """Nothing of ours is replaced while it is tested; the system around it may be."""
    ours = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "lpechod"
    }
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in {"monkeypatch", "patch"}
            and node.func.attr not in PATCHES_OF_THE_SURROUNDINGS
            and node.args
        ):
            continue
        target = re.split(r"\W+", ast.unparse(node.args[0]).lstrip("'\""))[0]
        if target in ours | {"lpechod"}:
            yield f"{node.lineno}: patches {ast.unparse(node.args[0])}"


CHECKS: tuple[Check, ...] = (docstrings, sleeps, mocks, patches)


@pytest.mark.parametrize("check", CHECKS)
def test_tests_are_written_so(check: Check) -> None:
    """Every file below tests passes the check, benchmarks aside: they do measure time."""
    wrong = [
        f"{path.relative_to(ROOT)}:{found}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.parent.name != "bench"
        for found in check(ast.parse(path.read_text()))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("check", "source", "found"),
    [
        (docstrings, 'def test_it():\n    """It works, and\n    well."""', None),
        (docstrings, "def helper(): pass", None),
        (docstrings, "def test_it(): pass", "1: test_it does not say what it is about"),
        (docstrings, 'async def test_it():\n    """It works"""', "1: test_it is not described"),
        (docstrings, 'def test_it():\n    """It works.\n\n    Well."""', "1: test_it is not"),
        (docstrings, 'class Test:\n    def test_it(self):\n        """It. Is."""', "2: test_it is"),
        (sleeps, "import time\ntime.monotonic()", None),
        (sleeps, "import time\ntime.sleep(0.1)", "2: time.sleep"),
        (sleeps, "import asyncio\nawait asyncio.sleep(0)", "2: asyncio.sleep"),
        (sleeps, "from time import monotonic, sleep", "1: time.sleep"),
        (mocks, "import mockingbird", None),
        (mocks, "import unittest.mock", "1: mocks"),
        (mocks, "from unittest import mock as m", "1: mocks"),
        (mocks, "from unittest.mock import patch", "1: mocks"),
        (mocks, "def test_it(mocker): pass", "1: mocks"),
        (patches, "monkeypatch.setenv('lpechod', 'x')\nmonkeypatch.chdir(lpechod)", None),
        (patches, "import select\nmonkeypatch.setattr(select, 'poll', None)", None),
        (patches, "monkeypatch.setattr('lpechod.cli.main', None)", "1: patches 'lpechod.cli"),
        (patches, "import lpechod.cli\nmonkeypatch.setattr(lpechod.cli, 'x', 1)", "2: patches"),
        (patches, "from lpechod import cli\nmonkeypatch.setattr(cli, 'x', 1)", "2: patches cli"),
        (
            patches,
            "from lpechod.net.listener import Listener as It\nmonkeypatch.delattr(It, 'close')",
            "2: patches It",
        ),
        (
            patches,
            "from lpechod import cli\nwith x as patch:\n    patch.setitem(cli.table, 'x', 1)",
            "3: patches cli.table",
        ),
    ],
)
def test_each_check_finds_what_it_is_for(check: Check, source: str, found: str | None) -> None:
    """A check finds what it is there to find, and passes what only looks like it."""
    results = list(check(ast.parse(source)))
    assert len(results) == (found is not None)
    assert all(result.startswith(found or "") for result in results)


# What lies in the repository.


def repository_files(root: Path) -> list[Path]:
    """List the files under version control, and those that would be with the next commit."""
    if not (root / ".git").exists():
        pytest.skip("this is no checkout, so nobody knows which files belong to it")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in files if (root / path).is_file()]


def strangers(files: list[Path]) -> set[str]:
    """Compare the top level with what belongs there; names with a dot in front are tools' own."""
    found = {path.parts[0] for path in files if not path.parts[0].startswith(".")}
    return found ^ TOP_LEVEL


def traces(root: Path, files: list[Path]) -> list[str]:
    """Find marks of unfinished work, and paths into somebody's home."""
    return [
        f"{path}:{number}: {found[0]}"
        for path in files
        for number, line in enumerate((root / path).read_text(errors="replace").splitlines(), 1)
        for found in [UNFINISHED.search(line) or HOME.search(line)]
        if found
    ]


def test_the_top_level_is_tidy() -> None:
    """The top level of the repository holds what belongs there, all of it, and nothing else."""
    assert strangers(repository_files(ROOT)) == set()


def test_the_repository_is_finished() -> None:
    """No file has a mark of unfinished work, or names a path in somebody's home."""
    assert traces(ROOT, repository_files(ROOT)) == []


def test_the_repository_is_looked_at(tmp_path: Path) -> None:
    """Strangers, absent files and traces are found, in files committed or not, but not ignored."""
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    unfinished, home = "TO" + "DO", str(Path("/") / "home" / "somebody")
    for name, text in {
        ".gitignore": "ignored\n",
        "LICENSE": f"fine\nat {home}/x\n",
        "notes.txt": f"# {unfinished}: more\n",
        "deploy/units": "fine, at /usr/share/home/x and METHODS\n",
        "ignored": f"{unfinished}\n",
        "data.bin": "\udcff\udcfe",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, errors="surrogateescape")
    subprocess.run(["git", "add", "LICENSE"], cwd=tmp_path, check=True)
    files = repository_files(tmp_path)
    assert strangers(files) == TOP_LEVEL - {"LICENSE", "deploy"} | {"notes.txt", "data.bin"}
    assert traces(tmp_path, sorted(files)) == [
        f"LICENSE:2: {home[:7]}",
        f"notes.txt:1: {unfinished}",
    ]


def test_runtime_dependencies() -> None:
    """The package needs these libraries at run time, each with a lower bound, and no others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(each.split(" ", 1) for each in project["dependencies"])
    assert bounds.keys() == RUNTIME_DEPENDENCIES
    assert all(bound.startswith(">= ") for bound in bounds.values())

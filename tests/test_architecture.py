"""The structure of the package, enforced from its source: who may import what, and how files look.

Folders are rings: a module may import from its own ring and from lower-numbered ones. The rules are
functions over parsed modules; each is shown to fail on a made-up package before the real one is
held to it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lpechod"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

RINGS = {"wire": 1, "engine": 2, "net": 3, "ops": 4, "process": 5, "cli": 6, "__main__": 6}

FORBIDDEN = {
    # Anything that can block, log or tell time: the protocol is pure.
    "wire": {
        "asyncio",
        "datetime",
        "logging",
        "os",
        "prometheus_client",
        "pydantic",
        "random",
        "select",
        "selectors",
        "signal",
        "socket",
        "ssl",
        "structlog",
        "threading",
        "time",
    },
    # The mechanism knows nothing of frames.
    "engine": {f"{PACKAGE}.wire", "pydantic"},
    # The inner rings receive plain values and never see a model.
    "net": {"pydantic"},
}

CLOCK = f"{PACKAGE}.engine.clock"
PRINTS = f"{PACKAGE}.cli"
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    is_package: bool
    source: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The folder below the package, or the module itself if it lies at the top."""
        return self.name.split(".")[1] if "." in self.name else ""

    def line(self, number: int) -> str:
        """Return a line of the source, counted from 1."""
        return self.source.splitlines()[number - 1]


@dataclass(frozen=True)
class Import:
    """An import of ``target``, which is run when the module is, unless it is ``deferred``."""

    target: str
    line: int
    deferred: bool


def load(root: Path) -> dict[str, Module]:
    """Parse every module of a package."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        source = path.read_text()
        modules[name] = Module(name, is_package, source, ast.parse(source))
    return modules


def imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """Find every import of a module, also those inside of functions."""
    deferred = {
        inner
        for node in ast.walk(module.tree)
        if isinstance(node, Function) or _is_for_types_only(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node in deferred)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module)
            for alias in node.names:
                # What is imported from a package may be one of its modules.
                inner = f"{origin}.{alias.name}"
                target = inner if inner in modules else origin
                yield Import(target, node.lineno, node in deferred)


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _origin(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    above = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*above, node.module] if node.module else above)


def _is_within(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}.")


# The rules. Each yields what is wrong, as "line: what".

Rule = Callable[[Module, dict[str, Module]], Iterator[str]]


def rings(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """A module imports from its own ring and from lower-numbered ones only."""
    if module.name == PACKAGE:
        ring = 0
    elif module.part in RINGS:
        ring = RINGS[module.part]
    else:
        yield f"1: {module.part} is in no ring"
        return
    for each in imports(module, modules):
        if _is_within(each.target, PACKAGE) and each.target != PACKAGE:
            theirs = RINGS.get(each.target.split(".")[1], 0)
            if theirs > ring:
                yield f"{each.line}: ring {ring} imports {each.target} of ring {theirs}"


def purity(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """A module imports nothing that its folder must not know."""
    for each in imports(module, modules):
        for name in sorted(FORBIDDEN.get(module.part, ())):
            if _is_within(each.target, name):
                yield f"{each.line}: {module.part} imports {each.target}"


def clocks(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """One module reads clocks; all others are given a time."""
    if module.name == CLOCK:
        return
    for each in imports(module, modules):
        if _is_within(each.target, "time"):
            yield f"{each.line}: imports time"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.search(r"\b(datetime|date)\.(now|utcnow|today)$", text) or text == "os.times":
                yield f"{node.lineno}: reads a clock, {text}"


def cycles(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """No module imports itself by way of others while it is being imported."""
    reached: set[str] = set()
    waiting = [module.name]
    while waiting:
        for each in imports(modules[waiting.pop()], modules):
            if each.deferred or each.target not in modules:
                continue
            if each.target == module.name:
                yield "1: imports itself by way of others"
                return
            if each.target not in reached:
                reached.add(each.target)
                waiting.append(each.target)


def names(module: Module, _modules: dict[str, Module]) -> Iterator[str]:
    """A module is named for what it does."""
    if module.name.rsplit(".", 1)[-1] in VAGUE_NAMES:
        yield "1: a name that says nothing"


def docstrings(module: Module, _modules: dict[str, Module]) -> Iterator[str]:
    """A module says why it exists."""
    if not (ast.get_docstring(module.tree) or "").strip():
        yield "1: no docstring"


def sizes(module: Module, _modules: dict[str, Module]) -> Iterator[str]:
    """A file or a function that has outgrown a reader is split."""
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines}: more than {MAX_FILE_LINES} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines"


def excepts(module: Module, _modules: dict[str, Module]) -> Iterator[str]:
    """Who catches everything says why, in the comment that lets the linter pass it."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else "everything"
        if re.search(r"\b(everything|Exception|BaseException)\b", caught) and not re.search(
            r"# noqa: (BLE001|E722) - \w", module.line(node.lineno)
        ):
            yield f"{node.lineno}: catches {caught} and does not say why"


def prints(module: Module, _modules: dict[str, Module]) -> Iterator[str]:
    """Only a command prints; a daemon logs."""
    if module.name == PRINTS:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"{node.lineno}: prints"


RULES: tuple[Rule, ...] = (
    rings,
    purity,
    clocks,
    cycles,
    names,
    docstrings,
    sizes,
    excepts,
    prints,
)


def violations(root: Path, rule: Rule) -> list[str]:
    """Hold every module of a package to a rule."""
    modules = load(root)
    return [
        f"{module.name}:{found}" for module in modules.values() for found in rule(module, modules)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    """No module of the package breaks a rule of its structure."""
    assert violations(ROOT, rule) == []


def test_the_package_is_looked_at() -> None:
    """The rules see the whole package: every ring, the command line and the clock are found."""
    modules = load(ROOT)
    assert {module.part for module in modules.values()} == {"", *RINGS}
    assert {CLOCK, PRINTS} < modules.keys()
    found = {each.target for module in modules.values() for each in imports(module, modules)}
    assert {f"{PACKAGE}.wire.states", "h11", "pydantic", "time"} < found


def make(directory: Path, files: dict[str, str]) -> Path:
    """Write a made-up package: sound modules in each ring, and the files given."""
    root = directory / PACKAGE
    sound = {
        "__init__.py": "",
        "__main__.py": f"from {PACKAGE} import cli\n",
        "cli.py": f"import {PACKAGE}.process.worker\nprint('OK')\n",
        "wire/__init__.py": "",
        "wire/frames.py": "from struct import Struct\n",
        "engine/__init__.py": "",
        "engine/clock.py": "import time\nnow = time.monotonic\n",
        "engine/loop.py": f"import select\nfrom {PACKAGE}.engine import clock\n",
        "net/__init__.py": "",
        "net/socket.py": f"import socket\nfrom {PACKAGE}.wire.frames import Struct\n",
        "ops/__init__.py": "",
        "ops/config.py": "import pydantic\nfrom datetime import datetime, UTC\n",
        "process/__init__.py": "",
        "process/worker.py": f"import {PACKAGE}.ops.config\nfrom ..net import socket\n",
    }
    for name, source in (sound | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name in files else f'"""What {name} is for."""\n\n{source}')
    return root


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_package_passes(tmp_path: Path, rule: Rule) -> None:
    """A package that keeps all rules is not complained about."""
    assert violations(make(tmp_path, {}), rule) == []


LONG = "def long() -> None:\n" + "    pass\n" * 50

UNSOUND: list[tuple[Rule, dict[str, str], list[str]]] = [
    (
        rings,
        {"wire/a.py": "import lpechod.engine.loop\n"},
        ["lpechod.wire.a:1: ring 1 imports lpechod.engine.loop of ring 2"],
    ),
    (
        rings,
        {"net/a.py": "from ..ops import config\n"},
        ["lpechod.net.a:1: ring 3 imports lpechod.ops.config of ring 4"],
    ),
    (
        rings,
        {"net/__init__.py": "from ..ops import config\n"},
        ["lpechod.net:1: ring 3 imports lpechod.ops.config of ring 4"],
    ),
    (
        rings,
        {"ops/a.py": "def late():\n    from lpechod import cli\n"},
        ["lpechod.ops.a:2: ring 4 imports lpechod.cli of ring 6"],
    ),
    (
        rings,
        {"__init__.py": "from lpechod.wire.frames import Struct\n"},
        ["lpechod:1: ring 0 imports lpechod.wire.frames of ring 1"],
    ),
    (rings, {"extra/a.py": ""}, ["lpechod.extra.a:1: extra is in no ring"]),
    *(
        (
            purity,
            {"wire/a.py": f"from {module} import anything\n"},
            [f"lpechod.wire.a:1: wire imports {module}"],
        )
        for module in sorted(FORBIDDEN["wire"])
    ),
    (purity, {"wire/a.py": "import os.path\n"}, ["lpechod.wire.a:1: wire imports os.path"]),
    (
        purity,
        {"engine/a.py": "from lpechod.wire import frames\n"},
        ["lpechod.engine.a:1: engine imports lpechod.wire.frames"],
    ),
    (
        purity,
        {"engine/a.py": "from ..wire import frames\n"},
        ["lpechod.engine.a:1: engine imports lpechod.wire.frames"],
    ),
    (
        purity,
        {"net/a.py": "if True:\n    import pydantic.types\n"},
        ["lpechod.net.a:2: net imports pydantic.types"],
    ),
    (clocks, {"ops/a.py": "import time\n"}, ["lpechod.ops.a:1: imports time"]),
    (clocks, {"ops/a.py": "from time import sleep\n"}, ["lpechod.ops.a:1: imports time"]),
    (
        clocks,
        {"ops/a.py": "import datetime\n\ndatetime.datetime.now()\n"},
        ["lpechod.ops.a:3: reads a clock, datetime.datetime.now"],
    ),
    (
        clocks,
        {"cli.py": "from datetime import date\nread = date.today\n"},
        ["lpechod.cli:2: reads a clock, date.today"],
    ),
    (
        cycles,
        {
            "ops/a.py": "import lpechod.ops.b\n",
            "ops/b.py": "from lpechod.ops import c\n",
            "ops/c.py": "from .a import anything\n",
            "ops/d.py": "import lpechod.ops.a\n",
        },
        [f"lpechod.ops.{name}:1: imports itself by way of others" for name in "abc"],
    ),
    (
        cycles,
        {
            "ops/a.py": "from typing import TYPE_CHECKING\nimport lpechod.ops.b\n",
            "ops/b.py": "def late():\n    import lpechod.ops.a\n"
            "if TYPE_CHECKING:\n    import lpechod.ops.a\n",
        },
        [],
    ),
    *(
        (
            names,
            {f"net/{name}.py": ""},
            [f"lpechod.net.{name}:1: a name that says nothing"],
        )
        for name in ("common", "helpers", "manager", "misc", "utils")
    ),
    (names, {"net/utils/__init__.py": ""}, ["lpechod.net.utils:1: a name that says nothing"]),
    (docstrings, {"net/a.py": "import socket\n"}, ["lpechod.net.a:1: no docstring"]),
    (docstrings, {"net/__init__.py": '"""  """\n'}, ["lpechod.net:1: no docstring"]),
    (sizes, {"net/a.py": "\n" * 401}, ["lpechod.net.a:401: more than 400 lines"]),
    (sizes, {"net/a.py": "\n" * 400}, []),
    (sizes, {"net/a.py": f"\n{LONG}"}, ["lpechod.net.a:2: long has 51 lines"]),
    (sizes, {"net/a.py": LONG.replace("    pass\n", "", 1)}, []),
    (
        excepts,
        {"net/a.py": "try:\n    pass\nexcept:\n    pass\n"},
        ["lpechod.net.a:3: catches everything and does not say why"],
    ),
    (
        excepts,
        {"net/a.py": "try:\n    pass\nexcept (OSError, Exception):  # noqa: BLE001\n    pass\n"},
        ["lpechod.net.a:3: catches (OSError, Exception) and does not say why"],
    ),
    (
        excepts,
        {"net/a.py": "try:\n    pass\nexcept BaseException as error:\n    raise\n"},
        ["lpechod.net.a:3: catches BaseException and does not say why"],
    ),
    (
        excepts,
        {
            "net/a.py": "try:\n    pass\n"
            "except Exception:  # noqa: BLE001 - a defect ends its own source only.\n    pass\n"
        },
        [],
    ),
    (prints, {"net/a.py": "\nprint('hello')\n"}, ["lpechod.net.a:2: prints"]),
    (prints, {"net/a.py": "say = print\n"}, ["lpechod.net.a:1: prints"]),
]


@pytest.mark.parametrize(("rule", "files", "expected"), UNSOUND)
def test_an_unsound_package_is_found(
    tmp_path: Path, rule: Rule, files: dict[str, str], expected: list[str]
) -> None:
    """Each rule finds what breaks it, where it stands, and nothing else."""
    assert violations(make(tmp_path, files), rule) == expected


def test_each_rule_is_shown_to_fail() -> None:
    """No rule is trusted that has not found anything."""
    assert {rule for rule, _, expected in UNSOUND if expected} == set(RULES)

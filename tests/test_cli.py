"""The command line, run as a process: what it prints where, and with which status it ends."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from lpechod import __version__
from lpechod.ops.config import load_config
from tests.certificates import issue

PATIENCE_SECONDS = 20
"""How long a command may take. It turns a hang into a failure, and that is all."""

EXAMPLE = Path(__file__).resolve().parent.parent / "config.example.toml"
COMMAND = (sys.executable, "-m", "lpechod")
COMMANDS = ("serve", "check", "config", "schema")

ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Output is buffered, as it is where nobody has asked for the contrary: it may fail late."""

UNMEASURED = {name: text for name, text in ENVIRONMENT.items() if not name.startswith("COVERAGE_")}

NOBODY = 65534
_AS_NOBODY = f"""\
import os, sys, lpechod.cli
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
sys.exit(lpechod.cli.main(sys.argv[1:]))
"""
AS_NOBODY = (sys.executable, "-c", _AS_NOBODY)
"""Runs the command line without root's power to open everything. It is imported first: the
interpreter itself may lie where only root can read it. Its coverage can't be measured: nobody may
not write the data."""

FAULTS = """\
[server]
worker = 2
drain_timeout = "soon"

[[listen]]
address = "9000"
tls = true

[limits]
max_frame = "1 MiB"
max_connections = -1

[timeout]
idle = 5
"""


def run(
    *arguments: str | Path,
    command: Sequence[str] = COMMAND,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    journal: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``journal`` is what systemd would say of its journal."""
    environment = ENVIRONMENT if command is COMMAND else UNMEASURED
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment | ({"JOURNAL_STREAM": journal} if journal else {}),
        check=False,
    )


def outcome(ended: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    """Return status, standard output and standard error."""
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(name="open_directory")
def _open_directory() -> Iterator[Path]:
    """A directory that everybody can enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture(name="unread")
def _unread() -> Iterator[int]:
    """The writing end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


# What is printed.


def test_version() -> None:
    """--version prints name and version, and nothing else."""
    assert outcome(run("--version")) == (0, f"lpechod {__version__}\n", "")


def test_help() -> None:
    """--help names every command and every exit status."""
    status, printed, complaint = outcome(run("--help"))
    assert (status, complaint) == (0, "")
    assert all(re.search(rf"^ +{command} ", printed, re.MULTILINE) for command in COMMANDS)
    assert "Exit status: 0 success, 1 failure at run time, 2 usage, 78 configuration." in printed


def test_help_of_a_command() -> None:
    """--help of a command that reads a file names the file it reads by default."""
    status, printed, complaint = outcome(run("serve", "--help"))
    assert (status, complaint) == (0, "")
    assert "/etc/lpechod/config.toml" in printed


def test_check_of_a_good_file() -> None:
    """A configuration that can be used is OK."""
    assert outcome(run("check", "--config", EXAMPLE)) == (0, "OK\n", "")


def test_check_of_files(tmp_path: Path) -> None:
    """Files that can't be used are problems with line and key; `config` does not look at them."""
    path = tmp_path / "config.toml"
    path.write_text('[metrics]\nbearer_token_file = "/none"\n')
    problem = "/none can't be read: No such file or directory"
    expected = (78, "", f"{path}:2: metrics.bearer_token_file: {problem}\n")
    assert outcome(run("check", "--config", path)) == expected
    assert outcome(run("serve", "--config", path)) == expected
    assert run("config", "--config", path).returncode == 0


def test_a_configuration_is_printed_as_it_has_to_be_written(tmp_path: Path) -> None:
    """TOML is UTF-8, whatever the locale would have."""
    path = tmp_path / "config.toml"
    path.write_text('[[listen]]\naddress = "unix:/run/\u00fc.sock"\n', encoding="utf-8")
    ended = subprocess.run(
        [*COMMAND, "config", "--config", str(path)],
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert "unix:/run/\u00fc.sock" in ended.stdout.decode("utf-8")


def test_check_of_a_file_without_permission(open_directory: Path) -> None:
    """A key that the user may not read is a problem, with the reason."""
    issued = issue(open_directory)
    issued.key.chmod(0o000)
    issued.certificate.chmod(0o644)
    path = open_directory / "config.toml"
    path.write_text(f"[[listen]]\ntls = {issued.table()}\n")
    path.chmod(0o644)
    problem = f"{path}:2: listen[0].tls.key: {issued.key} can't be read: Permission denied\n"
    assert outcome(run("check", "--config", path, command=AS_NOBODY)) == (78, "", problem)


def test_check_warns(tmp_path: Path) -> None:
    """What will be trouble is said on standard error, and the file is OK all the same."""
    issued = issue(tmp_path, after=-1)
    issued.key.chmod(0o604)
    path = tmp_path / "config.toml"
    path.write_text(f"[[listen]]\n[listen.tls]\n{issued.lines()}")
    status, printed, complaint = outcome(run("check", "--config", path))
    assert (status, printed) == (0, "OK\n")
    certificate, key = complaint.splitlines()
    assert re.fullmatch(
        rf"{path}:3: listen\[0\]\.tls\.certificate: warning: a certificate in "
        rf"{issued.certificate} expired on \d{{4}}-\d\d-\d\d \d\d:\d\d UTC; renew it",
        certificate,
    )
    assert key == (
        f"{path}:4: listen[0].tls.key: warning: {issued.key} is readable by everybody; chmod o-r"
    )


def test_warnings_that_nobody_reads(tmp_path: Path, unread: int) -> None:
    """That nobody reads the warnings does not change the outcome."""
    issued = issue(tmp_path, after=-1)
    path = tmp_path / "config.toml"
    path.write_text(f"[[listen]]\ntls = {issued.table()}\n")
    ended = run("check", "--config", path, stderr=unread)
    assert (ended.returncode, ended.stdout) == (0, "OK\n")


@pytest.mark.parametrize("command", ["serve", "check", "config"])
def test_faults(tmp_path: Path, command: str) -> None:
    """Every command reports every fault, one line each, on standard error with status 78."""
    path = tmp_path / "faults.toml"
    path.write_text(FAULTS)
    status, printed, complaint = outcome(run(command, "--config", path))
    assert (status, printed) == (78, "")
    assert complaint.splitlines() == [
        f"{path}:2: server.worker: unknown key (did you mean workers?)",
        f"{path}:3: server.drain_timeout: {_after(complaint, 'server.drain_timeout')}",
        f'{path}:6: listen[0].address: "9000" has no colon; write ":9000" for every interface',
        f"{path}:7: listen[0].tls: expected a table, found true",
        f"{path}:11: limits.max_connections: expected at least 1, found -1",
        f"{path}:13: timeout: unknown key (did you mean timeouts?)",
    ]


def test_faults_in_the_journal(tmp_path: Path) -> None:
    """In the journal every fault is an error of its own."""
    path = tmp_path / "faults.toml"
    path.write_text(FAULTS)
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as journal:
        pipe = os.fstat(writer)
        run("serve", "--config", path, stderr=writer, journal=f"{pipe.st_dev}:{pipe.st_ino}")
        os.close(writer)
        lines = journal.read().splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"<3>{path}:") for line in lines)


def _after(text: str, key: str) -> str:
    (line,) = [line for line in text.splitlines() if key in line]
    return line.partition(f"{key}: ")[2]


def test_config_loads_back(tmp_path: Path) -> None:
    """The effective configuration is a file that means the same, and prints as itself."""
    source, copy = tmp_path / "source.toml", tmp_path / "copy.toml"
    source.write_text(
        '[[listen]]\naddress = ":9001"\n[[listen]]\naddress = "unix:/run/echo.sock"\nbacklog = 7\n'
        '[timeouts]\nidle = 90\nlifetime = "1d"\n[limits]\nmax_frame = 2000\n'
        '[metrics]\naddress = "off"\n'
    )
    status, printed, complaint = outcome(run("config", "--config", source))
    assert (status, complaint) == (0, "")
    copy.write_text(printed)
    assert load_config(copy) == load_config(source)
    assert run("config", "--config", copy).stdout == printed


@pytest.fixture(name="schema", scope="module")
def _schema() -> dict[str, Any]:
    status, printed, complaint = outcome(run("schema"))
    assert (status, complaint) == (0, "")
    schema: dict[str, Any] = json.loads(printed)
    return schema


def test_schema_accepts_the_example(schema: dict[str, Any]) -> None:
    """The schema is JSON, accepts the example file, and knows each of its keys."""
    example = tomllib.loads(EXAMPLE.read_text())
    validate(example, schema, schema)
    assert schema["properties"].keys() == example.keys()
    for table, content in example.items():
        shape = resolve(schema["properties"][table], schema)
        keys = content
        if isinstance(content, list):
            shape, keys = resolve(shape["items"], schema), content[0]
        shown = {key for key, of in shape["properties"].items() if "default" in of}
        assert shown == keys.keys()


@pytest.mark.parametrize(
    "text",
    [
        "surprise = 1",
        "[server]\nworker = 1",
        "[server]\nworkers = true",
        "listen = []",
        '[limits]\nmax_connections = "many"',
        "[limits]\nmax_connections = 0",
        '[log]\nlevel = "loud"',
        "[metrics]\naddress = 10862",
        '[metrics]\nbearer_token_file = "metrics.token"',
        "[[listen]]\ntls = true",
        '[metrics.tls]\ncertificate = "/a"\nkey = "/b"\nciphers = "x"',
        '[metrics.tls]\ncertificate = "/a"',
    ],
)
def test_schema_rejects_mistakes(schema: dict[str, Any], text: str) -> None:
    """An editor that goes by the schema marks an unknown key, a wrong type, a value too small."""
    with pytest.raises(AssertionError):
        validate(tomllib.loads(text), schema, schema)


KINDS: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def resolve(shape: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference within the schema."""
    if "$ref" not in shape:
        return shape
    for step in shape["$ref"].removeprefix("#/").split("/"):
        schema = schema[step]
    return schema


def validate(value: object, shape: dict[str, Any], schema: dict[str, Any]) -> None:
    """Check a value against the words of JSON Schema that ours has."""
    shape = resolve(shape, schema)
    known = {"$defs", "$schema", "additionalProperties", "default", "description", "enum"}
    known |= {"examples", "exclusiveMinimum", "items", "maximum", "minimum", "minItems", "pattern"}
    known |= {"properties", "required", "title", "type"}
    assert not shape.keys() - known, "a word nobody checks"
    kinds = shape.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    assert any(isinstance(value, KINDS[kind]) for kind in kinds)
    assert not isinstance(value, bool) or "boolean" in kinds
    assert value in shape.get("enum", [value])
    if isinstance(value, str):
        assert re.search(shape.get("pattern", ""), value)
    elif isinstance(value, int | float):
        assert shape.get("minimum", value) <= value <= shape.get("maximum", value)
        assert value > shape.get("exclusiveMinimum", value - 1)
    elif isinstance(value, list):
        assert len(value) >= shape.get("minItems", 0)
        for item in value:
            validate(item, shape["items"], schema)
    elif isinstance(value, dict):
        assert shape["additionalProperties"] is False
        assert {*shape.get("required", ())} <= value.keys() <= shape["properties"].keys()
        for key, item in value.items():
            validate(item, shape["properties"][key], schema)


# Wrong usage, and files that are none.


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "start",
        "serve --port 9000",
        "check --config",
        "schema --config FILE",
    ],
)
def test_wrong_usage(arguments: str) -> None:
    """Wrong usage is explained on standard error, with status 2."""
    status, printed, complaint = outcome(run(*shlex.split(arguments)))
    assert (status, printed) == (2, "")
    assert complaint.startswith("usage: lpechod ")
    assert "\nlpechod" in complaint
    assert "error: " in complaint


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is a problem of the configuration, said in one line."""
    path = tmp_path / "missing.toml"
    status, printed, complaint = outcome(run("serve", "--config", path))
    assert (status, printed) == (78, "")
    assert complaint.startswith(f"{path}: can't be read: No such file or directory; ")
    assert complaint.count("\n") == 1


def test_directory(tmp_path: Path) -> None:
    """A directory is no configuration."""
    status, printed, complaint = outcome(run("check", "--config", tmp_path))
    assert (status, printed) == (78, "")
    assert complaint.startswith(f"{tmp_path}: can't be read: Is a directory; ")
    assert complaint.count("\n") == 1


def test_unreadable_file(open_directory: Path) -> None:
    """A file that the user may not read is named, with whom to let read it."""
    path = open_directory / "secret.toml"
    path.touch(0o000)
    status, printed, complaint = outcome(run("check", "--config", path, command=AS_NOBODY))
    assert (status, printed) == (78, "")
    assert complaint == (
        f"{path}: can't be read: Permission denied; "
        "the user that lpechod runs as must be able to read it\n"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"[server\n", 1), (b"[server]\nworkers = 1\nworkers = 2\n", 3), (b"\n# \xff\n", 2)],
)
def test_malformed_file(tmp_path: Path, content: bytes, line: int) -> None:
    """What is not TOML, or not even text, is one problem with its line."""
    path = tmp_path / "malformed.toml"
    path.write_bytes(content)
    status, printed, complaint = outcome(run("check", "--config", path))
    assert (status, printed) == (78, "")
    assert complaint.startswith(f"{path}:{line}: ")
    assert complaint.count("\n") == 1


# Output that goes nowhere.


PRINTING = ("--version", "--help", "schema", f"config --config {EXAMPLE}")


@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_nobody_reads(unread: int, arguments: str) -> None:
    """That the reader of a pipe has gone (`| head`) is no failure, and nothing is said about it."""
    ended = run(*shlex.split(arguments), stdout=unread)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_head() -> None:
    """`lpechod schema | head -n 1` prints one line and nothing else."""
    ended = run(command=("sh", "-c", f"{shlex.join(COMMAND)} schema | head -n 1"))
    assert outcome(ended) == (0, "{\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this platform has no /dev/full")
@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_can_not_be_written(arguments: str) -> None:
    """A full disk is a failure, said in one line."""
    with Path("/dev/full").open("wb") as full:
        ended = run(*shlex.split(arguments), stdout=full)
    complaint = "lpechod: cannot write to standard output: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, complaint)


def test_problems_that_nobody_reads(tmp_path: Path, unread: int) -> None:
    """The status tells of a wrong configuration even if nobody reads the problems."""
    path = tmp_path / "faults.toml"
    path.write_text(FAULTS)
    assert run("check", "--config", path, stdout=unread, stderr=unread).returncode == 78


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this platform has no /dev/full")
def test_wrong_usage_into_a_full_disk() -> None:
    """The status stays that of a wrong usage, which is no output."""
    with Path("/dev/full").open("wb") as full:
        ended = run("bogus", stdout=full)
    assert ended.returncode == 2
    assert "cannot write" not in ended.stderr


def test_closed_standard_error(tmp_path: Path) -> None:
    """Problems that can't be shown do not end up among the output."""
    path = tmp_path / "faults.toml"
    path.write_text(FAULTS)
    script = f"{shlex.join(COMMAND)} config --config {shlex.quote(str(path))} 2>&-"
    assert outcome(run(command=("sh", "-c", script))) == (78, "", "")


def test_closed_standard_output() -> None:
    """A closed standard output is no failure of a check."""
    script = f"{shlex.join(COMMAND)} check --config {shlex.quote(str(EXAMPLE))} >&-"
    assert outcome(run(command=("sh", "-c", script))) == (0, "", "")


# Addresses that can't be had.


def problems(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what `serve` complained about, after checking that it has done nothing else."""
    assert (ended.returncode, ended.stdout) == (1, "")
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert {(line["event"], line["level"]) for line in lines} == {("listen_failed", "error")}
    return [line["problem"] for line in lines]


def test_addresses_in_use(tmp_path: Path) -> None:
    """Every address that is taken is named with the reason at once, those of metrics included."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        one, two, metrics = [f"127.0.0.1:{each.getsockname()[1]}" for each in taken]
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(str(tmp_path / "taken.sock"))
        local.listen()
        config = tmp_path / "config.toml"
        config.write_text(
            "".join(
                f'[[listen]]\naddress = "{address}"\n'
                for address in (one, "127.0.0.1:0", f"unix:{tmp_path}/new.sock", two)
            )
            + f'[[listen]]\naddress = "unix:{tmp_path}/taken.sock"\n'
            f'[metrics]\naddress = "{metrics}"\n'
        )
        found = problems(run("serve", "--config", config))
    named = [problem.partition("cannot listen on ")[2].partition(": ") for problem in found]
    assert [address for address, _, _ in named] == [
        one,
        two,
        f"unix:{tmp_path}/taken.sock",
        metrics,
    ]
    assert all(reason.startswith("Address already in use") for _, _, reason in named)
    assert not (tmp_path / "new.sock").exists()
    assert (tmp_path / "taken.sock").exists()


@pytest.mark.parametrize("table", ["[[listen]]", "[metrics]"])
def test_unix_socket_in_a_missing_directory(tmp_path: Path, table: str) -> None:
    """A UNIX socket in a directory that is not there is named with the reason."""
    path = tmp_path / "missing" / "echo.sock"
    config = tmp_path / "config.toml"
    other = "[metrics]" if table == "[[listen]]" else "[[listen]]"
    config.write_text(f'{table}\naddress = "unix:{path}"\n{other}\naddress = "127.0.0.1:0"\n')
    (problem,) = problems(run("serve", "--config", config))
    assert problem.startswith(f"cannot listen on unix:{path}: No such file or directory")


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_unix_socket_without_permission(open_directory: Path, mode: int) -> None:
    """A UNIX socket where the user may not write, or not even look, is named with the reason."""
    closed = open_directory / "closed"
    closed.mkdir()
    path = closed / "echo.sock"
    config = open_directory / "config.toml"
    config.write_text(f'[[listen]]\naddress = "unix:{path}"\n[metrics]\naddress = "off"\n')
    config.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(closed, NOBODY, NOBODY)
    closed.chmod(mode)
    (problem,) = problems(run("serve", "--config", config, command=AS_NOBODY))
    closed.chmod(0o700)
    assert problem.startswith(f"cannot listen on unix:{path}: Permission denied")


def test_a_file_in_the_way_of_a_socket(tmp_path: Path) -> None:
    """A file that is no socket is neither replaced nor removed."""
    path = tmp_path / "precious"
    path.write_text("data")
    config = tmp_path / "config.toml"
    config.write_text(f'[[listen]]\naddress = "unix:{path}"\n[metrics]\naddress = "off"\n')
    (problem,) = problems(run("serve", "--config", config))
    assert problem.startswith(f"cannot listen on unix:{path}: a file that is not a socket")
    assert path.read_text() == "data"

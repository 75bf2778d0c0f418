"""The log as its readers see it: which events pass, and what their lines say."""

import contextlib
import json
import math
import os
import pty
import socket
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NoReturn

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lpechod.net.eventlog import EventLog
from lpechod.ops.loglines import MAX_TEXT, MAX_TRACEBACK
from lpechod.ops.logs import Level, Log, LogFormat, open_log
from tests.fake_time import FakeClock

STAMP = "2026-02-03T04:05:06.000000Z"
LEVELS: list[Level] = ["debug", "info", "warning", "error"]


class Output:
    """A file that stands for standard error, and the log that writes to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.clock = FakeClock()
        self._path = path
        self._opened: list[Log] = []

    def close(self) -> None:
        """Close it, and what was opened on it."""
        for log in self._opened:
            log.close()
        os.close(self.descriptor)

    def open(
        self,
        log_format: LogFormat = "json",
        *,
        level: Level = "debug",
        burst: int = 100,
        rate: float = 0,
        **context: object,
    ) -> Log:
        """Open a log that would write to this file."""
        log = open_log(
            level,
            log_format,
            burst,
            rate,
            clock=self.clock,
            wall=lambda: 1770091506.0,
            descriptor=self.descriptor,
            environ={},
            context=context,
        )
        self._opened.append(log)
        return log

    def text(self) -> str:
        """Return what was written so far."""
        return self._path.read_text(encoding="utf-8")

    def events(self) -> list[dict[str, object]]:
        """Return the lines written so far, which have to be JSON objects."""
        return [json.loads(line) for line in self.text().split("\n")[:-1]]


@pytest.fixture(name="output")
def _output(tmp_path: Path) -> Iterator[Output]:
    output = Output(tmp_path / "stderr")
    yield output
    output.close()


@contextlib.contextmanager
def temporary_output() -> Iterator[Output]:
    """Make an output for one example of a property."""
    descriptor = os.memfd_create("stderr")
    output = Output(Path(f"/proc/self/fd/{descriptor}"))
    try:
        yield output
    finally:
        output.close()
        os.close(descriptor)


def raised(message: str) -> Exception:
    """Return an exception that has been through a frame."""

    def fail() -> NoReturn:
        raise ValueError(message)

    try:
        fail()
    except ValueError as error:
        return error


# Rate limit.


def test_burst_then_rate(output: Output) -> None:
    """A burst passes at once, then lines pass at the rate, and never more than a burst again."""
    log = output.open(burst=3, rate=2)
    passed = []

    for seconds in (0, 0.5, 0.25, 0.25, 60):
        output.clock.advance(seconds)
        before = len(output.events())
        for _ in range(10):
            log.info("frame_rejected")
        passed.append(len(output.events()) - before)

    assert passed == [3, 1, 0, 1, 3]
    assert log.suppressed_lines == 50 - 8


def test_suppressed_is_reported(output: Output) -> None:
    """The next line that passes says how many of its event did not, and only that one."""
    log = output.open(burst=1, rate=1)
    for _ in range(5):
        log.info("frame_rejected")
    log.info("connection_closed")

    output.clock.advance(1)
    log.info("frame_rejected")
    output.clock.advance(1)
    log.info("frame_rejected")

    assert [event.get("suppressed") for event in output.events()] == [None, None, 4, None]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_limited(output: Output, level: Level) -> None:
    """Warnings and errors can be provoked as well, so they have no privilege."""
    log = output.open(burst=2)

    for _ in range(5):
        getattr(log, level)("accept_failed")

    assert len(output.events()) == 2
    assert log.suppressed_lines == 3


def test_what_failed_for_several_reasons_is_one_event(output: Output) -> None:
    """All its lines are written, whatever the limit; the next failure is held to it."""
    log = output.open(burst=1)
    log.errors("reload_failed", ({"problem": number} for number in range(30)))
    log.errors("reload_failed", [{"problem": "late"}])
    output.clock.advance(1000.0)
    quiet = output.open(level="error")
    quiet.errors("reload_failed", [])

    assert [event["problem"] for event in output.events()] == list(range(30))
    assert log.suppressed_lines == 1


def test_permits_takes_nothing(output: Output) -> None:
    """Asking is free; only the line takes a token, and one that was permitted is sure to pass."""
    log = output.open(burst=2)

    assert all(log.permits("connection_closed") for _ in range(100))
    log.info("connection_closed")
    assert log.permits("connection_closed")
    log.info("connection_closed")

    assert not log.permits("connection_closed")
    assert len(output.events()) == 2
    assert log.suppressed_lines == 1


steps = st.lists(
    # Eighths of a second and whole rates are exact in binary: no tolerance is needed.
    st.tuples(st.integers(0, 40).map(lambda eighths: eighths / 8), st.integers(0, 6)),
    max_size=30,
)


@pytest.mark.parametrize("ask_first", [False, True])
@settings(deadline=None)
@given(steps=steps, burst=st.integers(1, 5), rate=st.integers(0, 4))
def test_limit(steps: list[tuple[float, int]], burst: int, rate: int, *, ask_first: bool) -> None:
    """No window sees more than burst + rate * t lines; every other line is counted and reported."""
    with temporary_output() as output:
        log = output.open(burst=burst, rate=rate)
        times: list[float] = []
        offered = 0
        for seconds, lines in steps:
            output.clock.advance(seconds)
            for _ in range(lines):
                offered += 1
                suppressed = log.suppressed_lines
                if not ask_first or log.permits("frame_rejected"):
                    log.info("frame_rejected")
                if log.suppressed_lines == suppressed:
                    times.append(output.clock.now)

        assert len(times) == len(output.events()) == offered - log.suppressed_lines
        for first, start in enumerate(times):
            for last, end in enumerate(times[first:]):
                assert last + 1 <= burst + rate * (end - start)
        output.clock.advance(1)
        log.info("frame_rejected")
        if rate:
            reports = [event.get("suppressed", 0) for event in output.events()]
            assert sum(n for n in reports if isinstance(n, int)) == log.suppressed_lines
        log.close()


def test_report_survives_a_dropped_line() -> None:
    """A report that the sink could not take is not lost: the next line that is taken has it."""
    reader, writer = os.pipe()
    clock = FakeClock()
    log = open_log("info", "json", 1, 1, clock=clock, descriptor=writer)
    log.info("frame_rejected")
    log.info("frame_rejected")
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))

    clock.advance(1)
    log.info("frame_rejected")
    assert (log.suppressed_lines, log.dropped_lines) == (1, 1)
    while len(os.read(reader, 1 << 20)) == 1 << 20:
        pass
    clock.advance(1)
    log.info("frame_rejected")

    assert json.loads(os.read(reader, 4096))["suppressed"] == 1
    assert (log.suppressed_lines, log.dropped_lines) == (1, 1)
    log.close()
    os.close(reader)
    os.close(writer)


# Levels.


@pytest.mark.parametrize("level", LEVELS)
def test_level(output: Output, level: Level) -> None:
    """A level admits itself and what is more severe."""
    log = output.open(level=level)

    for name in LEVELS:
        getattr(log, name)("something_happened")

    assert [event["level"] for event in output.events()] == LEVELS[LEVELS.index(level) :]


def test_level_comes_first(output: Output) -> None:
    """A line below the level takes no token and is not counted as suppressed."""
    log = output.open(level="warning", burst=1)

    for _ in range(10):
        log.info("something_happened")
    log.warning("something_happened")

    assert [event["level"] for event in output.events()] == ["warning"]
    assert log.suppressed_lines == 0


# JSON.


def test_json_line(output: Output) -> None:
    """A line is one JSON object: time, level, event, what the log was opened with, the fields."""
    log: EventLog = output.open(worker=2)

    log.info("connection_closed", peer="[2001:db8::1]:7", frames=3, tls=None, ok=True, seconds=0.5)

    assert output.text() == (
        f'{{"timestamp": "{STAMP}", "level": "info", "event": "connection_closed", "worker": 2, '
        '"peer": "[2001:db8::1]:7", "frames": 3, "tls": null, "ok": true, "seconds": 0.5}\n'
    )


class _Reason(Enum):
    PEER_CLOSED = "peer_closed"


class _Faulty:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\x00secret", "<7 bytes>"),
        (bytearray(3), "<3 bytes>"),
        (memoryview(bytes(16)).cast("I"), "<16 bytes>"),
        ([b"secret", "text", 1], ["<6 bytes>", "text", 1]),
        (("[::]:9000",), ["[::]:9000"]),
        (_Reason.PEER_CLOSED, "peer_closed"),
        (Path("/etc/lpechod"), "/etc/lpechod"),
        (math.inf, "inf"),
        (1 << 64, "18446744073709551616"),
        (10**5000, "<int that cannot be shown>"),
        (_Faulty(), "<_Faulty that cannot be shown>"),
        ("x" * MAX_TEXT, "x" * MAX_TEXT),
        ("x" * (MAX_TEXT + 7), "x" * MAX_TEXT + "...[7 more]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values(output: Output, value: object, shown: object) -> None:
    """Bytes are counted, text is bounded, and what JSON cannot hold becomes text."""
    output.open().info("something_happened", value=value)

    assert output.events()[0]["value"] == shown


def test_reserved_fields(output: Output) -> None:
    """A field cannot pass for the time or the level of its line."""
    output.open().info("something_happened", timestamp="never", level="error")

    assert output.events() == [{"timestamp": STAMP, "level": "info", "event": "something_happened"}]


anything = st.text(st.characters(), max_size=2 * MAX_TEXT)
HOSTILE = "\x1b[2J\r\n\x7f\x9b\u2028\u202e\ud800 level=error"


@settings(deadline=None)
@given(text=anything)
@example(text=HOSTILE)
def test_json_gives_text_back(text: str) -> None:
    """Whatever a string holds, it makes one printable line that gives it back up to its bound."""
    with temporary_output() as output:
        log = output.open()
        log.info("something_happened", text=text, texts=[text])
        log.close()

        line = output.text().removesuffix("\n")
        assert line.isascii()
        assert line.isprintable()
        excess = len(text) - MAX_TEXT
        expected = text if excess <= 0 else f"{text[:MAX_TEXT]}...[{excess} more]"
        assert json.loads(line)["text"] == expected
        assert json.loads(line)["texts"] == [expected]


def test_json_traceback(output: Output) -> None:
    """An exception is one field of the line."""
    output.open().error("loop_failed", exc_info=raised("bad\nthing"), step=1)

    (event,) = output.events()
    assert list(event) == ["timestamp", "level", "event", "step", "exception"]
    trace = str(event["exception"])
    assert trace.startswith("Traceback (most recent call last):\n")
    assert trace.endswith("\nValueError: bad\nthing")


def test_long_traceback(output: Output) -> None:
    """Of a traceback without end the end is shown."""
    output.open().error("loop_failed", exc_info=raised("x" * 2 * MAX_TRACEBACK + "!"))

    assert output.events()[0]["exception"] == "x" * (MAX_TRACEBACK - 1) + "!"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exception_as_field(output: Output, log_format: LogFormat) -> None:
    """An exception given as a plain field shows its message."""
    output.open(log_format).error("loop_failed", exception=ValueError("bad"))

    assert "bad" in output.text()


# Console.


def test_console_line(output: Output) -> None:
    """On the console the same fields stand in the same order, without colours in a file."""
    output.open("console", worker=2).warning("accept_paused", reason="emfile", peer="a b")

    assert output.text().split() == [
        STAMP,
        "[warning",
        "]",
        "accept_paused",
        "worker=2",
        "reason=emfile",
        "peer='a",
        "b'",
    ]


@settings(deadline=None)
@given(text=anything)
@example(text=HOSTILE)
def test_console_is_one_line(text: str) -> None:
    """Whatever strings hold, the console gets one line, and nothing that moves the cursor."""
    with temporary_output() as output:
        log = output.open("console")
        log.info("something_happened", text=text, texts=[text])
        log.close()

        assert output.text().removesuffix("\n").isprintable()


@settings(deadline=None)
@given(message=anything)
@example(message=HOSTILE)
def test_console_traceback(message: str) -> None:
    """A traceback takes indented lines, so no message can pass for a line of the log."""
    with temporary_output() as output:
        log = output.open("console")
        log.error("loop_failed", exc_info=raised(message))
        log.close()

        first, *lines = output.text().removesuffix("\n").split("\n")
        assert first.startswith(STAMP)
        assert all(line.startswith("  ") and line.isprintable() for line in lines)
        assert "Traceback" in lines[0] or len(message) > MAX_TRACEBACK // 12


def written_to_terminal(log_format: LogFormat, environ: dict[str, str]) -> str:
    """Return what a terminal gets of one event."""
    screen, terminal = pty.openpty()
    log = open_log(
        "info", log_format, 1, 1, clock=FakeClock(), descriptor=terminal, environ=environ
    )
    log.info("worker_started", number=1)
    log.close()
    text = os.read(screen, 4096).decode()
    os.close(terminal)
    os.close(screen)
    return text


def test_auto_on_terminal() -> None:
    """People at a terminal get the console format, in colours."""
    text = written_to_terminal("auto", {})

    assert "\x1b[" in text
    assert "worker_started" in text
    assert not text.startswith("{")


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours(environ: dict[str, str]) -> None:
    """NO_COLOR and a dumb terminal turn colours off."""
    text = written_to_terminal("auto", environ)

    assert "\x1b" not in text
    assert "worker_started" in text


def test_json_on_terminal() -> None:
    """The format that was asked for wins over the terminal."""
    assert json.loads(written_to_terminal("json", {}))["event"] == "worker_started"


def test_auto_in_file(output: Output) -> None:
    """Away from a terminal `auto` is JSON."""
    output.open("auto").info("worker_started")

    assert output.events()[0]["event"] == "worker_started"


# The journal.


@contextlib.contextmanager
def journal() -> Iterator[tuple[socket.socket, int, dict[str, str]]]:
    """Make a stream as systemd connects it: journald's end, standard error, the environment."""
    far, near = socket.socketpair()
    status = os.fstat(near.fileno())
    with far, near:
        yield far, near.fileno(), {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_journal_priorities() -> None:
    """The journal gets JSON, each line with its priority in front."""
    with journal() as (stream, descriptor, environ):
        log = open_log(
            "debug", "auto", 9, 1, clock=FakeClock(), descriptor=descriptor, environ=environ
        )
        for level in LEVELS:
            getattr(log, level)("something_happened")
        log.close()
        lines = stream.recv(4096).decode().splitlines()

    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>"]
    assert [json.loads(line[3:])["level"] for line in lines] == LEVELS


def test_journal_traceback() -> None:
    """In the console format each line of a traceback is a message, so each has the priority."""
    with journal() as (stream, descriptor, environ):
        log = open_log(
            "debug", "console", 9, 1, clock=FakeClock(), descriptor=descriptor, environ=environ
        )
        log.error("loop_failed", exc_info=raised("bad\nthing"))
        log.close()
        lines = stream.recv(4096).decode().splitlines()

    assert len(lines) > 3
    assert {line[:3] for line in lines} == {"<3>"}


@pytest.mark.parametrize("value", ["", "1:1", "nonsense"])
def test_other_stream(value: str) -> None:
    """A JOURNAL_STREAM that is not standard error, but of a parent, adds no priorities."""
    with journal() as (stream, descriptor, _environ):
        environ = {"JOURNAL_STREAM": value}
        log = open_log(
            "info", "auto", 9, 1, clock=FakeClock(), descriptor=descriptor, environ=environ
        )
        log.info("something_happened")
        log.close()
        line = stream.recv(4096)

    assert line.startswith(b"{")


# Life.


def test_closed(output: Output) -> None:
    """A closed log drops and counts what it is given."""
    log = output.open()

    log.close()
    log.info("something_happened")

    assert output.text() == ""
    assert log.dropped_lines == 1


def test_no_descriptor() -> None:
    """Without standard error the daemon runs, and counts the lines nobody gets."""
    descriptor = os.dup(2)
    os.close(descriptor)

    log = open_log("info", "auto", 9, 1, clock=FakeClock(), descriptor=descriptor, environ={})
    log.info("something_happened")

    assert log.dropped_lines == 1


class _UnusableContext(dict[str, object]):
    def __init__(self, *_arguments: object) -> None:
        raise AssertionError("the global configuration was used")


def test_nothing_global(output: Output) -> None:
    """Neither does a log change structlog's global configuration, nor does it heed it."""
    structlog.configure(
        processors=[], wrapper_class=structlog.BoundLogger, context_class=_UnusableContext
    )
    try:
        configured = structlog.get_config()

        output.open(worker=1).info("something_happened")
        output.open(worker=2).info("something_happened")

        assert structlog.get_config() == configured
        assert [event["worker"] for event in output.events()] == [1, 2]
    finally:
        structlog.reset_defaults()

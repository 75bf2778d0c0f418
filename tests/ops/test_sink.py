"""The log sink against real pipes, sockets, terminals and files that are full, gone or shared."""

import contextlib
import fcntl
import os
import pty
import resource
import select
import signal
import socket
import stat
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.ops.sink import LogSink

PAGE = 4096
PIPE_SIZE = 4 * PAGE
NOBODY = 65534

Channel = tuple[int, int]
"""A descriptor to read from and one to write to."""


def numbered(index: int) -> bytes:
    """Return a line of 200 bytes that no other index has."""
    return b"%0199d\n" % index


@contextlib.contextmanager
def open_channel(kind: str, folder: Path) -> Iterator[Channel]:
    """Make a small channel of a kind: `pipe`, `fifo`, `socket` or `terminal`."""
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "fifo":
        os.mkfifo(folder / "fifo")
        reader = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(folder / "fifo", os.O_WRONLY)
        os.set_blocking(reader, True)
    elif kind == "socket":
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        reader, writer = pty.openpty()
        tty.setraw(writer)
    if kind in {"pipe", "fifo"}:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    try:
        yield reader, writer
    finally:
        for descriptor in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def open_denied(descriptor: int) -> LogSink:
    """Open a sink as somebody who may write to the descriptor but not open its file."""
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.fchmod(descriptor, 0)
    if root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
        return LogSink(descriptor)
    finally:
        if root:
            os.seteuid(0)
        os.fchmod(descriptor, mode)


WAYS: list[tuple[str, Callable[[int], LogSink]]] = [
    ("pipe", LogSink),
    ("fifo", LogSink),
    ("terminal", LogSink),
    ("socket", LogSink),
    ("pipe", open_denied),
    ("fifo", open_denied),
    ("terminal", open_denied),
]

each_way = pytest.mark.parametrize(
    ("kind", "open_sink"), WAYS, ids=[f"{kind}-{way.__name__}" for kind, way in WAYS]
)


def fill(sink: LogSink) -> list[bytes]:
    """Write lines until one is refused; return those that were taken."""
    lines: list[bytes] = []
    while sink.write(numbered(len(lines))):
        lines.append(numbered(len(lines)))
    return lines


def read(descriptor: int, count: int) -> bytes:
    """Read exactly so many bytes."""
    data = b""
    while len(data) < count:
        data += os.read(descriptor, count - len(data))
    return data


def open_descriptors() -> set[int]:
    """Return the descriptors this process has open."""
    found = set()
    for descriptor in range(1024):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
            found.add(descriptor)
    return found


def read_available(descriptor: int, count: int) -> bytes:
    """Read up to so many bytes of what has arrived."""
    return os.read(descriptor, count) if select.select([descriptor], [], [], 0)[0] else b""


@each_way
def test_full(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """A reader that never reads costs lines, which are counted, and never makes a write wait."""
    with open_channel(kind, tmp_path) as (_reader, writer):
        sink = open_sink(writer)

        taken = fill(sink)

        # Room for a short line is left at the end of the last page, but not for one of this size.
        assert len(taken) >= 3 * (PAGE // 200)
        assert [sink.write(numbered(number)) for number in range(10)] == [False] * 10
        assert sink.dropped_lines == 11
        sink.close()


@each_way
def test_recovery(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """Once the reader catches up lines flow again, and all that were taken arrive whole."""
    with open_channel(kind, tmp_path) as (reader, writer):
        sink = open_sink(writer)
        taken = fill(sink)
        stream = read(reader, 200 * (len(taken) - 1))

        assert sink.write(b"the last\n")
        expected = b"".join(taken) + b"the last\n"

        assert stream + read(reader, len(expected) - len(stream)) == expected
        assert sink.dropped_lines == 1
        sink.close()


@each_way
def test_shared_flags(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """The description that others share stays blocking, before and after it was full."""
    with open_channel(kind, tmp_path) as (_reader, writer):
        flags = fcntl.fcntl(writer, fcntl.F_GETFL)

        sink = open_sink(writer)
        fill(sink)

        assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags
        assert not flags & os.O_NONBLOCK
        sink.close()


@each_way
def test_reader_gone(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """A reader that goes away costs lines, and sends no SIGPIPE that the process did not ignore."""
    with open_channel(kind, tmp_path) as (reader, writer):
        sink = open_sink(writer)
        assert sink.write(b"seen\n")

        os.close(reader)

        assert [sink.write(b"unseen\n") for _ in range(3)] == [False] * 3
        assert sink.dropped_lines == 3
        sink.close()


@each_way
def test_own_copy(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """The sink outlives the descriptor it was given, and children do not inherit its own."""
    with open_channel(kind, tmp_path) as (reader, writer):
        before = open_descriptors()
        sink = open_sink(writer)
        own = open_descriptors() - before
        os.close(writer)

        assert sink.write(b"still here\n")

        assert read(reader, 11) == b"still here\n"
        assert [os.get_inheritable(descriptor) for descriptor in own] == [False]
        sink.close()


def test_no_reader_at_start() -> None:
    """A pipe that has lost its reader before the sink opens costs lines, nothing else."""
    reader, writer = os.pipe()
    os.close(reader)

    sink = LogSink(writer)

    assert not sink.write(b"unseen\n")
    assert sink.dropped_lines == 1
    sink.close()
    os.close(writer)


def test_socket_raises_no_signal() -> None:
    """A closed socket is an error of the call, even where SIGPIPE is not ignored."""
    near, far = socket.socketpair()
    signals: list[int] = []
    previous = signal.signal(signal.SIGPIPE, lambda number, _frame: signals.append(number))
    try:
        sink = LogSink(near.fileno())
        far.close()

        assert not sink.write(b"unseen\n")
    finally:
        signal.signal(signal.SIGPIPE, previous)
    assert signals == []
    sink.close()
    near.close()


lengths = st.integers(min_value=1, max_value=2 * PIPE_SIZE)
steps = st.lists(st.tuples(lengths, st.integers(min_value=0, max_value=PIPE_SIZE)), max_size=12)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("open_sink", [LogSink, open_denied])
@settings(
    deadline=None, max_examples=40
)  # A terminal that may not be reopened takes a byte a time.
@given(steps=steps)
def test_lines_of_any_length(
    kind: str, open_sink: Callable[[int], LogSink], steps: list[tuple[int, int]]
) -> None:
    """However long lines are and however slowly they are read, none is torn, mixed or lost."""
    with open_channel(kind, Path()) as (reader, writer):
        sink = open_sink(writer)
        taken = received = b""
        dropped = 0
        for number, (length, wanted) in enumerate(steps):
            line = bytes([65 + number]) * (length - 1) + b"\n"
            if sink.write(line):
                taken += line
            else:
                dropped += 1
            received += read_available(reader, wanted)

        assert sink.dropped_lines == dropped
        assert taken.startswith(received)
        while len(received) < len(taken):
            assert any(select.select([reader], [writer] if sink._tail else [], [], 5)), "bytes lost"
            received += read_available(reader, PIPE_SIZE)
            sink._tail = sink._push(sink._tail)
        assert received == taken
        sink.close()


def test_long_line_is_finished_first() -> None:
    """The tail of a line too long for the pipe precedes the next line, which waits its turn."""
    with open_channel("pipe", Path()) as (reader, writer):
        sink = LogSink(writer)
        long = b"a" * (PIPE_SIZE + 99) + b"\n"

        assert sink.write(long)
        assert not sink.write(b"too early\n")
        head = read(reader, PIPE_SIZE)
        assert sink.write(b"next\n")

        assert head + read(reader, 105) == long + b"next\n"
        assert sink.dropped_lines == 1
        sink.close()


def test_tail_lost_at_close() -> None:
    """A line whose tail is still waiting when the sink closes counts as dropped."""
    with open_channel("pipe", Path()) as (_reader, writer):
        sink = LogSink(writer)
        assert sink.write(b"a" * (PIPE_SIZE + 99) + b"\n")

        sink.close()

        assert sink.dropped_lines == 1


def test_device_full() -> None:
    """ENOSPC costs lines."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    sink = LogSink(descriptor)

    assert not sink.write(b"unseen\n")
    assert sink.dropped_lines == 1
    sink.close()
    os.close(descriptor)


def test_file_is_shared(tmp_path: Path) -> None:
    """Lines in a file keep their order with what others write through the same descriptor."""
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as file:
        file.write(b"before\n")
        sink = LogSink(file.fileno())

        assert sink.write(b"line\n")
        file.write(b"after\n")
        sink.close()

    assert path.read_bytes() == b"before\nline\nafter\n"


def test_file_system_full(tmp_path: Path) -> None:
    """A line that the file system takes in part is completed, unmixed, once there is room."""
    path = tmp_path / "log"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("wb", buffering=0) as file:
        sink = LogSink(file.fileno())
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
            taken = [sink.write(b"a" * 49 + b"\n"), sink.write(b"dropped\n")]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == b"a" * 30

        assert sink.write(b"next\n")

        assert taken == [True, False]
        assert path.read_bytes() == b"a" * 49 + b"\nnext\n"
        assert sink.dropped_lines == 1
        sink.close()


@pytest.mark.parametrize("flags", [None, os.O_RDONLY], ids=["closed", "read-only"])
def test_unusable(flags: int | None, tmp_path: Path) -> None:
    """A descriptor that is closed or not open for writing costs lines, nothing else."""
    path = tmp_path / "log"
    path.touch()
    descriptor = os.open(path, flags or os.O_RDONLY)
    if flags is None:
        os.close(descriptor)

    sink = LogSink(descriptor)

    assert not sink.write(b"unseen\n")
    assert sink.dropped_lines == 1
    sink.close()
    if flags is not None:
        os.close(descriptor)


@each_way
def test_close(kind: str, open_sink: Callable[[int], LogSink], tmp_path: Path) -> None:
    """Closing twice is fine, later lines are dropped, and the given descriptor stays open."""
    with open_channel(kind, tmp_path) as (reader, writer):
        before = open_descriptors()
        sink = open_sink(writer)

        sink.close()
        sink.close()

        assert open_descriptors() == before
        assert not sink.write(b"unseen\n")
        assert os.write(writer, b"mine") == 4
        assert read(reader, 4) == b"mine"

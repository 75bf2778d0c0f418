"""The protocol of the service manager, spoken to real sockets that are full, gone or bound anew."""

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lpechod.process import systemd
from lpechod.process.systemd import Inherited, Notifier, ServiceManager, take_environment

pytestmark = pytest.mark.timeout(20)

PID = 4711
OURS = str(PID)
FAR = 900  # A number far above the descriptors that a test has open.
LONG = "x" * 256
VARIABLES = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "FDSTORE"} | {
    f"LISTEN_{name}" for name in ("PID", "PIDFDID", "FDS", "FDNAMES")
}
ANY_TEXT = st.text(st.characters(exclude_categories=()))
NOISE = b"noise"
DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK

Datagram = tuple[str, list[int]]  # A text, and the inodes of the descriptors that came with it.


class Manager:
    """The receiving end, and a notifier that has its address as NOTIFY_SOCKET would give it."""

    def __init__(self, address: str) -> None:
        self.notifier = Notifier(address)
        self.bound = re.sub("^@", "\0", address)
        self.socket = socket.socket(socket.AF_UNIX, DATAGRAM)
        self.socket.bind(self.bound)

    def go(self) -> None:
        self.socket.close()
        if self.bound.startswith("/"):
            Path(self.bound).unlink(missing_ok=True)

    def close(self) -> None:
        self.go()
        self.notifier.close()

    def fill(self) -> None:
        """Leave no room in the queue, though one sender may run out of memory before."""
        for _ in range(8):
            rival = socket.socket(socket.AF_UNIX, DATAGRAM)
            with rival, contextlib.suppress(BlockingIOError):
                while True:
                    rival.sendto(NOISE, self.bound)

    def receive(self) -> list[Datagram]:
        received = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, 8)
                if data != NOISE:
                    received.append((data.decode(), [os.fstat(fd).st_ino for fd in fds]))
                for fd in fds:
                    os.close(fd)
        return received

    def texts(self) -> list[str]:
        return [text for text, _ in self.receive()]

    def drain(self) -> list[Datagram]:
        """Read, and have the rest flushed, by turns until nothing more comes."""
        assert self.receive() == []  # The queue was full before.
        received: list[Datagram] = []
        self.notifier.flush()
        while batch := self.receive():
            received += batch
            self.notifier.flush()
        return received


def descriptors() -> set[int]:
    """Return the numbers of all that are open, so that none can be left over unseen."""
    return {fd for fd in range(FAR + 10) if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@{secrets.token_hex(8)}"
    with contextlib.closing(Manager(address)) as made:
        yield made


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def take(**environ: str) -> ServiceManager:
    return take_environment(environ, PID, first=FAR)


def test_the_environment_is_taken() -> None:
    """Everything that the manager says is read and removed, and nothing else."""
    said = {"NOTIFY_SOCKET": "@x", "WATCHDOG_PID": OURS, "WATCHDOG_USEC": "1500000"}
    environ = dict.fromkeys(VARIABLES, "1") | said | {"PATH": "/bin"}
    assert take_environment(environ, PID) == ServiceManager("@x", 1.5, True, ())
    assert environ == {"PATH": "/bin"}
    assert take_environment(environ, PID) == ServiceManager(None, None, False, ())


@pytest.mark.parametrize("pid", ["1", "me", "", f"{OURS} "])
def test_the_watchdog_is_for_us(pid: str) -> None:
    """The watchdog is for this process, unless another one is named."""
    assert take(WATCHDOG_USEC="30000000").watchdog_s == 30.0
    assert take(WATCHDOG_USEC="30000000", WATCHDOG_PID=OURS).watchdog_s == 30.0
    assert take(WATCHDOG_USEC="30000000", WATCHDOG_PID=pid).watchdog_s is None
    assert take(WATCHDOG_USEC=str(2**64 - 1)).watchdog_s is None  # It means "never".


@pytest.mark.parametrize("value", ["0", "-1", "+1", "1e6", "1_0", " 1", "٣", "", "x", "9" * 5000])
def test_a_number_is_a_number(value: str) -> None:
    """What is no decimal number over zero, or one too high, counts as absent."""
    with passed(1):
        environ = {"LISTEN_PID": OURS, "LISTEN_FDS": value}
        assert take(**environ, WATCHDOG_USEC=value, FDSTORE=value) == ServiceManager()
        assert take(LISTEN_PID=OURS, LISTEN_FDS="9" * 20) == ServiceManager()


@contextlib.contextmanager
def passed(count: int) -> Iterator[None]:
    """Open so many inheritable descriptors from the far number on."""
    for fd in range(FAR, FAR + count):
        os.dup2(0, fd, inheritable=True)
    try:
        yield
    finally:
        os.closerange(FAR, FAR + count)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("echo:metrics", ["echo", "metrics"]),
        ("echo:", ["echo", ""]),
        ("echo:new\nline", ["echo", "unknown"]),
        (f"echo:{LONG}", ["echo", "unknown"]),
        ("echo:metrics:more", ["unknown", "unknown"]),
        ("", ["unknown"]),
        (None, ["unknown"]),
    ],
)
def test_descriptors_are_inherited(names: str | None, expected: list[str]) -> None:
    """What is passed is named as far as the names are right, and no program we start has it."""
    environ = {} if names is None else {"LISTEN_FDNAMES": names}
    with passed(3):
        inherited = take(LISTEN_PID=OURS, LISTEN_FDS=str(len(expected)), **environ).inherited
        inheritable = [fd for fd in range(FAR, FAR + 3) if os.get_inheritable(fd)]
    assert inherited == tuple(map(Inherited, expected, (FAR, FAR + 1)))
    assert inheritable == list(range(FAR + len(expected), FAR + 3))


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": ""}, {"LISTEN_PID": "1"}])
def test_descriptors_of_others_are_left_alone(environ: dict[str, str]) -> None:
    """Nothing is inherited, and no descriptor changed, unless they are meant for this process."""
    with passed(1):
        assert take(LISTEN_FDS="1", **environ).inherited == ()
        assert os.get_inheritable(FAR)


TAKE = """
import os
from lpechod.process.systemd import take_environment
taken = take_environment(os.environ, os.getpid())
print(taken.inherited, os.read(3, 9), os.get_inheritable(3), [n for n in os.environ if "LIST" in n])
"""


def test_a_real_process_inherits(tmp_path: Path) -> None:
    """A program that is started as by the manager finds its descriptor at number 3."""
    (tmp_path / "file").write_text("content")
    start = 'export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=echo; exec "$0" -c "$1" 3<"$2"'
    command = ["sh", "-c", start, sys.executable, TAKE, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{(Inherited('echo', 3),)} b'content' False []"


ANY_VALUE = ANY_TEXT | st.text("0123456789-+_ :") | st.sampled_from([OURS, "1", "3", "a:b:c"])


@given(st.dictionaries(st.sampled_from([*sorted(VARIABLES), "PATH", "LISTEN"]), ANY_VALUE))
def test_any_environment_is_taken(environ: dict[str, str]) -> None:
    """Whatever the variables are, nothing is raised, all are removed and others are left alone."""
    others = {name: value for name, value in environ.items() if name not in VARIABLES}
    taken = take_environment(environ, PID, first=FAR)
    assert environ == others
    assert taken.inherited == ()
    assert taken.watchdog_s is None or taken.watchdog_s > 0


@given(ANY_TEXT)
@example("\udcc3\udca9")
@example("é" * 200)
def test_a_name_is_valid_and_unique(listener: str) -> None:
    """A name keeps to the rules, and unless it is long its listener's can be read back from it."""
    assert systemd.descriptor_name("[::]:9000/x.sock") == "[%3A%3A]%3A9000/x.sock"
    name = systemd.descriptor_name(listener)
    assert re.fullmatch(r"[\x20-\x39\x3b-\x7e]{0,255}", name)
    assert "#" in name or unquote(name, errors="surrogatepass") == listener
    assert ("#" in name) <= (len(name) == 255)


@given(st.text(), st.text())
@example("x", "y")
def test_a_long_name_is_unique(one: str, other: str) -> None:
    """Listeners that differ only beyond what a name has room for have different names."""
    assert len({systemd.descriptor_name(LONG + end) for end in (one, other)}) == len({one, other})


CALLS: dict[str, Callable[[Notifier], None]] = {
    "READY=1\nSTATUS=serving": lambda it: it.ready("serving"),
    "RELOADING=1\nMONOTONIC_USEC=12345678\nSTATUS=x": lambda it: it.reloading(12.345678, "x"),
    "STOPPING=1\nSTATUS=bye": lambda it: it.stopping("bye"),
    "STATUS=größer": lambda it: it.status("größer"),
    "EXTEND_TIMEOUT_USEC=2500000": lambda it: it.extend_timeout(2.5),
    "WATCHDOG=1": lambda it: it.feed_watchdog(),
    "FDSTORE=1\nFDNAME=name": lambda it: it.store("name", 0),
    "FDSTOREREMOVE=1\nFDNAME=name": lambda it: it.remove("name"),
}


def call_all(notifier: Notifier) -> None:
    for call in CALLS.values():
        call(notifier)


@pytest.mark.parametrize("expected", CALLS)
def test_a_call_is_a_datagram(manager: Manager, expected: str) -> None:
    """Each call sends its assignments as one datagram, to a path or an abstract name."""
    CALLS[expected](manager.notifier)
    assert manager.texts() == [expected]


@pytest.mark.parametrize("name", ["a:b", "a\nREADY=1", "é", "\x7f", LONG])
def test_an_invalid_name_is_refused(manager: Manager, name: str) -> None:
    """A name that the manager would ignore, or read as more than a name, is never sent."""
    with pytest.raises(ValueError, match="no name"):
        manager.notifier.store(name, 0)
    with pytest.raises(ValueError, match="no name"):
        manager.notifier.remove(name)
    assert manager.texts() == []


@given(ANY_TEXT)
@example("one\ntwo\rthree\x85four\u2028five\x00six\x7f")
@example("\U0001f600" * systemd.MAX_STATUS * 2)
@example("bytes \udcff of a path")
def test_a_status_is_one_line(text: str) -> None:
    """A status is one line of UTF-8, of bounded length, with blanks for what may not be there."""
    with contextlib.closing(Manager(f"@{secrets.token_hex(8)}")) as manager:
        manager.notifier.status(text)
        manager.notifier.ready(text)
        manager.notifier.stopping(text)
        manager.notifier.reloading(0.0, text)
        found = [message.partition("STATUS=") for message in manager.texts()]
    status = found[0][2]
    starts = ["", "READY=1\n", "STOPPING=1\n", "RELOADING=1\nMONOTONIC_USEC=0\n"]
    assert found == [(start, "STATUS=", status) for start in starts]
    assert status.isprintable()
    assert len(status) == min(len(text), systemd.MAX_STATUS)
    assert all(new in {old, " "} for old, new in zip(text, status, strict=False))
    assert all(new == old for old, new in zip(text, status, strict=False) if old.isalnum())


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "a/b", "/not/there", f"/{LONG}"])
def test_without_an_address_nothing_happens(address: str | None) -> None:
    """Without an address that we can send to, no call does anything."""
    before = descriptors()
    with contextlib.closing(Notifier(address)) as notifier:
        opened = address is not None and address.startswith(("/", "@"))
        call_all(notifier)
        assert len(descriptors()) == len(before) + opened


def test_a_full_queue_is_waited_for(manager: Manager) -> None:
    """What the manager has no room for arrives later, everything, in order, and once."""
    manager.fill()
    call_all(manager.notifier)
    assert [text for text, _ in manager.drain()] == list(CALLS)
    manager.notifier.flush()
    assert manager.receive() == []


def test_a_waiting_descriptor_outlives_the_original(manager: Manager) -> None:
    """A descriptor that waits is the one of the call, even if its number now means another file."""
    before = descriptors()
    manager.fill()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number, stored = listener.fileno(), os.fstat(listener.fileno()).st_ino
        manager.notifier.store("echo", number)
    other = os.open(os.devnull, os.O_RDONLY)
    (waiting,) = descriptors() - before - {other}
    assert (other, os.get_inheritable(waiting)) == (number, False)
    assert manager.drain() == [("FDSTORE=1\nFDNAME=echo", [stored])]
    os.close(other)
    assert descriptors() == before


def test_a_closed_descriptor_is_not_stored(manager: Manager) -> None:
    """A descriptor that is not open is not announced either, whether or not the queue is full."""
    manager.notifier.store("echo", FAR)
    assert manager.receive() == []
    manager.fill()
    manager.notifier.ready("serving")
    manager.notifier.store("echo", FAR)
    assert manager.drain() == [("READY=1\nSTATUS=serving", [])]


def test_what_tells_the_present_is_superseded(manager: Manager) -> None:
    """A newer status, sign of life or respite replaces the one that waits, and nothing else."""
    manager.fill()
    manager.notifier.status("early")
    manager.notifier.ready("serving")
    for turn in range(systemd.MAX_WAITING + 1):
        manager.notifier.status(f"turn {turn}")
        manager.notifier.feed_watchdog()
        manager.notifier.extend_timeout(turn)
    assert [text for text, _ in manager.drain()] == [
        *("READY=1\nSTATUS=serving", f"STATUS=turn {systemd.MAX_WAITING}", "WATCHDOG=1"),
        f"EXTEND_TIMEOUT_USEC={systemd.MAX_WAITING}000000",
    ]


def test_what_waits_is_bounded(manager: Manager, listener: socket.socket) -> None:
    """What waits is bounded, and the oldest give way, but READY only to another READY."""
    before = descriptors()
    manager.fill()
    manager.notifier.store("oldest", listener.fileno())
    manager.notifier.ready("serving")
    for number in range(systemd.MAX_WAITING + 1):
        manager.notifier.store(str(number), listener.fileno())
    assert len(descriptors()) == len(before) + systemd.MAX_WAITING - 1
    stored = [f"FDSTORE=1\nFDNAME={number}" for number in range(2, systemd.MAX_WAITING + 1)]
    assert [text for text, _ in manager.drain()] == ["READY=1\nSTATUS=serving", *stored]
    assert descriptors() == before
    manager.fill()
    for number in range(systemd.MAX_WAITING + 1):
        manager.notifier.ready(str(number))
    assert manager.drain()[0] == ("READY=1\nSTATUS=1", [])


def test_nobody_listens(manager: Manager, listener: socket.socket) -> None:
    """When the manager has gone nothing is kept, neither what waits nor what comes."""
    left = descriptors() - {manager.socket.fileno()}
    manager.fill()
    manager.notifier.store("echo", listener.fileno())
    manager.go()
    call_all(manager.notifier)
    assert descriptors() == left


def test_a_manager_that_binds_anew_gets_the_rest(tmp_path: Path, listener: socket.socket) -> None:
    """A manager in the place of another gets what waited, and what comes, not what failed."""
    address = str(tmp_path / "notify")
    with contextlib.closing(Manager(address)) as busy:
        stored = ("FDSTORE=1\nFDNAME=echo", [os.fstat(listener.fileno()).st_ino])
        busy.notifier.store("echo", listener.fileno())
        assert busy.receive() == [stored]
        busy.fill()
        busy.notifier.store("echo", listener.fileno())
        busy.notifier.feed_watchdog()
        busy.go()
        with contextlib.closing(Manager(address)) as fresh:
            busy.notifier.ready("serving")
            assert fresh.receive() == [stored, ("WATCHDOG=1", []), ("READY=1\nSTATUS=serving", [])]
        busy.notifier.feed_watchdog()
        with contextlib.closing(Manager(address)) as fresh:
            busy.notifier.stopping("bye")
            assert fresh.texts() == ["STOPPING=1\nSTATUS=bye"]


def test_close_lets_go_of_everything(manager: Manager, listener: socket.socket) -> None:
    """Closing frees the socket and the descriptors that wait; later calls do nothing."""
    before = descriptors()
    with contextlib.closing(Notifier(re.sub("^\0", "@", manager.bound))) as notifier:
        manager.fill()
        notifier.store("echo", listener.fileno())
        assert [os.get_inheritable(fd) for fd in descriptors() - before] == [False, False]
        notifier.close()
        assert (descriptors(), manager.receive()) == (before, [])
        call_all(notifier)
        notifier.flush()
    assert (descriptors(), manager.receive()) == (before, [])

"""A loop that turns without doing work is noticed, and one that works is not."""

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lpechod.engine.poller import ERROR, HANGUP, PEER_CLOSED, READABLE, URGENT, WRITABLE
from lpechod.engine.wheel import Timer
from lpechod.net.admission import AdmissionLimits
from lpechod.net.entrance import Entrance
from lpechod.net.spin import SPIN_TURNS_PER_SECOND, SpinDetector, _describe
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer, KernelBuffers, body_of, frame
from tests.net.tlswire import dial, hello, meet, seal

Stuck = Callable[[], int]


class Heartbeat(Timer):
    """Lets a detector look at its server with each tick, as a worker does."""

    def __init__(self, server: EchoServer) -> None:
        super().__init__()
        self.server = server
        self.detector = SpinDetector(server.loop, server.service, server.log)
        server.loop.schedule(self, server.loop.now)

    def on_deadline(self, now: float) -> None:
        self.detector.check(now)
        self.server.loop.schedule(self, now)

    def turn(
        self, seconds: float, turns_per_second: int, step: Callable[[], object] = lambda: None
    ) -> None:
        """Make so many turns a second, and a step before each."""
        for _ in range(round(seconds * turns_per_second)):
            self.server.clock.advance(1 / turns_per_second)
            step()
            self.server.turn()


class Careless:
    """A source that never reads what is ready."""

    def on_ready(self, mask: int, now: float) -> None:
        pass

    def on_failure(self, error: Exception, _now: float) -> None:
        raise error


class Restless(Careless):
    """A source that asks for another turn in each."""

    def __init__(self, server: EchoServer) -> None:
        self.server = server

    def on_ready(self, _mask: int, _now: float) -> None:
        self.server.loop.again(self, READABLE)


@pytest.fixture(name="heart")
def _heart(serve: Serve) -> Iterator[Heartbeat]:
    server = serve(buffers=KernelBuffers(send=16384))
    heart = Heartbeat(server)
    yield heart
    server.loop.cancel(heart)


@pytest.fixture(name="stuck")
def _stuck(heart: Heartbeat) -> Iterator[Stuck]:
    """Make descriptors that stay ready, and return the number of each."""
    with ExitStack() as stack:

        def make() -> int:
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                stack.enter_context(end)
            theirs.send(b"unread")
            heart.server.loop.register(ours.fileno(), Careless(), READABLE)
            stack.callback(heart.server.loop.unregister, ours.fileno())
            return ours.fileno()

        yield make


class TestSpin:
    """Turns that do nothing."""

    def test_descriptor_that_nobody_reads(self, heart: Heartbeat, stuck: Stuck) -> None:
        """Within little more than a second it is counted, and named in a warning."""
        fd = stuck()
        heart.turn(1.2, 5000)
        (line,) = heart.server.log.of("loop_spinning")
        assert line == {
            "turns_per_second": pytest.approx(5000, rel=0.01),
            "descriptors": [fd],
            "masks": ["readable"],
            "asking": [],
        }
        assert heart.server.log.lines[-1].level == "warning"

        assert heart.detector.spins == 1

    def test_source_that_asks_for_ever(self, heart: Heartbeat) -> None:
        """Without any descriptor, the kind of the source is named."""
        restless = Restless(heart.server)
        heart.server.loop.again(restless, READABLE)
        heart.turn(1.2, 5000)
        heart.server.loop._again.clear()
        (line,) = heart.server.log.of("loop_spinning")
        assert (line["descriptors"], line["masks"]) == ([], [])

        assert line["asking"] == ["Restless"]

    def test_one_line_for_a_spell(self, heart: Heartbeat) -> None:
        """A spell is logged when it begins and when it ends, and each of its seconds counted."""
        heart.turn(5.0, 3000)
        assert heart.server.log.events() == ["loop_spinning"]
        assert heart.detector.spins == 4
        heart.server.pass_time(3.0)
        assert heart.server.log.events() == ["loop_spinning", "loop_spin_ended"]
        assert heart.server.log.lines[-1].level == "info"
        assert heart.server.log.of("loop_spin_ended") == [
            {"duration_s": pytest.approx(5.0, abs=0.6)}
        ]
        assert heart.detector.spins in (4, 5)

    def test_spell_after_spell(self, heart: Heartbeat) -> None:
        """The next spell has lines of its own."""
        for _ in range(2):
            heart.turn(2.5, 3000)
            heart.server.pass_time(3.0)

        assert heart.server.log.events() == ["loop_spinning", "loop_spin_ended"] * 2

    def test_beside_work(self, heart: Heartbeat, stuck: Stuck) -> None:
        """Some echoes a second do not hide it."""
        stuck()
        client = heart.server.connect()
        for _ in range(15):
            client.exchange(frame(b"work"))
            heart.turn(0.1, 5000)

        assert heart.detector.spins == 1

    def test_many_descriptors(self, heart: Heartbeat, stuck: Stuck) -> None:
        """However many there are, a line names a few."""
        made = {stuck() for _ in range(20)}
        heart.turn(1.2, 3000)
        (line,) = heart.server.log.of("loop_spinning")
        assert isinstance(line["descriptors"], list)
        assert len(set(line["descriptors"])) == 8
        assert made > set(line["descriptors"])

        assert line["masks"] == ["readable"] * 8

    @pytest.mark.parametrize(("factor", "spins"), [(0.9, 0), (1.1, 2)])
    def test_threshold(self, heart: Heartbeat, factor: float, spins: int) -> None:
        """So many turns a second are suffered, and more are not."""
        heart.turn(2.5, round(SPIN_TURNS_PER_SECOND * factor))

        assert heart.detector.spins == spins

    def test_rate_counts(self, heart: Heartbeat) -> None:
        """Turns are measured against the time they took, however late a heartbeat comes."""
        heart.turn(0.5, 5000)
        heart.server.jump(60)
        heart.turn(0.1, 5000)

        assert heart.detector.spins == 0


class TestNoSpin:
    """Turns that do work, as many as there may be."""

    @pytest.fixture(name="working", autouse=True)
    def _working(self, heart: Heartbeat) -> Iterator[None]:
        """See that there were turns enough for a spin, and that there was none."""
        yield
        assert heart.server.turns > 1.2 * SPIN_TURNS_PER_SECOND
        assert heart.detector.spins == 0
        assert heart.server.log.of("loop_spinning") == []

    def test_echoes(self, heart: Heartbeat) -> None:
        """Five thousand echoes a second are work."""
        client = heart.server.connect()

        def ping() -> None:
            client.receive_some()
            client.send_some(frame(b""))

        heart.turn(2.2, 5000, ping)
        heart.server.settle()
        client.receive_some()

        assert client.sent == client.received == 11_000 * 4

    def test_single_bytes(self, heart: Heartbeat) -> None:
        """So is a frame that arrives byte by byte."""
        client = heart.server.connect()
        rest = iter(frame(body_of(100_000)))

        heart.turn(1.2, 5000, lambda: client.send_some(bytes([next(rest)])))

        assert heart.server.tally.received_bytes == 6000

    def test_slow_reader(self, heart: Heartbeat) -> None:
        """So is sending what a client takes little by little, though nothing is received."""
        client = heart.server.connect(buffers=KernelBuffers(receive=16384))
        client.send(frame(body_of(1_000_000)))
        heart.server.pass_time(2.0)
        received = heart.server.tally.received_bytes
        unsent = heart.server.tally.unsent_bytes
        heart.turn(1.2, 5000, lambda: client.receive_some(150))

        assert heart.server.tally.received_bytes == received
        assert 0 < heart.server.tally.unsent_bytes < unsent


class TestNoSpinOverTls:
    """What is received and counts as no byte is work, too."""

    @pytest.fixture(name="entrance")
    def _entrance(self) -> Entrance:
        return SECURED

    def test_bytes_behind_the_end_of_a_stream(self, heart: Heartbeat) -> None:
        """A client that goes on to send after a refused frame, byte by byte, makes no spin."""
        client = heart.server.connect()
        client.exchange(frame(b"x"))
        client.send_some(b"\xff" * 4)
        heart.server.settle()
        heart.turn(1.2, 5000, lambda: client.socket.send(b"x"))

        assert heart.server.turns > 1.2 * SPIN_TURNS_PER_SECOND
        assert heart.detector.spins == 0

    def test_a_record_in_pieces(self, heart: Heartbeat) -> None:
        """Nor does one that sends a record byte by byte."""
        client = meet(heart.server)
        record = iter(seal(client, frame(body_of(8000))))
        heart.turn(1.2, 5000, lambda: client.socket.send(bytes([next(record)])))

        assert heart.server.turns > 1.2 * SPIN_TURNS_PER_SECOND
        assert heart.detector.spins == 0
        client.socket.send(bytes(record))

    def test_handshakes(self, heart: Heartbeat) -> None:
        """Nor do clients that send their first flight byte by byte."""
        server = heart.server

        def dribbled() -> Iterator[int]:
            while True:
                client = dial(server)
                for byte in hello(client)[:-1]:
                    yield client.socket.send(bytes([byte]))

        heart.turn(1.2, 5000, dribbled().__next__)

        assert server.turns > 1.2 * SPIN_TURNS_PER_SECOND
        assert heart.detector.spins == 0


class TestNoSpinOfConnections:
    """Connections that come and go without a byte are work as well."""

    def storm(self, server: EchoServer, path: Path, *, turns_each: int) -> Heartbeat:
        """Let 2500 clients a second connect over a UNIX socket, and leave in their last turn."""
        heart = Heartbeat(server)
        open_ends: list[socket.socket] = []

        def call() -> None:
            if not open_ends:
                open_ends.append(socket.socket(socket.AF_UNIX))
                open_ends[0].connect(str(path))
                if turns_each == 2:
                    return
            open_ends.pop().close()

        heart.turn(1.2, 2500 * turns_each, call)
        server.settle()
        server.loop.cancel(heart)
        return heart

    def test_served(self, serve: Serve, tmp_path: Path) -> None:
        """A turn that accepts and a turn that closes is work for each of the connections."""
        server = serve(f"unix:{tmp_path}/echo.sock")
        heart = self.storm(server, tmp_path / "echo.sock", turns_each=2)

        assert server.service.counts.accepted == 3000
        assert heart.detector.spins == 0

    def test_rejected(self, serve: Serve, tmp_path: Path) -> None:
        """A storm of connections that are turned away is no spin either."""
        limits = AdmissionLimits(max_connections=0)
        server = serve(f"unix:{tmp_path}/echo.sock", admission=limits)
        heart = self.storm(server, tmp_path / "echo.sock", turns_each=1)

        assert server.service.counts.rejected["max_connections"] == 3000
        assert heart.detector.spins == 0


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (READABLE, "readable"),
        (READABLE | WRITABLE, "readable|writable"),
        (ERROR | HANGUP, "error|hangup"),
        (PEER_CLOSED | URGENT, "urgent|peer_closed"),
        (PEER_CLOSED | select.POLLNVAL, f"peer_closed|{select.POLLNVAL:#x}"),
        (0, ""),
    ],
)
def test_masks_have_names(mask: int, text: str) -> None:
    """What woke the loop is written in words, and in a number where there is none."""
    assert _describe(mask) == text

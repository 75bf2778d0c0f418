"""The load of the benchmarks: figures of a server that does not echo well must not be believed."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.bench.clients import Address, Churn, Kept, PingPong, connect
from tests.bench.crew import PATIENCE_SECONDS, Crew, Job
from tests.bench.meters import CLIENTS_CPU
from tests.bench.rounds import (
    Figures,
    Workload,
    measure,
    play,
    show_together,
    times_ours,
    together,
)
from tests.bench.servers import PEERS, Server, peer

BODY_BYTES = 64
SMALL_WINDOW_BYTES = 65536
SECONDS = 0.05


class Replies:
    """A server of one thread for each connection, which does to frames whatever a test wants.

    Args:
        reply: returns what is sent for a frame, given the one before it, too.
    """

    def __init__(self, reply: Callable[[bytes, bytes], bytes]) -> None:
        self.lengths: list[int] = []
        """Of the frames that have come, with their headers."""
        self._reply = reply
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address: Address = self._listening.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # The end of the test.
            while True:
                client = self._listening.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        before = b""
        with client, client.makefile("rb") as stream, contextlib.suppress(OSError):
            while header := stream.read(4):
                frame = header + stream.read(int.from_bytes(header, "big"))
                self.lengths.append(len(frame))
                client.sendall(self._reply(frame, before))
                before = frame

    def close(self) -> None:
        """Accept no more."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def echo(frame: bytes, _before: bytes) -> bytes:
    return frame


def flip_last_bit(frame: bytes, _before: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def repeat(frame: bytes, before: bytes) -> bytes:
    return before or frame


@contextlib.contextmanager
def serving(reply: Callable[[bytes, bytes], bytes]) -> Iterator[Replies]:
    replies = Replies(reply)
    try:
        yield replies
    finally:
        replies.close()


def run(job: Job) -> None:
    """Run a job until it says that it has done its work."""
    with Crew(1, CLIENTS_CPU) as crew:
        crew.prepare([job])
        crew.begin()
        crew.await_ready()


JOBS: dict[str, Callable[[Address], Job]] = {
    "one in flight": lambda address: PingPong(address, False, 2, BODY_BYTES, SECONDS),
    "some in flight": lambda address: PingPong(address, False, 2, BODY_BYTES, SECONDS, 3),
    "churn": lambda address: Churn(address, False, 2, BODY_BYTES, SECONDS),
    "idle": lambda address: Kept(address, False, 2),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_wrong_bit_is_noticed(name: str) -> None:
    """No client takes an echo of which the last bit is another."""
    with serving(flip_last_bit) as server, pytest.raises(AssertionError, match="a bad echo"):
        run(JOBS[name](server.address))


@pytest.mark.parametrize("name", ["one in flight", "some in flight"])
def test_the_echo_of_another_frame_is_noticed(name: str) -> None:
    """No client takes the echo of a frame that it has sent before, as each is different."""
    with serving(repeat) as server, pytest.raises(AssertionError, match="a bad echo"):
        run(JOBS[name](server.address))


def test_an_end_instead_of_an_echo_is_noticed() -> None:
    """A server that closes instead of echoing has not served faster."""

    def end(frame: bytes, before: bytes) -> bytes:
        if before:
            raise OSError
        return frame

    with serving(end) as server, pytest.raises(AssertionError, match="the stream ended after 0"):
        run(JOBS["one in flight"](server.address))


@pytest.mark.parametrize("name", ["bare", "asyncio", "asyncio-buffered"])
def test_peers_echo_well(name: str) -> None:
    """What lpechod is compared with echoes every byte, also if its client takes them slowly."""
    with peer(*PEERS[name]) as server, connect(server.address, None, SMALL_WINDOW_BYTES) as client:
        run(PingPong(server.address, False, 2, BODY_BYTES, SECONDS, 3))
        run(PingPong(server.address, False, 2, 1 << 20, SECONDS))

        client.settimeout(PATIENCE_SECONDS)
        body = os.urandom(1 << 20)
        frames = (len(body).to_bytes(4, "big") + body) * 4
        sending = threading.Thread(target=client.sendall, args=(frames,))
        sending.start()
        with client.makefile("rb") as echoes:
            assert echoes.read(len(frames)) == frames
        sending.join()


def test_a_round_with_a_bad_echo_has_no_figures() -> None:
    """What a process of the crew finds wrong ends the measurement."""
    with (
        serving(flip_last_bit) as server,
        Crew(1, CLIENTS_CPU) as crew,
        pytest.raises(AssertionError, match="a bad echo"),
    ):
        measure(crew, Server(os.getpid(), server.address), Workload("bad", 1, BODY_BYTES), SECONDS)


@pytest.mark.parametrize(
    ("workload", "unmeasured"),
    [
        (Workload("one in flight", 3, BODY_BYTES), 3 * 3),
        (Workload("some in flight", 3, BODY_BYTES, in_flight=4), 3 * 3 * 4),
        (Workload("churn", 3, BODY_BYTES, churn=True), 0),
    ],
    ids=lambda value: value.name if isinstance(value, Workload) else "",
)
def test_each_frame_is_counted_once(workload: Workload, unmeasured: int) -> None:
    """The frames of a round are those that the server has echoed, without the first of each."""
    with serving(echo) as server, Crew(3, CLIENTS_CPU) as crew:
        figures = measure(crew, Server(os.getpid(), server.address), workload, SECONDS)

    assert round(figures.rate * SECONDS) == len(server.lengths) - unmeasured > 0
    assert figures.cpu > 0
    assert 0 < figures.p50 <= figures.p99


def test_idle_connections_are_there_and_do_nothing() -> None:
    """Idle connections echo 8 bytes each, at each server, and no more while it is loaded."""
    with serving(echo) as one, serving(echo) as other, Crew(1, CLIENTS_CPU) as crew:
        up = {name: Server(os.getpid(), it.address) for name, it in (("1", one), ("2", other))}
        workload = Workload("idle", 1, BODY_BYTES, idle=20)
        figures = play(crew, up, workload, rounds=2, seconds=SECONDS)

    assert [len(rounds) for rounds in figures.values()] == [2, 2]
    assert one.lengths.count(12) == other.lengths.count(12) == 20


def test_ratios_are_of_pairs() -> None:
    """A ratio is the median over the rounds of what two servers had in the same one."""
    figures = {
        name: [Figures(value, 1, 1, 1) for value in values]
        for name, values in {"lpechod": [1, 10, 2], "uvloop": [3, 20, 20]}.items()
    }

    assert times_ours(figures, "uvloop", "cpu") == 3
    assert times_ours(figures, "lpechod", "cpu") is None


def test_workloads_together_weigh_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Half as much in one and eight times as much in another is twice as much in both."""
    measured = [
        {"lpechod": [Figures(of, 1, 1, 1)], "uvloop": [Figures(other, 1, 1, 1)]}
        for of, other in ((2, 1), (50, 400))
    ]

    assert together(measured, "uvloop", "cpu") == pytest.approx(2)
    assert together(measured, "lpechod", "cpu") is None

    show_together("both", measured)
    assert capsys.readouterr().out.split()[:4] == ["both", "uvloop", "(", "2.00x)"]

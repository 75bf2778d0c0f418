"""`max_buffered` as a hard limit, with peers that really do not read."""

import os
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import pytest

from lpechod.engine.rotation import UNDIVIDED
from lpechod.net.budget import PATIENCE_SECONDS
from lpechod.net.connection import Connection
from lpechod.ops.config_tables import least_buffered
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason
from tests.net.conftest import Serve
from tests.net.harness import Client, EchoServer, KernelBuffers, assert_same, body_of, frame

LIMIT = 2 << 20
ALARM = LIMIT * 9 // 10
RELIEVED = ALARM * 5 // 6
MOST = (ALARM + LIMIT) // 2
"""Up to here, frames that have begun are given room for their rest while memory is short."""
ECHO = EchoSettings(
    max_frame_bytes=64 << 10,
    high_watermark_bytes=256 << 10,
    low_watermark_bytes=32 << 10,
    write_s=1000,
    frame_s=1000,
)
HELD = (64 << 10) + 64
"""What a frame of the largest size holds: a buffer of its class."""

FRAME = frame(body_of(64 << 10))

SERVER = KernelBuffers(send=4096, receive=1 << 20)
CLIENT = KernelBuffers(send=1 << 20, receive=4096)
"""A frame arrives as a whole, and its echo stays with us."""


@pytest.fixture(name="server")
def _server(serve: Serve) -> EchoServer:
    server = serve(echo=ECHO, max_buffered_bytes=LIMIT, buffers=SERVER)
    pool = server.service.pool
    alarm = pool.on_alarm

    def check(owner: Hashable) -> None:
        assert pool.held <= pool.limit
        assert sum(pool.held_by.values()) == pool.held
        alarm(owner)

    pool.on_alarm = check
    return server


@pytest.fixture(name="holder")
def _holder(server: EchoServer) -> Callable[[int], Client]:
    """Connect clients whose echoes wait: so many of the largest frames, which they do not read."""

    def hold(frames: int) -> Client:
        client = server.connect(buffers=CLIENT)
        connection = server.connection_of(client)
        for _ in range(frames):
            assert client.send_some(FRAME) == len(FRAME)
            server.settle()
        assert server.service.pool.held_by[connection] == frames * HELD
        return client

    return hold


@pytest.mark.parametrize("kib", [1, 60, 64, 65, 300, 1024, 1126])
@pytest.mark.parametrize("small", [False, True])
def test_the_least_that_may_be_configured_is_enough(serve: Serve, kib: int, small: bool) -> None:
    """With it, frames of the largest size are echoed, one after the other and however they come."""
    echo = replace(ECHO, max_frame_bytes=kib << 10)
    least = least_buffered(echo.max_frame_bytes, echo.high_watermark_bytes)
    buffers = KernelBuffers(send=4096, receive=4096) if small else SERVER
    server = serve(echo=echo, max_buffered_bytes=least, buffers=buffers)
    client = server.connect()
    client.exchange(frame(body_of(kib << 10)) * 3)

    assert server.service.counts.closed[CloseReason.OVERLOAD] == 0
    assert server.log.of("memory_short") == []


@pytest.mark.parametrize("high_kib", [32, 256])
@pytest.mark.parametrize("send", [4096, None])
@pytest.mark.parametrize("most", [1 << 10, 64 << 10, 200_000, 256 << 10, 300_000, 1 << 20])
def test_the_least_is_enough_for_many_small_ones(
    serve: Serve, most: int, send: int | None, high_kib: int
) -> None:
    """Nor does a client that pipelines, and reads its echoes, need more, whatever the sizes."""
    high = high_kib << 10
    echo = replace(
        ECHO, max_frame_bytes=most, high_watermark_bytes=high, low_watermark_bytes=high // 4
    )
    server = serve(
        echo=echo,
        max_buffered_bytes=least_buffered(most, high),
        buffers=KernelBuffers(send=send, receive=4 << 20),
    )
    client = server.connect(buffers=KernelBuffers(send=4 << 20))
    small = frame(body_of(64))
    mixed = small * 50 + frame(body_of(300)) * 100 + frame(body_of(most))
    client.exchange(small * (1_000_000 // len(small)))
    client.exchange(mixed * (1_000_000 // len(mixed) + 1))

    assert server.service.counts.closed[CloseReason.OVERLOAD] == 0
    assert server.log.of("memory_short") == []


def lose_descriptor(server: EchoServer, client: Client) -> None:
    """Have something in the place of a socket that can't be watched."""
    with Path(os.devnull).open("rb") as other:
        os.dup2(other.fileno(), server.connection_of(client)._transport.fd)


def fill_with_parts(server: EchoServer) -> list[Client]:
    """Hold memory until the alarm rings, by clients inside frames that have room for the rest."""
    clients = []
    while not server.log.of("memory_short"):
        clients.append(server.connect())
        clients[-1].send(FRAME[:60_000])
        server.settle()
    return clients


class TestShortage:
    """Past nine tenths: who needs more is paused, and after a second the largest are shed."""

    def fill(self, server: EchoServer, holder: Callable[[int], Client]) -> list[Client]:
        """Hold memory until the alarm rings."""
        clients = []
        while server.service.pool.held <= ALARM:
            clients.append(holder(1))
        return clients

    def fill_up(self, server: EchoServer, holder: Callable[[int], Client]) -> list[Client]:
        """Hold memory until there is no room for another frame."""
        clients = self.fill(server, holder)
        while server.service.pool.held + HELD <= MOST:
            clients.append(holder(1))
        return clients

    def test_pauses_and_goes_on(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """Peers that read within the second lose nothing; beginning and end have a line each."""
        clients = self.fill(server, holder)
        (short,) = server.log.of("memory_short")
        assert short["limit"] == LIMIT
        assert ALARM < int(str(short["held"])) <= LIMIT
        assert short["paused"] == len(clients)
        for client in clients:
            assert not server.connection_of(client).protocol.wants_read
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(PATIENCE_SECONDS + 0.1)
        assert server.log.of("memory_relieved") == [{"held": 0, "shed": 0}]
        assert server.loop.rotation.beginning == UNDIVIDED

        for client in clients:
            client.exchange(FRAME)

    def test_sheds_the_largest(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """If nobody reads, the largest are closed, as few as it takes."""
        large = [holder(2) for _ in range(4)]
        small = self.fill(server, holder)
        held = server.service.pool.held
        server.pass_time(PATIENCE_SECONDS - 0.1)
        assert server.service.counts.closed[CloseReason.OVERLOAD] == 0
        server.pass_time(0.2)
        shed = server.service.counts.closed[CloseReason.OVERLOAD]
        assert RELIEVED - 2 * HELD < server.service.pool.held <= RELIEVED
        assert 0 < shed <= len(large)
        assert shed == -(-(held - RELIEVED) // (2 * HELD))
        assert server.log.of("memory_relieved") == [
            {"held": server.service.pool.held, "shed": shed}
        ]

        for client in small:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
            client.exchange(frame(b"goes on"))
        overloaded = [line["peer"] for line in server.log.of("connection_closed")]
        assert set(overloaded) <= {client.name for client in large}

    def test_small_ones_are_served(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """While memory is short, those who hold little are not paused."""
        small = server.connect()
        part = frame(body_of(2000))
        small.send(part[:1500])
        server.settle()
        self.fill(server, holder)
        assert server.connection_of(small).protocol.wants_read
        small.send(part[1500:])

        assert_same(part, small.receive_exactly(len(part)))
        server.connect().exchange(frame(b"newcomer"))

    def test_once_at_a_time(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """More alarms within the second do not start it again, or write another line."""
        self.fill_up(server, holder)
        server.pass_time(0.5)
        for _ in range(2):
            server.connect().send(FRAME[:3000])
            server.settle()
        server.pass_time(0.6)

        assert len(server.log.of("memory_short")) == 1
        assert len(server.log.of("memory_relieved")) == 1

    def test_alarms_in_two_turns(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """An alarm that rings while the first is being acted on is the same shortage."""
        late = [server.connect(buffers=CLIENT) for _ in range(2)]
        while server.service.pool.held + HELD <= ALARM:
            holder(1)
        for client in late:
            client.send_some(FRAME)
            server.turn()
        server.settle()

        assert len(server.log.of("memory_short")) == 1

    def test_again_when_it_comes_again(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """The next shortage is handled like the first."""
        for _ in range(2):
            self.fill(server, holder)
            server.pass_time(PATIENCE_SECONDS + 0.1)

        assert len(server.log.of("memory_short")) == 2
        assert len(server.log.of("memory_relieved")) == 2
        assert server.service.pool.held <= RELIEVED

    def test_gone_before_it_is_over(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Connections that end while they are paused for memory are not touched again."""
        for client in self.fill(server, holder):
            client.reset()
        server.settle()
        assert server.service.pool.held == 0
        server.pass_time(PATIENCE_SECONDS + 0.1)

        assert server.log.of("memory_relieved") == [{"held": 0, "shed": 0}]

    def test_no_spin(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """A shortage that lasts wakes nobody but its own timer, ten times a second."""
        self.fill(server, holder)
        server.settle()

        server.assert_quiet()
        assert server.pass_time(0.9) <= 10

    def test_over_as_soon_as_it_is(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """When peers have read enough, the others go on at the next look, not after a second."""
        clients = self.fill(server, holder)
        for client in clients[: len(clients) // 4]:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(0.2)
        assert server.log.of("memory_relieved") == [{"held": server.service.pool.held, "shed": 0}]
        assert server.service.budget.seconds <= 0.2

        for client in clients:
            assert server.connection_of(client).protocol.wants_read

    @pytest.mark.parametrize("poller_name", ["epoll"])  # Others don't mind what they watch.
    @pytest.mark.parametrize("when", ["paused", "let go", "spared", "relieved"])
    def test_a_defect_costs_its_own_connection(
        self, server: EchoServer, holder: Callable[[int], Client], *, when: str
    ) -> None:
        """Who can't be paused, or go on, is closed, and the others go on."""
        server.errors = {"connection_failed"}
        broken = server.connect() if when == "let go" else holder(1)
        if when == "paused":
            lose_descriptor(server, broken)
        others = self.fill_up(server, holder)
        if when == "let go":
            broken.send(FRAME[:4000])
            server.settle()
        elif when == "spared":
            assert_same(FRAME, broken.receive_exactly(len(FRAME)))
        if when != "paused":
            assert not server.connection_of(broken).protocol.wants_read
            lose_descriptor(server, broken)
        if when == "spared":
            server.pass_time(0.2)
            assert not server.log.of("memory_relieved")
        for client in others:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(PATIENCE_SECONDS + 0.1)

        assert server.closed(broken)["reason"] == "internal_error"
        assert server.log.of("memory_relieved") == [{"held": 0, "shed": 0}]
        for client in others:
            client.exchange(FRAME)

    def test_who_needs_no_more_may_go_on(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """A frame with room for its rest is completed, one without waits, and both are echoed."""
        sent = {server.connect(): 60_000}
        (roomy,) = sent
        roomy.send(FRAME[:60_000])
        server.settle()
        others = self.fill_up(server, holder)
        outgrown = server.connect()
        sent[outgrown] = 4000
        outgrown.send(FRAME[:4000])
        server.settle()
        assert server.connection_of(roomy).protocol.wants_read
        assert not server.connection_of(outgrown).protocol.wants_read
        for client, count in sent.items():
            assert client.send_some(FRAME[count:]) == len(FRAME) - count
        assert_same(FRAME, roomy.receive_exactly(len(FRAME)))
        server.settle()
        assert not outgrown.received
        assert_same(FRAME, others[0].receive_exactly(len(FRAME)))
        assert_same(FRAME, others[1].receive_exactly(len(FRAME)))

        assert_same(FRAME, outgrown.receive_exactly(len(FRAME)))
        assert len(server.log.of("memory_short")) == 1
        assert not server.log.of("memory_relieved")

    def test_who_begins_meanwhile_waits(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Whoever begins a large frame while memory is short holds little of it, and is paused."""
        others = self.fill_up(server, holder)
        client = server.connect()
        assert client.send_some(FRAME) == len(FRAME)
        server.settle()
        connection = server.connection_of(client)
        assert not connection.protocol.wants_read
        assert server.service.pool.held_by[connection] <= 4096 + 64

        assert_same(FRAME, others[0].receive_exactly(len(FRAME)))
        turns = server.loop.turns
        assert_same(FRAME, client.receive_exactly(len(FRAME)))
        assert server.loop.turns - turns < 8, "receives the rest in small pieces"

    def test_who_is_furthest_goes_on_first(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Room that comes back is for the frame of which least is missing, without waiting."""
        clients = [server.connect() for _ in range(3)]
        others = self.fill_up(server, holder)
        for client, part in zip(clients, (1000, 4000, 2500), strict=True):
            client.send(FRAME[:part])
            server.settle()
        connections = [server.connection_of(client) for client in clients]
        assert [each.protocol.wants_read for each in connections] == [False] * 3
        for expected in ([False, True, False], [False, True, True], [True] * 3):
            other = others.pop()
            assert_same(FRAME, other.receive_exactly(len(FRAME)))
            server.settle()
            assert [each.protocol.wants_read for each in connections] == expected
        held_by = server.service.pool.held_by
        assert all(held_by[each] <= 4096 + 64 for each in connections), "before more has arrived"
        for client, part in zip(clients, (1000, 4000, 2500), strict=True):
            client.send(FRAME[part:])
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        assert not server.log.of("memory_relieved")

    @pytest.mark.parametrize("ends", [False, True])
    def test_room_is_promised_to_one_at_a_time(
        self, server: EchoServer, holder: Callable[[int], Client], ends: bool
    ) -> None:
        """It is for one frame, in however many parts that comes, or until its client has ended."""
        first, second = server.connect(), server.connect()
        other = self.fill_up(server, holder).pop()
        connections = [server.connection_of(client) for client in (first, second)]

        def going_on() -> list[bool]:
            server.settle()
            return [connection.protocol.wants_read for connection in connections]

        first.send(FRAME[:4000])
        second.send(FRAME[:1000])
        assert going_on() == [False, False]
        assert_same(FRAME, other.receive_exactly(len(FRAME)))
        for start, end in ((4000, 6000), (6000, 10_000), (10_000, 20_000), (20_000, 60_000)):
            assert going_on() == [True, False]
            if ends and start == 10_000:
                first.reset()
                server.settle()
                assert connections[1].protocol.wants_read
                return
            first.send(FRAME[start:end])
        assert going_on() == [True, False]
        first.send(FRAME[60_000:] + FRAME[:4000])
        assert_same(FRAME, first.receive_exactly(len(FRAME)))
        assert going_on() == [False, True], "a frame later"
        assert second.send_some(FRAME[1000:]) == len(FRAME) - 1000
        assert_same(FRAME, second.receive_exactly(len(FRAME)))

    def test_a_promise_ends_with_the_shortage(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Nothing of it is left for the next one, neither the room nor who was late."""
        client = server.connect()
        other = self.fill_up(server, holder).pop()
        client.send(FRAME[:4000])
        server.settle()
        assert_same(FRAME, other.receive_exactly(len(FRAME)))
        server.settle()
        assert server.connection_of(client).protocol.wants_read
        budget = server.service.budget
        assert (set(budget._promised.values()), budget._owed) == ({HELD}, HELD)
        server.pass_time(1.2)
        assert server.log.of("memory_relieved")
        assert (len(budget._promised), budget._owed, len(budget._late)) == (0, 0, 0)
        assert server.service.pool._on_release is None

    def test_not_all_go_on_at_once(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """When some have been shed, as many go on as can be completed; the others are next."""
        self.fill_up(server, holder)
        clients = [server.connect() for _ in range(20)]
        for client in clients:
            client.send(FRAME[:4000])
            server.settle()
        connections = [server.connection_of(client) for client in clients]
        assert not any(connection.protocol.wants_read for connection in connections)
        server.pass_time(1.1)
        going_on = [connection.protocol.wants_read for connection in connections]
        room = MOST - server.service.pool.held
        assert 0 < sum(going_on) == room // HELD < len(clients)

        for client in sorted(clients, key=lambda client: not going_on[clients.index(client)]):
            client.send(FRAME[4000:])
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(0.1)
        (line,) = server.log.of("memory_relieved")
        assert line["shed"]

    def test_who_makes_nothing_of_a_promise_waits_behind_others(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """A peer that dribbles does not keep others from going on for longer than a second."""
        dribblers = [server.connect() for _ in range(9)]
        other = server.connect()
        self.fill_up(server, holder)
        for client in (*dribblers, other):
            client.send(FRAME[: 2000 if client is other else 4000])
            server.settle()
        server.pass_time(1.1)
        going_on = [server.connection_of(each).protocol.wants_read for each in dribblers]
        assert going_on == [True] * 6 + [False] * 3
        assert not server.connection_of(other).protocol.wants_read

        server.pass_time(1.1)
        assert server.connection_of(other).protocol.wants_read
        assert len(server.service.budget._late) == 6
        dribblers[0].reset()
        server.pass_time(0.1)
        assert len(server.service.budget._late) == 5
        other.send(FRAME[2000:])
        assert_same(FRAME, other.receive_exactly(len(FRAME)))

    def test_who_waits_for_nobody_goes_on(self, serve: Serve) -> None:
        """A frame too large for the room there is goes on when memory is back below the mark."""
        echo = replace(ECHO, max_frame_bytes=1 << 20)
        server = serve(echo=echo, max_buffered_bytes=LIMIT, buffers=SERVER)
        others: list[Client] = []
        while server.service.pool.held <= ALARM:
            others.append(server.connect(buffers=CLIENT))
            assert others[-1].send_some(FRAME) == len(FRAME)
            server.settle()
        client = server.connect()
        client.send(frame(body_of(1 << 20))[:4000])
        server.settle()
        connection = server.connection_of(client)
        for other in others:
            assert not connection.protocol.wants_read
            assert_same(FRAME, other.receive_exactly(len(FRAME)))
            server.settle()
            if server.service.pool.held <= RELIEVED:
                break
        server.pass_time(0.1)
        assert server.connection_of(client).protocol.wants_read

    def test_a_promise_that_is_kept_renews_patience(self, server: EchoServer) -> None:
        """Who comes to have room for all of its frame has gone on, like who is given leave to."""
        fill_with_parts(server)
        client = server.connect()
        client.send(FRAME[:4000])
        server.settle()
        budget = server.service.budget
        assert budget._owed == HELD
        server.pass_time(0.8)
        client.send(FRAME[4000:20_000])
        server.pass_time(0.9)
        assert budget._owed == 0
        assert not server.log.of("memory_relieved")
        server.pass_time(0.3)
        assert server.log.of("memory_relieved")

    def test_what_is_promised_is_a_whole_buffer(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """A frame goes on when there is room for the buffer that it needs, however full."""
        self.fill_up(server, holder)
        small = frame(body_of(20_000))
        client = server.connect()
        client.send(small[:4000])
        server.settle()
        assert len(small) < MOST - server.service.pool.held < HELD
        assert not server.connection_of(client).protocol.wants_read

    def test_nobody_is_shed_while_somebody_goes_on(self, server: EchoServer) -> None:
        """Patience lasts as long as one after the other is given room, and a second beyond."""
        fill_with_parts(server)
        client = server.connect()
        for _ in range(4):
            server.pass_time(0.8)
            client.exchange(FRAME)
        assert not server.log.of("memory_relieved")
        server.pass_time(0.9)
        assert not server.log.of("memory_relieved")
        server.pass_time(0.3)

        (line,) = server.log.of("memory_relieved")
        assert line["shed"]

    def test_who_takes_nothing_is_shed_though_others_go_on(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Peers that do not read are closed after a second, as few as it takes, largest first."""
        large, _small = holder(3), self.fill(server, holder)
        held = server.service.pool.held
        client = server.connect()
        for _ in range(3):
            server.pass_time(0.4)
            client.exchange(FRAME)

        server.pass_time(0.1)
        (line,) = server.log.of("memory_relieved")
        assert line["shed"] == 1 + -(-(held - 3 * HELD - RELIEVED) // HELD)
        assert server.closed(large)["reason"] == "overload"
        client.exchange(FRAME)

    def test_who_takes_some_is_not_shed(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """A peer that reads slowly keeps its place for as long as others go on."""
        slow = holder(3)
        fill_with_parts(server)
        client = server.connect()
        for _ in range(5):
            server.pass_time(0.4)
            while not slow.receive_some(8192):
                server.turn()
            server.settle()
            client.exchange(FRAME)
        assert server.connection_of(slow).protocol.unsent_bytes
        assert server.service.counts.closed[CloseReason.OVERLOAD] == 0

    def test_who_has_no_echo_left_is_read_again(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """A peer that has taken its echoes is not paused for as long as memory is short."""
        clients = self.fill_up(server, holder)
        assert_same(FRAME, clients[0].receive_exactly(len(FRAME)))
        server.pass_time(0.2)
        assert not server.log.of("memory_relieved")
        assert server.connection_of(clients[0]).protocol.wants_read
        assert not server.connection_of(clients[1]).protocol.wants_read

    def test_who_has_a_part_of_a_frame_left_is_read_again(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Nor is one paused for its echoes that has some bytes of the next frame behind them."""
        client = holder(1)
        small = frame(body_of(10))
        client.send(small[:6])
        server.settle()
        clients = self.fill_up(server, holder)
        assert not server.connection_of(client).protocol.wants_read
        assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(0.1)
        assert not server.log.of("memory_relieved")
        client.send(small[6:])
        assert client.receive_exactly(len(small)) == small
        assert not server.connection_of(clients[0]).protocol.wants_read

    def test_who_ends_while_waiting_is_forgotten(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """However many come and go while memory is short, only those are kept who are there."""
        self.fill_up(server, holder)
        server.connect().send(FRAME[:4000])
        server.settle()
        budget = server.service.budget
        for _ in range(80):
            client = server.connect()
            client.send(FRAME[:1000])
            server.settle()
            client.reset()
            server.settle()
        server.pass_time(0.1)
        assert len(budget._waiting) <= 2 * len(budget._paused)
        assert not budget._late

    def test_large_frames_of_a_crowd(self, serve: Serve) -> None:
        """Of far more large frames than memory has room for, each is echoed, and nobody waits."""
        large, limit = frame(body_of(256 << 10)), 16 << 20
        echo = EchoSettings(high_watermark_bytes=1 << 20)
        buffers = KernelBuffers(send=1 << 20, receive=1 << 20)
        server = serve(echo=echo, max_buffered_bytes=limit, buffers=buffers)
        clients = [server.connect(buffers=buffers) for _ in range(200)]
        rest = {client: memoryview(large) for client in clients}
        echoed = dict.fromkeys(clients, 0)

        def done() -> bool:
            for client, unsent in rest.items():
                if unsent:
                    rest[client] = unsent[client.send_some(unsent) :]
                while some := client.receive_some():
                    at = echoed[client]
                    assert large[at : at + len(some)] == some
                    echoed[client] = at + len(some)
            return min(echoed.values()) == len(large)

        server.turn_until(done, "all echoes", [client.socket for client in clients])
        assert server.log.of("memory_short")
        assert server.service.counts.closed[CloseReason.OVERLOAD] == 0


class TestDribblers:
    """Before anybody is paused, those go who have been inside a frame for too long."""

    PART = FRAME[:60_000]
    """It holds as much as the whole frame, and would be overdue after 5 s and 64 KiB / min_rate."""

    LATE = 5.0 + 64.0

    def begin(self, server: EchoServer) -> Client:
        """Connect a client that begins a frame, and let a second pass."""
        client = server.connect()
        client.send(self.PART)
        server.pass_time(1.0)
        return client

    def fill(self, server: EchoServer, holder: Callable[[int], Client]) -> list[Client]:
        """Hold memory until the alarm rings, by clients that do nothing wrong."""
        clients = []
        while not server.log.of("memory_short"):
            clients.append(holder(1))
        return clients

    def test_go_first(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """As many as it takes are closed, the longest overdue first, and nobody is paused."""
        dribblers = [self.begin(server) for _ in range(12)]
        server.pass_time(self.LATE)
        well_behaved = self.fill(server, holder)
        held = (len(dribblers) + len(well_behaved)) * HELD
        wanted = -(-(held - RELIEVED) // HELD)
        assert 0 < wanted < len(dribblers)
        assert server.log.of("memory_short") == [
            {"held": held, "limit": LIMIT, "closed": wanted, "paused": 0}
        ]
        assert server.log.of("memory_relieved") == [{"held": held - wanted * HELD, "shed": 0}]

        for client in dribblers[:wanted]:
            client.expect_eof()
            client.close()
            assert server.closed(client)["reason"] == "overload"
        for client in dribblers[wanted:]:
            client.send(FRAME[len(self.PART) :])
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        for client in well_behaved:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        assert server.service.budget.seconds == 0.0

    def test_not_before_their_time(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Who is inside a frame, but not for too long, may complete it."""
        dribblers = [self.begin(server) for _ in range(12)]
        others = self.fill(server, holder)
        (short,) = server.log.of("memory_short")
        assert short["closed"] == 0
        assert short["paused"] == len(others)
        for client in others:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        server.pass_time(PATIENCE_SECONDS + 0.1)
        for client in dribblers:
            client.send(FRAME[len(self.PART) :])
            assert_same(FRAME, client.receive_exactly(len(FRAME)))
        assert 0 < server.service.budget.seconds <= 0.2

    def test_not_enough(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """If too few are overdue, they go, and the others are paused as well."""
        (dribbler,) = [self.begin(server)]
        server.pass_time(self.LATE)
        others = self.fill(server, holder)
        (short,) = server.log.of("memory_short")
        assert short["closed"] == 1
        assert short["paused"] == len(others)
        dribbler.expect_eof()
        server.pass_time(PATIENCE_SECONDS + 0.1)
        assert RELIEVED - HELD < server.service.pool.held <= RELIEVED

    def test_while_memory_stays_short(self, server: EchoServer) -> None:
        """Who is overdue only by then is closed within a second."""
        dribbler = self.begin(server)
        server.pass_time(self.LATE - 3.0)
        fill_with_parts(server)
        assert server.log.of("memory_short")[0]["closed"] == 0
        client = server.connect()
        for _ in range(3):
            server.pass_time(0.8)
            client.exchange(FRAME)  # So that nobody is shed meanwhile.
        assert not server.log.of("memory_relieved")
        dribbler.expect_eof()
        dribbler.close()
        assert server.closed(dribbler)["reason"] == "overload"

    def test_whole_by_now(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """A frame whose rest waits in the kernel is echoed, however late we look."""
        dribblers = [self.begin(server) for _ in range(12)]
        well_behaved = []
        while server.service.pool.held + HELD <= ALARM:
            well_behaved.append(holder(1))
        server.jump(self.LATE)
        last = server.dial(buffers=CLIENT)
        last.send_some(FRAME)
        for client in dribblers:
            assert client.send_some(FRAME[len(self.PART) :]) == len(FRAME) - len(self.PART)
        server.settle()

        for client in dribblers:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))


class TestLimit:
    """The limit itself is met at once, within the call that would pass it."""

    @pytest.fixture(autouse=True)
    def _no_alarm(self, server: EchoServer) -> None:
        """Leave it to the limit alone, without a warning before."""
        server.service.pool.alarm = LIMIT

    def test_larger_holder_makes_room(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Who asks for less than somebody else holds gets it, and that one is shed."""
        clients = []
        while server.service.pool.held + 2 * HELD <= LIMIT:
            clients.append(holder(2))
        while server.service.pool.held + HELD <= LIMIT:
            holder(1)
        newcomer = holder(1)
        assert server.service.counts.closed[CloseReason.OVERLOAD] == 1
        assert server.service.pool.held <= LIMIT

        assert_same(FRAME, newcomer.receive_exactly(len(FRAME)))
        (line,) = server.log.of("connection_closed")
        assert line["peer"] in {client.name for client in clients}

    def test_largest_holder_gets_no_more(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """Who holds most and wants more is the one to go; the others stay as they are."""
        greedy = holder(2)
        others = []
        while server.service.pool.held + HELD <= LIMIT:
            others.append(holder(1))
        greedy_connection = server.connection_of(greedy)
        greedy_connection.unpause(server.clock.now)
        greedy.send_some(FRAME[:50_000])
        server.settle()

        assert server.closed(greedy)["reason"] == "overload"
        for client in others:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))

    def test_largest_with_others(self, server: EchoServer, holder: Callable[[int], Client]) -> None:
        """Among those who hold the same, nobody is shed for the one that wants more."""
        others = []
        while server.service.pool.held + HELD <= LIMIT:
            others.append(holder(1))
        others.pop().send_some(FRAME)
        server.settle()

        assert server.service.counts.closed[CloseReason.OVERLOAD] == 1
        for client in others:
            assert_same(FRAME, client.receive_exactly(len(FRAME)))

    def test_never_passed(self, server: EchoServer) -> None:
        """A stampede of peers that do not read, in one turn, stays within the limit."""
        clients = [server.connect(buffers=CLIENT) for _ in range(60)]
        for _ in range(30):
            for client in clients:
                try:
                    client.send_some(FRAME * 2)
                except OSError:
                    continue  # It has been shed.
            server.turn()
            assert server.service.pool.held <= LIMIT
        server.pass_time(PATIENCE_SECONDS + 0.1)

        assert server.service.pool.held <= LIMIT
        assert server.service.counts.closed[CloseReason.OVERLOAD] > 0

    def test_whoever_has_grown_since_goes_first(
        self, server: EchoServer, holder: Callable[[int], Client]
    ) -> None:
        """In a crowd, too, those who hold little are not shed for one who has just come to much."""
        pool = server.service.pool
        small = [server.connect() for _ in range(300)]
        for client in small:
            client.send(FRAME[:900])
        server.settle()
        assert isinstance(server.service.budget._largest(), Connection)
        while pool.held + 2 * HELD <= LIMIT:
            holder(2)
        while pool.held + HELD <= LIMIT:
            holder(1)
        holder(1)
        assert server.service.counts.closed[CloseReason.OVERLOAD] == 1

        for client in small:
            assert server.connection_of(client).protocol.wants_read

    def test_request_larger_than_the_limit(self, serve: Serve) -> None:
        """What can never be met ends the connection that asks, and is no defect."""
        server = serve(max_buffered_bytes=1000)
        client = server.connect()
        client.send(frame(b"cut off")[:-1])

        assert server.closed(client)["reason"] == "overload"
        server.connect().exchange(frame(b"fits into one read"))

    def test_echo_before_it_is_sent(self, serve: Serve) -> None:
        """A connection that ends for want of memory has got the echoes that needed none."""
        server = serve(max_buffered_bytes=1000)
        client = server.connect()
        client.send(frame(b"whole") + frame(b"cut off")[:-1])

        assert client.receive_exactly(9) == frame(b"whole")
        assert server.closed(client)["sent_bytes"] == 9

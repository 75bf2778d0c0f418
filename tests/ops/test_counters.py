"""Totals of a worker: their shape, their sum, and what a turn of the loop adds to them."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.engine.loop import Loop
from lpechod.engine.poller import MAX_EVENTS, Poller, Ready, open_poller
from lpechod.net.admission import ALONE, AdmissionLimits, ClientCounts
from lpechod.net.counts import (
    HANDSHAKE_RESULTS,
    PAUSE_REASONS,
    REJECT_REASONS,
    SCARCE_RESOURCES,
)
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.ops.census import Census, CensusRow
from lpechod.ops.counters import GAUGES, TURN_CLASSES, Totals, TurnWatch, gather
from lpechod.ops.logs import open_log
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Histogram, Tally
from tests.fake_time import FakeClock, FakeTimePoller

NAMES = [each.name for each in fields(Totals)]
COUNTS = st.integers(0, 2**63)


@st.composite
def totals(draw: st.DrawFn) -> Totals:
    """Draw totals as a worker may have them."""
    made = Totals()
    for name in NAMES:
        zero = getattr(made, name)
        setattr(made, name, draw(COUNTS) if isinstance(zero, int) else [draw(COUNTS) for _ in zero])
    return made


def flat(made: Totals) -> list[int]:
    """Return all numbers, in order."""
    values = [getattr(made, name) for name in NAMES]
    return [n for value in values for n in ([value] if isinstance(value, int) else value)]


class TellingPoller(FakeTimePoller):
    """A poller that has something done right after each poll, before anybody acts on it."""

    def __init__(self, poller: Poller, clock: FakeClock) -> None:
        super().__init__(poller, clock)
        self.afterwards: Callable[[], object] = lambda: None

    def poll(self, timeout: float | None, maxevents: int = MAX_EVENTS, /) -> Ready:
        """Poll, and let something happen."""
        ready = super().poll(timeout, maxevents)
        self.afterwards()
        return ready


class Worker:
    """The data plane of one worker, in fake time.

    Args:
        log_descriptor: where it logs.
        settings: of the service.
        clients: how many connections of each client other workers hold.
    """

    def __init__(
        self, log_descriptor: int, settings: ServiceSettings, clients: ClientCounts = ALONE
    ) -> None:
        self.clock = FakeClock()
        self.tally = Tally()
        self.watch = TurnWatch(self.tally)
        self.poller = TellingPoller(open_poller("auto"), self.clock)
        self.loop = Loop(self.poller, self.clock, self.watch.note)
        self.log = open_log("debug", "json", 100, 0, clock=self.clock, descriptor=log_descriptor)
        self.service = EchoService(settings, self.loop, self.tally, self.log, clients=clients)

    def connect(self) -> socket.socket:
        """Connect a client over a UNIX socket: what it sends is there when it has been sent."""
        client, accepted = socket.socketpair()
        self.service.welcome(accepted.detach(), "", "listener")
        return client

    def totals(self) -> Totals:
        """Gather."""
        return gather(self.service, self.loop, self.watch)

    def close(self) -> None:
        """Close all that is open."""
        if self.service.connections:
            self.service.cut(self.clock.now)
            self.loop.turn()
        self.loop.close()
        self.log.close()


MakeWorker = Callable[..., Worker]


@pytest.fixture(name="make_worker")
def _make_worker(tmp_path: Path) -> Iterator[MakeWorker]:
    with ExitStack() as stack:
        descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        stack.callback(os.close, descriptor)

        def make(
            echo: EchoSettings | None = None,
            admission: AdmissionLimits | None = None,
            clients: ClientCounts = ALONE,
        ) -> Worker:
            settings = ServiceSettings(echo or EchoSettings(), admission or AdmissionLimits())
            worker = Worker(descriptor, settings, clients)
            stack.callback(worker.close)
            return worker

        yield make


# The shape.


def test_everything_is_zero_at_first() -> None:
    """New totals hold nothing but zeros, in lists of their own."""
    one, other = Totals(), Totals()
    one.connections_closed[0] += 1
    one.turns[3] += 1
    assert set(flat(other)) == {0}


def test_lists_have_a_place_for_each_label() -> None:
    """Lists by reason are as long as the reasons there are."""
    made = Totals()
    assert len(made.connections_closed) == len(CloseReason)
    assert len(made.connections_rejected) == len(REJECT_REASONS)
    assert len(made.accept_pauses) == len(PAUSE_REASONS)
    assert len(made.overload_ns) == len(SCARCE_RESOURCES)
    assert len(made.tls_handshakes) == len(HANDSHAKE_RESULTS)


def test_gathered_totals_have_the_same_shape(make_worker: MakeWorker) -> None:
    """What a worker gathers fits the zeros of new totals, field by field and class by class."""
    gathered = make_worker().totals()
    assert gathered == Totals()
    assert Totals.sum([Totals(), gathered]) == Totals()


def test_handshakes_are_gathered(make_worker: MakeWorker) -> None:
    """What the service counts of handshakes is in the totals, by result."""
    worker = make_worker()
    counts = worker.service.counts
    for number, result in enumerate(HANDSHAKE_RESULTS, 1):
        counts.tls_handshakes[result] = number
    counts.tls_handshakes_delayed = 9
    assert worker.totals().tls_handshakes == list(range(1, len(HANDSHAKE_RESULTS) + 1))
    assert worker.totals().tls_handshakes_delayed == 9


# The sum.


@given(parts=st.lists(totals(), max_size=3))
def test_sum_adds_each_number(parts: list[Totals]) -> None:
    """The sum over workers adds each number up, exactly, and leaves the parts alone."""
    before = [flat(part) for part in parts]
    expected = [sum(column) for column in zip(flat(Totals()), *before, strict=True)]
    assert flat(Totals.sum(parts)) == expected
    assert [flat(part) for part in parts] == before


def test_sum_of_nothing_is_zero() -> None:
    """Without any worker everything is zero."""
    assert Totals.sum([]) == Totals()


def test_sum_refuses_another_shape() -> None:
    """Totals of another version, with more or fewer classes, are not added up silently."""
    other = Totals(turns=[0] * (TURN_CLASSES + 1))
    with pytest.raises(ValueError, match="zip"):
        Totals.sum([other])


# As integers.


@given(made=totals())
def test_round_trip(made: Totals) -> None:
    """Totals come back from integers as they were, in lists of their own."""
    integers = made.to_integers()
    assert integers == flat(made)
    assert len(integers) == sum(length for _, length in Totals.layout())
    again = Totals.from_integers(Totals.layout(), integers)
    assert again == made
    assert made.to_integers(Totals.layout()) == integers
    again.turns[0] += 1
    assert flat(made) == integers


def test_layout_names_each_field() -> None:
    """The layout is the fields in their order, each with how many integers it holds."""
    layout = Totals.layout()
    assert [name for name, _ in layout] == NAMES
    assert dict(layout)["frames"] == 1
    assert dict(layout)["connections_closed"] == len(CloseReason)


@pytest.mark.parametrize(
    ("layout", "integers", "expected"),
    [
        ([], [], Totals()),
        ([], [1, 2], Totals()),
        ([("frames", 1), ("turns", 3)], [], Totals()),
        ([("sent_bytes", 1), ("frames", 1)], [1, 2], Totals(frames=2, sent_bytes=1)),
        ([("gone", 2), ("frames", 1)], [1, 2, 3], Totals(frames=3)),
        ([("sum", 1), ("layout", 1), ("frames", 1)], [1, 2, 3], Totals(frames=3)),
        ([("turns", 2)], [1, 2], Totals(turns=[1, 2] + [0] * (TURN_CLASSES - 2))),
        (
            [("turns", TURN_CLASSES + 1), ("frames", 1)],
            range(TURN_CLASSES + 2),
            Totals(turns=list(range(TURN_CLASSES)), frames=TURN_CLASSES + 1),
        ),
        ([("frames", 2), ("turns", 0), ("turns_ns", 1)], [1, 2, 3], Totals(frames=1, turns_ns=3)),
    ],
)
def test_integers_of_another_version(
    layout: list[tuple[str, int]], integers: Sequence[int], expected: Totals
) -> None:
    """Fields are found by name, unknown ones dropped, lists cut off or filled up with zeros."""
    assert Totals.from_integers(layout, integers) == expected


def test_integers_for_another_version() -> None:
    """Totals follow another layout by the same rules."""
    ours = list(range(1, TURN_CLASSES + 1))
    made = Totals(frames=7, turns=ours)
    layout = [("layout", 1), ("turns", TURN_CLASSES + 1), ("new", 2), ("frames", 1)]
    assert made.to_integers(layout) == [0, *ours, 0, 0, 0, 7]
    assert made.to_integers([("turns", 2), ("echo_delays", 0)]) == [1, 2]


# The end of a worker.


@given(made=totals())
def test_retire(made: Totals) -> None:
    """Of an ended worker its counters remain, and what was open has ended by an internal error."""
    before = flat(made)
    made.connections_accepted = made.connections_active + sum(made.connections_closed)
    left = made.retire()
    assert left.connections_accepted == sum(left.connections_closed) == made.connections_accepted
    lost = dict(zip(CloseReason, left.connections_closed, strict=True))
    for reason, number in zip(CloseReason, made.connections_closed, strict=True):
        lost[reason] -= number
    assert {reason for reason, number in lost.items() if number} <= {CloseReason.INTERNAL_ERROR}
    for name in {*NAMES} - {"connections_closed"}:
        assert getattr(left, name) == (0 if name in GAUGES else getattr(made, name))
    assert left.retire() == left
    assert flat(made)[1:] == before[1:]


def test_gauges() -> None:
    """The gauges are fields that hold one number."""
    assert {(name, 1) for name in GAUGES} <= {*Totals.layout()}
    assert {"connections_active", "buffered_bytes", "timer_entries"} == GAUGES


# What a turn adds.


@given(
    turns=st.lists(
        st.tuples(
            # Seconds: nearly all turns are in the first class, so many of these should be.
            st.floats(0, 100, allow_subnormal=False) | st.floats(0, 100e-6),
            st.integers(0, 300) | st.integers(0, 3),  # Events.
            st.integers(0, 5000) | st.integers(0, 3),  # Frames.
            st.integers(0, 5000) | st.just(0),  # Of which these could not leave at once.
            st.booleans(),  # Whether somebody wants to know.
        )
    )
)
def test_echoes_of_a_turn(turns: list[tuple[float, int, int, int, bool]]) -> None:
    """Each echo that left in its turn is counted once, with the mean time of one event."""
    tally = Tally()
    watch = TurnWatch(tally)
    echoes, durations = Histogram(50e-6, TURN_CLASSES), Histogram(50e-6, TURN_CLASSES)
    for seconds, events, frames, delayed, wanted in turns:
        tally.frames += frames
        tally.delayed_frames += min(frames, delayed)
        watch.note(seconds, events)
        durations.observe(seconds)
        echoes.observe(seconds / max(events, 1), frames - min(frames, delayed))
        if wanted:
            assert watch.settle().counts == durations.counts
    settled = watch.settle()
    assert settled.counts == durations.counts
    assert settled.seconds == pytest.approx(durations.seconds)
    assert tally.echo_delays.counts == echoes.counts
    assert tally.echo_delays.seconds == pytest.approx(echoes.seconds)


@pytest.mark.parametrize(
    ("seconds", "events", "place"),
    [(40e-6, 1, 0), (90e-6, 1, 1), (90e-6, 2, 0), (0.09, 100, 5), (1.0, 1, 15), (1000.0, 1, 20)],
)
def test_place_of_an_echo(seconds: float, events: int, place: int) -> None:
    """The mean time of an event decides the class, whatever the number of frames."""
    tally = Tally()
    watch = TurnWatch(tally)
    tally.frames = 17
    watch.note(seconds, events)
    watch.settle()
    assert {k: n for k, n in enumerate(tally.echo_delays.counts) if n} == {place: 17}


def test_a_turn_of_timers_adds_nothing_to_echoes() -> None:
    """The time of a turn without any event or frame is not that of an echo."""
    tally = Tally()
    watch = TurnWatch(tally)
    watch.note(10e-6, 0)
    assert (watch.settle().counts[0], watch.settle().seconds) == (1, 10e-6)
    assert (sum(tally.echo_delays.counts), tally.echo_delays.seconds) == (0, 0.0)


def test_delayed_echoes_are_left_to_their_queue() -> None:
    """Echoes that could not leave at once are not counted at the end of the turn."""
    tally = Tally()
    watch = TurnWatch(tally)
    tally.frames = tally.delayed_frames = 5
    watch.note(0.001, 1)
    watch.settle()
    assert sum(tally.echo_delays.counts) == 0
    tally.frames += 2
    watch.note(0.001, 1)
    watch.settle()
    assert sum(tally.echo_delays.counts) == 2


# A service of numbers.


def test_a_worker_counts_what_its_clients_do(make_worker: MakeWorker) -> None:
    """Frames, bytes, sizes, delays and durations agree with what one client did."""
    worker = make_worker()
    client = worker.connect()
    bodies = [b"", b"a", b"bb", b"x" * 300]
    sent = b"".join(len(body).to_bytes(4) + body for body in bodies)
    client.sendall(sent + b"\0")
    worker.loop.turn()

    present = worker.totals()
    assert (present.connections_accepted, present.connections_active) == (1, 1)
    assert (present.frames, present.received_bytes, present.sent_bytes) == (4, len(sent) + 1, 319)
    assert {k: n for k, n in enumerate(present.frame_sizes) if n} == {0: 1, 1: 2, 9: 1}
    assert present.frame_sizes_bytes == 303
    assert sum(present.echo_delays) == 4
    assert present.buffered_bytes > 0
    assert present.timer_entries == 2  # Of the frame that has begun, and of newcomers.
    assert sum(present.turns) == 1
    assert client.recv(1000) == sent

    seen = flat(present)
    client.close()
    worker.clock.advance(0.05)
    worker.loop.turn()
    ended = worker.totals()
    assert flat(present) == seen, "totals once taken have changed"
    closed = dict(zip(CloseReason, ended.connections_closed, strict=True))
    assert {reason: n for reason, n in closed.items() if n} == {CloseReason.TRUNCATED_FRAME: 1}
    assert (ended.connections_active, ended.buffered_bytes) == (0, 0)
    assert ended.timer_entries == 1  # Of newcomers, until the next tick.
    assert {k: n for k, n in enumerate(ended.connection_durations) if n} == {3: 1}
    assert ended.connection_durations_ns == 50_000_000


def test_a_worker_counts_what_waits(make_worker: MakeWorker) -> None:
    """Echoes that the kernel does not take are not yet sent, and count as delayed when they are."""
    worker = make_worker(EchoSettings(high_watermark_bytes=2000, low_watermark_bytes=1000))
    client = worker.connect()
    frame = (100_000).to_bytes(4) + b"x" * 100_000
    client.setblocking(False)
    sent = 0
    while not worker.totals().backpressure_pauses:
        sent += client.send((frame * 2)[sent % len(frame) :])
        worker.loop.turn()
    present = worker.totals()
    assert present.frames * len(frame) > present.sent_bytes
    assert present.buffered_bytes > 0
    assert sum(present.echo_delays) < present.frames

    worker.clock.advance(1)
    received = 0
    while received < present.frames * len(frame):
        received += len(client.recv(1 << 20))
        worker.loop.turn()
    later = worker.totals()
    assert sum(later.echo_delays) == later.frames
    assert later.echo_delays_ns > 1_000_000_000
    client.close()


def test_frames_that_a_timer_finds(make_worker: MakeWorker) -> None:
    """Bytes that come between the poll and a deadline are echoed and counted like others."""
    worker = make_worker(EchoSettings(idle_s=10.0))
    client = worker.connect()
    worker.loop.turn()  # Newcomers are filed.
    frame = b"\0\0\0\1x"
    worker.poller.afterwards = lambda: client.sendall(frame)
    worker.loop.turn()
    worker.poller.afterwards = lambda: None
    assert client.recv(100) == frame
    present = worker.totals()
    assert (present.frames, sum(present.echo_delays)) == (1, 1)
    client.close()


def test_rejected_and_paused_are_gathered_in_order(make_worker: MakeWorker) -> None:
    """Counts by reason come out in the order of the reasons."""
    worker = make_worker()
    counts = worker.service.counts
    for number, reason in enumerate(REJECT_REASONS, 1):
        counts.rejected[reason] = number
    for number, reason in enumerate(PAUSE_REASONS, 1):
        counts.accept_pauses[reason] = number
    for number, close_reason in enumerate(CloseReason, 1):
        counts.closed[close_reason] = number
    present = worker.totals()
    assert present.connections_rejected == list(range(1, len(REJECT_REASONS) + 1))
    assert present.accept_pauses == list(range(1, len(PAUSE_REASONS) + 1))
    assert present.connections_closed == list(range(1, len(CloseReason) + 1))


# What the limits of addresses have no room for.


def test_evictions_of_the_rate_limit_are_counted(make_worker: MakeWorker) -> None:
    """With more addresses than the rate limit remembers, those it forgets too early are counted."""
    limits = AdmissionLimits(max_connections=100_000, connection_rate=0.001)
    worker = make_worker(admission=limits)
    admission = worker.service.admission
    for number in range(100_000):
        admission.admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")

    assert worker.totals().rate_limit_evictions == admission.rate_evictions >= 100_000 - 65_536


def test_connections_without_a_place_in_the_census_are_counted(make_worker: MakeWorker) -> None:
    """With more addresses than a worker has room for, those that others do not see are counted."""
    census = Census.create()
    row = CensusRow(census, census.claim())
    limits = AdmissionLimits(max_connections=100_000, max_connections_per_ip=1)
    worker = make_worker(admission=limits, clients=row)
    for number in range(70_000):
        host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        assert worker.service.admission.admit(host) is None

    assert worker.totals().census_overflows >= 70_000 - 65_536
    row.close()
    census.close()

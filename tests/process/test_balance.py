"""Workers that share a queue wake each other: no connection waits for a heartbeat."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import FD_SETSIZE
from lpechod.net.acceptor import Acceptor
from lpechod.net.address import parse_address
from lpechod.net.counts import ConnectionCounts
from lpechod.net.listener import Listener, ListenerSettings, open_listeners
from lpechod.ops.segment import Segment, SlotState
from lpechod.process.balance import Balance
from lpechod.process.bell import Bell
from lpechod.process.siblings import Siblings
from tests.fake_time import FakeClock
from tests.net.harness import POLLERS, HeldPoller, RecordingLog, descriptors


class Sharer:
    """A worker without a service: accepts and keeps. No time passes, so it has no heartbeat.

    Args:
        house: what all have in common.
        poller: a key of `POLLERS`.
        stack: closes what is opened here.
    """

    def __init__(self, house: "House", poller: str, stack: ExitStack) -> None:
        clock = FakeClock()
        self.slot = house.segment.claim()
        self.slot.state = SlotState.READY
        self.siblings = Siblings(house.segment, self.slot)
        self.poller = HeldPoller(POLLERS[poller](), clock)
        self.loop = Loop(self.poller, clock)
        stack.callback(self.loop.close)
        self.log = RecordingLog()
        self.held: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None
        """Called when this one has found that it is ahead, before it acts on that."""
        stack.callback(self.leave, 10_000)
        self.acceptor = Acceptor(
            house.listeners,
            self._welcome,
            ConnectionCounts(),
            self.loop,
            self.log,
            self._allowance,
        )
        self.balance = Balance(self.acceptor, self.siblings, self.slot, house.bell, self.loop)
        stack.callback(self.balance.close)
        self.acceptor.start()

    def _allowance(self) -> int:
        answer = self.siblings.allowance()
        if answer <= 0:
            self.meanwhile()
        return answer

    def _welcome(self, fd: int, _peer: object, _listener: str) -> None:
        self.held.append(fd)
        self.slot.active = len(self.held)

    def leave(self, count: int) -> None:
        """Close so many connections, or all that there are."""
        for _ in range(min(count, len(self.held))):
            os.close(self.held.pop())
        self.slot.active = len(self.held)

    def turn(self) -> int:
        """Turn until there is nothing left to do, and return how many are held."""
        for _ in range(1000):
            turns = self.loop.turns
            self.loop.turn()
            assert self.loop.turns == turns + 1
            if not self.loop.ready:
                return len(self.held)
        raise AssertionError("still busy after 1000 turns")


class House:
    """Two listeners and some who accept from both.

    Args:
        count: how many.
        poller: a key of `POLLERS`.
        stack: closes what is opened here.
    """

    def __init__(self, count: int, poller: str, stack: ExitStack) -> None:
        self.segment = Segment.create()
        stack.callback(self.segment.close)
        self.bell = Bell()
        stack.callback(os.close, self.bell.fd)
        address = ListenerSettings(parse_address("127.0.0.1:0"))
        self.listeners: list[Listener] = [
            listener for each in open_listeners([address] * 2) for listener in each
        ]
        for listener in self.listeners:
            stack.callback(listener.close)
        self.sharers = [Sharer(self, poller, stack) for _ in range(count)]
        for sharer in self.sharers:
            sharer.siblings.observe()
        self.clients: list[socket.socket] = []
        stack.callback(self.hang_up)

    def dial(self, count: int) -> None:
        """Connect so many clients, one half to each listener."""
        for number in range(count):
            listener = self.listeners[number % len(self.listeners)]
            self.clients.append(socket.create_connection(listener.socket.getsockname()))

    def waiting(self) -> list[bool]:
        """Return of each whether it leaves the queue to others, as these see it."""
        return [sharer.slot.waits for sharer in self.sharers]

    def hang_up(self) -> None:
        """Close the clients."""
        for client in self.clients:
            client.close()

    def turn(self, times: int = 30) -> list[int]:
        """Have all turn in turn, and return how many each holds."""
        for _ in range(times):
            for sharer in self.sharers:
                sharer.turn()
        return [len(sharer.held) for sharer in self.sharers]


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("poller", POLLERS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_burst_waits_for_no_heartbeat(stack: ExitStack, poller: str, count: int) -> None:
    """Of 200 who come at once, all are taken in no time at all, and shared evenly."""
    house = House(count, poller, stack)
    house.dial(200)

    held = house.turn()

    assert sum(held) == 200
    assert all(160 <= each * count <= 250 for each in held), held


def test_who_waits_sleeps_until_it_is_its_turn(stack: ExitStack) -> None:
    """A ring of one who is no longer ahead wakes the other, and says so to nobody else."""
    house = House(2, "epoll", stack)
    first, second = house.sharers
    house.dial(30)
    assert first.turn() == 8
    assert house.waiting() == [True, False]
    assert first.turn() == 8
    assert second.turn() == 8 + 8 + 1
    assert house.waiting() == [True, True]
    assert first.turn() == 30 - 17
    assert house.waiting() == [False, True]


def test_nobody_is_woken_while_the_next_one_accepts(stack: ExitStack) -> None:
    """Whoever gives way to one that is watching the queue leaves those in peace who wait."""
    house = House(3, "epoll", stack)
    first, second, third = house.sharers
    house.dial(60)
    first.turn()
    woken = first.loop.turns
    second.turn()
    assert house.waiting() == [True, True, False]
    first.turn()
    assert first.loop.turns == woken + 1
    third.turn()
    assert first.turn() > 8


def test_one_that_went_ahead_meanwhile_is_seen(stack: ExitStack) -> None:
    """Who gives way looks once more, since the other could not know yet that it waits."""
    house = House(2, "epoll", stack)
    first, second = house.sharers
    house.dial(60)
    first.meanwhile = second.turn
    assert first.turn() > 8
    assert second.held


def test_who_drains_hears_no_bell(stack: ExitStack) -> None:
    """A worker that leaves while it waits is shown as not waiting, and is not woken any more."""
    house = House(2, "epoll", stack)
    first, _ = house.sharers
    house.dial(20)
    first.turn()
    assert house.waiting() == [True, False]
    first.acceptor.drain([])
    assert house.waiting() == [False, False]
    turns = first.loop.turns
    house.bell.ring()
    first.turn()
    assert first.loop.turns == turns + 1


def test_who_leaves_wakes_the_others(stack: ExitStack) -> None:
    """Whoever has left the queue to one that drains goes on as soon as it does."""
    house = House(2, "epoll", stack)
    first, second = house.sharers
    house.dial(30)
    assert first.turn() == 8
    before = len(descriptors())
    second.slot.state = SlotState.DRAINING
    second.balance.close()
    assert len(descriptors()) == before - 1
    assert first.turn() == 30


def test_a_worker_that_stays_suspended(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to accept again, and finds no room in the poller, is shown as it stands."""

    def refuse(_fd: int, _mask: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, _ = House(2, "epoll", stack).sharers
    first.acceptor.suspend("emfile")
    monkeypatch.setattr(first.poller, "register", refuse)
    first.acceptor.resume()
    assert first.acceptor.suspended
    assert not first.slot.accepts


def test_without_room_in_the_poller(stack: ExitStack) -> None:
    """A worker that can't listen for the bell gives way all the same, and a heartbeat wakes it."""
    house = House(2, "select", stack)
    first, second = house.sharers
    house.dial(40)
    first.balance.close()
    while (fd := os.dup(0)) < FD_SETSIZE - 1:
        stack.callback(os.close, fd)
    stack.callback(os.close, fd)
    first.balance = Balance(first.acceptor, first.siblings, first.slot, house.bell, first.loop)
    stack.callback(first.balance.close)
    assert first.turn() == 8
    second.turn()
    assert house.waiting() == [True, True]
    assert first.turn() == 8
    assert first.log.of("accept_failed") == []
    first.acceptor.rejoin()
    assert first.turn() > 8


def test_who_can_t_accept_is_waited_for_by_nobody(stack: ExitStack) -> None:
    """A worker out of descriptors says so at once, and whoever has left the queue to it goes on."""
    house = House(2, "epoll", stack)
    first, second = house.sharers
    house.dial(30)
    assert first.turn() == 8
    second.acceptor.suspend("emfile")
    assert not second.slot.accepts
    assert first.turn() == 30

    second.acceptor.resume()
    assert second.slot.accepts


@pytest.mark.parametrize("state", [SlotState.STARTING, SlotState.DRAINING])
def test_a_suspension_is_not_all_of_a_state(stack: ExitStack, state: SlotState) -> None:
    """A worker that starts, or drains, is shown as that, whether it can accept or not."""
    first, _ = House(2, "epoll", stack).sharers
    first.slot.state = state
    first.acceptor.suspend("emfile")
    assert first.slot.state is state
    first.acceptor.resume()
    assert first.slot.state is state

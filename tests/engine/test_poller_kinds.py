"""What only one of the pollers does, and how one is chosen."""

import errno
import os
import resource
import select
import socket
import sys
from contextlib import ExitStack

import pytest

from lpechod.engine.kqueue import KqueuePoller
from lpechod.engine.poller import (
    EDGE,
    ERROR,
    FD_SETSIZE,
    HANGUP,
    PEER_CLOSED,
    READABLE,
    WRITABLE,
    EpollPoller,
    PollPoller,
    SelectPoller,
    available,
    open_poller,
)
from tests.engine import fake_kqueue
from tests.engine.conftest import Pairs

_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")


@_LINUX
class TestEpoll:
    """epoll(7) only."""

    def test_level_unless_asked(self) -> None:
        """Only the edge-triggered variant tells connections to register for edges."""
        pollers = available()
        flags = {name: pollers[name]().edge_triggered for name in pollers}

        assert flags == {name: name == "epoll-et" for name in pollers}

    def test_edge_is_reported_once(self, unix_pair: Pairs) -> None:
        """With `EDGE`, a condition is reported when it begins, and again when more arrives."""
        poller = EpollPoller(edge_triggered=True)
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE | EDGE)
        theirs.send(b"one")
        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]
        assert poller.poll(0.0) == []

        theirs.send(b"two")
        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]
        assert poller.poll(0.0) == []
        poller.close()

    def test_edge_tells_that_the_peer_has_finished(self, tcp_pair: Pairs) -> None:
        """An end of file that comes with the last bytes shows in the mask of their edge."""
        poller = EpollPoller(edge_triggered=True)
        ours, theirs = tcp_pair()
        theirs.send(b"last")
        theirs.shutdown(socket.SHUT_WR)
        select.select([ours], [], [])
        while ours.recv(8, socket.MSG_PEEK) != b"last":
            pass
        poller.register(ours.fileno(), READABLE | WRITABLE | PEER_CLOSED | EDGE)

        masks = 0
        while not masks & PEER_CLOSED:
            [(_, mask)] = poller.poll(None)
            masks |= mask
        assert masks == READABLE | WRITABLE | PEER_CLOSED
        poller.close()

    def test_closing_gives_the_descriptor_back(self) -> None:
        """A closed poller holds no descriptor."""
        poller = EpollPoller()
        fd = poller._epoll.fileno()
        os.fstat(fd)
        poller.close()

        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_masks_are_the_kernels(self) -> None:
        """The flags have epoll's own values, so its answers need no translation."""
        assert (READABLE, WRITABLE, ERROR, HANGUP, PEER_CLOSED, EDGE) == (
            select.EPOLLIN,
            select.EPOLLOUT,
            select.EPOLLERR,
            select.EPOLLHUP,
            select.EPOLLRDHUP,
            select.EPOLLET,
        )


class TestPoll:
    """poll(2) only."""

    def test_masks_are_the_kernels(self) -> None:
        """The flags have poll's own values, so its answers need no translation."""
        assert (READABLE, WRITABLE, ERROR, HANGUP) == (
            select.POLLIN,
            select.POLLOUT,
            select.POLLERR,
            select.POLLHUP,
        )

    def test_closed_descriptor_is_a_defect(self, unix_pair: Pairs) -> None:
        """A descriptor closed while it is watched raises: POLLNVAL would make the loop spin."""
        poller = PollPoller()
        ours, _theirs = unix_pair()
        fd = ours.fileno()
        poller.register(fd, READABLE)
        ours.close()

        with pytest.raises(ValueError, match=f"descriptor {fd} was closed"):
            poller.poll(0.0)


class TestSelect:
    """select(2) only."""

    def test_refuses_large_descriptors(self, stack: ExitStack, unix_pair: Pairs) -> None:
        """A descriptor that select(2) has no bit for is refused before it can do harm."""
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= FD_SETSIZE:
            pytest.skip("descriptors that large are not allowed here")
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        large = os.dup2(ours.fileno(), FD_SETSIZE)
        stack.callback(os.close, large)
        largest = os.dup2(ours.fileno(), FD_SETSIZE - 1)
        stack.callback(os.close, largest)
        poller = SelectPoller()

        with pytest.raises(ValueError, match="descriptor 1024 is too large"):
            poller.register(large, READABLE)

        assert poller.poll(0.0) == []
        poller.register(largest, READABLE)
        assert poller.poll(0.0) == [(largest, READABLE)]

    def test_closed_descriptor_is_a_defect(self, unix_pair: Pairs) -> None:
        """A descriptor closed while it is watched raises instead of spinning."""
        poller = SelectPoller()
        ours, _theirs = unix_pair()
        poller.register(ours.fileno(), READABLE)
        ours.close()

        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            poller.poll(0.0)
        assert raised.value.errno == errno.EBADF


class TestChoice:
    """Choosing a poller by its name in the configuration."""

    def test_auto_picks_the_best(self) -> None:
        """`auto` opens the first of those that the platform has."""
        best, poller = next(iter(available().values()))(), open_poller("auto")

        assert type(poller) is type(best)
        assert not poller.edge_triggered
        best.close()
        poller.close()

    @_LINUX
    def test_best_of_linux(self) -> None:
        """Linux has level- and edge-triggered epoll, poll and select, best first."""
        assert list(available()) == ["epoll", "epoll-et", "poll", "select"]

    def test_by_name(self) -> None:
        """Every name that is offered opens the poller it stands for."""
        for name, factory in available().items():
            poller, twin = open_poller(name), factory()
            assert type(poller) is type(twin)
            assert poller.edge_triggered == twin.edge_triggered
            poller.close()
            twin.close()

    def test_unknown_name(self) -> None:
        """An unknown name is refused, and the message says which there are."""
        with pytest.raises(ValueError, match=r"no poller 'devpoll' here; there are .*select"):
            open_poller("devpoll")

    def test_kqueue_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where `select` has kqueue, it comes before poll and select."""
        monkeypatch.setattr(select, "kqueue", fake_kqueue.kqueue, raising=False)
        monkeypatch.setattr(sys, "platform", "freebsd14")

        assert list(available()) == ["kqueue", "poll", "select"]
        assert isinstance(open_poller("auto"), KqueuePoller)


def test_one_wait_takes_a_bounded_batch(unix_pair: Pairs) -> None:
    """A wait hands out no more events at once than it is asked for, and the rest next time."""
    poller = open_poller("auto")
    pairs = [unix_pair() for _ in range(8)]
    for ours, _ in pairs:
        poller.register(ours.fileno(), WRITABLE)

    first = poller.poll(0.0, 7)
    assert len(first) == 7
    assert len({*first, *poller.poll(0.0, 7)}) == 8
    poller.close()

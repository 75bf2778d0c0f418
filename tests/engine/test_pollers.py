"""Every poller of the platform through the same tests, and kqueue over a stand-in."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.kqueue import KqueuePoller
from lpechod.engine.poller import (
    ERROR,
    HANGUP,
    READABLE,
    WRITABLE,
    Poller,
    SelectPoller,
    available,
)
from tests.engine import fake_kqueue
from tests.engine.conftest import Pairs

POLLERS: dict[str, Callable[[], Poller]] = {
    **available(),
    "fake-kqueue": lambda: KqueuePoller(fake_kqueue),
}

_SILENT_WITHOUT_INTEREST = (SelectPoller, KqueuePoller)


@pytest.fixture(name="poller", params=list(POLLERS))
def _poller(request: pytest.FixtureRequest) -> Iterator[Poller]:
    poller = POLLERS[request.param]()
    yield poller
    poller.close()


class TestEveryPoller:
    """What the loop may rely on, whichever poller the operator has chosen."""

    def test_nothing_ready(self, poller: Poller, unix_pair: Pairs) -> None:
        """A silent descriptor is not reported, and a time-out of zero does not wait."""
        ours, _theirs = unix_pair()
        poller.register(ours.fileno(), READABLE)

        assert poller.poll(0.0) == []

    def test_no_descriptors(self, poller: Poller) -> None:
        """A poller that watches nothing can still wait for a deadline."""
        assert poller.poll(0.0) == []
        assert poller.poll(0.001) == []

    def test_readable(self, poller: Poller, unix_pair: Pairs) -> None:
        """Bytes to read are reported, to those that ask for reading."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE)
        theirs.send(b"frame")

        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]

    def test_writable(self, poller: Poller, unix_pair: Pairs, fill: Callable[..., int]) -> None:
        """Room to write is reported while there is some, and not otherwise."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), WRITABLE)
        assert poller.poll(0.0) == [(ours.fileno(), WRITABLE)]

        unread = fill(ours)
        assert poller.poll(0.0) == []

        while unread:
            unread -= len(theirs.recv(65536))
        assert poller.poll(0.0) == [(ours.fileno(), WRITABLE)]

    def test_both_in_one_mask(self, poller: Poller, unix_pair: Pairs) -> None:
        """A descriptor ready in both ways is one entry with both bits."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE | WRITABLE)
        theirs.send(b"frame")

        assert poller.poll(0.0) == [(ours.fileno(), READABLE | WRITABLE)]

    def test_only_what_was_asked_for(self, poller: Poller, unix_pair: Pairs) -> None:
        """Readiness that nobody asked for is not reported."""
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        poller.register(ours.fileno(), WRITABLE)
        assert poller.poll(0.0) == [(ours.fileno(), WRITABLE)]

        poller.modify(ours.fileno(), READABLE)
        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]

        poller.modify(ours.fileno(), 0)
        assert poller.poll(0.0) == []

        poller.modify(ours.fileno(), READABLE | WRITABLE)
        assert poller.poll(0.0) == [(ours.fileno(), READABLE | WRITABLE)]

    def test_registered_for_nothing(self, poller: Poller, unix_pair: Pairs) -> None:
        """A descriptor can be registered without interest, and be given some later."""
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        poller.register(ours.fileno(), 0)
        assert poller.poll(0.0) == []

        poller.modify(ours.fileno(), READABLE)
        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]

    def test_unregistered(self, poller: Poller, unix_pair: Pairs) -> None:
        """A descriptor that was taken out is silent, and can be registered again."""
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        poller.register(ours.fileno(), READABLE | WRITABLE)
        poller.unregister(ours.fileno())
        assert poller.poll(0.0) == []

        poller.register(ours.fileno(), READABLE)
        assert poller.poll(0.0) == [(ours.fileno(), READABLE)]

    @pytest.mark.parametrize("forgotten", [False, True])
    def test_reused_number(self, poller: Poller, unix_pair: Pairs, *, forgotten: bool) -> None:
        """A number that comes back once it was given up and closed stands for its new file only."""
        ours, theirs = unix_pair()
        fd = ours.fileno()
        theirs.send(b"frame")
        poller.register(fd, READABLE | WRITABLE)
        (poller.forget if forgotten else poller.unregister)(fd)
        ours.close()
        fresh, other = unix_pair()
        assert fresh.fileno() == fd
        poller.register(fd, READABLE)
        assert poller.poll(0.0) == []

        other.send(b"frame")
        assert poller.poll(0.0) == [(fd, READABLE)]

    def test_level_triggered(self, poller: Poller, unix_pair: Pairs) -> None:
        """What stays ready is reported by each poll, until it has been read."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE)
        theirs.send(b"frame")
        for _ in range(3):
            assert poller.poll(0.0) == [(ours.fileno(), READABLE)]

        ours.recv(64)
        assert poller.poll(0.0) == []

    def test_many_at_once(self, poller: Poller, unix_pair: Pairs) -> None:
        """With more ready descriptors than one wait takes, every one gets its turn."""
        owners = [unix_pair() for _ in range(300)]
        for ours, theirs in owners:
            poller.register(ours.fileno(), READABLE)
            theirs.send(b"frame")
        reported: set[int] = set()
        for _ in range(2):
            ready = poller.poll(0.0)
            assert len({fd for fd, _ in ready}) == len(ready)
            reported.update(fd for fd, _ in ready)

        assert reported == {ours.fileno() for ours, _ in owners}

    @pytest.mark.parametrize("kind", ["unix_pair", "tcp_pair"])
    def test_end_of_file_stays_readable(
        self, poller: Poller, kind: str, request: pytest.FixtureRequest
    ) -> None:
        """A half-close is readable again and again, even after it has been read."""
        ours, theirs = request.getfixturevalue(kind)()
        poller.register(ours.fileno(), READABLE)
        theirs.shutdown(socket.SHUT_WR)

        for _ in range(3):
            assert poller.poll(None) == [(ours.fileno(), READABLE)]
            assert ours.recv(64) == b""

        poller.modify(ours.fileno(), 0)
        assert poller.poll(0.0) == []

    def test_half_close_leaves_writing_alone(self, poller: Poller, tcp_pair: Pairs) -> None:
        """A peer that has only finished sending is no hang-up: it still reads."""
        ours, theirs = tcp_pair()
        poller.register(ours.fileno(), READABLE)
        theirs.shutdown(socket.SHUT_WR)
        poller.poll(None)
        poller.modify(ours.fileno(), WRITABLE)

        assert poller.poll(0.0) == [(ours.fileno(), WRITABLE)]

    def test_listener(self, poller: Poller, stack: ExitStack) -> None:
        """A listening socket is readable while a connection waits."""
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        poller.register(listener.fileno(), READABLE)
        assert poller.poll(0.0) == []

        stack.enter_context(socket.create_connection(listener.getsockname()))
        assert poller.poll(None) == [(listener.fileno(), READABLE)]

    def test_reset_reaches_readers(
        self, poller: Poller, tcp_pair: Pairs, reset: Callable[..., None]
    ) -> None:
        """A reset makes a watched descriptor readable, so that a read can tell what happened."""
        ours, theirs = tcp_pair()
        poller.register(ours.fileno(), READABLE)
        reset(theirs)

        [(fd, mask)] = poller.poll(None)
        assert fd == ours.fileno()
        assert mask & READABLE
        with pytest.raises(ConnectionResetError):
            ours.recv(64)

    def test_reset_reaches_writers(
        self,
        poller: Poller,
        tcp_pair: Pairs,
        fill: Callable[..., int],
        reset: Callable[..., None],
    ) -> None:
        """A reset wakes those that wait for room to write."""
        ours, theirs = tcp_pair()
        fill(ours)
        poller.register(ours.fileno(), WRITABLE)
        reset(theirs)

        [(fd, mask)] = poller.poll(None)
        assert fd == ours.fileno()
        assert mask & WRITABLE

    def test_reset_without_interest(
        self, poller: Poller, tcp_pair: Pairs, reset: Callable[..., None]
    ) -> None:
        """Where the system call can't mask errors, a reset shows without any interest."""
        ours, theirs = tcp_pair()
        poller.register(ours.fileno(), READABLE)
        reset(theirs)
        poller.poll(None)
        poller.modify(ours.fileno(), 0)

        if isinstance(poller, _SILENT_WITHOUT_INTEREST):
            assert poller.poll(0.0) == []
        else:
            assert poller.poll(0.0) == [(ours.fileno(), ERROR | HANGUP)]

    def test_hang_up(self, poller: Poller, unix_pair: Pairs) -> None:
        """A UNIX peer that has closed shows as end of file to readers, and as a hang-up."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE | WRITABLE)
        theirs.close()

        expected = READABLE | WRITABLE
        if not isinstance(poller, SelectPoller):
            expected |= HANGUP
        assert poller.poll(0.0) == [(ours.fileno(), expected)]
        assert poller.poll(0.0) == [(ours.fileno(), expected)]

    def test_pipe(self, poller: Poller, stack: ExitStack) -> None:
        """A pipe, which signals arrive by, is readable like a socket, and at its end as well."""
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        poller.register(reader, READABLE)
        assert poller.poll(0.0) == []

        os.write(writer, b"\x0f")
        assert poller.poll(0.0) == [(reader, READABLE)]
        os.read(reader, 64)
        os.close(writer)

        [(fd, mask)] = poller.poll(0.0)
        assert fd == reader
        assert mask & (READABLE | HANGUP)

    @pytest.mark.parametrize("timeout", [1e-9, 0.0001, 0.0009999, 0.0010001, 0.0025, 0.0099995])
    def test_waits_at_least(self, poller: Poller, timeout: float) -> None:
        """A wait is rounded up, never down: no poll returns before its time-out has passed."""
        for _ in range(3):
            start = time.monotonic()
            assert poller.poll(timeout) == []
            assert time.monotonic() >= start + timeout

    def test_waits_for_ever(self, poller: Poller, unix_pair: Pairs) -> None:
        """Without a time-out the poller waits until somebody else makes a descriptor ready."""
        ours, theirs = unix_pair()
        poller.register(ours.fileno(), READABLE)
        somebody = threading.Thread(target=theirs.send, args=(b"frame",))
        somebody.start()

        assert poller.poll(None) == [(ours.fileno(), READABLE)]
        somebody.join()

    def test_unknown_descriptor(self, poller: Poller, unix_pair: Pairs) -> None:
        """Changing or taking out what is not watched is an error, not a silent new entry."""
        ours, _theirs = unix_pair()

        with pytest.raises((OSError, KeyError)):
            poller.modify(ours.fileno(), READABLE)
        with pytest.raises((OSError, KeyError)):
            poller.unregister(ours.fileno())

"""Readiness: select(2), poll(2) and epoll(7) behind one face (kqueue(2) is in `kqueue`).

A poller takes descriptors with a mask of interest and returns pairs of descriptor and mask. Facts
that every user has to honour:

- poll(2) and epoll(7) report `ERROR` and `HANGUP` whether asked for or not, again and again, until
  the descriptor is taken out. Interest in nothing silences everything else only. select(2) and
  kqueue(2) tell nothing to those who ask for nothing;
- an end of file is *readable*, again and again, until interest in reading is dropped;
- only `EpollPoller` with `EDGE` reports a change once; all else is level-triggered.

Time-outs are rounded up to what the system call can express: waking a millisecond early would mean
to turn the loop until the deadline is really there.
"""

import math
import select
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

READABLE = 0x001
WRITABLE = 0x004
ERROR = 0x008
HANGUP = 0x010
PEER_CLOSED = 0x2000
"""The peer shut down its writing side. Edge-triggered interest only: it tells a reader that the
next edge may never come because the end of file has already arrived (epoll(7), EPOLLRDHUP)."""
URGENT = 0x002
"""There is an urgent byte (tcp(7)), at which a read ends, whatever is behind it. With epoll(7)
only."""
EDGE = 0x8000_0000
"""Interest flag: report changes, not conditions. These numbers are Linux's own (poll(2), epoll(7)),
so that epoll's answers need no translation."""

FD_SETSIZE = 1024
"""One more than the largest descriptor that select(2) can hold, on glibc, musl and the BSDs."""

MAX_EVENTS = 256
"""Events taken by one wait; the kernel hands the rest out first next time, so nobody starves."""

Ready = list[tuple[int, int]]


class Poller(Protocol):
    """What the loop needs of a readiness call."""

    edge_triggered: bool
    """Whether connections should register with `EDGE`."""

    def register(self, fd: int, mask: int) -> None:
        """Start to watch a descriptor."""

    def modify(self, fd: int, mask: int) -> None:
        """Change what a descriptor is watched for."""

    def unregister(self, fd: int) -> None:
        """Stop watching a descriptor. To be called before the descriptor is closed."""

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor that is closed next, and of which there is no duplicate."""

    def poll(self, timeout: float | None, maxevents: int = MAX_EVENTS, /) -> Ready:
        """Wait until something is ready.

        Args:
            timeout: seconds to wait at most; None waits for ever.
            maxevents: how many pairs to return at most, if the system call has such a bound.
        """

    def close(self) -> None:
        """Give the poller's own descriptor back."""


class EpollPoller:
    """epoll(7): a wait costs what is ready, not what is watched."""

    __slots__ = ("_epoll", "edge_triggered", "modify", "poll", "register", "unregister")

    def __init__(self, *, edge_triggered: bool = False) -> None:
        self.edge_triggered = edge_triggered
        self._epoll = select.epoll()
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.poll = self._epoll.poll  # It rounds to the next millisecond itself.

    def forget(self, fd: int) -> None:
        """Do nothing: a descriptor leaves the set by itself when it is closed (epoll(7))."""

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()


class PollPoller:
    """poll(2): no limit on descriptors, but each wait costs all that are watched."""

    __slots__ = ("_poll", "forget", "modify", "register", "unregister")

    edge_triggered = False

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self.forget = self._poll.unregister

    def poll(self, timeout: float | None, _maxevents: int = MAX_EVENTS, /) -> Ready:
        """Wait, with the time-out rounded up to a millisecond; return all that is ready."""
        ready = self._poll.poll(None if timeout is None else math.ceil(timeout * 1000))
        for fd, mask in ready:
            if mask & select.POLLNVAL:
                # Never clears, so it would spin: somebody closed a descriptor that is watched.
                raise ValueError(f"descriptor {fd} was closed while it was watched")
        return ready

    def close(self) -> None:
        """There is no descriptor to give back."""


class SelectPoller:
    """select(2): everywhere, but only for descriptors below `FD_SETSIZE`."""

    __slots__ = ("_interest",)

    edge_triggered = False

    def __init__(self) -> None:
        self._interest: dict[int, int] = {}

    def register(self, fd: int, mask: int) -> None:
        """Start to watch a descriptor.

        Raises:
            ValueError: the descriptor is too large for select(2).
        """
        if fd >= FD_SETSIZE:
            raise ValueError(
                f"descriptor {fd} is too large for select(2), which ends at {FD_SETSIZE - 1}"
            )
        self._interest[fd] = mask

    def modify(self, fd: int, mask: int) -> None:
        """Change what a descriptor is watched for.

        Raises:
            KeyError: it is not being watched.
        """
        if fd not in self._interest:
            raise KeyError(fd)
        self._interest[fd] = mask

    def unregister(self, fd: int) -> None:
        """Stop watching a descriptor."""
        del self._interest[fd]

    forget = unregister

    def poll(self, timeout: float | None, _maxevents: int = MAX_EVENTS, /) -> Ready:
        """Wait; select.select rounds to the next microsecond itself. Return all that is ready.

        An error shows as readable and writable, as select(2) has no word for it.
        """
        watched = self._interest.items()
        readers, writers, _ = select.select(
            [fd for fd, mask in watched if mask & READABLE],
            [fd for fd, mask in watched if mask & WRITABLE],
            (),
            timeout,
        )
        masks = dict.fromkeys(readers, READABLE)
        for fd in writers:
            masks[fd] = masks.get(fd, 0) | WRITABLE
        return list(masks.items())

    def close(self) -> None:
        """There is no descriptor to give back."""


def _kqueue() -> Poller:
    from lpechod.engine.kqueue import KqueuePoller  # noqa: PLC0415 - BSD and macOS only.

    return KqueuePoller()


def available() -> Mapping[str, Callable[[], Poller]]:
    """Return the pollers of this platform, best first, by their names in the configuration."""
    pollers: dict[str, Callable[[], Poller]] = {}
    if sys.platform == "linux":
        pollers["epoll"] = EpollPoller
        pollers["epoll-et"] = lambda: EpollPoller(edge_triggered=True)
    if hasattr(select, "kqueue"):
        pollers["kqueue"] = _kqueue
    if hasattr(select, "poll"):
        pollers["poll"] = PollPoller
    pollers["select"] = SelectPoller
    return pollers


def best() -> str:
    """Return the name of the best poller of this platform."""
    return next(iter(available()))


def open_poller(name: str) -> Poller:
    """Open a poller.

    Args:
        name: as in the configuration; ``auto`` is the best of the platform.

    Raises:
        ValueError: the platform has no such poller.
    """
    pollers = available()
    if name == "auto":
        name = best()
    if name not in pollers:
        raise ValueError(f"no poller {name!r} here; there are {', '.join(pollers)}")
    return pollers[name]()

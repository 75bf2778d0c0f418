"""Accepts connections from all listeners of a worker, and stops when the kernel has nothing left.

When descriptors or memory run out, accept(2) fails and leaves the connection in the queue, so a
level-triggered listener stays ready and a loop that only tries again spins: 300,000 times a second.
So accepting is suspended for all listeners, one line is logged, and it goes on when a connection
has closed or a second has passed, whichever is first. A descriptor kept in reserve, to accept and
close, was rejected: it spins as well as soon as two processes share a listener, and it turns away
clients that a moment later could have been served.

A worker that shares its listeners with others may also give way to them: it leaves the queue alone
until it is no longer ahead. The listeners are watched while accepting has been started, is not
suspended and does not give way; each of the three changes without regard to the others.
"""

import errno
from collections.abc import Callable, Collection

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE
from lpechod.engine.wheel import Timer
from lpechod.net.counts import ConnectionCounts
from lpechod.net.eventlog import EventLog
from lpechod.net.listener import Listener

ACCEPTS_PER_TURN = 16
"""For each listener. Enough for 100,000 a second; a storm of them must not hold up the others."""

RETRY_SECONDS = 1.0

_LONGEST_QUEUE = 4096
"""Connections served by a drain from one listener: a full queue of the default backlog, but not
whatever a storm adds meanwhile."""

_EXHAUSTED = {
    errno.EMFILE: "emfile",
    errno.ENFILE: "enfile",
    errno.ENOBUFS: "enobufs",
    errno.ENOMEM: "enomem",
}

_ABORTED = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        getattr(errno, "ENONET", errno.EHOSTUNREACH),  # Linux only.
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)
"""Errors of the connection that waited, not of the listener: accept(2) passes them on on Linux, and
the next one in the queue may be well. EPERM: refused by a packet filter or a security module."""


class Acceptor(Timer):
    """Accepts for one service.

    Args:
        listeners: where to accept from; closed by `drain`.
        welcome: called with the descriptor of each connection, which is its own from then on, the
            peer's address and the listener's name.
        counts: where to count what could not be accepted.
        loop: where to wait.
        log: gets one line when accepting is suspended and one when it goes on.
        allowance: returns how many connections this worker may take before it is too far ahead of
            its siblings; asked once for each time that a listener is ready, and by `rejoin`. None:
            any number.
    """

    __slots__ = (
        "_allowance",
        "_counts",
        "_gives_way",
        "_listeners",
        "_log",
        "_loop",
        "_reason",
        "_started",
        "_watched",
        "_welcome",
        "on_giving_way",
        "on_suspended",
    )

    def __init__(
        self,
        listeners: list[Listener],
        welcome: Callable[[int, object, str], None],
        counts: ConnectionCounts,
        loop: Loop,
        log: EventLog,
        allowance: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self._listeners = listeners
        self._welcome = welcome
        self._counts = counts
        self._loop = loop
        self._log = log
        self._allowance = allowance
        self._started = False
        self._reason: str | None = None
        self._gives_way = False
        self._watched = False
        self.on_giving_way: Callable[[bool], None] = lambda _gives_way: None
        """Called with True when this worker has begun to give way, with False when it is over."""
        self.on_suspended: Callable[[bool], None] = lambda _suspended: None
        """Likewise when accepting has been suspended."""

    @property
    def accepting(self) -> bool:
        """Whether connections are being accepted at this moment."""
        return self._watched

    @property
    def suspended(self) -> bool:
        """Whether accepting has failed, and is not being tried again yet."""
        return self._reason is not None

    @property
    def gives_way(self) -> bool:
        """Whether new connections are left to other workers, until `rejoin`."""
        return self._gives_way

    def start(self) -> None:
        """Begin to accept, or go on."""
        self._started = True
        self._watch()

    def stop(self) -> None:
        """Leave new connections in the listeners' queues."""
        self._started = False
        self._watch()

    def drain(self, finish: Collection[str] | None = None) -> None:
        """Serve what already waits in the queues, then close the listeners.

        Closing the last descriptor of a listening socket resets every connection in its queue.

        Args:
            finish: names of the listeners that nobody will serve any more; the queues of the others
                are left to those who share them. None: all are served.
        """
        for listener in self._listeners:
            if finish is None or listener.name in finish:
                self._empty(listener)
        self.stop()
        self._loop.cancel(self)
        self._reason = None
        if self._gives_way:
            self._set_giving_way(False)
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    def accept(self, listener: Listener) -> None:
        """Accept from a listener until its queue is empty or the budget is spent."""
        budget = ACCEPTS_PER_TURN if self._allowance is None else self._allowance()
        if budget <= 0:
            self._give_way()
            return
        rejected = self._counts.rejected
        aborted = rejected["aborted"]
        for calls in range(1, ACCEPTS_PER_TURN + 1):
            if not self._accept_one(listener):
                return
            if calls - (rejected["aborted"] - aborted) == budget:
                return
        if rejected["aborted"] - aborted == ACCEPTS_PER_TURN:
            # Not the clients are at fault: a security module refuses each call, and leaves the
            # queue as it is.
            self.suspend("other")

    def suspend(self, reason: str) -> None:
        """Stop accepting until a connection closes or `RETRY_SECONDS` have passed."""
        if self._reason is not None:
            return
        self._counts.accept_pauses[reason] += 1
        listeners = [listener.name for listener in self._listeners]
        self._log.warning("accept_paused", reason=reason, listeners=listeners)
        self._reason = reason
        self._watch()
        self._loop.schedule(self, self._loop.now + RETRY_SECONDS)
        self.on_suspended(True)

    def resume(self) -> None:
        """Go on if accepting is suspended; called after each close and when the time is over."""
        if self._reason is not None:
            self._log.info("accept_resumed", reason=self._reason)
            self._reason = None
            self._loop.cancel(self)
            self.on_suspended(False)
            self._watch()

    def rejoin(self) -> None:
        """Go on if this worker gives way and need not any more.

        To be called at each heartbeat; and, so that nobody waits for that, after each close and
        when something has changed for another worker.
        """
        if self._gives_way and (self._allowance is None or self._allowance() > 0):
            self._set_giving_way(False)

    def fail(self, error: Exception) -> None:
        """Report a defect, and suspend: trying at once would meet it again."""
        self._log.error("accept_failed", exc_info=error)
        if self._watched:
            self.suspend("other")

    def on_deadline(self, _now: float) -> None:
        """Try again."""
        self.resume()

    def _give_way(self) -> None:
        self._counts.accept_pauses["balance"] += 1
        self._log.debug("accept_left_to_others")
        self._set_giving_way(True)

    def _set_giving_way(self, gives_way: bool) -> None:
        self._gives_way = gives_way
        self._watch()
        self.on_giving_way(gives_way)

    def _watch(self) -> None:
        """Watch the listeners, or do not, as things stand."""
        watched = self._started and self._reason is None and not self._gives_way
        if watched == self._watched:
            return
        if watched:
            self._open_doors()
        else:
            self._close_doors(self._listeners)
        self._watched = watched and self._reason is None

    def _open_doors(self) -> None:
        """Watch all listeners, or none if the kernel has no room for one (epoll_ctl(2))."""
        opened: list[Listener] = []
        try:
            for listener in self._listeners:
                self._loop.register(listener.socket.fileno(), _Door(self, listener), READABLE)
                opened.append(listener)
        except OSError as error:
            self._close_doors(opened)
            self.suspend(_EXHAUSTED.get(error.errno or 0, "other"))

    def _close_doors(self, listeners: list[Listener]) -> None:
        for listener in listeners:
            self._loop.unregister(listener.socket.fileno())

    def _empty(self, listener: Listener) -> None:
        try:
            for _ in range(_LONGEST_QUEUE):
                if not self._accept_one(listener):
                    break
        except Exception as error:  # noqa: BLE001 - the others are drained all the same.
            self._log.error("accept_failed", exc_info=error)

    def _accept_one(self, listener: Listener) -> bool:
        """Accept a connection; False when there is no point in trying on."""
        try:
            fd, peer = listener.socket.accept_descriptor()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _ABORTED:
                self._counts.rejected["aborted"] += 1
                return True
            if error.errno not in _EXHAUSTED:
                raise
            self.suspend(_EXHAUSTED[error.errno])
            return False
        self._welcome(fd, peer, listener.name)
        return True


class _Door:
    """A listener in the loop."""

    __slots__ = ("_acceptor", "_listener")

    def __init__(self, acceptor: Acceptor, listener: Listener) -> None:
        self._acceptor = acceptor
        self._listener = listener

    def on_ready(self, _mask: int, _now: float) -> None:
        self._acceptor.accept(self._listener)

    def on_failure(self, error: Exception, _now: float) -> None:
        self._acceptor.fail(error)

"""What a connection holds, and what moves it from one state to the next.

Events come from the peer (an end of file, a reset), from what precedes the first frame, from time
and from the operator. Each is one line of `lpechod.wire.states.TRANSITIONS`; what is here is what a
transition means for the buffers: whoever is past reading holds no frame in part, and whoever is
past sending holds no echo.

The attributes are set by `lpechod.wire.echo.EchoProtocol`, which is derived from it: a call less
for each connection.
"""

from collections.abc import Callable, Hashable

from lpechod.wire.deadlines import Deadlines
from lpechod.wire.partial import PartialFrame
from lpechod.wire.pending import Buffers
from lpechod.wire.states import CloseReason, Event, State, next_state

_OPEN, _DRAINING, _CLOSED = State.OPEN, State.DRAINING, State.CLOSED
READING = frozenset({State.OPEN, State.DRAINING})
_LEAVING = frozenset({State.FLUSHING, State.FINISHING})
OVER = frozenset({State.LINGERING, State.CLOSED})


class Lifecycle(Deadlines):
    """The states of one connection, from its handshake to its close.

    Attributes:
        changed: whether to call `advance` and look at everything again.
        close_reason: why it ends, from when that is certain.
        receive_into: where the next bytes go.
        steady: whether it is open, and holds nothing.
    """

    __slots__ = (
        "_buffers", "_leave_blocked", "_owner", "_spare", "changed", "close_reason", "receive_into",
        "steady",
    )  # fmt: skip

    _buffers: Buffers
    _leave_blocked: bool
    _owner: Hashable
    _spare: memoryview | None
    """A buffer of ours with nothing in it that has to be kept; given back by `advance`."""
    changed: bool
    close_reason: CloseReason | None
    receive_into: memoryview
    steady: bool

    def established(self, now: float) -> None:
        """Take note that what precedes the first frame is complete."""
        self._move(Event.ESTABLISHED)
        self.steady = True
        self.active_at = now

    def refuse(self, reason: CloseReason) -> None:
        """End it in good order: the peer broke a rule outside of this protocol."""
        self._move(Event.REFUSE, reason)

    def receive_eof(self, now: float) -> None:
        """Take note that the peer has shut down its writing side."""
        self.active_at = now
        self._move(Event.EOF, self._reason_of_end())

    def receive_last(self) -> None:
        """Do what `receive_eof` and `advance` do while `steady`: nothing is held, so it is over."""
        self._owner = None
        self.steady = False
        self.close_reason = CloseReason.PEER_CLOSED
        self.state = next_state(next_state(self.state, Event.EOF), Event.FLUSHED)

    def receive_end(self) -> None:
        """Take note that the peer has ended its stream, behind which more may come, to be dropped.

        That is an end in good order, as by `refuse`: a close right behind our last echo would make
        the kernel answer with a reset, which destroys echoes that the peer has not read yet.
        """
        self._move(Event.REFUSE, self._reason_of_end())

    def receive_failure(self, reason: CloseReason, now: float) -> None:
        """Take note that the stream is broken: what is pending will never go out."""
        if reason is CloseReason.MISSING_CLOSE_NOTIFY and self._partial is not None:
            reason = CloseReason.TRUNCATED_FRAME
        self._linger_until = now + self._settings.linger_s
        self._move(Event.STALLED, reason)

    def receive_reset(self) -> None:
        """Take note that the connection is gone."""
        self._move(Event.RESET, CloseReason.RESET)

    @property
    def begins(self) -> bool:
        """Whether what is received next is the front of a frame."""
        return self._partial is None and self._spare is None

    @property
    def outgrown(self) -> PartialFrame | None:
        """What has arrived of a frame, if all of it needs a larger buffer; None if not."""
        return self._partial if self._partial is not None and self._partial.outgrown else None

    @property
    def at_end(self) -> bool:
        """Whether the last echo is out, and the stream's own end is next."""
        return self._pending is None and self.state in _LEAVING

    def abort(self, reason: CloseReason) -> None:
        """End it now and drop whatever is pending."""
        self._move(Event.ABORT, reason)

    def advance(self, now: float, leave: Callable[[], bool] = lambda: True) -> None:
        """Make the transitions that need no further input, and clear `changed`.

        Args:
            now: the time.
            leave: called when the last echo is out; sends the stream's own end, as TLS has one, and
                tells whether that is out. If not, `wants_write` says so, and `write_s` runs.
        """
        if self._spare is not None:
            self._give_back_spare()
        # A drain waits for a lull, since it has an end of its own. A lifetime does not: a peer that
        # keeps echoes pending all the time could put it off for ever.
        done = self._pending is None or self._boundary_reason is CloseReason.LIFETIME
        if self.state is _DRAINING and self._partial is None and done:
            self._move(Event.BOUNDARY, self._boundary_reason)
        if self._pending is None and self.state in _LEAVING:  # `at_end`, without its call.
            if leave():
                self._linger_until = now + self._settings.linger_s
                self._move(Event.FLUSHED)
            elif not self._leave_blocked:
                self._leave_blocked = True
                self._progress_at = now
        self.changed = False

    def _give_back_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            self._buffers.release(spare, self._owner)
            if self._partial is None:
                self.receive_into = self._buffers.shared

    def _reason_of_end(self) -> CloseReason:
        truncated = self._partial is not None
        return CloseReason.TRUNCATED_FRAME if truncated else CloseReason.PEER_CLOSED

    def _move(self, event: Event, reason: CloseReason | None = None) -> None:
        """Change the state, as only `receive_last` does besides. The first reason stays."""
        self.state = next_state(self.state, event)
        if self.close_reason is None:
            self.close_reason = reason
        if self._partial is not None and self.state not in READING:
            self._partial.release()
            self._partial = None
            self.receive_into = self._buffers.shared
        if self.state in OVER:
            self._give_back_spare()
            if self._pending is not None:
                self._pending.discard()
                self._pending = None
        if self.state is _CLOSED:
            self._owner = None  # Which has us: a cycle would wait for the garbage collector.
        self._leave_blocked = False
        self.steady = False  # No event leads back to OPEN; for the one to it, see `established`.
        self.changed = True

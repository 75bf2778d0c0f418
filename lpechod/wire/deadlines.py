"""What time does to a connection: how long its peer may take, and what follows when it is over.

The times are attributes that the protocol stores into; nothing here is called for a frame. They
are a base class and not an object of their own because that would be one look-up more for each
frame, on the path that counts most.
"""

import math
from abc import ABC, abstractmethod

from lpechod.wire.partial import PartialFrame
from lpechod.wire.pending import PendingEchoes
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, Event, State

_HANDSHAKE, _LINGERING, _CLOSED = State.HANDSHAKE, State.LINGERING, State.CLOSED
"""To look a member up in its Enum costs as much as a call, and these are asked for several times
in the life of the shortest connection."""


class Deadlines(ABC):
    """The deadlines of one connection; `lpechod.wire.echo.EchoProtocol` is derived from it.

    Args:
        settings: limits and time-outs.
        state: where the connection stands.
        now: time in seconds, like every ``now`` below; it never goes back.
    """

    __slots__ = (
        "_boundary_reason", "_drain_until", "_expires_at", "_linger_until", "_partial",
        "_pending", "_progress_at", "_settings", "active_at", "state",
    )  # fmt: skip

    def __init__(self, settings: EchoSettings, state: State, now: float) -> None:
        self.state = state
        self._settings = settings
        self._partial: PartialFrame | None = None
        self._pending: PendingEchoes | None = None
        self._boundary_reason = CloseReason.DRAINED
        self._expires_at = now + settings.lifetime_s
        self._drain_until = math.inf
        self.active_at = self._linger_until = self._progress_at = now

    @property
    @abstractmethod
    def wants_read(self) -> bool:
        """Whether we read: while we do not, nobody can be late with what we would read."""

    @property
    @abstractmethod
    def wants_write(self) -> bool:
        """Whether something waits for room in the kernel, which depends on the peer."""

    @abstractmethod
    def refuse(self, reason: CloseReason) -> None:
        """End it in good order."""

    @abstractmethod
    def abort(self, reason: CloseReason) -> None:
        """End it now."""

    @abstractmethod
    def _move(self, event: Event, reason: CloseReason | None = None) -> None:
        """Change the state."""

    def next_deadline(self) -> float:
        """Return when `handle_deadline` has something to do unless more happens; inf is never."""
        settings = self._settings
        if self.state is _CLOSED:
            return math.inf
        if self.state is _LINGERING:
            return min(self._linger_until, self._drain_until)
        if self.state is _HANDSHAKE:
            own = self.active_at + settings.handshake_s
            return min(own, self._drain_until, self._expires_at)
        write = read = math.inf
        if self.wants_write:
            write = self._progress_at + settings.write_s
        if self.wants_read:
            if self._partial is not None:
                read = self._partial.deadline(settings.frame_s, settings.min_rate_bytes_per_s)
            elif self._pending is None:
                read = self.active_at + settings.idle_s
        return min(read, write, self._drain_until, self._expires_at)

    def overdue_at(self) -> float:
        """Return from when on it may be closed to make room for others; inf is never.

        That is the deadline of its idle time or of its frame under the shorter time-outs of an
        overload. What precedes the first frame counts as idle time. Whoever has echoes to take, is
        paused, or is being ended anyway, is never overdue.
        """
        settings = self._settings
        if self.state is _HANDSHAKE:
            return self.active_at + settings.overload_idle_s
        if self.state in (State.OPEN, State.DRAINING) and self.wants_read:
            if self._partial is not None:
                return self._partial.deadline(
                    settings.overload_frame_s, settings.min_rate_bytes_per_s
                )
            if self._pending is None:
                return self.active_at + settings.overload_idle_s
        return math.inf

    def stuck_since(self) -> float:
        """Return since when nothing has been taken of echoes that wait; inf if there are none."""
        return self._progress_at if self._pending is not None else math.inf

    def handle_deadline(self, now: float) -> None:
        """Act on every deadline that has passed."""
        if now < self.next_deadline():
            return
        settings = self._settings
        if now >= self._expires_at:
            self._expires_at = math.inf
            self._await_boundary(CloseReason.LIFETIME)
        if now >= self._drain_until:
            self.abort(CloseReason.DRAIN_TIMEOUT)
        elif self.state is _LINGERING:
            self._move(Event.LINGERED)
        elif self.state is _HANDSHAKE:
            self.refuse(CloseReason.HANDSHAKE_TIMEOUT)
        elif self.wants_write and now >= self._progress_at + settings.write_s:
            self._linger_until = now + settings.linger_s
            self._move(Event.STALLED, CloseReason.WRITE_TIMEOUT)
        elif self.wants_read and self._partial is not None:
            if now >= self._partial.deadline(settings.frame_s, settings.min_rate_bytes_per_s):
                self.refuse(CloseReason.FRAME_TIMEOUT)
        elif self.wants_read and self._pending is None and now >= self.active_at + settings.idle_s:
            self.refuse(CloseReason.IDLE_TIMEOUT)

    def drain(self, until: float) -> None:
        """End at the next frame boundary with nothing pending, or at time ``until`` regardless."""
        self._await_boundary(CloseReason.DRAINED)
        self._drain_until = min(self._drain_until, until)

    def _await_boundary(self, reason: CloseReason) -> None:
        if self.state in (State.OPEN, _HANDSHAKE):
            self._boundary_reason = reason
        self._move(Event.DRAIN)

"""What precedes the first frame of a connection, such as a PROXY header or a TLS handshake.

It has the descriptor to itself until it is complete: the steady path of a connection knows nothing
of it. The deadline, the end of the daemon and all else are the connection's affair meanwhile.
"""

from typing import Protocol

from lpechod.engine.loop import Source
from lpechod.wire.states import CloseReason


class HandshakeError(Exception):
    """The peer has not kept to what has to precede the first frame.

    Args:
        reason: the reason of the connection's end.
        problem: what is wrong, for the log; never bytes of the peer's.
    """

    def __init__(self, reason: CloseReason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class Handshake(Protocol):
    """Something that precedes the first frame."""

    def advance(self, waiter: Source) -> int | None:
        """Go on as far as the descriptor is ready for it.

        Args:
            waiter: whom to call, with `Loop.again`, when it may go on for another reason than the
                descriptor's readiness.

        Returns:
            What to wait for (a mask of `lpechod.engine.poller`, 0 for nothing of the descriptor),
            or None: it is complete.

        Raises:
            HandshakeError: it cannot be completed.
            PeerGoneError: the connection is over.
            EOFError: the peer has ended the stream before it sent anything.
        """

    def abandon(self, reason: CloseReason | None) -> None:
        """Take note that it will not be completed, and why the connection ends."""

    @property
    def peer(self) -> object | None:
        """Whom it has shown to be the client, as accept(2) writes addresses; None: nobody else."""


class Guest(Protocol):
    """A connection of which a handshake is under way."""

    def shake_hands(self, mask: int, now: float) -> None:
        """Go on with it."""

    def on_failure(self, error: Exception, now: float) -> None:
        """Give up."""


class Greeter:
    """Stands for a connection in the loop until what precedes the first frame is complete.

    Args:
        guest: the connection.
    """

    __slots__ = ("_guest",)

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def on_ready(self, mask: int, now: float) -> None:
        """Go on with the handshake."""
        self._guest.shake_hands(mask, now)

    def on_failure(self, error: Exception, now: float) -> None:
        """Have the connection give up."""
        self._guest.on_failure(error, now)

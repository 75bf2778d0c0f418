"""A connection under edge-triggered epoll(7): told of changes once, never of conditions.

Who is told once has to remember. The descriptor is registered for everything and never modified;
what the kernel will not repeat, the connection asks the loop to bring again: bytes that a full read
has left, bytes or an end of file behind a short one, room that a gathering write has not used up,
and bytes whose edge passed while reading was paused.
"""

from lpechod.engine.poller import EDGE, PEER_CLOSED, READABLE, URGENT, WRITABLE
from lpechod.net.connection import Connection
from lpechod.wire.states import State


class EdgeConnection(Connection):
    """One client, edge-triggered."""

    __slots__ = ()

    def on_ready(self, mask: int, now: float) -> None:
        """Handle readiness, and come again for what no edge will tell of."""
        protocol = self.protocol
        if protocol.foreseen_bytes:
            self._make_room()  # What follows has to know the room.
        room = len(self._room())
        before = protocol.received_bytes
        super().on_ready(mask, now)
        count = protocol.received_bytes - before
        if protocol.state is State.CLOSED:
            return
        if count and (count == room or mask & (PEER_CLOSED | URGENT) or self._is_cut()):
            self._loop.again(self, mask & (READABLE | PEER_CLOSED | URGENT))

    def _is_cut(self) -> bool:
        """Tell whether a short read has left something, as it hardly ever does.

        It ends at an urgent byte, before the peer's FIN, and on a UNIX socket at each message with
        descriptors, which nobody has asked for (SCM_RIGHTS, unix(7)). The first two show in the
        mask.
        """
        connected = self.peer if self.proxy is None else self.proxy
        return not isinstance(connected, tuple) and self._transport.waiting() > 0

    def _register(self) -> None:
        mask = READABLE | WRITABLE | PEER_CLOSED | URGENT | EDGE
        self._loop.register(self._transport.fd, self, mask)

    def _watch(self, interest: int) -> None:
        if interest & ~self._interest & READABLE:
            self._loop.again(self, READABLE | PEER_CLOSED)

    def _flush(self, now: float) -> None:
        offered = sum(map(len, self.protocol.data_to_send()))
        before = self.protocol.unsent_bytes
        super()._flush(now)
        # The kernel took all that was offered, so it would take more, and will say so to nobody.
        if self.protocol.wants_write and before - self.protocol.unsent_bytes == offered:
            self._loop.again(self, WRITABLE)

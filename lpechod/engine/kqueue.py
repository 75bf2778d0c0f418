"""kqueue(2) behind the face of `lpechod.engine.poller`.

kqueue knows filters instead of masks: reading and writing are two entries for one descriptor, each
with its own events, and an end of file or an error is a flag on one of them. Translation:

- EVFILT_READ is `READABLE`, with EV_EOF as well: the end of file is there to be read;
- EVFILT_WRITE is `WRITABLE`; with EV_EOF the peer will take nothing more: `HANGUP` too;
- EV_EOF with an errno in ``fflags``, and EV_ERROR, are `ERROR`.

A descriptor that is watched for nothing has no filter at all, so not even a reset shows. A child
does not inherit a kqueue (fork(2)): open it in the process that uses it.
"""

import select
from typing import Any

from lpechod.engine.poller import ERROR, HANGUP, MAX_EVENTS, READABLE, WRITABLE, Ready


class KqueuePoller:
    """kqueue(2), level-triggered: BSD's and macOS's counterpart of epoll.

    Args:
        module: where ``kqueue``, ``kevent`` and the ``KQ_*`` numbers come from.
    """

    __slots__ = ("_interest", "_kqueue", "_select")

    edge_triggered = False

    def __init__(self, module: Any = select) -> None:  # noqa: ANN401 - typed on BSD and macOS only.
        self._select = module
        self._kqueue = module.kqueue()
        self._interest: dict[int, int] = {}

    def register(self, fd: int, mask: int) -> None:
        """Start to watch a descriptor."""
        self._interest[fd] = 0
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        """Add and delete the filters in which the old and the new interest differ."""
        kq = self._select
        before = self._interest[fd]
        changes = []
        for bit, kind in ((READABLE, kq.KQ_FILTER_READ), (WRITABLE, kq.KQ_FILTER_WRITE)):
            if (before ^ mask) & bit:
                flags = kq.KQ_EV_ADD if mask & bit else kq.KQ_EV_DELETE
                changes.append(kq.kevent(fd, kind, flags))
        if changes:
            self._kqueue.control(changes, 0, 0)
        self._interest[fd] = mask

    def unregister(self, fd: int) -> None:
        """Delete the filters of a descriptor."""
        self.modify(fd, 0)
        del self._interest[fd]

    forget = unregister

    def poll(self, timeout: float | None, maxevents: int = MAX_EVENTS, /) -> Ready:
        """Wait; timeouts have nanoseconds here and need no rounding."""
        masks: dict[int, int] = {}
        for event in self._kqueue.control(None, maxevents, timeout):
            masks[event.ident] = masks.get(event.ident, 0) | self._translate(event)
        return list(masks.items())

    def _translate(self, event: Any) -> int:  # noqa: ANN401 - likewise.
        kq = self._select
        if event.flags & kq.KQ_EV_ERROR:
            return ERROR
        mask = READABLE if event.filter == kq.KQ_FILTER_READ else WRITABLE
        if event.flags & kq.KQ_EV_EOF:
            if event.fflags:
                mask |= ERROR
            elif mask == WRITABLE:
                mask |= HANGUP
        return mask

    def close(self) -> None:
        """Close the kqueue descriptor."""
        self._kqueue.close()

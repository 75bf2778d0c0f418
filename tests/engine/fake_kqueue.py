"""A stand-in for the kqueue part of `select`, since no kqueue can run on Linux.

It keeps kevent(2)'s side of the bargain over real descriptors, with poll(2) underneath, so that
`KqueuePoller` can be put through the same tests as the other pollers. What it stands for, from the
manual pages of FreeBSD and macOS and from FreeBSD's ``filt_soread``, ``filt_sowrite`` and
``pipe_kqfilter``:

- an entry is a pair of descriptor and filter; EV_ADD of one that exists changes it, EV_DELETE of
  one that does not fails with ENOENT, either on a closed descriptor with EBADF;
- changes are applied one by one; an error is returned as an event with EV_ERROR and the errno in
  ``data`` if there is room for one, and fails the call otherwise;
- entries of a closed descriptor are gone, without a word;
- reading: EV_EOF once the peer has shut down its side, with the error of the socket in ``fflags``,
  even while bytes wait. Writing: EV_EOF once the connection is over in both directions, or the
  reader of a pipe is gone; a pipe without a reader can't be watched for writing at all (EPIPE);
- level-triggered unless EV_CLEAR is given; no time-out waits for ever, zero does not wait.

Where it falls short: the errno of a broken connection is always ECONNRESET, since Linux tells the
real one only to those who clear it, and a socket whose writing side was shut down by its own owner
shows no EV_EOF. EV_CLEAR, EV_ONESHOT and the other flags are refused.
"""

import errno
import math
import os
import select
import stat
from collections.abc import Iterable
from dataclasses import dataclass

KQ_FILTER_READ = -1
KQ_FILTER_WRITE = -2
KQ_EV_ADD = 0x1
KQ_EV_DELETE = 0x2
KQ_EV_ERROR = 0x4000
KQ_EV_EOF = 0x8000

_OVER = select.POLLHUP | select.POLLERR


@dataclass
class kevent:  # noqa: N801 - the name in `select`.
    """A change, or an event."""

    ident: int
    filter: int = KQ_FILTER_READ
    flags: int = KQ_EV_ADD
    fflags: int = 0
    data: int = 0
    udata: int = 0


class kqueue:  # noqa: N801 - the name in `select`.
    """A kernel event queue.

    Attributes:
        changes: every change that was asked for, in order.
        timeouts: the time-out of every call that asked for events, in order.
    """

    def __init__(self) -> None:
        # The file behind each entry, as its number may be another file's by now.
        self._entries: dict[tuple[int, int], tuple[int, int]] = {}
        self.closed = False
        self.changes: list[kevent] = []
        self.timeouts: list[float | None] = []

    def control(
        self,
        changelist: Iterable[kevent] | None,
        max_events: int,
        timeout: float | None = None,
    ) -> list[kevent]:
        """Apply changes, then wait for events: kevent(2)."""
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")
        if max_events < 0:
            raise ValueError("Length of eventlist must be 0 or positive")
        errors: list[kevent] = []
        for change in changelist or ():
            self.changes.append(change)
            number = self._apply(change)
            if not number:
                continue
            if len(errors) == max_events:
                raise OSError(number, os.strerror(number))
            errors.append(
                kevent(change.ident, change.filter, change.flags | KQ_EV_ERROR, data=number)
            )
        if errors or not max_events:
            return errors
        self.timeouts.append(timeout)
        return self._wait(max_events, timeout)

    def close(self) -> None:
        """Close the queue; its entries are gone."""
        self.closed = True
        self._entries.clear()

    def _apply(self, change: kevent) -> int:
        """Add or delete an entry, and return an errno or 0."""
        try:
            status = os.fstat(change.ident)
        except OSError:
            return errno.EBADF
        key = (change.ident, change.filter)
        if change.flags == KQ_EV_DELETE:
            self._drop_closed()
            return 0 if self._entries.pop(key, None) else errno.ENOENT
        if change.flags != KQ_EV_ADD or change.filter not in {KQ_FILTER_READ, KQ_FILTER_WRITE}:
            return errno.EINVAL
        if (
            change.filter == KQ_FILTER_WRITE
            and stat.S_ISFIFO(status.st_mode)
            and self._poll_once(change.ident) & select.POLLERR
        ):
            return errno.EPIPE
        self._entries[key] = (status.st_dev, status.st_ino)
        return 0

    def _wait(self, max_events: int, timeout: float | None) -> list[kevent]:
        self._drop_closed()
        wanted: dict[int, int] = {}
        for fd, kind in self._entries:
            wanted[fd] = wanted.get(fd, 0) | (
                select.POLLIN | select.POLLRDHUP if kind == KQ_FILTER_READ else select.POLLOUT
            )
        poll = select.poll()
        for fd, mask in wanted.items():
            poll.register(fd, mask)
        ready = dict(poll.poll(None if timeout is None else math.ceil(timeout * 1000)))
        events: list[kevent] = []
        for fd, kind in list(self._entries):
            event = _translate(fd, kind, ready.get(fd, 0))
            if event is not None and len(events) < max_events:
                events.append(event)
                # To the end of the queue, so that with more events than room all get a turn.
                self._entries[fd, kind] = self._entries.pop((fd, kind))
        return events

    def _drop_closed(self) -> None:
        for (fd, kind), file in list(self._entries.items()):
            try:
                status = os.fstat(fd)
            except OSError:
                del self._entries[fd, kind]
                continue
            if (status.st_dev, status.st_ino) != file:
                del self._entries[fd, kind]

    @staticmethod
    def _poll_once(fd: int) -> int:
        poll = select.poll()
        poll.register(fd, 0)
        return dict(poll.poll(0)).get(fd, 0)


def _translate(fd: int, kind: int, mask: int) -> kevent | None:
    """Say in kqueue's words what poll(2) has found, for one filter of a descriptor."""
    if kind == KQ_FILTER_READ:
        eof = mask & (select.POLLRDHUP | _OVER)
        if not eof | mask & select.POLLIN:
            return None
    else:
        eof = mask & _OVER
        if not eof | mask & select.POLLOUT:
            return None
    broken = mask & select.POLLERR and not stat.S_ISFIFO(os.fstat(fd).st_mode)
    return kevent(
        fd,
        kind,
        KQ_EV_EOF if eof else 0,
        fflags=errno.ECONNRESET if broken else 0,
    )

"""The translation between masks and kqueue's filters, over a stand-in, and the stand-in itself."""

import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from lpechod.engine.kqueue import KqueuePoller
from lpechod.engine.poller import ERROR, HANGUP, READABLE, WRITABLE
from tests.engine import fake_kqueue
from tests.engine.conftest import Pairs


class Recorder:
    """The module `KqueuePoller` uses, with the queue it opens kept in sight."""

    kevent = fake_kqueue.kevent
    KQ_FILTER_READ = fake_kqueue.KQ_FILTER_READ
    KQ_FILTER_WRITE = fake_kqueue.KQ_FILTER_WRITE
    KQ_EV_ADD = fake_kqueue.KQ_EV_ADD
    KQ_EV_DELETE = fake_kqueue.KQ_EV_DELETE
    KQ_EV_EOF = fake_kqueue.KQ_EV_EOF
    KQ_EV_ERROR = fake_kqueue.KQ_EV_ERROR

    def __init__(self) -> None:
        self.queue = fake_kqueue.kqueue()

    def kqueue(self) -> fake_kqueue.kqueue:
        return self.queue


_READ, _WRITE = fake_kqueue.KQ_FILTER_READ, fake_kqueue.KQ_FILTER_WRITE
_ADD, _DELETE = fake_kqueue.KQ_EV_ADD, fake_kqueue.KQ_EV_DELETE
_EOF = fake_kqueue.KQ_EV_EOF


class TestKqueue:
    """The translation between masks and filters; kqueue itself cannot run on Linux."""

    def test_only_differences_reach_the_kernel(self, unix_pair: Pairs) -> None:
        """A change of interest adds and deletes exactly the filters that differ."""
        module = Recorder()
        poller = KqueuePoller(module)
        fd = unix_pair()[0].fileno()
        poller.register(fd, 0)
        steps = []
        for interest in (READABLE, READABLE, READABLE | WRITABLE, WRITABLE, READABLE, 0, WRITABLE):
            module.queue.changes.clear()
            poller.modify(fd, interest)
            steps.append([(change.filter, change.flags) for change in module.queue.changes])
        module.queue.changes.clear()
        poller.unregister(fd)

        assert steps == [
            [(_READ, _ADD)],
            [],
            [(_WRITE, _ADD)],
            [(_READ, _DELETE)],
            [(_READ, _ADD), (_WRITE, _DELETE)],
            [(_READ, _DELETE)],
            [(_WRITE, _ADD)],
        ]
        assert [(c.filter, c.flags) for c in module.queue.changes] == [(_WRITE, _DELETE)]

    @pytest.mark.parametrize(
        ("kind", "flags", "fflags", "mask"),
        [
            (_READ, 0, 0, READABLE),
            (_READ, _EOF, 0, READABLE),
            (_READ, _EOF, errno.ECONNRESET, READABLE | ERROR),
            (_WRITE, 0, 0, WRITABLE),
            (_WRITE, _EOF, 0, WRITABLE | HANGUP),
            (_WRITE, _EOF, errno.ECONNRESET, WRITABLE | ERROR),
            (_READ, fake_kqueue.KQ_EV_ERROR, 0, ERROR),
            (_WRITE, fake_kqueue.KQ_EV_ERROR, 0, ERROR),
        ],
    )
    def test_translation(self, kind: int, flags: int, fflags: int, mask: int) -> None:
        """Each kind of event becomes the mask that the other pollers would report."""
        poller = KqueuePoller(fake_kqueue)

        assert poller._translate(fake_kqueue.kevent(7, kind, flags, fflags)) == mask

    def test_reset_is_an_error_in_both_directions(
        self, tcp_pair: Pairs, reset: Callable[..., None]
    ) -> None:
        """The two events of a reset connection become one mask, with the error in it."""
        poller = KqueuePoller(fake_kqueue)
        ours, theirs = tcp_pair()
        poller.register(ours.fileno(), READABLE)
        reset(theirs)
        poller.poll(None)
        poller.modify(ours.fileno(), READABLE | WRITABLE)

        assert poller.poll(0.0) == [(ours.fileno(), READABLE | WRITABLE | ERROR)]

    def test_time_out_is_passed_on_unrounded(self) -> None:
        """kevent(2) takes nanoseconds: what the loop asks for is what the kernel is told."""
        module = Recorder()
        poller = KqueuePoller(module)
        poller.poll(0.0)
        poller.poll(0.000_001_5)

        assert module.queue.timeouts == [0.0, 0.000_001_5]

    def test_unregister_after_close_is_a_defect(self, unix_pair: Pairs) -> None:
        """Closing a descriptor before it is unregistered does not go unnoticed."""
        poller = KqueuePoller(fake_kqueue)
        ours, _theirs = unix_pair()
        fd = ours.fileno()
        poller.register(fd, READABLE)
        ours.close()

        with pytest.raises(OSError, match="Bad file descriptor"):
            poller.unregister(fd)

    def test_closes_its_queue(self) -> None:
        """A closed poller holds no queue."""
        module = Recorder()
        KqueuePoller(module).close()

        assert module.queue.closed


class TestFakeKqueue:
    """The stand-in itself, against what kevent(2) says."""

    def test_deleting_what_is_not_there(self, unix_pair: Pairs) -> None:
        """EV_DELETE of a filter that was not added fails with ENOENT."""
        queue = fake_kqueue.kqueue()
        fd = unix_pair()[0].fileno()

        with pytest.raises(FileNotFoundError):
            queue.control([fake_kqueue.kevent(fd, _READ, _DELETE)], 0, 0)

    def test_error_as_an_event(self, unix_pair: Pairs) -> None:
        """With room for events, an error is one, and changes after it are still applied."""
        queue = fake_kqueue.kqueue()
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        missing = fake_kqueue.kevent(ours.fileno(), _WRITE, _DELETE)
        [event] = queue.control([missing, fake_kqueue.kevent(ours.fileno())], 8, 0)

        assert event.flags & fake_kqueue.KQ_EV_ERROR
        assert event.data == errno.ENOENT
        assert queue.control(None, 8, 0) == [fake_kqueue.kevent(ours.fileno(), _READ, 0)]

    def test_adding_twice_is_adding_once(self, unix_pair: Pairs) -> None:
        """EV_ADD of a filter that is there makes no second entry."""
        queue = fake_kqueue.kqueue()
        fd = unix_pair()[0].fileno()
        add = fake_kqueue.kevent(fd, _WRITE, _ADD)
        queue.control([add, add], 0, 0)

        assert len(queue.control(None, 8, 0)) == 1
        queue.control([fake_kqueue.kevent(fd, _WRITE, _DELETE)], 0, 0)
        assert queue.control(None, 8, 0) == []

    def test_close_takes_the_filters_along(self, unix_pair: Pairs) -> None:
        """Entries of a closed descriptor are gone, also when its number has come back."""
        queue = fake_kqueue.kqueue()
        ours, _theirs = unix_pair()
        fd = ours.fileno()
        queue.control([fake_kqueue.kevent(fd, _WRITE, _ADD)], 0, 0)
        ours.close()
        assert queue.control(None, 8, 0) == []

        fresh, _other = unix_pair()
        assert fresh.fileno() == fd
        assert queue.control(None, 8, 0) == []
        with pytest.raises(FileNotFoundError):
            queue.control([fake_kqueue.kevent(fd, _WRITE, _DELETE)], 0, 0)

    def test_end_of_file_while_bytes_wait(self, unix_pair: Pairs) -> None:
        """EV_EOF may come while there is still something to read."""
        queue = fake_kqueue.kqueue()
        ours, theirs = unix_pair()
        theirs.send(b"last")
        theirs.shutdown(socket.SHUT_WR)
        queue.control([fake_kqueue.kevent(ours.fileno())], 0, 0)

        assert queue.control(None, 8, 0) == [fake_kqueue.kevent(ours.fileno(), _READ, _EOF)]
        assert ours.recv(64) == b"last"

    def test_pipe_without_a_reader(self, stack: ExitStack) -> None:
        """A pipe whose reader has gone can't be watched for writing, and ends one that is."""
        queue = fake_kqueue.kqueue()
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        queue.control([fake_kqueue.kevent(writer, _WRITE, _ADD)], 0, 0)
        os.close(reader)

        assert queue.control(None, 8, 0) == [fake_kqueue.kevent(writer, _WRITE, _EOF)]
        with pytest.raises(BrokenPipeError):
            fake_kqueue.kqueue().control([fake_kqueue.kevent(writer, _WRITE, _ADD)], 0, 0)

    @pytest.mark.parametrize("flags", [0, _ADD | 0x10, _ADD | 0x20])
    def test_refuses_what_it_does_not_model(self, unix_pair: Pairs, flags: int) -> None:
        """Flags that the stand-in knows nothing of are an error rather than ignored."""
        fd = unix_pair()[0].fileno()

        with pytest.raises(OSError, match="Invalid argument"):
            fake_kqueue.kqueue().control([fake_kqueue.kevent(fd, _READ, flags)], 0, 0)

    def test_closed_queue(self) -> None:
        """A closed queue, or a negative number of events, is refused as by `select.kqueue`."""
        queue = fake_kqueue.kqueue()
        with pytest.raises(ValueError, match="positive"):
            queue.control(None, -1, 0)
        queue.close()

        with pytest.raises(ValueError, match="closed kqueue"):
            queue.control(None, 1, 0)

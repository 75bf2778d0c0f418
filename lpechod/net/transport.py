"""Bytes to and from one peer, over a non-blocking stream socket.

A transport hides what kind of stream it is and what the kernel may say about it. There are three
answers: a count, `BLOCKED`, and `PeerGoneError`. Every other error is a defect of ours and passes.
"""

import errno
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Sequence
from typing import Protocol

from lpechod.wire.states import CloseReason

_COUNT = bytes(4)
"""An int for ioctl(2) to fill in."""

BLOCKED = -1
"""Nothing to be received now."""

PEER_GONE = frozenset(
    {
        errno.ECONNRESET,
        errno.EPIPE,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPERM,  # A packet filter refuses our packets.
        # What a router or a firewall said about packets that then timed out (icmp(7); Linux maps
        # the messages in icmp_err_convert and, for IPv6, in icmpv6_err_convert).
        errno.EACCES,
        errno.ECONNREFUSED,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPROTO,
        getattr(errno, "ENONET", errno.EHOSTUNREACH),  # Linux only.
    }
)
"""What the kernel answers when a connection is over, or its network is (tcp(7), ip(7), send(2))."""


class PeerGoneError(Exception):
    """The connection is over: a reset, or an error of the network. Not a fault of ours."""


class StreamError(PeerGoneError):
    """The peer has broken the rules of the stream; nothing more can be sent or received in it.

    Args:
        reason: the reason of the connection's end.
        problem: what is wrong, for the log; never bytes of the peer's.
    """

    def __init__(self, reason: CloseReason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class Transport(Protocol):
    """One stream. `fd` is what a poller watches."""

    fd: int

    def receive(self, buffer: memoryview) -> int:
        """Receive into a buffer.

        Returns:
            The count of bytes; 0 at the end of the stream; `BLOCKED` if there is nothing now.

        Raises:
            PeerGoneError: the connection is over.
        """

    def send(self, data: memoryview) -> int:
        """Send as much as the kernel takes, and return how many bytes that were, possibly 0.

        Raises:
            PeerGoneError: the connection is over.
        """

    def send_many(self, views: Sequence[memoryview]) -> int:
        """Send several buffers with one call; otherwise as `send`."""

    def heed(self, error: OSError, against: int) -> None:
        """Take note of why a call on the stream itself has failed; return if it can be repeated.

        Args:
            error: what it has raised.
            against: what such a call does not seem to wait for: `WRITABLE` if it was to receive,
                `READABLE` if it was to send.

        Raises:
            PeerGoneError: the connection is over.
        """

    def waiting(self) -> int:
        """Return about how many bytes are there to be received."""

    def take_leave(self) -> bool:
        """Say within the stream that nothing more will be sent, if it has a word for that.

        Returns:
            Whether that is done; if not, try again when the descriptor is writable.
        """

    def end(self) -> None:
        """End our direction: the peer sees the end of the connection behind all that was sent.

        What is received from then on is only fit to be dropped.
        """

    def close(self) -> None:
        """Close the descriptor."""


class PlainTransport:
    """A connected stream socket, TCP or UNIX.

    readv(2) and write(2) on the descriptor and no socket object: its methods also look at time-outs
    that we never set, and to make one for each connection takes a system call (getsockname(2)) and
    a tenth of all that accepting costs. SIGPIPE, which write(2) could raise, is ignored by the
    process.

    Args:
        fd: the socket's descriptor; made non-blocking here and owned from now on.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd

    def receive(self, buffer: memoryview) -> int:
        """Receive into a buffer; see `Transport.receive`."""
        return receive(self.fd, buffer)

    def send(self, data: memoryview) -> int:
        """Send; see `Transport.send`."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise translated(error) from error

    def send_many(self, views: Sequence[memoryview]) -> int:
        """Send several buffers; see `Transport.send_many`."""
        try:
            return os.writev(self.fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise translated(error) from error

    def heed(self, error: OSError, _against: int) -> None:
        """Tell 'it would block' from an end; see `Transport.heed`."""
        if not isinstance(error, BlockingIOError):
            raise translated(error) from error

    def waiting(self) -> int:
        """Ask the kernel; see `Transport.waiting`."""
        return waiting(self.fd)

    def take_leave(self) -> bool:
        """Do nothing: the FIN says it."""
        return True

    def end(self) -> None:
        """Send a FIN; on a connection that is already gone there is nothing to end."""
        # Only socket objects have shutdown(2). It does not ask for the family, which is any here.
        borrowed = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, self.fd)
        try:
            borrowed.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in PEER_GONE:
                raise
        finally:
            borrowed.detach()

    def close(self) -> None:
        """Close the descriptor; its number may be somebody else's from then on."""
        fd, self.fd = self.fd, -1
        try:  # noqa: SIM105 - contextlib.suppress costs as much as the call.
            os.close(fd)
        except ConnectionResetError:
            pass  # FreeBSD tells of it even now.


def receive(fd: int, buffer: memoryview) -> int:
    """Receive what the kernel has for a socket's reader; see `Transport.receive`."""
    try:
        return os.readv(fd, (buffer,))
    except BlockingIOError:
        return BLOCKED
    except OSError as error:
        raise translated(error) from error


def waiting(fd: int) -> int:
    """Return how many bytes the kernel has for a socket's reader (FIONREAD, ioctl_tty(2))."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, _COUNT), sys.byteorder)


def translated(error: OSError) -> Exception:
    """Turn an error into `PeerGoneError` if that is what it means."""
    return PeerGoneError(error.strerror) if error.errno in PEER_GONE else error

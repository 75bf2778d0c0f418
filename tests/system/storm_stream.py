"""One connection of a storm's client: what it sent, what came back, and whether that is right."""

import errno
import os
import random
import socket
import struct
from collections import deque
from collections.abc import Iterable
from enum import Enum

WINDOW_SECONDS = 0.5
"""What a connection did before that, a worker has published, even one that had to wait for the
processor now and then: it publishes within a fifth of a second."""

_RECEIVE_BYTES = 1 << 18
_HEADER = struct.Struct(">I")
_GONE = {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED}
_POOL_BYTES = 4 << 20


class End(Enum):
    """How a connection ended."""

    DONE = "done"
    """The client shut down its side, and the end of the stream followed the last echo."""
    DRAINED = "drained"
    """The daemon ended the stream behind a whole echo."""
    CUT = "cut"
    """The stream ended inside an echo."""
    RESET = "reset"
    REFUSED = "refused"
    MISMATCH = "mismatched"
    TIMEOUT = "timed out"


class Frames:
    """An endless supply of frames that are told apart by their contents.

    Args:
        dice: what decides on sizes and contents.
    """

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._pool = dice.randbytes(_POOL_BYTES)

    def make(self, small: bool = False) -> bytes:
        """Make a frame of 0 to 64 KiB, and one of 1 MiB now and then."""
        dice = self._dice
        if small:
            size = dice.randrange(4097)
        elif dice.random() < 0.005:
            size = 1 << 20
        else:
            size = dice.randrange(dice.choice((1, 65, 4097, 65537)))
        place = dice.randrange(_POOL_BYTES - size)
        return _HEADER.pack(size) + self._pool[place : place + size]


class Stream:
    """A connection.

    Args:
        address: where to connect to.
        is_long: whether it stays.
        frames: what to send first.
        now: the time, in seconds, like every ``now`` below.

    Attributes:
        flight: frames whose echo has not come whole, oldest first, whether sent yet or not.
        wants_write: whether to wait until it can send.
        doomed: what of it its worker had published for sure when that was killed: bytes received by
            the client, frames, and whether it existed; None while nobody has been killed.
    """

    def __init__(
        self, address: str | tuple[str, int], is_long: bool, frames: Iterable[bytes], now: float
    ) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.is_long = is_long
        self.flight: deque[bytes] = deque()
        self.wants_write = True
        self.opened_at: float | None = None
        self.progress_at = now
        self.due_at = now
        self.received = self.sent = self.frames = 0
        self.half_closed = False
        self.doomed: tuple[int, int, bool] | None = None
        self.identity = -1
        self._unsent: deque[memoryview] = deque()
        self._verified = 0
        self._history: deque[tuple[float, int, int]] = deque()
        for each in frames:
            self.add(each, now)
        self._error = self.socket.connect_ex(address)

    @property
    def family(self) -> str:
        """Whether it is TCP or UNIX, as a word."""
        return "unix" if self.socket.family == socket.AF_UNIX else "tcp"

    def add(self, frame: bytes, now: float) -> None:
        """Have a frame sent."""
        if not self.flight:
            self.progress_at = now
        self.flight.append(frame)
        self._unsent.append(memoryview(frame))
        self.wants_write = True

    def send(self, now: float) -> End | None:
        """Go on with connecting and sending."""
        if self.opened_at is None:
            error = self._error or self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._error = 0
            if error == errno.EINPROGRESS:
                return None
            if error:
                return End.RESET if error in _GONE else End.REFUSED
            self.opened_at = now
            # What the kernel knows it by: the client's port, or the inode of its socket.
            tcp = self.socket.family == socket.AF_INET
            self.identity = (
                self.socket.getsockname()[1] if tcp else os.fstat(self.socket.fileno()).st_ino
            )
        try:
            while self._unsent:
                part = self._unsent[0]
                count = self.socket.send(part)
                self.sent += count
                if count < len(part):
                    self._unsent[0] = part[count:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return End.RESET
        except BrokenPipeError:
            # Echoes may still wait to be read, and the end of the stream, which came before.
            self._unsent.clear()
        self.wants_write = False
        return None

    def receive(self, now: float) -> End | None:
        """Verify what has come; tell if the stream has ended."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return End.RESET
        if not data:
            if self._verified:
                return End.CUT
            return End.DONE if self.half_closed else End.DRAINED
        self.received += len(data)
        if not self._verify(data):
            return End.MISMATCH
        self.progress_at = now
        self._history.append((now, self.received, self.frames))
        while self._history[0][0] < now - 4 * WINDOW_SECONDS:
            self._history.popleft()
        return None

    def _verify(self, data: bytes) -> bool:
        place = 0
        while place < len(data):
            if not self.flight:
                return False
            frame = self.flight[0]
            part = data[place : place + len(frame) - self._verified]
            if part != frame[self._verified : self._verified + len(part)]:
                return False
            place += len(part)
            self._verified += len(part)
            if self._verified == len(frame):
                self.flight.popleft()
                self.frames += 1
                self._verified = 0
        return True

    def finish(self, now: float) -> None:
        """End our side; all echoes have come."""
        self.half_closed = True
        self.progress_at = now
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            # The daemon has gone first; what we read next tells how.
            if error.errno != errno.ENOTCONN:
                raise

    def published(self, since: float) -> tuple[int, int, bool]:
        """Return bytes, frames and existence as of a time, as far as the history goes back."""
        received = frames = 0
        for at, received_then, frames_then in self._history:
            if at > since:
                break
            received, frames = received_then, frames_then
        return received, frames, self.opened_at is not None and self.opened_at <= since

"""Frames that do not fit into the shared buffer: where they are received, and what becomes of it.

All are of a class of memory each, and the shared buffer is small, so that bytes are easy to count.
"""

import pytest

from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from tests.wire.driver import Shell, patterned

SHARED_BYTES = 4096
LARGE = patterned(60_000)
OTHER = patterned(50_000, 7)
SMALL = patterned(100)
BUFFER_BYTES = 65_600
SETTINGS = EchoSettings(max_frame_bytes=100_000)


@pytest.fixture(name="shell")
def _shell() -> Shell:
    """A connection whose latest frame was a large one."""
    shell = Shell(SETTINGS, shared_bytes=SHARED_BYTES)
    shell.feed(LARGE)
    return shell


def steady(shell: Shell) -> bool:
    """Return whether it is; a call, so that no type checker thinks that it stays."""
    return shell.protocol.steady


def echoed(shell: Shell) -> bytes:
    """Return what came back behind the first frame."""
    assert shell.sent.startswith(LARGE)
    return bytes(shell.sent[len(LARGE) :])


def test_into_a_buffer_of_its_own(shell: Shell) -> None:
    """The next frame is received whole with one call, and sent from where it lies."""
    shell.inbox += OTHER
    shell.receive()
    assert echoed(shell) == OTHER
    assert shell.held == 0
    assert shell.tally.delayed_frames == 0


def test_memory_for_what_has_arrived(shell: Shell) -> None:
    """As much memory is taken as for the bytes that are there, not as the frame before took."""
    shell.feed(LARGE[:1000])
    assert 1000 <= shell.held <= 4 * 1000
    shell.feed(LARGE[1000:])
    assert echoed(shell) == LARGE


def test_little_has_arrived(shell: Shell) -> None:
    """Where little is there to be copied, no buffer is taken for it beforehand."""
    shell.protocol.make_room(SHARED_BYTES // 16 - 1)
    assert shell.protocol.receive_into is shell.pool.shared
    shell.protocol.make_room(SHARED_BYTES // 16)
    assert shell.protocol.receive_into is not shell.pool.shared


def test_others_are_in_the_same_buffer(shell: Shell) -> None:
    """Whole frames and a part of one that were received with it are told apart."""
    stream = SMALL + SMALL + LARGE
    shell.inbox += stream
    shell.receive()
    assert echoed(shell) == SMALL + SMALL
    shell.pump()
    assert echoed(shell) == stream
    assert shell.held == 0


@pytest.mark.parametrize("before", [[], [OTHER], [OTHER, LARGE]])
def test_small_again(shell: Shell, before: list[bytes]) -> None:
    """After one small frame, connections are steady again."""
    for each in before:
        shell.feed(each)
    assert not steady(shell)
    shell.feed(SMALL)
    assert steady(shell)
    assert echoed(shell) == b"".join(before) + SMALL


def test_many_small_ones(shell: Shell) -> None:
    """Small frames that are more than the shared buffer holds are no large frame."""
    shell.inbox += SMALL * 100
    shell.receive()
    assert steady(shell)
    shell.pump()
    assert echoed(shell) == SMALL * 100


def test_nothing_comes_after_all(shell: Shell) -> None:
    """If it is the end that is received, that is at a boundary, and the buffer is given back."""
    shell.protocol.make_room(60_000)
    assert shell.held == BUFFER_BYTES
    shell.half_close()
    assert shell.protocol.close_reason is CloseReason.PEER_CLOSED
    assert shell.held == 0


def test_nothing_comes_yet(shell: Shell) -> None:
    """A buffer into which nothing was received, as of half a record of TLS, is given back."""
    shell.call(lambda: shell.protocol.make_room(60_000))
    assert shell.held == 0
    shell.feed(OTHER)
    assert echoed(shell) == OTHER


def test_header_in_part(shell: Shell) -> None:
    """A frame of which three bytes come is one that has begun, with its deadline."""
    shell.segment = 3
    shell.inbox += OTHER
    shell.receive()
    assert shell.protocol.next_deadline() < shell.now + shell.settings.idle_s
    shell.pump()
    assert echoed(shell) == OTHER


def test_too_large_for_all_that(shell: Shell) -> None:
    """A frame above the limit is refused there, too."""
    shell.feed(patterned(100_001))
    assert shell.protocol.close_reason is CloseReason.FRAME_TOO_LARGE
    assert shell.held == 0


def test_no_memory_beforehand(shell: Shell) -> None:
    """Where there is no memory, a connection ends as if it had not been asked for beforehand."""
    shell.pool.limit = 0
    shell.feed(LARGE)
    assert shell.protocol.close_reason is CloseReason.OVERLOAD
    assert not echoed(shell)


def test_no_memory_for_what_follows(shell: Shell) -> None:
    """Echoes that are lost since what follows them finds no memory stay counted as unsent."""
    shell.pool.limit = BUFFER_BYTES
    shell.feed(SMALL + LARGE)
    assert shell.protocol.close_reason is CloseReason.OVERLOAD
    assert shell.tally.unsent_bytes == len(SMALL)
    assert shell.held == 0


def test_sent_in_part(shell: Shell) -> None:
    """What the kernel does not take of a large echo waits where it lies."""
    shell.room = 10
    shell.feed(OTHER)
    assert shell.held == BUFFER_BYTES
    assert shell.tally.unsent_bytes == len(OTHER) - 10
    assert shell.tally.delayed_frames == 1
    shell.make_room()
    assert echoed(shell) == OTHER
    assert shell.held == 0


def test_little_is_left(shell: Shell) -> None:
    """A few bytes that the kernel does not take do not hold a large buffer."""
    shell.room = len(OTHER) - 10
    shell.feed(OTHER)
    assert shell.held < BUFFER_BYTES / 4
    shell.make_room()
    assert echoed(shell) == OTHER


def test_reset_while_it_is_sent(shell: Shell) -> None:
    """A connection that is gone when an echo is sent gives its buffer back."""
    protocol = shell.protocol
    shell.inbox += OTHER
    protocol.make_room(len(OTHER))
    protocol.receive_into[: len(OTHER)] = OTHER
    echo = protocol.receive_data(len(OTHER), shell.now)
    assert echo is not None
    protocol.receive_reset()
    protocol.unsent(echo, 0, shell.now)
    protocol.advance(shell.now)
    assert protocol.state is State.CLOSED
    assert shell.held == 0
    assert shell.tally.unsent_bytes == len(OTHER)


def test_draining(shell: Shell) -> None:
    """A drain waits for a large frame that has begun, and closes behind its echo."""
    shell.feed(OTHER[:30_000])
    shell.call(lambda: shell.protocol.drain(shell.now + 60))
    assert shell.protocol.state is State.DRAINING
    shell.feed(OTHER[30_000:])
    assert echoed(shell) == OTHER
    assert shell.protocol.close_reason is CloseReason.DRAINED
    assert shell.held == 0

"""The life of a connection as data: states, events, and the one table that joins them.

Two house rules. Everything that decides a state change is in this file. This file knows neither
bytes nor time: flow control is not a state (`EchoProtocol.wants_read` is a predicate), and a
deadline reaches it as the event it causes.

    HANDSHAKE ──ESTABLISHED──> OPEN   (if something precedes the first frame; ends as OPEN)
    OPEN ──DRAIN──> DRAINING ──BOUNDARY──> FLUSHING ──FLUSHED──> LINGERING ──EOF──> CLOSED
      └──────────────── REFUSE ───────────────┘         (our FIN is out)
      └── EOF ──> FINISHING ──FLUSHED──> CLOSED
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class _Identity(Enum):
    """Members that are hashed by what they are: Enum hashes names, with a function in Python."""

    __hash__ = object.__hash__


class State(_Identity):
    """Where a connection stands; each member says what follows from it."""

    HANDSHAKE = "handshake"
    """What precedes the first frame is under way, such as a PROXY header."""
    OPEN = "open"
    """Frames are read and echoed."""
    DRAINING = "draining"
    """As OPEN, but the connection ends at the next frame boundary."""
    FLUSHING = "flushing"
    """We end it: nothing more is read, pending echoes go out, then our FIN."""
    FINISHING = "finishing"
    """The peer ended it: pending echoes go out, then the descriptor is closed."""
    LINGERING = "lingering"
    """Our FIN is out. What the peer still sends is read and dropped, because close(2) with unread
    data makes the kernel send a reset, which destroys echoes that the peer has not read yet."""
    CLOSED = "closed"
    """Nothing is held any more. Terminal."""


class Event(_Identity):
    """What can happen to a connection."""

    ESTABLISHED = "established"
    """What precedes the first frame is complete."""
    DRAIN = "drain"
    """It shall end at the next frame boundary (the daemon drains, or its lifetime is over)."""
    BOUNDARY = "boundary"
    """A draining connection is between two frames."""
    REFUSE = "refuse"
    """The peer broke a rule or ran out of time: end it, but let whole echoes out first."""
    STALLED = "stalled"
    """What is pending will never go out: the peer takes nothing, or the stream is broken."""
    FLUSHED = "flushed"
    """The last pending byte went to the kernel."""
    EOF = "eof"
    """The peer shut down its writing side."""
    RESET = "reset"
    """The connection is gone: a reset, or an error of the network."""
    LINGERED = "lingered"
    """The peer did not end its side in time after our FIN."""
    ABORT = "abort"
    """End it now, whatever is pending."""


class CloseReason(_Identity):
    """Why a connection ended. The values are the labels of logs and metrics."""

    PEER_CLOSED = "peer_closed"
    TRUNCATED_FRAME = "truncated_frame"
    FRAME_TOO_LARGE = "frame_too_large"
    RESET = "reset"
    IDLE_TIMEOUT = "idle_timeout"
    FRAME_TIMEOUT = "frame_timeout"
    WRITE_TIMEOUT = "write_timeout"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    LIFETIME = "lifetime"
    DRAINED = "drained"
    DRAIN_TIMEOUT = "drain_timeout"
    OVERLOAD = "overload"
    TLS_ERROR = "tls_error"
    MISSING_CLOSE_NOTIFY = "missing_close_notify"
    PROXY_ERROR = "proxy_error"
    REJECTED = "rejected"
    INTERNAL_ERROR = "internal_error"


class IllegalTransitionError(Exception):
    """An event that cannot happen in this state: a defect of ours, never a fault of the peer."""


_ANYWHERE = {Event.RESET: State.CLOSED, Event.ABORT: State.CLOSED}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.HANDSHAKE: {
            Event.ESTABLISHED: State.OPEN,
            Event.DRAIN: State.DRAINING,
            Event.REFUSE: State.FLUSHING,
            Event.EOF: State.FINISHING,
            **_ANYWHERE,
        },
        State.OPEN: {
            Event.DRAIN: State.DRAINING,
            Event.REFUSE: State.FLUSHING,
            Event.STALLED: State.LINGERING,
            Event.EOF: State.FINISHING,
            **_ANYWHERE,
        },
        State.DRAINING: {
            Event.DRAIN: State.DRAINING,
            Event.BOUNDARY: State.FLUSHING,
            Event.REFUSE: State.FLUSHING,
            Event.STALLED: State.LINGERING,
            Event.EOF: State.FINISHING,
            **_ANYWHERE,
        },
        State.FLUSHING: {
            Event.DRAIN: State.FLUSHING,
            Event.STALLED: State.LINGERING,
            Event.FLUSHED: State.LINGERING,
            **_ANYWHERE,
        },
        State.FINISHING: {
            Event.DRAIN: State.FINISHING,
            Event.STALLED: State.CLOSED,
            Event.FLUSHED: State.CLOSED,
            **_ANYWHERE,
        },
        State.LINGERING: {
            Event.DRAIN: State.LINGERING,
            Event.EOF: State.CLOSED,
            Event.LINGERED: State.CLOSED,
            **_ANYWHERE,
        },
        State.CLOSED: {},
    }
)


def next_state(state: State, event: Event) -> State:
    """Look up where an event leads.

    Args:
        state: the present state.
        event: what happened.

    Raises:
        IllegalTransitionError: the table has no such pair.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransitionError(f"{event.name} in state {state.name}") from None

"""The table of transitions, without any bytes."""

import pytest

from lpechod.wire.states import (
    TRANSITIONS,
    CloseReason,
    Event,
    IllegalTransitionError,
    State,
    next_state,
)

PAIRS = [(state, event) for state in State for event in Event]
LEGAL = [(state, event) for state, event in PAIRS if event in TRANSITIONS[state]]
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]


def reachable(start: State) -> set[State]:
    """Follow the table wherever it leads."""
    seen = {start}
    todo = [start]
    while todo:
        for state in TRANSITIONS[todo.pop()].values():
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen


def test_every_state_is_in_the_table() -> None:
    """The table has a row for each state, and the terminal one maps to nothing."""
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.CLOSED] == {}
    assert [state for state in State if not TRANSITIONS[state]] == [State.CLOSED]


def test_table_cannot_be_changed() -> None:
    """The table is data for everybody, so nobody may write to it."""
    with pytest.raises(TypeError):
        TRANSITIONS[State.CLOSED] = {}  # type: ignore[index]


@pytest.mark.parametrize(("state", "event"), LEGAL)
def test_legal_pair(state: State, event: Event) -> None:
    """A pair of the table leads where the table says."""
    assert next_state(state, event) is TRANSITIONS[state][event]


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_missing_pair(state: State, event: Event) -> None:
    """A pair that is not in the table raises, naming both, and changes nothing."""
    before = {row: dict(events) for row, events in TRANSITIONS.items()}
    with pytest.raises(IllegalTransitionError, match=f"{event.name} in state {state.name}"):
        next_state(state, event)
    assert {row: dict(events) for row, events in TRANSITIONS.items()} == before


@pytest.mark.parametrize("state", State)
def test_every_state_can_end(state: State) -> None:
    """From every state CLOSED can be reached."""
    assert State.CLOSED in reachable(state)


def test_no_state_is_unreachable() -> None:
    """From HANDSHAKE every state can be reached, and from OPEN every other one."""
    assert reachable(State.HANDSHAKE) | {State.HANDSHAKE} == set(State)
    assert reachable(State.OPEN) == set(State) - {State.HANDSHAKE}


def test_every_event_is_used() -> None:
    """No event is declared that nothing reacts to."""
    assert {event for _, event in LEGAL} == set(Event)


@pytest.mark.parametrize("state", [state for state in State if state is not State.CLOSED])
def test_what_can_happen_anywhere(state: State) -> None:
    """A reset or an abort ends a connection whatever its state; a drain never is a surprise."""
    assert TRANSITIONS[state][Event.RESET] is State.CLOSED
    assert TRANSITIONS[state][Event.ABORT] is State.CLOSED
    assert Event.DRAIN in TRANSITIONS[state]


def test_reading_never_comes_back() -> None:
    """A connection that was ended by either side never reads frames again."""
    for state in (State.FLUSHING, State.FINISHING, State.LINGERING):
        assert not reachable(state) & {State.OPEN, State.DRAINING}


def test_close_reasons() -> None:
    """The close reasons are those of the published table: they are labels of logs and metrics."""
    assert [reason.value for reason in CloseReason] == [
        "peer_closed",
        "truncated_frame",
        "frame_too_large",
        "reset",
        "idle_timeout",
        "frame_timeout",
        "write_timeout",
        "handshake_timeout",
        "lifetime",
        "drained",
        "drain_timeout",
        "overload",
        "tls_error",
        "missing_close_notify",
        "proxy_error",
        "rejected",
        "internal_error",
    ]

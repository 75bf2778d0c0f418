"""What tests look for in the memory that processes share."""

from lpechod.ops.segment import Segment, Slot


def occupied(segment: Segment) -> list[Slot]:
    """Return the slots that are not free, in order."""
    states, _ = segment.signs()
    return [segment.slot(index) for index, state in enumerate(states) if state]

"""What the workers of a daemon have in common: made before the first of them, kept over reloads."""

from dataclasses import dataclass

from lpechod.ops.census import Census
from lpechod.ops.segment import Segment
from lpechod.process.bell import Bell


@dataclass(frozen=True, slots=True)
class Shared:
    """What each worker is given when it is forked."""

    segment: Segment
    """The counters, and what siblings see of each other."""
    census: Census | None
    """Where workers count their clients for each other, if there is a limit that needs it."""
    bell: Bell
    """Wakes those who leave new connections to others."""

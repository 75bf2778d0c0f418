"""The only place that reads a clock; everybody else is given one, or a time.

Deadlines and durations use CLOCK_MONOTONIC, which no operator and no NTP daemon can set back
(clock_gettime(2)). The wall clock is for people: time stamps in logs and metrics.
"""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds; only differences of two readings of the same clock mean anything."""

monotonic: Clock = time.monotonic
wall: Clock = time.time

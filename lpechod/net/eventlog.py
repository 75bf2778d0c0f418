"""The face of the log that the inner rings see.

Rings 1 to 3 may not import the operator's ring, yet they know best when something is worth a
line. They receive an object of this shape; `lpechod.ops.logs.Log` is the one that writes.
"""

from typing import Protocol


class EventLog(Protocol):
    """Take events: a `snake_case` name that is a literal of the code, and data in keywords.

    No method raises or blocks, whatever becomes of the line.
    """

    def debug(self, event: str, **fields: object) -> None:
        """Record a step that only somebody who debugs the daemon wants to see."""

    def info(self, event: str, **fields: object) -> None:
        """Record what a healthy daemon does."""

    def warning(self, event: str, **fields: object) -> None:
        """Record what an operator should look into, while the service goes on."""

    def error(self, event: str, **fields: object) -> None:
        """Record what failed; pass ``exc_info=error`` to show where."""

    def permits(self, event: str) -> bool:
        """Tell whether the rate limit would let a line of this event pass now.

        For callers that may be made to log thousands of times a second: ask before gathering
        the fields. Asking takes nothing, so a caller told True may log or not. A caller told
        False must not log: the suppressed line has been counted already.

        Args:
            event: Name of the event that would be logged next.
        """

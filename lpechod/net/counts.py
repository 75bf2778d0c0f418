"""What a worker counts about connections, beside the `Tally` of their bytes.

All label values exist from the start, at zero: a rate over a series that appears with its first
event misses that event.
"""

from dataclasses import dataclass, field

from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Histogram

REJECT_REASONS = (
    "max_connections",
    "max_connections_per_ip",
    "connection_rate",
    "denied",
    "untrusted_proxy",
    "aborted",
    "other",
)
"""Why a connection was not served: a limit; ``denied`` by an access list, or ``untrusted_proxy``, a
listener for proxies that does not know this one; ``aborted`` (the peer was gone before we could
take it) or ``other`` (the kernel could not watch it; the log says why)."""

HANDSHAKE_RESULTS = ("completed", "failed", "timed_out", "abandoned")
"""What became of a TLS handshake: ``failed``, by an error that TLS has a word for; ``timed_out``
after ``timeouts.handshake``; or ``abandoned``, because the connection ended."""

PAUSE_REASONS = ("emfile", "enfile", "enobufs", "enomem", "other", "balance")
"""Why accepting was suspended: the errno of accept(2), in lower case; ``other``: a defect, a
security module that refuses every call, or a poller without room; or ``balance``: this worker was
so far ahead of its siblings that it left the next connections to them, which is no error."""


SCARCE_RESOURCES = ("connections", "memory")
"""What a worker can be short of: places among ``max_connections``, or ``max_buffered`` bytes."""


@dataclass(slots=True)
class ConnectionCounts:
    """Totals since the worker started."""

    accepted: int = 0
    closed: dict[CloseReason, int] = field(default_factory=lambda: dict.fromkeys(CloseReason, 0))
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECT_REASONS, 0))
    accept_pauses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PAUSE_REASONS, 0))
    tls_handshakes: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(HANDSHAKE_RESULTS, 0)
    )
    tls_handshakes_delayed: int = 0
    """Those that had to wait for a place among the handshakes under way."""
    steps: int = 0
    """Work of which no byte counts: steps of handshakes, and reads of TLS without plaintext."""
    durations: Histogram = field(default_factory=lambda: Histogram(0.01, 25))

"""The numbers that govern an echo connection, as the protocol wants them: plain and frozen."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class EchoSettings:
    """Limits in bytes and time-outs in seconds; an infinite time-out is off."""

    max_frame_bytes: int = 1 << 20
    high_watermark_bytes: int = 256 << 10
    low_watermark_bytes: int = 64 << 10
    idle_s: float = 300.0
    frame_s: float = 30.0
    min_rate_bytes_per_s: int = 1024
    write_s: float = 30.0
    handshake_s: float = 10.0
    lifetime_s: float = inf
    linger_s: float = 2.0
    overload_idle_s: float = 10.0
    overload_frame_s: float = 5.0
    """These two stand in for ``idle_s`` and ``frame_s`` while there is too little room for all."""

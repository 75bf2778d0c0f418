"""Compares the daemon's counters with what its clients have seen.

Without kills they have to be equal. A worker that is killed takes along what it has counted since
it last published, so for each kill the clients say how much that can be (`storm_clients.Loss`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.system.storm_metrics import ACCEPTED, ACTIVE, Scrape, closed

_BY_DAEMON = ("drained", "lifetime")
_EXPECTED = ("peer_closed", *_BY_DAEMON, "internal_error")


@dataclass
class Probes:
    """What the harness itself has done as a client."""

    opened: int = 0
    frames: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Comparison:
    """A value of the daemon's, and between what bounds the clients' totals put it."""

    name: str
    value: float
    least: float
    most: float

    @property
    def agrees(self) -> bool:
        """Whether the value is within its bounds."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        least, most = f"{self.least:.0f}", f"{self.most:.0f}"
        bounds = least if least == most else f"{least} to {most}"
        return f"{self.name}: {self.value:.0f}, by the clients' account {bounds}"


def compare(scrape: Scrape, clients: Mapping[str, Any], probes: Probes) -> list[Comparison]:
    """Compare after all connections have ended.

    Args:
        scrape: the daemon's counters.
        clients: `storm_clients.Totals`, as a document.
        probes: the harness's own.
    """
    loss = clients["loss"]
    opened = sum(clients["opened"].values()) + probes.opened
    frames = clients["frames"] + probes.frames
    sent = clients["sent"] + probes.sent
    received = clients["received"] + probes.received
    drained = _ends(clients, "drained")
    done = _ends(clients, "done") + probes.opened
    found = scrape["lpechod_frames_total"]
    accepted = scrape[ACCEPTED]
    by_daemon = sum(closed(scrape, reason) for reason in _BY_DAEMON)
    others = closed(scrape) - sum(closed(scrape, reason) for reason in _EXPECTED)
    durations = scrape["lpechod_connection_duration_seconds_count"]
    echoes = scrape["lpechod_echo_duration_seconds_count"]
    rejected = _sum(scrape, "lpechod_connections_rejected_total")
    return [
        Comparison("accepted", accepted, opened - loss["accepted"], opened),
        Comparison("active", scrape[ACTIVE], 0, 0),
        Comparison("closed", closed(scrape), accepted, accepted),
        Comparison("closed by us", by_daemon, drained - loss["ended"], drained + done),
        Comparison("closed by the peer", closed(scrape, "peer_closed"), 0, done),
        Comparison("lost with a worker", closed(scrape, "internal_error"), 0, loss["ended"]),
        Comparison("closed otherwise", others, 0, 0),
        Comparison("rejected", rejected, 0, 0),
        Comparison("durations", durations, accepted - loss["ended"], accepted),
        Comparison("frames", found, frames - loss["frames"], frames + loss["unread_frames"]),
        Comparison("frame sizes", scrape["lpechod_frame_size_bytes_count"], found, found),
        Comparison("echo durations", echoes, frames - loss["frames"], found),
        Comparison(
            "received bytes",
            scrape["lpechod_received_bytes_total"],
            sent - loss["received"],
            sent,
        ),
        Comparison(
            "sent bytes",
            scrape["lpechod_sent_bytes_total"],
            received - loss["sent"],
            received + loss["unread_bytes"],
        ),
        Comparison("spins", scrape["lpechod_loop_spins_total"], 0, 0),
    ]


def _ends(clients: Mapping[str, Any], how: str) -> int:
    return sum(count for end, count in clients["ends"].items() if end.endswith(f" {how}"))


def _sum(scrape: Scrape, name: str) -> float:
    return sum(value for series, value in scrape.items() if series.startswith(name + "{"))

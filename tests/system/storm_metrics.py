"""Scrapes all through a storm: counters never go back, and always agree with each other."""

import http.client
import re
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.system.daemon import PATIENCE_SECONDS

Scrape = dict[str, float]
"""Values by series, written as in the text format: ``name{label="value"}``."""

ACCEPTED = "lpechod_connections_accepted_total"
ACTIVE = "lpechod_connections_active"
CLOSED = "lpechod_connections_closed_total"
RESTARTS = "lpechod_worker_restarts_total"
RELOADED = "lpechod_config_last_reload_successful"

_PAUSE_SECONDS = 0.1
_GIVE_UP_SCRAPES = 300


def closed(scrape: Scrape, reason: str | None = None) -> float:
    """Return how many connections have been closed, in all or for one reason."""
    if reason is not None:
        return scrape[f'{CLOSED}{{reason="{reason}"}}']
    return sum(value for series, value in scrape.items() if series.startswith(CLOSED + "{"))


def worker_states(scrape: Scrape) -> dict[str, int]:
    """Return the number of workers in each state that there is one in."""
    return {
        found[1]: int(value)
        for series, value in scrape.items()
        if value and (found := re.fullmatch(r'lpechod_workers\{state="(\w+)"\}', series))
    }


class Scraper:
    """A thread that scrapes several times a second for as long as its context lasts.

    Args:
        port: of the exporter on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._news = threading.Condition()
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._latest: Scrape = {}
        self._begun = 0
        self.count = 0
        self.violations: list[str] = []

    def wait_for(self, what: str, holds: Callable[[Scrape], bool]) -> Scrape:
        """Wait for a scrape, begun after this call, of which something holds.

        Args:
            what: the same in words.
            holds: tells whether it does.
        """
        with self._news:
            first = self._begun + 1
            while self.count < first + _GIVE_UP_SCRAPES:
                number = self.count
                assert self._news.wait(2 * PATIENCE_SECONDS), "no scrape has ended"
                assert self.count > number or not self.violations, self.violations
                if self.count >= first and holds(self._latest):
                    return self._latest
        raise AssertionError(f"never in {_GIVE_UP_SCRAPES} scrapes: {what}; {self._latest}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._end.close()
        self._thread.join()
        self._ended.close()

    def _run(self) -> None:
        while not select.select([self._ended], [], [], _PAUSE_SECONDS)[0]:
            with self._news:
                self._begun += 1
            try:
                text = self._get()
            except (OSError, http.client.HTTPException) as error:
                with self._news:
                    self.violations.append(f"scrape {self._begun} failed: {error!r}")
                    self._news.notify_all()
                continue
            scrape, counters = _parse(text)
            with self._news:
                self._check(scrape, counters)
                self._latest = scrape
                self.count = self._begun
                self._news.notify_all()

    def _get(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"status {answer.status}")
        return text

    def _check(self, scrape: Scrape, counters: set[str]) -> None:
        for series in counters & self._latest.keys():
            before, now = self._latest[series], scrape.get(series, -1)
            if now < before:
                self.violations.append(f"{series} went back from {before} to {now}")
        accepted, ended = scrape[ACCEPTED], scrape[ACTIVE] + closed(scrape)
        if accepted != ended:
            self.violations.append(f"{accepted} accepted, but {ended} active and closed")


def _parse(text: str) -> tuple[Scrape, set[str]]:
    """Return all values, and which of the series may only grow."""
    scrape: Scrape = {}
    counters: set[str] = set()
    kind = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            kind = line.split()[-1]
        elif not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            scrape[series] = float(value)
            if kind in ("counter", "histogram"):
                counters.add(series)
    return scrape, counters

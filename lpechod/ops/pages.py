"""What the exporter answers: a method and a target in, a status, headers and a body out."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry, generate_latest

from lpechod import __version__

_TEXT = "text/plain; charset=utf-8"
_HTML = "text/html; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
"""The text format that every Prometheus understands. OpenMetrics is left out: what it adds, we do
not have (exemplars, created timestamps, native histograms)."""

_LANDING = f"""<!DOCTYPE html>
<html lang="en">
<head><title>lpechod</title></head>
<body>
<h1>lpechod {__version__}</h1>
<p>A TCP responder that echoes length-prefixed frames.</p>
<ul>
<li><a href="/metrics">Metrics</a></li>
<li><a href="/-/healthy">Health</a></li>
<li><a href="/-/ready">Readiness</a></li>
</ul>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer; ``headers`` are those beside the ones that every answer has."""

    status: int
    body: bytes
    content_type: str = _TEXT
    headers: tuple[tuple[str, str], ...] = ()


class Pages:
    """The pages of a daemon.

    Args:
        registry: what ``/metrics`` shows.
        ready: tells whether connections are being served.
        token: what has to be sent for the pages that tell more than whether the daemon lives; who
            asks for those, such as a load balancer, often can't send any. None: nothing has to.
    """

    def __init__(
        self, registry: CollectorRegistry, ready: Callable[[], bool], token: str | None = None
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._token = None if token is None else token.encode("ascii")
        self._guarded = () if token is None else ("/", "/metrics")
        self._paths = {
            "/": self._landing,
            "/metrics": self._metrics,
            "/-/healthy": self._healthy,
            "/-/ready": self._readiness,
        }

    def answer(self, method: str, target: str, authorization: bytes = b"") -> Page:
        """Answer a request.

        Args:
            method: as in the request line.
            target: path and query, as in the request line.
            authorization: the header of that name, empty if there is none.
        """
        try:
            path, query = urlsplit(target)[2:4]
        except ValueError:
            return Page(400, b"Bad request target.\n")
        if path not in self._paths:
            return Page(404, b"Not found. There are /, /metrics, /-/healthy and /-/ready.\n")
        if path in self._guarded and not self._knows_token(authorization):
            return Page(401, b"Unauthorized.\n", headers=(("WWW-Authenticate", "Bearer"),))
        if method not in ("GET", "HEAD"):
            return Page(405, b"Only GET and HEAD.\n", headers=(("Allow", "GET, HEAD"),))
        return self._paths[path](query)

    def _knows_token(self, authorization: bytes) -> bool:
        scheme, _, sent = authorization.partition(b" ")
        # Takes the same time however much of it is right (RFC 6750, 2.1; RFC 9110, 11.1).
        return scheme.lower() == b"bearer" and hmac.compare_digest(sent.strip(), self._token or b"")

    def _landing(self, _query: str) -> Page:
        return Page(200, _LANDING.encode(), _HTML)

    def _metrics(self, query: str) -> Page:
        # A scrape may ask for some series only, by name, as from every Prometheus client library.
        names = parse_qs(query).get("name[]")
        registry = self._registry.restricted_registry(names) if names else self._registry
        return Page(200, generate_latest(registry), _METRICS)

    def _healthy(self, _query: str) -> Page:
        return Page(200, b"Healthy.\n")

    def _readiness(self, _query: str) -> Page:
        if self._ready():
            return Page(200, b"Ready.\n")
        return Page(503, b"Not serving new connections.\n")

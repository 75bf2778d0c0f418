"""Prometheus and its blackbox exporter as real servers, on the configuration that is shipped.

Each listens on a port that the kernel chooses, and its log says which: no two tests can collide.
Whatever a server will know only after its next scrape is asked for until it does.
"""

import itertools
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.certificates import issue
from tests.system.daemon import PATIENCE_SECONDS, Daemon

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SHIPPED = DEPLOY / "prometheus"

Sample = dict[str, Any]


def program(name: str, package: str = "prometheus") -> str:
    """Return the path of a program, or fail with the Debian package that has it."""
    found = shutil.which(name)
    assert found, f"{name} is not installed (Debian: apt install {package})"
    return found


def promtool(
    *arguments: str | Path, standard_input: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run promtool to its end; standard error goes with the output."""
    return subprocess.run(
        [program("promtool"), *arguments],
        input=standard_input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


class Server:
    """A server of the Prometheus family, which serves once this has been constructed.

    Args:
        command: how to start it, without an address to listen on.
        ready: what it logs, after the address, when it answers; None: it does at once.
    """

    def __init__(self, command: Sequence[str], ready: str | None = None) -> None:
        self.process = subprocess.Popen(
            [*command, "--web.listen-address=127.0.0.1:0"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log: list[str] = []
        self._reader: threading.Thread | None = None
        try:
            listening = self._wait_for(r'"Listening on" address=(\S+)')
            self.address = listening[1]
            if ready is not None:
                self._wait_for(re.escape(ready))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        # Nobody needs the rest, but a pipe that is full would stop the server.
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._log.extend, args=[self.process.stderr])
        self._reader.start()

    def _wait_for(self, pattern: str) -> re.Match[str]:
        # Lines that have been read count, too: on a busy machine it may be ready before it listens.
        for line in itertools.chain(tuple(self._log), self._lines()):
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended: {self._log[-5:]}")

    def _lines(self) -> Iterator[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            yield line

    def get(
        self, path: str, query: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> str:
        """Return a page.

        Raises:
            AssertionError: the server refuses; the message is its own.
        """
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
                text: str = answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{url}: {error.read().decode()}") from None
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)
        if self._reader is not None:
            self._reader.join(PATIENCE_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()


class Prometheus(Server):
    """A Prometheus server.

    Args:
        directory: for its configuration and its data.
        configuration: what would be in prometheus.yml.
    """

    def __init__(self, directory: Path, configuration: str) -> None:
        path = directory / "prometheus.yml"
        path.write_text(configuration)
        super().__init__(
            [
                program("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
            ],
            ready="ready to receive web requests",
        )

    def api(self, path: str, **query: str) -> Any:
        """Return the data of an answer of the HTTP API."""
        return json.loads(self.get(f"/api/v1/{path}", query))["data"]

    def ask(self, expression: str) -> list[Sample]:
        """Return the samples of an expression now; those that are no number count as none."""
        result: list[Sample] = self.api("query", query=expression)["result"]
        return [sample for sample in result if sample["value"][1] != "NaN"]

    def without_result(self, expressions: Iterable[str]) -> list[str]:
        """Ask until each expression has a result; return those that never had one."""
        missing = list(expressions)
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while missing and time.monotonic() < give_up_at:
            missing = [expression for expression in missing if not self.ask(expression)]
        return missing

    def wait_for(self, expression: str) -> str:
        """Ask until an expression has a result; return the value of its first sample."""
        assert not self.without_result([expression]), f"no result: {expression}"
        value: str = self.ask(expression)[0]["value"][1]
        return value

    def names(self) -> set[str]:
        """Return the names of all metrics it has seen, recorded ones included."""
        return set(self.api("label/__name__/values"))


def blackbox_exporter() -> Server:
    """Start the blackbox exporter with the module that is shipped."""
    return Server(
        [
            program("prometheus-blackbox-exporter", "prometheus-blackbox-exporter"),
            f"--config.file={SHIPPED / 'blackbox.yml'}",
        ]
    )


def shipped_configuration(metrics: str, echo: str, exporter: str) -> str:
    """Return the prometheus.yml that is shipped, for these addresses and in a hurry."""
    text = (SHIPPED / "prometheus.yml").read_text()
    for shipped, here in {
        "localhost:10862": metrics,
        "localhost:9000": echo,
        "localhost:9115": exporter,
        "- lpechod.rules.yml": f"- {SHIPPED / 'lpechod.rules.yml'}",
        # Not half a second: the exporter ends a probe that long before Prometheus loses patience.
        "_interval: 15s": "_interval: 400ms",
    }.items():
        assert shipped in text, f"prometheus.yml has no {shipped}"
        text = text.replace(shipped, here)
    return text


@contextmanager
def watched_daemon(directory: Path) -> Iterator[Prometheus]:
    """Run a daemon, its probe and a Prometheus that has seen it echo, reject and reload."""
    limit = 20
    tls = issue(directory).table()
    config = (
        f"[server]\nworkers = 2\n[limits]\nmax_connections = {limit}\n"
        f'[[listen]]\naddress = "127.0.0.1:0"\n[[listen]]\naddress = "127.0.0.1:0"\ntls = {tls}\n'
    )
    with Daemon(directory, config) as daemon, blackbox_exporter() as exporter:
        configuration = shipped_configuration(
            daemon.latest["metrics"][0], daemon.address, exporter.address
        )
        with Prometheus(directory, configuration) as prometheus:
            # A rate is a difference: values from before the load must have been stored.
            prometheus.wait_for("lpechod_frames_total")
            with daemon.connect() as client:
                for size in (0, 5, 1000, 100_000) * 10:
                    client.echo(bytes(size))
            with ExitStack() as clients:
                for _ in range(limit + 1):
                    clients.enter_context(daemon.connect())
                prometheus.wait_for(
                    'lpechod_connections_rejected_total{reason="max_connections"} > 0'
                )
            daemon.reload()
            yield prometheus

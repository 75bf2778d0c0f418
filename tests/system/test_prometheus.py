"""The metrics as Prometheus itself takes them."""

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon import Daemon

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool on PATH (Debian: apt install prometheus)",
)


@needs_prometheus
def test_promtool_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    """`promtool check metrics` reads a scrape and says nothing."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"hello")
        text = daemon.get()
    run = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@needs_prometheus
def test_a_real_prometheus_scrapes_the_daemon(tmp_path: Path) -> None:
    """A Prometheus server finds the target up and stores the frames that were echoed."""
    with Daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            for _ in range(7):
                client.echo(b"hello")
        daemon.wait_until("lpechod_frames_total", 7)
        target = daemon.wait_for("ready")["metrics"][0]
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            "scrape_configs:\n"
            "  - job_name: lpechod\n"
            f"    static_configs: [{{targets: ['{target}']}}]\n"
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _wait_until_ready(process)
            assert _ask_until(process, port, "lpechod_frames_total") == "7"
            assert _ask_until(process, port, 'up{job="lpechod"}') == "1"
            assert _ask_until(process, port, "process_open_fds > bool 0") == "1"
        finally:
            process.terminate()
            process.communicate(timeout=20)


def _wait_until_ready(process: "subprocess.Popen[bytes]") -> None:
    """Read the log of Prometheus until it answers queries."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"ready to receive web requests" in line:
            return
    raise AssertionError("prometheus ended")


def _ask_until(process: "subprocess.Popen[bytes]", port: int, query: str) -> str:
    """Ask Prometheus until a query has a result; the server itself paces the questions."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    for _ in range(20_000):
        assert process.poll() is None, "prometheus ended"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except (urllib.error.URLError, ConnectionError):
            continue
        if result:
            value: str = result[0]["value"][1]
            return value
    raise AssertionError(f"no answer to {query}")

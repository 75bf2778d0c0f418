"""The metrics as Prometheus itself takes them."""

from pathlib import Path

from tests.deploy.prometheus import Prometheus, promtool
from tests.system.daemon import Daemon


def test_promtool_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    """`promtool check metrics` reads a scrape and says nothing."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"hello")
        text = daemon.get()
    run = promtool("check", "metrics", standard_input=text)
    assert (run.returncode, run.stdout) == (0, "")


def test_a_real_prometheus_scrapes_the_daemon(tmp_path: Path) -> None:
    """A Prometheus server finds the target up and stores the frames that were echoed."""
    with Daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            for _ in range(7):
                client.echo(b"hello")
        daemon.wait_until("lpechod_frames_total", 7)
        target = daemon.latest["metrics"][0]
        configuration = (
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            "scrape_configs:\n"
            "  - job_name: lpechod\n"
            f"    static_configs: [{{targets: ['{target}']}}]\n"
        )
        with Prometheus(tmp_path, configuration) as prometheus:
            assert prometheus.wait_for("lpechod_frames_total") == "7"
            assert prometheus.wait_for('up{job="lpechod"}') == "1"
            assert prometheus.wait_for("process_open_fds > bool 0") == "1"

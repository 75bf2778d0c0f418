"""The metrics as Prometheus itself takes them."""

from pathlib import Path

import trustme

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


def test_a_real_prometheus_scrapes_over_tls_with_certificate_and_token(tmp_path: Path) -> None:
    """A Prometheus server that has a certificate and the token is let in, and nobody else is."""
    authority = trustme.CA()
    files = {name: tmp_path / name for name in ("ca", "server", "server.key", "own", "own.key")}
    authority.cert_pem.write_to_path(files["ca"])
    for name, host in (("server", "127.0.0.1"), ("own", "scraper.test")):
        issued = authority.issue_cert(host)
        issued.cert_chain_pems[0].write_to_path(files[name])
        issued.private_key_pem.write_to_path(files[f"{name}.key"])
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    for secret in (files["server.key"], token):
        secret.chmod(0o600)
    config = (
        f'[metrics]\naddress = "127.0.0.1:0"\nbearer_token_file = "{token}"\n'
        f'tls = {{ certificate = "{files["server"]}", key = "{files["server.key"]}", '
        f'client_ca = "{files["ca"]}" }}\n'
    )
    with Daemon(tmp_path, config) as daemon:
        target = daemon.wait_for("ready")["metrics"][0]
        tls = (
            f"tls_config: {{ca_file: {files['ca']}, cert_file: {files['own']}, "
            f"key_file: {files['own.key']}}}"
        )
        jobs = {
            "known": f"{tls}, authorization: {{credentials_file: {token}}}",
            "tokenless": tls,
            "uncertified": (
                f"tls_config: {{ca_file: {files['ca']}}}, "
                f"authorization: {{credentials_file: {token}}}"
            ),
        }
        configuration = "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n"
        for name, how in jobs.items():
            configuration += (
                f"  - {{job_name: {name}, scheme: https, {how}, "
                f"static_configs: [{{targets: ['{target}']}}]}}\n"
            )
        with Prometheus(tmp_path, configuration) as prometheus:
            assert prometheus.wait_for('up{job="known"}') == "1"
            assert prometheus.wait_for('up{job="tokenless"}') == "0"
            assert prometheus.wait_for('up{job="uncertified"}') == "0"
            assert prometheus.wait_for("lpechod_connections_active") == "0"
        daemon.wait_for("exporter_handshake_failed")

"""Certificates, keys and tokens as the operator meets them: at the start, and over reloads."""

import contextlib
import re
import signal
import socket
from pathlib import Path

from lpechod.net.certificate import certificates, validity
from tests.certificates import Issued, issue
from tests.system.daemon import Daemon, EchoClient, children
from tests.system.manager import Manager
from tests.system.test_reload_failures import FAILURE, fail, nothing_changes, succeed

EXPIRY = "lpechod_tls_certificate_expiry_timestamp_seconds"
TOKEN = "s3cr3t.Token"  # noqa: S105 - of these tests only.


def configuration(issued: Issued, *more: str, metrics: str = "") -> str:
    """Write a configuration with an address in the clear, then one with TLS on line 6."""
    return (
        '[[listen]]\naddress = "127.0.0.1:0"\n\n[[listen]]\naddress = "127.0.0.2:0"\n'
        f"tls = {issued.table()}\n{''.join(more)}"
        f'[metrics]\naddress = "127.0.0.1:0"\n{metrics}\n'
    )


def end_of(issued: Issued) -> float:
    """Return when a certificate expires."""
    return validity(certificates(issued.certificate.read_text())[0]).not_after


def ask(daemon: Daemon, path: str, *headers: str) -> bytes:
    """Return what the exporter answers to a request with these headers."""
    host, _, port = daemon.latest["metrics"][0].rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        lines = (f"GET {path} HTTP/1.1", "Host: localhost", *headers)
        client.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        with client.makefile("rb") as stream:
            return stream.read()


def test_a_start_with_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    """A start with a bad file ends at once, as with any other mistake in the configuration."""
    issued = issue(tmp_path)
    issued.key.unlink()
    with Daemon(tmp_path, configuration(issued), status=78, errors=["unparsable"]) as daemon:
        assert daemon.process.wait(20) == 78
    (line,) = (event["line"] for event in daemon.log)
    reason = f"{issued.key} can't be read: No such file or directory"
    assert line == f"{daemon.path}:6: listen[1].tls.key: {reason}\n"


def test_a_certificate_that_can_not_be_read(tmp_path: Path) -> None:
    """A reload with a certificate that is gone changes nothing, and works once it is there."""
    old, new = issue(tmp_path, "old"), issue(tmp_path, "new", after=50)
    with Daemon(tmp_path, configuration(old), errors=FAILURE) as daemon:
        assert daemon.metric(EXPIRY, address="127.0.0.2:0") == end_of(old)
        with nothing_changes(daemon):
            kept = new.certificate.read_bytes()
            new.certificate.unlink()
            daemon.path.write_text(configuration(new))
            fail(
                daemon,
                rf"{re.escape(str(daemon.path))}:6: listen\[1\]\.tls\.certificate: "
                rf"{re.escape(str(new.certificate))} can't be read: No such file or directory",
            )
            assert daemon.metric(EXPIRY, address="127.0.0.2:0") == end_of(old)
        new.certificate.write_bytes(kept)
        succeed(daemon, configuration(new))
        assert daemon.metric(EXPIRY, address="127.0.0.2:0") == end_of(new)


def test_the_status_names_the_file(tmp_path: Path) -> None:
    """After a reload that failed on a file, the service manager's status line says on which one."""
    issued = issue(tmp_path)
    with (
        Manager(tmp_path / "notify") as manager,
        manager.start(tmp_path, configuration(issued), errors=FAILURE) as daemon,
    ):
        manager.wait_for("READY")
        issued.key.write_text("")
        daemon.signal(signal.SIGHUP)
        manager.wait_for("RELOADING", "1")
        said = manager.wait_for("READY", "1").fields["STATUS"]
        place = f"{daemon.path}:6: listen[1].tls.key: {issued.key}: "
        assert said.startswith(f"Reload failed, all is as before: {place}")


def test_every_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    """A reload that fails on several files logs each with its line, and nothing of its content."""
    issued, other = issue(tmp_path), issue(tmp_path, "other")
    token = tmp_path / "token"
    token.write_text("two words")
    more = f'tls = {{ key = "{tmp_path}", certificate = "/x" }}\n'
    config = configuration(
        Issued(issued.certificate, other.key, issued.ca),
        f'[[listen]]\naddress = "127.0.0.3:0"\n{more}',
        metrics=f'bearer_token_file = "{token}"',
    )
    with Daemon(tmp_path, configuration(issued), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            daemon.path.write_text(config)
            file = re.escape(str(daemon.path))
            fail(
                daemon,
                rf"{file}:6: listen\[1\]\.tls\.key: .*: the key does not belong to the certificate",
                rf"{file}:9: listen\[2\]\.tls\.key: .*: not a regular file",
                rf"{file}:9: listen\[2\]\.tls\.certificate: /x can't be read: .*",
                rf"{file}:12: metrics\.bearer_token_file: .*: a token is one word .*",
            )
        succeed(daemon, configuration(issued))
    logged = str(daemon.log)
    assert "two words" not in logged
    assert "BEGIN" not in logged


def test_files_that_go_after_the_check(tmp_path: Path) -> None:
    """A reload that has been found good does not need its files a second time."""
    issued, path = issue(tmp_path), tmp_path / "new.sock"
    token = tmp_path / "token"
    token.write_text(TOKEN)
    config = configuration(
        issued, f'[[listen]]\naddress = "unix:{path}"\n', metrics=f'bearer_token_file = "{token}"'
    )
    with Daemon(tmp_path) as daemon:
        workers = daemon.workers()
        metrics = daemon.latest["metrics"][0]
        daemon._sockets.append(str(path))
        with EchoClient(metrics) as silent:  # It holds the handover up.
            silent.send(b"GET")
            daemon.path.write_text(config)
            daemon.signal(signal.SIGHUP)
            while not path.exists() or children(daemon.pid) != workers:
                pass
            for file in (issued.certificate, issued.key, token, daemon.path):
                file.unlink()
        daemon.wait_for("reloaded")
        assert len(daemon.latest["listeners"]) == 3
        assert b" 401 " in ask(daemon, "/metrics")
        page = ask(daemon, "/metrics", f"Authorization: Bearer {TOKEN}")
        assert f'{EXPIRY}{{address="127.0.0.2:0"}}'.encode() in page


def test_warnings_at_the_start_and_after_a_reload(tmp_path: Path) -> None:
    """What will be trouble is logged with its file, and after each reload until it is mended."""
    issued, fresh = issue(tmp_path, before=-88, after=2), issue(tmp_path, "fresh")
    issued.key.chmod(0o644)
    with Daemon(tmp_path, configuration(issued)) as daemon:
        for count in (1, 2):
            key = daemon.wait_for_count("private_key_exposed", count)
            assert (key["path"], key["level"]) == (str(issued.key), "warning")
            assert key["key"] == "listen[1].tls.key"
            certificate = daemon.wait_for_count("certificate_expires", count)
            assert (certificate["path"], certificate["level"]) == (
                str(issued.certificate),
                "warning",
            )
            daemon.reload()
        daemon.reload(configuration(fresh))
    assert len(daemon.events("private_key_exposed")) == 3
    assert len(daemon.events("certificate_expires")) == 3


def test_the_token(tmp_path: Path) -> None:
    """With a token, metrics are for who sends it, and health is for everybody; no log has it."""
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    right = f"Authorization: Bearer {TOKEN}"
    config = f'[metrics]\naddress = "127.0.0.1:0"\nbearer_token_file = "{token}"\n'
    with Daemon(tmp_path, f'[log]\nlevel = "debug"\n{config}') as daemon:
        refusal = ask(daemon, "/metrics")
        assert refusal.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
        assert b"\r\nWWW-Authenticate: Bearer\r\n" in refusal
        assert b"lpechod_" not in refusal
        assert b"lpechod_frames_total 0.0" in ask(daemon, "/metrics", right)
        assert b" 401 " in ask(daemon, "/", "Authorization: Bearer wrong")
        assert b" 401 " in ask(daemon, "/metrics", right, right)
        assert b" 401 " in ask(daemon, "/metrics", right[:-3], f"Authorization: {right[-3:]}")
        assert b" 200 " in ask(daemon, "/", right)
        assert b" 200 " in ask(daemon, "/-/healthy")
        assert b" 200 " in ask(daemon, "/-/ready")
        token.write_text("another")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        assert b" 401 " in ask(daemon, "/metrics", right)
        assert b" 200 " in ask(daemon, "/metrics", "Authorization: Bearer another")
    assert TOKEN not in str(daemon.log)


def open_files(pid: int) -> list[str]:
    """List what a process has open; what it closes meanwhile is left out."""
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(each.readlink()))
    return links


def test_no_secret_is_left_open(tmp_path: Path) -> None:
    """Neither supervisor nor workers keep a descriptor of a file, or of a copy in memory."""
    issued = issue(tmp_path)
    with Daemon(tmp_path, configuration(issued)) as daemon:
        for _ in range(2):
            for pid in (daemon.pid, *daemon.workers()):
                links = open_files(pid)
                assert links
                assert not [link for link in links if "pem" in link or "document" in link]
            daemon.reload()
            daemon.wait_until("lpechod_workers", 0, state="draining")

"""A reload that fails changes nothing, and one that is interrupted ends in good order."""

import os
import re
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

from tests.system.daemon import (
    Daemon,
    EchoClient,
    configuration,
    descriptor_kinds,
    frame,
    free_address,
    is_alive,
    wait_for_end,
    wait_for_sleeps,
)

FAILURE = ("reload_failed",)


def listens(address: str) -> bool:
    """Tell whether somebody listens on an address."""
    host, _, port = address.rpartition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


@contextmanager
def nothing_changes(daemon: Daemon) -> Iterator[None]:
    """Demand that a failed reload leaves processes, sockets and connections as they were."""
    sent = frame(bytes(1000))
    latest, processes = daemon.latest, (daemon.pid, *daemon.workers())
    wait_for_sleeps(daemon.pid, 2)  # The last scrape may be closing its connection.
    kinds = [descriptor_kinds(pid) for pid in processes]
    name = "lpechod_config_last_reload_success_timestamp_seconds"
    loaded_at = daemon.metric(name)
    received = daemon.settled("lpechod_received_bytes_total")
    with daemon.connect() as idle, daemon.connect() as busy:
        idle.echo(b"before")
        busy.send(sent[:500])
        daemon.wait_until("lpechod_received_bytes_total", received + 10 + 500)

        yield

        busy.send(sent[500:])
        assert busy.receive(len(sent)) == sent
        idle.echo(b"after")
        with daemon.connect() as late:
            late.echo(b"a new one")
    daemon.wait_until("lpechod_connections_active", 0)
    assert daemon.metric("lpechod_config_last_reload_successful") == 0
    assert daemon.metric(name) == loaded_at
    assert daemon.latest == latest
    assert (daemon.pid, *daemon.workers()) == processes
    daemon.wait_for_descriptors(sum(map(len, kinds)))
    assert [descriptor_kinds(pid) for pid in processes] == kinds


def fail(daemon: Daemon, *patterns: str) -> None:
    """Send SIGHUP, and demand that these problems are logged, in any order and no others."""
    count = len(daemon.events("reload_failed"))
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_count("reload_failed", count + len(patterns))
    daemon.wait_until("lpechod_config_last_reload_successful", 0)
    found = [event["problem"] for event in daemon.events("reload_failed")[count:]]
    assert len(found) == len(patterns)
    for pattern in patterns:
        assert any(re.fullmatch(pattern, problem) for problem in found), found


def succeed(daemon: Daemon, config: str) -> None:
    """Reload after a failure, and demand that this is a success in every respect."""
    before = daemon.metric("lpechod_config_last_reload_success_timestamp_seconds")
    daemon.reload(config)
    assert daemon.metric("lpechod_config_last_reload_successful") == 1
    assert daemon.metric("lpechod_config_last_reload_success_timestamp_seconds") > before
    with daemon.connect() as client:
        client.echo(b"as it should be")


@contextmanager
def held_up(daemon: Daemon) -> Iterator[tuple[int, TextIO]]:
    """Start a reload whose check waits for its configuration; give its process and the file."""
    before = {*daemon.workers()}
    daemon.path.unlink()
    os.mkfifo(daemon.path)
    daemon.signal(signal.SIGHUP)
    with daemon.path.open("w") as fifo:  # Returns when the check reads it.
        daemon.path.unlink()
        (check,) = {*daemon.workers()} - before
        yield check, fifo


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    """A syntax error is reported with file and line, and nothing changes."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            daemon.path.write_text("[server]\nworkers = = 2\n")
            fail(daemon, f"{re.escape(str(daemon.path))}:2: not TOML: .*")
        succeed(daemon, configuration())


def test_wrong_values(tmp_path: Path) -> None:
    """Every wrong value is reported on a line of its own, with file and line."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            daemon.path.write_text('[server]\nworkers = 0\npoler = "x"\n[limits]\nmax_frame = 0\n')
            file = re.escape(str(daemon.path))
            fail(
                daemon,
                rf"{file}:2: server\.workers: .*",
                rf"{file}:3: server\.poler: .*\(did you mean poller\?\)",
                rf"{file}:5: limits\.max_frame: .*",
            )
        succeed(daemon, configuration())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A configuration that is missing, or can't be read, is reported, and nothing changes."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            daemon.path.unlink()
            fail(daemon, ".*: can't be read: No such file or directory.*")
            daemon.path.mkdir()
            fail(daemon, ".*: can't be read: Is a directory.*")
            daemon.path.rmdir()
        succeed(daemon, configuration())


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """Of several new addresses, one that is taken keeps all from being listened on."""
    free, taken, path = free_address(), free_address(), tmp_path / "new.sock"
    host, _, port = taken.rpartition(":")
    config = configuration("127.0.0.1:0", free, f"unix:{path}", taken)
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon), socket.create_server((host, int(port))):
            daemon.path.write_text(config)
            fail(
                daemon,
                rf"cannot listen on {taken}: Address already in use .*",
            )
            assert not listens(free)
            assert not path.exists()
        succeed(daemon, config)
        assert listens(free)
        assert path.exists()
        daemon.reload(configuration())


def test_a_unix_socket_in_no_directory(tmp_path: Path) -> None:
    """A UNIX socket needs its directory, and it is enough to make that and try again."""
    directory = tmp_path / "run"
    config = configuration("127.0.0.1:0", f"unix:{directory}/echo.sock")
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            daemon.path.write_text(config)
            fail(
                daemon,
                rf"cannot listen on unix:{directory}/echo\.sock: .*the directory has to exist\)",
            )
        directory.mkdir()
        succeed(daemon, config)


def test_a_unix_socket_of_somebody_else(tmp_path: Path) -> None:
    """A UNIX socket that somebody serves, and a file that is none, are left alone."""
    taken, file = tmp_path / "taken.sock", tmp_path / "file"
    file.write_text("precious")
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon), socket.socket(socket.AF_UNIX) as other:
            other.bind(str(taken))
            other.listen()
            daemon.path.write_text(configuration(f"unix:{taken}", f"unix:{file}"))
            fail(daemon, r".*another process listens.*", r".*not a socket.*")
            with EchoClient(f"unix:{taken}"):
                other.accept()[0].close()
            assert file.read_text() == "precious"
        succeed(daemon, configuration())


def test_a_pipe_that_has_been_read(tmp_path: Path) -> None:
    """A pipe such as /dev/stdin, empty since the start, is not taken for a file of defaults."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            with held_up(daemon):
                pass
            daemon.wait_for("reload_failed")
            daemon.wait_until("lpechod_config_last_reload_successful", 0)
        assert "is a pipe with nothing in it" in daemon.events("reload_failed")[0]["problem"]
        succeed(daemon, configuration())


def test_a_check_that_is_killed(tmp_path: Path) -> None:
    """A check that ends by a signal is a failed reload like any other."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            with held_up(daemon) as (check, _):
                os.kill(check, signal.SIGKILL)
                daemon.wait_for("reload_failed")
            daemon.wait_until("lpechod_config_last_reload_successful", 0)
        succeed(daemon, configuration())


def test_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    """When execve(2) fails at the last moment, new sockets are closed and everything goes on."""
    # Only the supervisor is traced, and the call that has started it does not count.
    inject = "inject=execve:error=ENOMEM:when=1"
    prefix = ("strace", "-o", str(tmp_path / "trace"), "-e", "trace=execve", "-e", inject)
    free, path = free_address(), tmp_path / "new.sock"
    config = configuration("127.0.0.1:0", free, f"unix:{path}")
    with Daemon(tmp_path, configuration(), errors=FAILURE, prefix=prefix) as daemon:
        with nothing_changes(daemon):
            daemon.path.write_text(config)
            fail(daemon, "cannot execute the new program: Cannot allocate memory")
            assert not listens(free)
            assert not path.exists()
        succeed(daemon, config)
        daemon.reload(configuration())


def test_two_signals_and_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    """A signal during a reload that fails at the last moment leads to one reload more."""
    inject = "inject=execve:error=ENOMEM:when=1..2"
    prefix = ("strace", "-o", str(tmp_path / "trace"), "-e", "trace=execve", "-e", inject)
    with Daemon(tmp_path, configuration(), errors=FAILURE, prefix=prefix) as daemon:
        with held_up(daemon) as (_, fifo):
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_count("signal", 2)
            daemon.path.write_text(configuration())
            fifo.write(configuration())
        daemon.wait_for_count("reload_failed", 2)
        succeed(daemon, configuration())
        # Two of ours, the supervisor's own to whatever it would become, and the last.
        assert len(daemon.events("signal")) == 4


def test_shared_memory_that_cannot_be_made(tmp_path: Path) -> None:
    """A reload that needs memory which there is not fails before there is no way back."""
    limited = configuration(more="[limits]\nmax_connections_per_ip = 5\n")
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        with nothing_changes(daemon):
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (1 << 30, before[1]))
            daemon.path.write_text(limited)
            fail(daemon, "no shared memory for the new program: File too large")
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)
        succeed(daemon, limited)


def test_a_check_that_cannot_be_executed(tmp_path: Path) -> None:
    """Without the means to start a check, a reload fails, and everything goes on."""
    inject = "inject=execve:error=ENOMEM:when=1"
    prefix = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=execve", "-e", inject)
    with Daemon(tmp_path, errors=FAILURE, prefix=prefix) as daemon, nothing_changes(daemon):
        fail(daemon, "cannot start a check: Cannot allocate memory")
        fail(daemon, "cannot start a check: Cannot allocate memory")


def test_a_check_whose_sockets_find_no_descriptors(tmp_path: Path) -> None:
    """Without descriptors for all the new sockets, a reload fails, and those it got are closed."""
    many = configuration(*["127.0.0.1:0"] * 12)
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
        last = max(int(each.name) for each in Path(f"/proc/{daemon.pid}/fd").iterdir())
        with nothing_changes(daemon):
            # As many as it takes to start a check, and to scrape it.
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (last + 8, hard))
            daemon.path.write_text(many)
            fail(daemon, "too few descriptors are left for its sockets; raise LimitNOFILE=")
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
        succeed(daemon, many)


def test_an_address_that_overlaps_with_one_that_stays(tmp_path: Path) -> None:
    """What could not be bound together at a start is not bound by a reload, either."""
    port = free_address().rpartition(":")[2]
    one, other = f"127.0.0.1:{port}", f"[::1]:{port}"
    with Daemon(tmp_path, configuration(one, other), errors=FAILURE) as daemon:
        with nothing_changes(daemon):
            for staying in ([one], [other], [one, other]):
                daemon.path.write_text(configuration(*staying, f"[::]:{port}"))
                fail(daemon, rf"cannot listen on \[::\]:{port}: Address already in use .*")
        succeed(daemon, configuration(f"[::]:{port}"))


def test_a_second_signal_after_a_failure_is_obeyed(tmp_path: Path) -> None:
    """A SIGHUP that came during a check that fails leads to another check."""
    with Daemon(tmp_path, configuration(), errors=FAILURE) as daemon:
        with held_up(daemon) as (_, fifo):
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_count("signal", 2)
            daemon.path.write_text(configuration(more="[server]\nworkers = 2\n"))
            fifo.write("nonsense")
        daemon.wait_for("reload_failed")
        daemon.wait_for("reloaded", workers=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:{}/echo.sock"])
def test_an_end_during_a_check(tmp_path: Path, number: signal.Signals, address: str) -> None:
    """A signal to end while a configuration is checked ends the check as well."""
    with Daemon(tmp_path, configuration(address.format(tmp_path))) as daemon:
        with held_up(daemon) as (check, _), daemon.connect() as client:
            client.echo(b"still served")
            daemon.signal(number)
            client.expect_end()
            wait_for_end(check)
        assert daemon.wait() == 0
        assert not is_alive(check)
    assert daemon.events("reload_failed") == []


@pytest.mark.parametrize("moment", ["handover", "start"])
def test_an_end_during_a_reload(tmp_path: Path, moment: str) -> None:
    """A signal to end after the check, or when new workers start, ends old and new ones alike."""
    path = tmp_path / "new.sock"
    with Daemon(tmp_path, configuration()) as daemon, daemon.connect() as client:
        client.echo(b"served")
        old = {*daemon.workers()}
        with held_up(daemon) as (check, fifo):
            fifo.write(configuration("127.0.0.1:0", f"unix:{path}"))
        wait_for_end(check)
        while moment == "start" and not {*daemon.workers()} - old - {check}:
            pass
        daemon.signal(signal.SIGTERM)
        client.expect_end()
        client.close()
        assert daemon.wait() == 0
        assert not path.exists()


def test_an_end_between_check_and_handover(tmp_path: Path) -> None:
    """A signal to end after a successful check leaves no file of a socket that was to be new."""
    path = tmp_path / "new.sock"
    config = configuration("127.0.0.1:0", f"unix:{path}")
    with Daemon(tmp_path, configuration()) as daemon:
        workers = daemon.workers()
        with EchoClient(daemon.latest["metrics"][0]) as silent:  # It holds the handover up.
            silent.send(b"GET")
            daemon.path.write_text(config)
            daemon.signal(signal.SIGHUP)
            while not path.exists() or daemon.workers() != workers:
                pass
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
    assert not path.exists()


def test_metrics_of_an_end_between_check_and_handover(tmp_path: Path) -> None:
    """While draining, metrics are served also if a reload was about to replace the program."""
    config = '[server]\ndrain_timeout = "1h"\n'
    with Daemon(tmp_path, configuration(more=config)) as daemon, daemon.connect() as client:
        client.send(b"\0")
        daemon.wait_until("lpechod_received_bytes_total", 1)
        workers = daemon.workers()
        with EchoClient(daemon.latest["metrics"][0]) as silent:
            silent.send(b"GET")
            daemon.path.write_text(configuration(f"unix:{tmp_path}/new.sock", more=config))
            daemon.signal(signal.SIGHUP)
            while not (tmp_path / "new.sock").exists() or daemon.workers() != workers:
                pass
            daemon.signal(signal.SIGTERM)
            daemon.wait_for("draining")
        assert daemon.metric("lpechod_workers", state="draining") == 1
        client.send(bytes(3))
        assert client.receive(4) == bytes(4)
        client.expect_end()


def test_the_handover_waits_for_a_scrape(tmp_path: Path) -> None:
    """A scraper that is in the middle of its request at the handover has a second to finish it."""
    with Daemon(tmp_path, configuration()) as daemon:
        answers: list[bytes] = []
        while b"HTTP/1.1 200 " not in answers and len(answers) < 5:  # A second may be too short.
            workers = daemon.workers()
            with EchoClient(daemon.latest["metrics"][0]) as scraper, suppress(ConnectionError):
                scraper.send(b"GET /metrics HT")
                with held_up(daemon) as (_, fifo):
                    fifo.write(configuration())
                while daemon.workers() != workers:
                    pass
                answers.append(b"")
                scraper.send(b"TP/1.0\r\n\r\n")
                answers[-1] = scraper.socket.recv(13)
            daemon.wait_for_count("reloaded", len(answers))
            daemon.wait_for("worker_ended", worker=workers[0])
        assert b"HTTP/1.1 200 " in answers


def test_an_end_with_workers_of_a_longer_drain_timeout(tmp_path: Path) -> None:
    """The drain_timeout in force at the end holds for workers of an older generation, too."""
    long, short = (f'[server]\ndrain_timeout = "{each}"\n' for each in ("1h", "100ms"))
    with Daemon(tmp_path, configuration(more=long)) as daemon, daemon.connect() as client:
        client.send(b"\0")
        daemon.wait_until("lpechod_received_bytes_total", 1)
        daemon.reload(configuration(more=short))
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("connection_closed", reason="drain_timeout")

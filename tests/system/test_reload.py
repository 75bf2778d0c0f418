"""A reload as clients, scrapers and the process table see it: nothing is lost or goes back."""

import os
import re
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from tests.system.callers import Callers, echoes
from tests.system.daemon import (
    Daemon,
    EchoClient,
    children,
    configuration,
    descriptor_kinds,
    frame,
    free_address,
    is_alive,
)

ENDLESS_DRAIN = configuration(more='[server]\ndrain_timeout = "1h"\n')
COUNTERS = re.compile(r"^(lpechod_\w+_(?:total|count|sum|bucket)\S*) (\S+)$", re.MULTILINE)
FROM_CLIENTS = re.compile(r"connections_(accepted|closed)|frame|_bytes_|connection_duration")


def counters(text: str) -> dict[str, float]:
    """Return the counters of a page of metrics, histograms among them."""
    return {name: float(value) for name, value in COUNTERS.findall(text)}


def ask(address: str) -> EchoClient:
    """Send a scrape, and do not wait for the answer."""
    client = EchoClient(address)
    client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
    return client


def answer(client: EchoClient) -> str:
    """Read the answer to a scrape to its end."""
    text = b""
    while piece := client.socket.recv(65536):
        text += piece
    client.close()
    return text.decode()


def reload_and_wait(daemon: Daemon, old: int) -> None:
    """Reload, and wait for the end of a worker of before."""
    daemon.reload()
    daemon.wait_for("worker_ended", worker=old)


def test_an_idle_connection_is_closed_with_a_fin(tmp_path: Path) -> None:
    """A connection at a frame boundary ends in good order, its reason being the drain."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"hello")
        daemon.reload()
        client.expect_end()
        client.close()
        daemon.wait_for("connection_closed", reason="drained", frames=1)


def test_a_frame_in_flight_is_echoed_by_the_old_worker(tmp_path: Path) -> None:
    """A frame that has begun before the reload comes back whole after it, and then the FIN."""
    sent = frame(bytes(range(256)) * 1000)
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        (old,) = daemon.workers()
        client.send(sent[:100_000])
        daemon.wait_until("lpechod_received_bytes_total", 100_000)
        daemon.reload()
        client.send(sent[100_000:])
        assert client.receive(len(sent)) == sent
        client.expect_end()
        client.close()
        daemon.wait_for("connection_closed", worker=old, reason="drained", frames=1)


def test_busy_connections_outlive_many_reloads(tmp_path: Path) -> None:
    """With a long drain_timeout, workers of several generations serve until their clients leave."""
    sent = frame(bytes(range(100)))
    clients: list[EchoClient] = []
    owners: list[int] = []
    received = 0
    with Daemon(tmp_path, ENDLESS_DRAIN) as daemon:
        for generation in range(1, 4):
            (owner,) = {*daemon.workers()} - {*owners}
            owners.append(owner)
            clients.append(daemon.connect())
            for client in clients:  # They are in the middle of a frame, and go on with it.
                client.send(sent[:20] if client is clients[-1] else sent[:1])
            received += 20 + generation - 1
            daemon.wait_until("lpechod_received_bytes_total", received)
            daemon.reload()
            assert daemon.metric("lpechod_workers", state="draining") == generation
            assert daemon.metric("lpechod_connections_active") == generation
        for client, owner in zip(clients, owners, strict=True):
            begun = sent[:20] + sent[:1] * (2 - clients.index(client))
            rest = sent[len(begun) :]
            client.send(rest)
            assert client.receive(len(sent)) == begun + rest
            client.expect_end()
            client.close()
            daemon.wait_for("connection_closed", worker=owner, reason="drained", frames=1)
            daemon.wait_for("worker_ended", worker=owner)
        assert daemon.metric("lpechod_workers", state="draining") == 0


def test_the_process_stays(tmp_path: Path) -> None:
    """The supervisor keeps its process id, is one, and has replaced the worker without restarts."""
    with Daemon(tmp_path) as daemon:
        pid, (old,) = daemon.pid, daemon.workers()
        for _ in range(2):
            event = daemon.reload()
            assert event["pid"] == pid
            daemon.wait_for("worker_ended", worker=old)
            (new,) = children(pid)
            assert new != old
            old = new
        assert daemon.process.pid == pid
        assert daemon.metric("lpechod_worker_restarts_total") == 0


def test_a_worker_that_was_replaced_stays_counted(tmp_path: Path) -> None:
    """The number of restarts is carried over a reload, and counts on."""
    with Daemon(tmp_path, errors=["worker_died"]) as daemon:
        for restarts in (1, 2):
            (worker,) = daemon.workers()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_for("worker_died", worker=worker)
            daemon.wait_until("lpechod_workers", 1, state="ready")
            (replacement,) = daemon.workers()
            reload_and_wait(daemon, replacement)
            assert daemon.metric("lpechod_worker_restarts_total") == restarts


@pytest.mark.parametrize("workers", [1, 2])
def test_new_connections_are_served_all_the_time(tmp_path: Path, workers: int) -> None:
    """Clients that come during five reloads are all let in, and none is reset."""
    config = configuration(more=f"[server]\nworkers = {workers}\n")
    with Daemon(tmp_path, config) as daemon:
        callers = Callers(daemon.address)
        with callers.calling():
            for _ in range(5):
                daemon.reload()
        assert callers.errors == []
        let_in = callers.echoed + callers.turned_away
        daemon.wait_until("lpechod_connections_accepted_total", let_in)
        # Not even between their accept and their first frame.
        assert callers.turned_away == 0
        assert callers.echoed > 5


def test_counters_are_exact_over_reloads(tmp_path: Path) -> None:
    """No series of clients' doings loses or gains by a reload, and none ever goes back."""
    with Daemon(tmp_path) as daemon:
        before: dict[str, float] = {}
        for generation in range(1, 4):
            (old,) = daemon.workers()
            for size in (0, 10, 1000):
                with daemon.connect() as client:
                    client.echo(bytes(size))
                    client.echo(bytes(size))
            daemon.wait_until("lpechod_connection_duration_seconds_count", 3 * generation)
            page = counters(daemon.get())
            assert page["lpechod_connections_accepted_total"] == 3 * generation
            assert page["lpechod_frames_total"] == 6 * generation
            total = (6 * 4 + 2 * 1010) * generation
            assert page["lpechod_received_bytes_total"] == total
            assert page["lpechod_sent_bytes_total"] == total
            assert page['lpechod_connections_closed_total{reason="peer_closed"}'] == 3 * generation
            reload_and_wait(daemon, old)
            after = counters(daemon.get())
            assert after.keys() == page.keys()
            assert [n for n in page if not before.get(n, 0) <= page[n] <= after[n]] == []
            changed = {name for name in page if after[name] != page[name]}
            assert not [name for name in changed if FROM_CLIENTS.search(name)]
            before = after


def test_lines_that_were_withheld_stay_counted(tmp_path: Path) -> None:
    """What the supervisor counts itself is carried over, too."""
    config = configuration(more="[log]\nburst = 1\nrate = 0.001\n")
    bad = config.replace("burst = 1", "burst = 0\nlevel = 1\nformat = 1")
    with Daemon(tmp_path, config, errors=["reload_failed"]) as daemon:
        daemon.wait_for("ready")
        daemon.path.write_text(bad)
        daemon.signal(signal.SIGHUP)
        daemon.wait_until("lpechod_config_last_reload_successful", 0)
        daemon.signal(signal.SIGHUP)
        daemon.wait_until("lpechod_log_lines_suppressed_total", 2)  # Of each event the second.
        withheld = daemon.metric("lpechod_log_lines_suppressed_total")
        before = daemon.metric("lpechod_config_last_reload_success_timestamp_seconds")
        daemon.reload(config)
        assert daemon.metric("lpechod_log_lines_suppressed_total") >= withheld
        assert daemon.metric("lpechod_config_last_reload_success_timestamp_seconds") > before
        assert daemon.metric("lpechod_config_last_reload_successful") == 1


def test_scrapes_are_answered_all_the_time(tmp_path: Path) -> None:
    """Scrapes that are sent during reloads are answered whole, and their counters never go back."""
    metrics = free_address()
    with Daemon(tmp_path, configuration(metrics=metrics)) as daemon:
        daemon.wait_for("ready")
        pages: list[str] = []
        enough = threading.Event()

        def scrape() -> None:
            while not enough.is_set():
                waiting = [ask(metrics) for _ in range(4)]  # Fewer than may wait or be served.
                pages.extend(answer(client) for client in waiting)

        thread = threading.Thread(target=scrape)
        thread.start()
        for _ in range(3):
            daemon.reload()
        enough.set()
        thread.join()
    assert [page for page in pages if not page.startswith("HTTP/1.1 200")] == []
    assert [page for page in pages if not page.endswith("\n") or "process_" not in page] == []
    successive = [counters(page) for page in pages[::4]]
    for before, after in pairwise(successive):
        assert [name for name in before if before[name] > after[name]] == []


def test_a_scrape_in_the_middle_of_a_reload_is_answered(tmp_path: Path) -> None:
    """Half a request before the signal and half of it while the check goes on is a request."""
    with Daemon(tmp_path, configuration()) as daemon:
        metrics = daemon.latest["metrics"][0]
        daemon.path.unlink()
        os.mkfifo(daemon.path)
        client = EchoClient(metrics)
        client.send(b"GET /metrics HT")
        daemon.signal(signal.SIGHUP)
        with daemon.path.open("w") as fifo:  # Returns when the check reads it.
            client.send(b"TP/1.0\r\n\r\n")
            assert answer(client).startswith("HTTP/1.1 200")
            fifo.write(configuration())
        daemon.wait_for("reloaded")


def test_a_scraper_that_does_not_hang_up_holds_up_nothing(tmp_path: Path) -> None:
    """A reload does not wait for ever for clients of the exporter, and its answers get out."""
    with Daemon(tmp_path, configuration()) as daemon:
        metrics = daemon.latest["metrics"][0]
        silent, lingering = EchoClient(metrics), ask(metrics)
        first = lingering.receive(12)
        daemon.reload()
        assert (first + answer(lingering).encode()).startswith(b"HTTP/1.1 200")
        silent.expect_end()
        silent.close()


@pytest.mark.parametrize("count", [2, 10])
def test_signals_in_quick_succession_are_not_lost(tmp_path: Path, count: int) -> None:
    """What was written before the last of many SIGHUPs is in force in the end."""
    with Daemon(tmp_path, configuration()) as daemon:
        (old,) = daemon.workers()
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("signal", name="SIGHUP")
        for number in range(2, count + 1):
            more = f"[limits]\nmax_frame = {number}\n[server]\nworkers = {1 + (number == count)}\n"
            daemon.path.write_text(configuration(more=more))
            daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded", workers=2)
        daemon.wait_for("worker_ended", worker=old)
        daemon.wait_for_count("reloaded", 2)
        daemon.wait_until("lpechod_workers", 2, state="ready")
        while not echoes(daemon.address, bytes(count)):  # More reloads may be to come.
            pass
        assert not echoes(daemon.address, bytes(count + 1))
        assert is_alive(daemon.process.pid)
    assert 2 <= len(daemon.events("reloaded")) <= count


def test_signals_during_a_check_lead_to_one_reload_more(tmp_path: Path) -> None:
    """A SIGHUP that comes while a configuration is checked is obeyed after that, however many."""
    with Daemon(tmp_path, configuration()) as daemon:
        daemon.wait_for("ready")
        daemon.path.unlink()
        os.mkfifo(daemon.path)
        daemon.signal(signal.SIGHUP)
        with daemon.path.open("w") as fifo:  # Returns when the check reads it.
            daemon.path.unlink()
            daemon.path.write_text(configuration(more="[server]\nworkers = 3\n"))
            for number in range(2, 5):
                daemon.signal(signal.SIGHUP)
                daemon.wait_for_count("signal", number)
            fifo.write(configuration(more="[server]\nworkers = 2\n"))
        daemon.wait_for_count("reloaded", 2)
        daemon.wait_until("lpechod_workers", 3, state="ready")
        daemon.wait_until("lpechod_workers", 0, state="draining")
    assert [event["workers"] for event in daemon.events("reloaded")] == [2, 3]


def test_a_signal_during_the_start_is_remembered(tmp_path: Path) -> None:
    """A SIGHUP before the first worker is ready leads to a reload as soon as it is."""
    # The trace stops the first fork(2) for a second: the supervisor's handlers are there by then.
    delay = "inject=clone,fork,clone3:delay_enter=1s:when=1"
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-o", str(trace), "-e", "trace=clone,fork,clone3", "-e", delay)
    with Daemon(tmp_path, prefix=prefix) as daemon:
        while not trace.exists() or "(" not in trace.read_text():
            pass
        (supervisor,) = children(daemon.process.pid)
        os.kill(supervisor, signal.SIGHUP)
        daemon.wait_for("ready")
        daemon.wait_for("reloaded")


def test_a_signal_during_the_end_is_ignored(tmp_path: Path) -> None:
    """A SIGHUP while draining neither reloads nor keeps the daemon from ending."""
    with Daemon(tmp_path, ENDLESS_DRAIN) as daemon, daemon.connect() as client:
        client.send(b"\0")
        daemon.wait_until("lpechod_received_bytes_total", 1)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("signal", name="SIGHUP")
        client.send(bytes(3))
        assert client.receive(4) == bytes(4)
        client.expect_end()
        client.close()
        assert daemon.wait() == 0
    assert daemon.events("reloaded") == []


def test_descriptors_do_not_add_up(tmp_path: Path) -> None:
    """After many reloads supervisor and worker have open what they had after the first ones."""
    plain = configuration()
    more = configuration("127.0.0.1:0", free_address(), f"unix:{tmp_path}/echo.sock")
    kinds: list[list[list[str]]] = []
    with Daemon(tmp_path, plain) as daemon:
        (old,) = daemon.workers()
        for config in (more, plain) * 5:
            daemon.reload(config)
            daemon.wait_for("worker_ended", worker=old)
            (old,) = daemon.workers()
            kinds.append([descriptor_kinds(pid) for pid in (daemon.pid, old)])
    assert kinds == kinds[:2] * 5
    assert [len(more) - len(fewer) for more, fewer in zip(*kinds[:2], strict=True)] == [2, 2]

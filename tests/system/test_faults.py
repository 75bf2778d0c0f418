"""The daemon among clients that misbehave and a kernel that runs out of things."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, EchoClient, frame

PINGS = 200
MIB = 1 << 20


def assert_quiet(daemon: Daemon) -> None:
    """Demand that the loop turns for a healthy client's frames and for nothing else.

    A descriptor that spins is ready in every turn, so it adds turns between two frames: hundreds,
    since a turn takes some microseconds and a frame's way to and fro some hundred.
    """
    name = "lpechod_loop_turn_seconds_count"
    with daemon.connect() as client:
        client.echo(b"warm-up")
        before = daemon.settled(name)
        for _ in range(PINGS):
            client.echo(b"ping")
        turns = daemon.settled(name) - before
    # One turn for each frame, and some for the scrape, the wheel and stray wake-ups.
    assert turns < PINGS * 1.2 + 20


def test_a_client_that_never_reads_is_paused_without_a_spin(tmp_path: Path) -> None:
    """A client that pipelines and never reads is held at the watermark, and costs no turns."""
    with Daemon(tmp_path) as daemon, daemon.connect() as greedy:
        greedy.socket.setblocking(False)
        flood = frame(bytes(65536)) * 16
        sent = 0
        while daemon.metric("lpechod_backpressure_pauses_total") == 0:
            try:
                sent += greedy.socket.send(flood)
            except BlockingIOError:
                continue

        assert_quiet(daemon)

        # The watermark, and what one receive call may add to it.
        assert daemon.settled("lpechod_buffered_bytes") < 4 * MIB
        greedy.reset()
        daemon.wait_for("connection_closed", reason="reset")


def test_a_half_closed_client_gets_its_echo_without_a_spin(tmp_path: Path) -> None:
    """A client that ends its side with echoes pending gets them all, then the end."""
    sent = frame(bytes(MIB)) * 16
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.socket.setblocking(False)
        offset = 0
        received = 0
        # The frames go in; what the kernel's buffers cannot hold has to come back meanwhile.
        while offset < len(sent):
            try:
                offset += client.socket.send(sent[offset : offset + MIB])
            except BlockingIOError:
                client.socket.settimeout(20)
                received += len(client.socket.recv(MIB))
                client.socket.setblocking(False)
        client.socket.shutdown(socket.SHUT_WR)
        client.socket.settimeout(20)

        assert_quiet(daemon)

        assert client.receive(len(sent) - received) == sent[received:]
        client.expect_end()
        daemon.wait_for("connection_closed", reason="peer_closed", frames=16)


def test_a_silent_half_closed_client_costs_nothing(tmp_path: Path) -> None:
    """A client that ends its side at once is closed at once."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.socket.shutdown(socket.SHUT_WR)
        client.expect_end()
        daemon.wait_for("connection_closed", reason="peer_closed", frames=0)
        assert_quiet(daemon)


def test_a_storm_of_resets_leaves_nothing(tmp_path: Path) -> None:
    """Clients that reset at once, with and without data, leave neither descriptors nor a spin."""
    with Daemon(tmp_path) as daemon:
        daemon.connect().close()
        daemon.wait_for("connection_closed")
        baseline = daemon.descriptors()  # Before the first scrape, and with no client.
        for number in range(1000):
            client = daemon.connect()
            if number % 2:
                client.send(frame(bytes(100)) * 5)
            client.reset()
        daemon.wait_until("lpechod_connections_active", 0)

        assert_quiet(daemon)

        daemon.wait_until("lpechod_connections_active", 0)
        daemon.wait_for_descriptors(baseline)
        counted = daemon.settled("lpechod_connections_accepted_total")
        aborted = daemon.settled("lpechod_connections_rejected_total", reason="aborted")
        assert counted + aborted >= 1000


@pytest.mark.parametrize(("workers", "told"), [(2, [200]), (3, [])])
def test_descriptors_of_all_workers_count(tmp_path: Path, workers: int, told: list[int]) -> None:
    """A warning tells for how many connections descriptors suffice, if that is too few for all."""
    config = f"[server]\nworkers = {workers}\n[limits]\nmax_connections = 250\n"
    with Daemon(tmp_path, config, prefix=("prlimit", "--nofile=164:164")) as daemon:
        daemon.wait_for("ready")
        warnings = daemon.events("descriptor_limit_low")

        assert [warning["enough_for"] for warning in warnings] == told
        assert daemon.metric("lpechod_connections_limit") == (told or [250])[0]


def test_running_out_of_descriptors_pauses_and_recovers(tmp_path: Path) -> None:
    """At EMFILE one line is logged, others are served, and a close lets the next one in."""
    with Daemon(tmp_path, prefix=("prlimit", "--nofile=64:64")) as daemon:
        daemon.wait_for("descriptor_limit_low")
        clients: list[EchoClient] = []
        # More than there are descriptors for; the kernel completes the handshake of all of them.
        while len(clients) < 100:
            clients.append(daemon.connect())
        daemon.wait_for("accept_paused", reason="emfile")
        for client in clients[:10]:
            client.echo(b"served meanwhile")

        assert len(daemon.events("accept_paused")) == 1

        # As they leave one by one, those who wait come in.
        for client in clients:
            client.echo(b"at last")
            client.close()


def test_accept_calls_are_counted_out_while_descriptors_lack(tmp_path: Path) -> None:
    """While descriptors lack, accept(2) fails once for each pause and not once for each turn."""
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-o", str(trace), "-e", "trace=accept4")
    with Daemon(tmp_path, prefix=(*prefix, "prlimit", "--nofile=64:64")) as daemon:
        clients = [daemon.connect() for _ in range(100)]
        daemon.wait_for("accept_paused", reason="emfile")
        for _ in range(PINGS):
            clients[0].echo(b"ping")
        for client in clients:
            client.reset()
    failed = len(re.findall(r"accept4.*EMFILE", trace.read_text()))
    pauses = len(daemon.events("accept_paused"))
    suppressed = sum(event.get("suppressed", 0) for event in daemon.events("accept_paused"))
    assert pauses <= failed <= pauses + suppressed + 50


@pytest.mark.parametrize("error", ["ENFILE", "ENOBUFS", "ENOMEM"])
def test_the_kernel_running_out_pauses_accepting(tmp_path: Path, error: str) -> None:
    """ENFILE, ENOBUFS and ENOMEM suspend accepting, by their names, and it goes on by itself."""
    inject = f"inject=accept4:error={error}:when=1"
    prefix = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=accept4", "-e", inject)
    with Daemon(tmp_path, prefix=prefix) as daemon, daemon.connect() as client:
        daemon.wait_for("accept_paused", reason=error.lower())
        client.echo(b"served after all")
        assert daemon.settled("lpechod_accept_pauses_total", reason=error.lower()) == 1


@pytest.mark.parametrize("error", ["ECONNABORTED", "EPROTO", "EPERM"])
def test_an_error_of_a_waiting_connection_is_not_the_listener_s(tmp_path: Path, error: str) -> None:
    """What accept(2) passes on from one connection does not keep the next one out."""
    inject = f"inject=accept4:error={error}:when=1"
    prefix = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=accept4", "-e", inject)
    with Daemon(tmp_path, prefix=prefix) as daemon, daemon.connect() as client:
        client.echo(b"served")
        assert daemon.settled("lpechod_connections_rejected_total", reason="aborted") == 1


def test_announced_lengths_command_no_memory(tmp_path: Path) -> None:
    """200 clients that announce 1 MiB each and send nothing more cost less than 2 MiB in all."""
    with Daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            client.echo(bytes(100))
        daemon.get()
        before = daemon.resident_kib()
        clients = [daemon.connect() for _ in range(200)]
        for client in clients:
            client.send(MIB.to_bytes(4, "big"))
        daemon.wait_until("lpechod_received_bytes_total", 104 + 800)

        assert daemon.resident_kib() - before < 2048

        for client in clients:
            client.reset()


def test_max_connections_turns_away_and_counts(tmp_path: Path) -> None:
    """Past max_connections new clients are closed at once, counted, and logged by reason."""
    with Daemon(tmp_path, "[limits]\nmax_connections = 2\n") as daemon:
        first, second, third = (daemon.connect() for _ in range(3))
        third.expect_end()
        daemon.wait_for("connection_rejected", reason="max_connections")
        first.echo(b"one")
        second.close()
        daemon.wait_for("connection_closed", connection=2)
        with daemon.connect() as fourth:
            fourth.echo(b"four")
        count = daemon.settled("lpechod_connections_rejected_total", reason="max_connections")
        assert count == 1
        first.close()
        third.close()


def test_max_connections_per_ip_turns_away_and_counts(tmp_path: Path) -> None:
    """Past max_connections_per_ip an address is turned away while another one is served."""
    with (
        Daemon(tmp_path, "[limits]\nmax_connections_per_ip = 1\n") as daemon,
        daemon.connect() as first,
        daemon.connect() as second,
    ):
        second.expect_end()
        daemon.wait_for("connection_rejected", reason="max_connections_per_ip")
        host, _, port = daemon.address.rpartition(":")
        with socket.create_connection(
            (host, int(port)), source_address=("127.0.0.2", 0), timeout=20
        ) as other:
            other.sendall(frame(b"x"))
            assert other.recv(5) == frame(b"x")
        first.echo(b"first")


def test_a_frame_too_large_ends_only_its_connection(tmp_path: Path) -> None:
    """Echoes before a frame that is too large arrive, even though more of it is under way."""
    with (
        Daemon(tmp_path, '[limits]\nmax_frame = "64KiB"\n') as daemon,
        daemon.connect() as client,
    ):
        client.send(frame(b"good") + frame(bytes(65537)))
        assert client.receive(8) == frame(b"good")
        client.expect_end()
        client.close()
        daemon.wait_for("connection_closed", reason="frame_too_large", frames=1)


def test_memory_for_slow_readers_is_bounded(tmp_path: Path) -> None:
    """Slow readers together never hold more than max_buffered; those with most are shed."""
    config = (
        '[limits]\nmax_frame = "1MiB"\nmax_buffered = "4MiB"\n'
        'high_watermark = "1MiB"\nlow_watermark = "64KiB"\n'
    )
    with Daemon(tmp_path, config) as daemon:
        greedy = [daemon.connect() for _ in range(12)]
        for client in greedy:
            client.socket.setblocking(False)
        flood = frame(bytes(MIB // 2)) * 32
        offsets = [0] * len(greedy)
        while not daemon.metric("lpechod_connections_closed_total", reason="overload"):
            for number, client in enumerate(greedy):
                try:
                    piece = flood[offsets[number] % len(flood) :]
                    offsets[number] += client.socket.send(piece)
                except (BlockingIOError, ConnectionError):
                    continue
            assert daemon.metric("lpechod_buffered_bytes") <= 4 * MIB
        with daemon.connect() as modest:
            modest.echo(b"still served")
        for client in greedy:
            client.reset()


def test_a_stopped_log_reader_does_not_stop_the_service(tmp_path: Path) -> None:
    """With the log's pipe full, echoes go on and the lost lines are counted."""
    config = '[log]\nlevel = "debug"\nburst = 100000\nrate = 100000.0\n'
    path = tmp_path / "config.toml"
    path.write_text(
        f'{config}[[listen]]\naddress = "unix:{tmp_path}/e.sock"\n'
        f'[metrics]\naddress = "unix:{tmp_path}/m.sock"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lpechod", "serve", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any('"ready"' in line for line in process.stderr)
    # 64 KiB of pipe hold some 300 lines; nobody reads them.
    for _ in range(1000):
        with EchoClient(f"unix:{tmp_path}/e.sock") as client:
            client.echo(b"x")
    dropped = 0.0
    for _ in range(5000):  # What is lost shows within a fifth of a second.
        with EchoClient(f"unix:{tmp_path}/m.sock") as scraper:
            scraper.send(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b""
            while piece := scraper.socket.recv(65536):
                text += piece
        found = re.search(rb"^lpechod_log_lines_dropped_total (\S+)", text, re.MULTILINE)
        assert found
        dropped = float(found[1])
        if dropped > 100:
            break
    assert dropped > 100
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_one_event_cannot_flood_the_log(tmp_path: Path) -> None:
    """Lines of one event are limited, the rest is counted, and other events are still heard."""
    with Daemon(tmp_path, "[log]\nburst = 5\nrate = 0.001\n") as daemon:
        for _ in range(100):
            with daemon.connect() as client:
                client.echo(b"x")
        daemon.wait_until("lpechod_connections_active", 0)
        assert daemon.settled("lpechod_log_lines_suppressed_total") == 95
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("stopped")
        assert len(daemon.events("connection_closed")) == 5

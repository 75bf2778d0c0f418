"""Overload seen from outside: silent clients make room, active ones notice nothing."""

from pathlib import Path

from tests.system.daemon import Daemon, EchoClient, frame

CONFIG = """
[server]
workers = 2
[limits]
max_connections = 100
[timeouts]
overload_idle = "2s"
"""
MARK = 90
SILENT = 95
ACTIVE = 5
TOO_MANY = 7


def is_over(client: EchoClient) -> bool:
    """Tell whether a client that expects nothing has been closed, in good order."""
    client.socket.setblocking(False)
    try:
        data = client.socket.recv(1)
    except BlockingIOError:
        return False
    finally:
        client.socket.settimeout(20)
    assert data == b""
    return True


def is_served(client: EchoClient) -> bool:
    """Tell whether a fresh client gets its echo, or is turned away."""
    try:
        client.socket.sendall(frame(b"first"))
        data = client.socket.recv(1)
    except ConnectionError:
        return False
    if data:
        assert data + client.receive(8) == frame(b"first")
    return bool(data)


def see_off(silent: list[EchoClient]) -> int:
    """Close the clients that have been closed, take them out, and return how many they were."""
    over = [client for client in silent if is_over(client)]
    for client in over:
        client.close()
        silent.remove(client)
    return len(over)


def test_silent_clients_make_room(tmp_path: Path) -> None:
    """At the limit newcomers are turned away; soon silent ones go, and active ones lose nothing."""
    with Daemon(tmp_path, CONFIG) as daemon:
        active = [daemon.connect() for _ in range(ACTIVE)]
        assert all(is_served(client) for client in active)
        clients = [daemon.connect() for _ in range(SILENT + TOO_MANY)]
        silent = [client for client in clients if is_served(client)]
        turned_away = [client for client in clients if client not in silent]
        for client in turned_away:
            client.close()
        echoes = len(active) + len(silent)
        too_many = echoes - MARK + 1
        ended = 0
        while ended < too_many:
            for client in active:
                client.echo(b"still here")
            echoes += len(active)
            ended += see_off(silent)
        while daemon.metric("lpechod_connections_closed_total", reason="overload") != ended:
            ended += see_off(silent)

        newcomer = daemon.connect()
        assert is_served(newcomer)

        assert too_many <= ended <= too_many + 4
        assert len(turned_away) >= TOO_MANY - 1
        daemon.wait_until("lpechod_frames_total", echoes + 1)
        daemon.wait_until(
            "lpechod_connections_rejected_total", len(turned_away), reason="max_connections"
        )
        assert daemon.metric("lpechod_overload_seconds_total", resource="connections") > 0
        assert daemon.metric("lpechod_overload_seconds_total", resource="memory") == 0
        daemon.wait_for("overload_began", mark=MARK)
        for client in [*active, newcomer]:
            client.echo(b"to the end")
        for client in [*active, newcomer, *silent]:
            client.close()

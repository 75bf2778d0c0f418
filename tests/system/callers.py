"""Clients that never stop coming while something happens to the daemon."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.system.daemon import EchoClient, frame


class Callers:
    """Clients that come one after the other until told to stop, and what has become of each."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._enough = threading.Event()
        self.echoed = 0
        self.turned_away = 0
        """Ended in good order before their first frame was seen, as idle connections are."""
        self.errors: list[OSError] = []

    def _run(self) -> None:
        while not self._enough.is_set():
            try:
                echoed = echoes(self._address, b"on and on")
            except OSError as error:
                self.errors.append(error)
            else:
                self.echoed += echoed
                self.turned_away += not echoed

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Have them come during the block."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._enough.set()
            thread.join()


def echoes(address: str, body: bytes) -> bool:
    """Send a frame and the end of the stream; tell if the frame comes back before the end."""
    with EchoClient(address) as client:
        sent = frame(body)
        client.send(sent)
        client.socket.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.socket.recv(100):
            answer += piece
    assert answer in (sent, b"")
    return bool(answer)

"""Clients that go on while something is done to the daemon, and count what happens to them."""

import socket
import threading
from types import TracebackType
from typing import Self

from tests.boot.guest import Guest
from tests.system.daemon import EchoClient


class Callers:
    """Connects, has a frame echoed and closes, over and over, in a thread.

    Leaving the context ends it and demands that at least one call was made before and one after
    whatever was done meanwhile, and that every call was answered.

    Args:
        guest: where the daemon is.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._goes_on = True
        self._failed: list[str] = []
        self._made = threading.Condition()
        self.calls = 0
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        while self._goes_on:
            try:
                self._guest.echo(b"call %d" % self.calls)
            except (OSError, AssertionError) as error:
                self._failed.append(f"call {self.calls}: {error!r}")
            with self._made:
                self.calls += 1
                self._made.notify_all()

    def _wait_for_more(self, count: int) -> None:
        """Wait until so many more calls have ended."""
        with self._made:
            goal = self.calls + count
            assert self._made.wait_for(lambda: self.calls >= goal, 60)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait_for_more(3)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._wait_for_more(3)
        self._goes_on = False
        self._thread.join()
        print(f"{self.calls} calls, {len(self._failed)} failed")
        assert error is not None or not self._failed


def ends_cleanly(client: EchoClient) -> None:
    """Demand that an idle connection is ended by the daemon with a FIN, and not with a reset."""
    client.expect_end()
    client.socket.shutdown(socket.SHUT_WR)
    client.close()

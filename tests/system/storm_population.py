"""The clients of a storm as the harness sees them: a process that is asked for its totals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.system.daemon import PATIENCE_SECONDS

LONGS = 50
SHORTS_PER_SECOND = 25

ROOT = Path(__file__).resolve().parents[2]


def unmeasured() -> list[str]:
    """Return a command that runs another one without coverage, which would make it slow."""
    return ["env", *(f"--unset={name}" for name in os.environ if name.startswith("COVERAGE_"))]


class Population:
    """Runs `tests.system.storm_clients`.

    Args:
        seed: decides on what they send.
        port: of the TCP listener on 127.0.0.1.
        path: of the UNIX listener.
    """

    def __init__(self, seed: int, port: int, path: Path) -> None:
        arguments = (seed, port, path, LONGS, SHORTS_PER_SECOND)
        self._process = subprocess.Popen(
            [
                *unmeasured(),
                *(sys.executable, "-m", "tests.system.storm_clients"),
                *map(str, arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, what: str, **more: object) -> dict[str, Any]:
        """Send a request, and return the clients' totals."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the clients ended with status {self._process.wait(PATIENCE_SECONDS)}"
        totals: dict[str, Any] = json.loads(answer)
        return totals

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        status = self._process.wait(PATIENCE_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        assert kind is not None or status == 0

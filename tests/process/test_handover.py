"""What a program leaves to the one that replaces it: executed for real, and refused."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lpechod.process.documents import write_document
from lpechod.process.handover import FORMAT, Handover, hand_over, take_over
from lpechod.process.signals import HANDLED_SIGNALS
from tests.net.harness import descriptors

VARIABLE = "LPECHOD_HANDOVER"

SUCCESSOR = """\
import json, os, signal, sys
from dataclasses import asdict
from lpechod.process.handover import Handover, hand_over, take_over

handover = take_over(os.environ)
if handover is None:
    fds = [os.memfd_create("x") for _ in range(8)]
    hand_over(
        Handover(
            config={"server": {"workers": 3}},
            sockets=[
                {"address": "a", "sockets": [{"fd": fds[0]}, {"fd": fds[1]}]},
                {"address": "b", "sockets": [{"fd": fds[2]}]},
            ],
            segments=[fds[3]],
            credentials={"texts": {"/a": "s3cr3t"}, "exposed": []},
            workers=[{"pid": 1, "line": fds[4]}],
            restarts=7,
            notify_socket="@x",
            watchdog_s=1.5,
            keeps_descriptors=True,
            census=fds[5],
            bell=fds[6],
        ),
        lambda: os.kill(os.getpid(), signal.SIGHUP),
    )
inherited = [fd for fd in handover.descriptors() if not os.get_inheritable(fd)]
print(json.dumps({
    "pid": os.getpid(),
    "handover": asdict(handover),
    "closed on execve": len(inherited),
    "memfds": sum("memfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 30)
                  if os.path.lexists(f"/proc/self/fd/{fd}")),
    "told": "LPECHOD_HANDOVER" in os.environ,
    "pending": [number.name for number in signal.sigpending()],
    "arguments": sys.argv[1:],
}))
"""


@pytest.fixture(name="held")
def _held() -> Iterator[list[int]]:
    """Hold descriptors of the kinds that are handed over."""
    pair = socket.socketpair()
    named = [os.memfd_create(name) for name in ("segment", "census", "bell")]
    fds = [named[0], *(each.detach() for each in pair), *named[1:]]
    yield fds
    for fd in fds:
        os.close(fd)


def handover_of(held: list[int]) -> Handover:
    """Describe the descriptors as the supervisor does."""
    return Handover(
        config={},
        sockets=[{"address": "x", "sockets": [{"fd": held[2], "path": None}]}],
        segments=[held[0]],
        workers=[{"pid": 2, "segment": 0, "slot": 0, "line": held[1], "told": False}],
        census=held[3],
        bell=held[4],
    )


def document(**changes: object) -> dict[str, str]:
    """Return an environment that names a document."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "pid": os.getpid(),
        **asdict(Handover({}, [], [])),
        **changes,
    }
    return {VARIABLE: str(write_document(content)), "PATH": "/bin"}


def test_the_next_program_has_it_all(tmp_path: Path) -> None:
    """The same process goes on with all that was left to it, and with the signals held back."""
    script = tmp_path / "program.py"
    script.write_text(SUCCESSOR)
    with subprocess.Popen(
        [sys.executable, "-X", "dev", str(script), "--word", "two words"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        output, _ = process.communicate(timeout=30)
    said = json.loads(output)
    assert said["pid"] == process.pid
    handover = said["handover"]
    assert handover["config"] == {"server": {"workers": 3}}
    assert handover["credentials"] == {"texts": {"/a": "s3cr3t"}, "exposed": []}
    assert [len(each["sockets"]) for each in handover["sockets"]] == [2, 1]
    assert handover["workers"][0]["pid"] == 1
    assert handover["restarts"] == 7
    assert handover["notify_socket"] == "@x"
    assert handover["watchdog_s"] == 1.5
    assert handover["keeps_descriptors"] is True
    assert said["closed on execve"] == 7
    assert said["memfds"] == 7  # Neither the eighth, which nobody named, nor the document.
    assert not said["told"]
    assert said["pending"] == ["SIGHUP"]
    assert said["arguments"] == ["--word", "two words"]


def test_nothing_is_left_to_who_has_just_been_born() -> None:
    """Without the variable there is nothing to take over."""
    environ = {"PATH": "/bin"}
    assert take_over(environ) is None
    assert environ == {"PATH": "/bin"}


def test_the_document_is_read() -> None:
    """What the document says is what is taken over, and the variable is gone."""
    environ = document(config={"a": 1}, restarts=3, watchdog_s=None)
    assert take_over(environ) == Handover({"a": 1}, [], [], restarts=3)
    assert environ == {"PATH": "/bin"}


def test_secrets_are_not_shown() -> None:
    """What the files of the configuration hold is not in the text of a handover."""
    handover = Handover({}, [], [], credentials={"texts": {"/a": "s3cr3t"}, "exposed": []})
    assert "s3cr3t" not in f"{handover} {handover!r}"


@pytest.mark.parametrize("changes", [{"format": FORMAT + 1}, {"pid": 1}])
def test_a_document_for_others_is_refused(changes: dict[str, object]) -> None:
    """A document of another format, or for another process, is not taken over."""
    before = descriptors()
    with pytest.raises(ValueError, match="not meant for this program"):
        take_over(document(**changes))
    assert descriptors() == before


def test_a_document_with_more_in_it_is_refused() -> None:
    """What this program does not know is not passed over, since it may matter."""
    with pytest.raises(TypeError):
        take_over(document(surprise=1))


def test_a_failure_changes_nothing(
    held: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the program can't be executed no descriptor is left inheritable, nor a signal blocked."""
    program = tmp_path / "program"
    program.write_text("no program")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv(VARIABLE, raising=False)
    before = descriptors()
    calls = []

    def blocked() -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        calls.append(set(HANDLED_SIGNALS) <= mask)

    program.chmod(0o600)
    for error in (PermissionError, FileNotFoundError):
        with pytest.raises(error):
            hand_over(handover_of(held), blocked)
        program.unlink(missing_ok=True)

    assert calls == [True, True]
    assert not any(os.get_inheritable(fd) for fd in held)
    assert descriptors() == before
    assert VARIABLE not in os.environ
    assert not set(HANDLED_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_every_descriptor_is_named(held: list[int]) -> None:
    """Segments, census, bell, lines and listening sockets stay open, each once."""
    assert sorted(handover_of(held).descriptors()) == sorted(held)

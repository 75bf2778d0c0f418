"""What the supervisor leaves to itself when it replaces its code by that on disk (execve(2)).

The process id, the children and the descriptors stay; everything else is a new program. What that
needs to know is one document, whose descriptor is named in the environment. Signals stay blocked
from before the call until the new program can handle them: the kernel keeps them meanwhile, where
the default action of a SIGHUP would be the end of the daemon.

``FORMAT`` grows when the document changes in a way that an older or newer program can't read. A
rehearsal (`lpechod.process.rehearsal`) by the new program says so before anything is given up.
"""

import os
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lpechod.ops.credentials import Credentials
from lpechod.process.command import own_command
from lpechod.process.documents import read_document, write_document
from lpechod.process.signals import signals_blocked

FORMAT = 4

_VARIABLE = "LPECHOD_HANDOVER"


@dataclass(slots=True)
class Handover:
    """The document.

    Attributes:
        config: the configuration, as JSON values; what was checked is what runs.
        credentials: the contents of the files that it names (`Credentials.describe`). They are
            secrets: a memfd that only this process has is as good a place as its memory.
        sockets: the listening sockets (`lpechod.process.sockets.Bound.describe`).
        segments: descriptors of the shared memory, the latest first.
        workers: of each child the process id, the place of its segment in ``segments``, its slot,
            the descriptor of its line, whether it has been told to drain, and for how long it has
            been silent, in seconds.
        restarts: how many workers were started in place of ones that had died.
        reloaded_at: when the configuration before this one was loaded, in Unix time.
        notify_socket: the service manager's address.
        watchdog_s: what the service manager wants, in seconds.
        keeps_descriptors: whether it stores descriptors.
        unsent: what its queue had no room for: messages, each with a descriptor or None.
        census: descriptor of the census of clients, if there is one.
        bell: descriptor of the workers' bell; None: there will be a new one.
    """

    config: dict[str, Any]
    sockets: list[dict[str, Any]]
    segments: list[int]
    credentials: dict[str, Any] = field(
        default_factory=lambda: Credentials().describe(), repr=False
    )
    workers: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0
    reloaded_at: float | None = None
    notify_socket: str | None = None
    watchdog_s: float | None = None
    keeps_descriptors: bool = False
    unsent: list[tuple[str, int | None]] = field(default_factory=list)
    census: int | None = None
    bell: int | None = None

    def descriptors(self) -> Sequence[int]:
        """List the descriptors that have to stay open."""
        return [
            *self.segments,
            *(fd for fd in (self.census, self.bell) if fd is not None),
            *(each["line"] for each in self.workers),
            *(each["fd"] for bound in self.sockets for each in bound["sockets"]),
            *(fd for _, fd in self.unsent if fd is not None),
        ]


def hand_over(handover: Handover, blocked: Callable[[], None]) -> None:
    """Become the program that is on disk now; returns only by failing, with nothing changed.

    Args:
        handover: what to take along.
        blocked: called when no signal can arrive any more, to see to those that just have.

    Raises:
        OSError: it cannot be executed.
    """
    document = write_document({"format": FORMAT, "pid": os.getpid(), **asdict(handover)})
    descriptors = [document, *handover.descriptors()]
    command = own_command()
    with signals_blocked():
        blocked()
        try:
            for fd in descriptors:
                os.set_inheritable(fd, True)
            os.execve(command[0], command, {**os.environ, _VARIABLE: str(document)})  # noqa: S606
        finally:
            for fd in descriptors:
                os.set_inheritable(fd, False)
            os.close(document)


def take_over(environ: MutableMapping[str, str]) -> Handover | None:
    """Return what this process has left to itself, or None if it has just been born.

    Raises:
        OSError, ValueError, TypeError: the document cannot be read.
    """
    named = environ.pop(_VARIABLE, None)
    if named is None:
        return None
    document = read_document(int(named))
    if document.pop("format") != FORMAT or document.pop("pid") != os.getpid():
        raise ValueError("the handover is not meant for this program")
    handover = Handover(**document)
    for fd in handover.descriptors():
        os.set_inheritable(fd, False)
    return handover

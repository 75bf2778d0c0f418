"""A reload tried out beforehand, by a process of its own.

The supervisor runs its own command once more, with a variable in the environment that makes it a
rehearsal: the code that is on disk now reads the configuration and the files that this names, and
listens on the addresses that the supervisor does not hold yet. If that works, the sockets and what
has been read are sent back, and the reload can't fail on either any more; if not, whatever is wrong
stands on the rehearsal's standard error, and nothing has happened.

Checking in the supervisor's own process was rejected: it runs the old code, has the old modules in
memory, and would look up names and read files while its workers wait for their watchdog.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE
from lpechod.engine.wheel import Timer
from lpechod.net.address import Address, TcpAddress, parse_address
from lpechod.net.listener import ListenError
from lpechod.ops.census import Census
from lpechod.ops.config import Config
from lpechod.ops.credentials import Loaded, tls_contexts
from lpechod.ops.segment import Segment
from lpechod.process.command import own_command
from lpechod.process.documents import read_document, write_document
from lpechod.process.handover import FORMAT
from lpechod.process.signals import HANDLED_SIGNALS
from lpechod.process.sockets import Bound, bind, missing, wanted_by

TIMEOUT_SECONDS = 30.0
"""Longer than any start takes; a name server that does not answer is given up after 10 or so."""

_VARIABLE = "LPECHOD_REHEARSAL"
_CHANNEL = 3
_MAX_OUTPUT = 1 << 16
_MOST_DESCRIPTORS = 253
"""Of one message (SCM_MAX_FD, unix(7)): a document, and the sockets of an address, which may be a
name of several."""


class Rehearsal(Timer):
    """A rehearsal, as the supervisor sees it.

    Args:
        held: addresses that need not be bound.
        loop: where to wait.
        on_end: called once with what has been checked, or None, the sockets that were bound for it,
            and the problems, one line each. What has been checked is the ``config`` and the
            ``credentials`` of a `Handover`.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self,
        held: Sequence[str],
        loop: Loop,
        on_end: Callable[[dict[str, Any] | None, list[Bound], list[str]], None],
    ) -> None:
        super().__init__()
        self._loop = loop
        self._on_end = on_end
        self._checked: dict[str, Any] | None = None
        self._bound: list[Bound] = []
        self._output = b""
        self._fault = ""
        self._gone = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors, their_errors = os.pipe()
        try:
            self._send_request(held)
            self.pid = _spawn(theirs.fileno(), their_errors)
        except OSError:
            self._channel.close()
            os.close(self._errors)
            raise
        finally:
            theirs.close()
            os.close(their_errors)
        self._channel.setblocking(False)
        os.set_blocking(self._errors, False)
        self._watched: set[int] = set()
        try:
            for fd in (self._channel.fileno(), self._errors):
                loop.register(fd, self, READABLE)
                self._watched.add(fd)
        except OSError:
            self.kill()  # Whoever waits for children finds a stranger.
            self._close()
            raise
        loop.schedule(self, loop.now + TIMEOUT_SECONDS)

    def on_ready(self, _mask: int, _now: float) -> None:
        """Take what it sends, so that it need not wait for us."""
        self._receive()

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on."""
        raise error

    def on_deadline(self, _now: float) -> None:
        """Give up on a rehearsal that takes too long."""
        self._give_up(f"checking took more than {TIMEOUT_SECONDS:.0f} seconds")

    def kill(self) -> None:
        """End it; `ended` follows when it has been waited for."""
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, code: int) -> None:
        """Come to the result, now that the process has been waited for.

        Args:
            code: its exit status, or a signal's number, negated.
        """
        self._gone = True
        self._receive()
        self._close()
        problems = _problems(self._output.decode(errors="replace").splitlines())
        checked = self._checked
        if code != 0:
            checked = None
        if self._fault:
            problems.append(self._fault)
        elif checked is None and not problems:
            problems.append(f"the check ended with status {code} and no word")
        if checked is None:
            for bound in self._bound:
                bound.close()
            self._bound = []
        self._on_end(checked, self._bound, problems)

    def _give_up(self, fault: str) -> None:
        self._fault = fault
        if not self._gone:
            self.kill()

    def abandon(self) -> None:
        """Close the copies that fork(2) has made."""
        self._channel.close()
        os.close(self._errors)
        for bound in self._bound:
            for listener in bound.listeners:
                listener.keep_file()
            bound.close()

    def _close(self) -> None:
        self._loop.cancel(self)
        for fd in tuple(self._watched):
            self._unwatch(fd)
        self._channel.close()
        os.close(self._errors)

    def _unwatch(self, fd: int) -> None:
        # Its end of file stays readable until the process has been waited for.
        if fd in self._watched:
            self._watched.remove(fd)
            self._loop.unregister(fd)

    def _send_request(self, held: Sequence[str]) -> None:
        document = write_document({"format": FORMAT, "held": list(held)})
        socket.send_fds(self._channel, [b"request"], [document])
        os.close(document)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._channel.fileno() in self._watched:
                self._take_message()
        with contextlib.suppress(BlockingIOError):
            while self._errors in self._watched:
                output = os.read(self._errors, 4096)
                self._output = (self._output + output)[:_MAX_OUTPUT]
                if not output:
                    self._unwatch(self._errors)

    def _take_message(self) -> None:
        try:
            kind, fds, flags, _ = socket.recv_fds(self._channel, 64, _MOST_DESCRIPTORS)
        except ConnectionResetError:  # It has not read the request.
            kind, fds, flags = b"", [], 0
        if not kind:
            self._unwatch(self._channel.fileno())
            return
        if flags & socket.MSG_CTRUNC:
            # This process may have no more descriptors (EMFILE, of which only this tells, unix(7)).
            for fd in fds:
                os.close(fd)
            self._unwatch(self._channel.fileno())
            self._give_up("too few descriptors are left for its sockets; raise LimitNOFILE=")
            return
        document = read_document(fds[0])
        if kind == b"checked":
            self._checked = document
            return
        for described, fd in zip(document["sockets"], fds[1:], strict=True):
            os.set_inheritable(fd, False)
            described["fd"] = fd
        self._bound.append(Bound.restore(document))


def _problems(lines: list[str]) -> list[str]:
    """Reduce a traceback to what is wrong and where: one line of the log, and of STATUS."""
    if lines[:1] != ["Traceback (most recent call last):"]:
        return lines
    places = [line.strip() for line in lines if line.lstrip().startswith('File "')]
    return [f"{lines[-1]} ({places[-1]})" if places else lines[-1]]


def _spawn(channel: int, errors: int) -> int:
    command = own_command()
    return os.posix_spawn(
        command[0],
        command,
        {**os.environ, _VARIABLE: str(_CHANNEL)},
        # Errors first: the channel's place may be theirs.
        file_actions=[
            (os.POSIX_SPAWN_DUP2, errors, 1),
            (os.POSIX_SPAWN_DUP2, errors, 2),
            (os.POSIX_SPAWN_DUP2, channel, _CHANNEL),
        ],
        setsigmask=[],
        setsigdef=HANDLED_SIGNALS,
    )


def rehearsing(environ: MutableMapping[str, str]) -> int | None:
    """Return the channel to the supervisor if this process is a rehearsal."""
    channel = environ.pop(_VARIABLE, None)
    return None if channel is None else int(channel)


def rehearse(loaded: Loaded, descriptor: int) -> int:
    """Be a rehearsal: bind what is missing, and send it to the supervisor with what has been read.

    Args:
        loaded: the configuration and its files.
        descriptor: the channel.

    Returns:
        The exit status. Problems are on standard error, one line each.
    """
    with socket.socket(fileno=descriptor) as channel:
        _, fds, _, _ = socket.recv_fds(channel, 64, 1)
        request = read_document(fds[0])
        if request["format"] != FORMAT:
            return _refuse("this version can't take over from the running one; restart the daemon")
        config, credentials = loaded.config, loaded.credentials
        contexts = tls_contexts(config, credentials)
        wanted = wanted_by(config, contexts)
        # Beside a socket that stays, an overlapping one would be bound now, and at no start again.
        held = {parse_address(each) for each in request["held"]}
        staying = held & {each.address for each in wanted}
        ports = _ports(held - staying) - _ports(staying)
        try:
            opened = bind(missing(wanted, request["held"]), ports)
        except ListenError as error:
            return _refuse(*error.problems)
        for bound in opened:
            described = bound.describe()
            listening = [each["fd"] for each in described["sockets"]]
            _send(channel, b"bound", described, listening)
        try:
            _try_memory(config)
        except OSError as error:
            return _refuse(f"no shared memory for the new program: {error.strerror}")
        checked = {
            "config": config.model_dump(mode="json"),
            "credentials": credentials.describe(),
        }
        _send(channel, b"checked", checked, [])
        for bound in opened:
            for listener in bound.listeners:
                listener.keep_file()
    return 0


def _try_memory(config: Config) -> None:
    """Make what the new program may have to make, when there will be no way back.

    Raises:
        OSError: there is no room for it.
    """
    Segment.create().close()
    if config.limits.max_connections_per_ip:
        Census.create().close()


def _ports(addresses: Iterable[Address]) -> set[int]:
    return {each.port for each in addresses if isinstance(each, TcpAddress)}


def _send(channel: socket.socket, kind: bytes, document: dict[str, Any], fds: list[int]) -> None:
    fd = write_document(document)
    socket.send_fds(channel, [kind], [fd, *fds])
    os.close(fd)


def _refuse(*problems: str) -> int:
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return 1

"""The listening sockets of the daemon: where they come from, and where they go.

A socket that listens is never closed while a successor may need it: closing the last descriptor
resets every connection in its queue. So before anything is bound, it is looked for among what this
process has been given: by itself before its re-execution, by a socket unit, or by the service
manager's store, which keeps descriptors over a restart and a crash. Sockets are told apart by the
address that the configuration has for them; what they are used for does not matter.
"""

import os
import socket
import ssl
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lpechod.net.address import Address
from lpechod.net.entrance import EVERYBODY, OPEN_TO_ALL, Entrance
from lpechod.net.eventlog import EventLog
from lpechod.net.listener import (
    Listener,
    ListenerSettings,
    open_listeners,
    serves,
)
from lpechod.net.networks import AccessList
from lpechod.ops.config import Config, ListenConfig
from lpechod.ops.exporter import MAX_CLIENTS
from lpechod.ops.toml import KeyPath
from lpechod.process.systemd import Inherited, Notifier, descriptor_name

ECHO = "echo"
METRICS = "metrics"


@dataclass(slots=True, eq=False)
class Bound:
    """An address of the configuration and the sockets that listen on it.

    A name may stand for several. ``foreign``: they belong to a socket unit, which has decided on
    their options and on their life.
    """

    address: str
    listeners: list[Listener] = field(default_factory=list)
    foreign: bool = False
    purpose: str = ECHO

    def describe(self) -> dict[str, Any]:
        """Return what `restore` needs; the descriptors' numbers stay the same over execve(2)."""
        return {
            "address": self.address,
            "purpose": self.purpose,
            "foreign": self.foreign,
            "sockets": [
                {"fd": listener.socket.fileno(), "path": listener.path, "inode": listener.inode}
                for listener in self.listeners
            ],
        }

    @classmethod
    def restore(cls, described: dict[str, Any]) -> "Bound":
        """Take over what another process, or this one before its re-execution, has described.

        Raises:
            OSError: a descriptor is not open.
        """
        listeners = [
            Listener(socket.socket(fileno=each["fd"]), each["path"], each.get("inode"))
            for each in described["sockets"]
        ]
        return cls(
            described["address"], listeners, described["foreign"], described.get("purpose", ECHO)
        )

    def close(self) -> None:
        """Close the sockets and remove their files."""
        for listener in self.listeners:
            listener.close()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the configuration asks for: an address, its backlog, and what to use it for."""

    address: Address
    backlog: int
    purpose: str
    entrance: Entrance = OPEN_TO_ALL


def wanted_by(config: Config, contexts: Mapping[KeyPath, ssl.SSLContext]) -> list[Wanted]:
    """List every address of a configuration.

    Args:
        config: the configuration.
        contexts: those of its tables with TLS, of which none may be missing: a socket that should
            speak TLS must not serve without (`lpechod.ops.credentials.tls_contexts`).
    """
    wanted = []
    for index, table in enumerate(config.listen):
        tls = None if table.tls is None else contexts["listen", index]
        wanted.append(Wanted(table.address, table.backlog, ECHO, _entrance(table, tls)))
    metrics = config.metrics
    if metrics.address is not None:
        entrance = OPEN_TO_ALL if metrics.tls is None else Entrance(tls=contexts["metrics",])
        wanted.append(Wanted(metrics.address, MAX_CLIENTS, METRICS, entrance))
    return wanted


def _entrance(table: ListenConfig, tls: ssl.SSLContext | None) -> Entrance:
    listed = bool(table.allow or table.deny)
    return Entrance(
        access=AccessList(table.allow, table.deny) if listed else EVERYBODY,
        proxies=AccessList(table.trusted_proxies, ()) if table.proxy_protocol else None,
        tls=tls,
    )


def missing(wanted: Iterable[Wanted], held: Iterable[str]) -> list[Wanted]:
    """List what is wanted but not held.

    Args:
        wanted: what the configuration asks for; the same address may come twice if the kernel
            chooses the port.
        held: addresses of sockets that are there.
    """
    left = Counter(held)
    lacking = []
    for each in wanted:
        left[str(each.address)] -= 1
        if left[str(each.address)] < 0:
            lacking.append(each)
    return lacking


def bind(wanted: Sequence[Wanted], shared_ports: Collection[int] = ()) -> list[Bound]:
    """Listen on every address.

    Args:
        wanted: the addresses.
        shared_ports: ports on which somebody listens who has called `Sockets.share_ports`.

    Raises:
        ListenError: at least one cannot be listened on; all others have been closed again.
    """
    settings = [ListenerSettings(each.address, each.backlog) for each in wanted]
    opened = open_listeners(settings, shared_ports)
    return [
        Bound(str(each.address), listeners, purpose=each.purpose)
        for each, listeners in zip(wanted, opened, strict=True)
    ]


class Sockets:
    """All listening sockets of the supervisor.

    Args:
        bound: those that are there already.
    """

    def __init__(self, bound: Iterable[Bound] = ()) -> None:
        self.bound = list(bound)
        self.gone: list[Bound] = []
        """Those that `assign` has found nobody to want."""
        self.coming: list[Bound] = []
        """Those that a rehearsal has bound for the next program."""

    def inherit(
        self,
        inherited: Iterable[Inherited],
        wanted: Sequence[Wanted],
        notifier: Notifier,
        log: EventLog,
    ) -> None:
        """Take from the service manager's descriptors those that serve an address.

        Args:
            inherited: what it has passed. The order is undefined if several units contribute, and
                the store comes last (sd_listen_fds(3)), so only address and name count.
            wanted: what the configuration asks for.
            notifier: told which descriptors the manager need not keep any longer.
            log: gets a warning for each descriptor that nothing asks for.
        """
        for each in inherited:
            problem = self._inherit(each, wanted)
            if problem is not None:
                log.warning("inherited_socket_unused", name=each.name, problem=problem)
                notifier.remove(each.name)

    def _inherit(self, inherited: Inherited, wanted: Sequence[Wanted]) -> str | None:
        """Take a descriptor if it serves an address; otherwise close it, and say why."""
        try:
            listening = socket.socket(fileno=inherited.fd)
        except OSError:  # A file (OpenFile=, systemd.service(5)), or somebody else's memory.
            os.close(inherited.fd)
            return "it is no socket"
        for want in wanted:
            if serves(listening, want.address):
                self._add(want, listening, inherited.name)
                return None
        address = listening.getsockname()
        listening.close()
        return f"no address of the configuration matches {address}"

    def _add(self, taker: Wanted, listening: socket.socket, name: str) -> None:
        listener = Listener(listening)
        foreign = name != descriptor_name(listener.name)
        if taker.address.kind == "unix" and not foreign:
            listener = Listener(listener.socket, taker.address.path)
        address = str(taker.address)
        for bound in self.bound:
            if bound.address == address:
                bound.listeners.append(listener)
                return
        self.bound.append(Bound(address, [listener], foreign, taker.purpose))

    def bind_missing(self, wanted: Sequence[Wanted]) -> None:
        """Listen on every address that is wanted and not held.

        Raises:
            ListenError: at least one cannot be listened on; nothing has changed.
        """
        self.bound += bind(missing(wanted, self.addresses))

    @property
    def all(self) -> list[Bound]:
        """Everything that is held."""
        return self.bound + self.gone + self.coming

    @property
    def addresses(self) -> list[str]:
        """The addresses that are held."""
        return [bound.address for bound in self.all]

    def assign(self, wanted: Iterable[Wanted]) -> None:
        """Settle what each socket is for and its backlog; sockets that nobody wants go to ``gone``.

        Args:
            wanted: what the configuration asks for, all of which is held.
        """
        kept = []
        for want in wanted:
            bound = next(each for each in self.bound if each.address == str(want.address))
            self.bound.remove(bound)
            kept.append(bound)
            bound.purpose = want.purpose
            for listener in bound.listeners:
                listener.entrance = want.entrance
            if not bound.foreign:
                for listener in bound.listeners:
                    listener.listen(want.backlog)
        self.gone, self.bound = self.bound, kept

    def listeners(self, purpose: str) -> list[Listener]:
        """Return the sockets for echo clients, or for the exporter's."""
        return [
            listener
            for bound in self.bound
            if bound.purpose == purpose
            for listener in bound.listeners
        ]

    def store(self, notifier: Notifier) -> None:
        """Have the service manager keep the sockets over a restart.

        It knows what it has already (sd_notify(3)). Those of a socket unit it keeps anyway.
        """
        for bound in self.bound:
            for listener in bound.listeners if not bound.foreign else ():
                notifier.store(descriptor_name(listener.name), listener.socket.fileno())

    def withdraw_gone(self) -> None:
        """Have new clients go elsewhere than to the sockets that nobody wants any more.

        Not those of a socket unit, which goes on with them.
        """
        for bound in self.gone:
            if not bound.foreign:
                for listener in bound.listeners:
                    listener.withdraw()

    def close_gone(self, notifier: Notifier) -> list[str]:
        """Close the sockets that nobody wants, here and in the service manager's store.

        Returns:
            Their names.
        """
        names = []
        for bound in self.gone:
            for listener in bound.listeners:
                names.append(listener.name)
                if not bound.foreign:
                    notifier.remove(descriptor_name(listener.name))
            bound.close()
        self.gone = []
        return names

    def share_ports(self, shared: bool) -> None:
        """Let a rehearsal bind addresses that overlap with these, or not."""
        for bound in self.all:
            for listener in bound.listeners:
                listener.share_port(shared)

    def drop_coming(self) -> None:
        """Close the sockets of a reload that does not happen."""
        for bound in self.coming:
            bound.close()
        self.coming = []

    def keep_files(self) -> None:
        """Leave the files of UNIX sockets in place: somebody else has a copy of each socket."""
        for bound in self.all:
            for listener in bound.listeners:
                listener.keep_file()

    def close(self, purpose: str) -> None:
        """Close the sockets of a purpose."""
        for bound in self.all:
            if bound.purpose == purpose:
                bound.close()

    def abandon(self) -> None:
        """Close the copies that fork(2) has made, but for those that a worker accepts from."""
        self.keep_files()
        self.close(METRICS)
        for bound in self.gone + self.coming:
            bound.close()

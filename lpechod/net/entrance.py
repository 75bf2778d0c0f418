"""Whom a listener lets in, and by whose word."""

import ssl
from dataclasses import dataclass, field

from lpechod.net.networks import AccessList

EVERYBODY = AccessList((), ())


@dataclass(frozen=True, slots=True)
class Entrance:
    """What a listener demands of its clients.

    Attributes:
        access: who may connect.
        proxies: who may connect to speak for clients, each with a PROXY header; then `access` is
            about those clients. None: clients connect by themselves.
        tls: what to do a TLS handshake by, after the PROXY header if there is one. None: no TLS.
        is_plain: whether connections begin with their first frame.
        is_open: whether anybody may connect.
    """

    access: AccessList = EVERYBODY
    proxies: AccessList | None = None
    tls: ssl.SSLContext | None = None
    is_plain: bool = field(init=False)
    is_open: bool = field(init=False)

    def __post_init__(self) -> None:
        direct = self.proxies is None
        # It is frozen, and these are asked for each connection.
        object.__setattr__(self, "is_plain", direct and self.tls is None)
        object.__setattr__(self, "is_open", direct and not self.access)


OPEN_TO_ALL = Entrance()

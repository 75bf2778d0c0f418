"""Where to listen, as a value: the text an operator writes and nothing that touches a socket.

One syntax serves every address of the configuration, so it is parsed, compared and printed here.
Two addresses are equal exactly when their canonical texts are. Names are only checked for their
form; looking them up belongs to the listener, at start, where it may block.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

# sockaddr_un.sun_path has 108 bytes on Linux, the last one a NUL: unix(7).
_MAX_PATH_BYTES = 107
# The longest host name is 253 characters (RFC 1035 section 2.3.4); a scope id and a port add to it.
_MAX_TEXT = 300

# RFC 1123 section 2.1, and the underscore that container networks put into names.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP endpoint.

    Attributes:
        host: An IPv4 or IPv6 literal without brackets, a host name in lower case, or None for every
            interface of the machine.
        port: 0 to 65535; 0 lets the kernel choose.

    """

    kind: ClassVar[Literal["tcp"]] = "tcp"
    host: str | None
    port: int

    def __str__(self) -> str:
        if self.host is None:
            return f":{self.port}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A stream socket in the file system.

    Attributes:
        path: An absolute path of at most 107 bytes (unix(7)).

    """

    kind: ClassVar[Literal["unix"]] = "unix"
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address: TypeAlias = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Parse ``host:port``, ``[v6]:port``, ``:port`` or ``unix:/path``.

    Args:
        text: The address as an operator writes it.

    Returns:
        The address with its host in canonical form (RFC 5952 for IPv6, lower case for names).

    Raises:
        ValueError: The text is no address; the message says what to write instead.

    """
    if not text:
        raise ValueError(
            'an address is empty; write "host:port", "[v6]:port", ":port" or "unix:/path"'
        )
    if not text.isprintable() or " " in text:
        raise ValueError("an address holds no spaces or control characters")
    if len(text) > _MAX_TEXT:
        raise ValueError(f"an address has at most {_MAX_TEXT} characters, found {len(text)}")
    if text.startswith("unix:"):
        return _parse_unix(text.removeprefix("unix:"))
    host, port = _split(text)
    return TcpAddress(_parse_host(host), _parse_port(port))


def _parse_unix(path: str) -> UnixAddress:
    """Check the path of a UNIX socket; abstract names are left out, they carry no permissions."""
    if not path.startswith("/"):
        raise ValueError(f'a UNIX socket needs an absolute path, "unix:/path", found "{path}"')
    size = len(os.fsencode(path))
    if size > _MAX_PATH_BYTES:
        raise ValueError(
            f"the path of a UNIX socket has at most {_MAX_PATH_BYTES} bytes, found {size}"
        )
    return UnixAddress(path)


def _split(text: str) -> tuple[str, str]:
    """Separate host and port, and guess what was meant when that can't be done."""
    if text.isdecimal():
        raise ValueError(f'"{text}" has no colon; write ":{text}" for every interface')
    if text.startswith("["):
        literal, bracket, port = text.partition("]")
        if not bracket:
            raise ValueError(f'"{text}" has an opening bracket but no closing one')
        if not port.startswith(":"):
            raise ValueError(f'"{text}" has no port; write "{literal}]:PORT"')
        return text[: len(literal) + 1], port[1:]
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f'"{text}" has no port; write "{text}:PORT"')
    if ":" in host:
        raise ValueError(f'an IPv6 address needs brackets; write "{_bracketed(text)}"')
    return host, port


def _bracketed(text: str) -> str:
    """Return the likeliest reading of an IPv6 address that was written without brackets."""
    host, _, port = text.rpartition(":")
    if _is_ipv6(host) and port.isdecimal():
        return f"[{host}]:{port}"
    return f"[{text}]:PORT" if _is_ipv6(text) else "[v6]:port"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _parse_host(host: str) -> str | None:
    """Return the canonical form of a host, None for every interface."""
    if not host:
        return None
    if host == "*":
        raise ValueError('"*" is no host; write ":PORT" for every interface')
    if host.startswith("["):
        literal = host[1:-1]
        if not _is_ipv6(literal):
            raise ValueError(f'"{literal}" in brackets is not an IPv6 address')
        return str(ipaddress.IPv6Address(literal))
    return _parse_name(host.lower())


def _parse_name(name: str) -> str:
    """Return an IPv4 address or a host name that has a form the resolver can know."""
    labels = name.removesuffix(".").split(".")
    # A top-level domain is never all digits (RFC 3696 section 2): this is a mistyped address.
    if labels[-1].isdecimal():
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError as error:
            raise ValueError(f'"{name}" is not an IPv4 address') from error
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        hint = "" if name.isascii() else "; names in other scripts have an xn-- form"
        raise ValueError(f'"{name}" is not a host name{hint}')
    return name


def _parse_port(port: str) -> int:
    if not (port.isascii() and port.isdecimal()):
        raise ValueError(f'a port is a number from 0 to 65535, found "{port}"')
    number = int(port)
    if number > 65535:
        raise ValueError(f"a port is a number from 0 to 65535, found {port}")
    return number

"""The files that a configuration names: certificates, keys, and the token for the metrics.

They are read once, by whoever reads the configuration, and go with it from there. So a reload that
has been found good can't fail any more because such a file has changed or gone meanwhile, and what
was checked is what is used. Their contents are secrets: they are in no message and in no ``repr``.
"""

import os
import re
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lpechod.net.address import Address
from lpechod.net.tlscontext import TlsMaterialError, check_certificates, check_key, server_context
from lpechod.ops.config import Config, ConfigError, Problem, locate_config
from lpechod.ops.config_tables import TlsConfig
from lpechod.ops.toml import KeyPath, format_path, nearest_line

MAX_FILE_BYTES: Final = 1 << 20
"""A thousand certificates fit in; who names a device or a log instead is told so."""

METRICS: Final[KeyPath] = ("metrics",)
TOKEN: Final[KeyPath] = ("metrics", "bearer_token_file")

# b64token of RFC 6750, 2.1: what can stand behind "Bearer" in a header.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """The contents of the files.

    Attributes:
        texts: by path, in Latin-1, which keeps each byte.
        exposed: paths of those that everybody may read.
    """

    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    exposed: frozenset[str] = frozenset()

    def describe(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values."""
        return {"texts": dict(self.texts), "exposed": sorted(self.exposed)}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> "Credentials":
        """Take over what another process, or this one before its re-execution, has described."""
        return cls(described["texts"], frozenset(described["exposed"]))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration with the files that it names, and where its keys stand."""

    config: Config
    credentials: Credentials
    lines: Mapping[KeyPath, int]


def load(path: str | Path) -> Loaded:
    """Read and check a configuration file, and every file that it names.

    Args:
        path: the TOML file; it is named in every message as it is given here.

    Raises:
        ConfigError: one of the files can't be read or can't be used, with every reason.
    """
    config, lines = locate_config(path)
    texts: dict[str, str] = {}
    exposed: set[str] = set()
    found: list[tuple[KeyPath, str]] = []
    for key, name, check in _files(config):
        try:
            if name not in texts:
                texts[name], is_exposed = _read(name)
                exposed |= {name} if is_exposed else set()
            check(texts[name])
        except OSError as error:
            found.append((key, f"{name} can't be read: {error.strerror}"))
        except ValueError as error:
            found.append((key, f"{name}: {error}"))
    bad = {key[:-1] for key, _ in found}
    for key, _, table in tls_tables(config):
        if (*key, "tls") not in bad:
            try:
                _context(table, texts)
            except TlsMaterialError as error:
                found.append(((*key, "tls", error.part), f"{getattr(table, error.part)}: {error}"))
    if found:
        raise ConfigError(
            Problem(str(path), nearest_line(lines, key), format_path(key), message)
            for key, message in found
        )
    return Loaded(config, Credentials(texts, frozenset(exposed)), lines)


def tls_tables(config: Config) -> Iterator[tuple[KeyPath, Address, TlsConfig]]:
    """Yield where a configuration has TLS: the path of the table around it, its address, and it."""
    for index, table in enumerate(config.listen):
        if table.tls is not None:
            yield ("listen", index), table.address, table.tls
    metrics = config.metrics
    if metrics.tls is not None and metrics.address is not None:
        yield METRICS, metrics.address, metrics.tls


def tls_contexts(config: Config, credentials: Credentials) -> dict[KeyPath, ssl.SSLContext]:
    """Make a context for each place where a configuration has TLS, see `tls_tables`.

    Args:
        config: the configuration.
        credentials: the contents of its files, as `load` has found them good.
    """
    return {key: _context(table, credentials.texts) for key, _, table in tls_tables(config)}


def metrics_token(config: Config, credentials: Credentials) -> str | None:
    """Return the token that a scraper has to send, None if it needs none."""
    name = _token_file(config)
    return None if name is None else credentials.texts[name].strip()


def _files(config: Config) -> Iterator[tuple[KeyPath, str, Callable[[str], None]]]:
    """Yield each key that names a file, its path, and what makes sure of what is in it."""
    for key, _, table in tls_tables(config):
        yield (*key, "tls", "certificate"), table.certificate, check_certificates
        yield (*key, "tls", "key"), table.key, check_key
        if table.client_ca is not None:
            yield (*key, "tls", "client_ca"), table.client_ca, check_certificates
    name = _token_file(config)
    if name is not None:
        yield TOKEN, name, _check_token


def _token_file(config: Config) -> str | None:
    return None if config.metrics.address is None else config.metrics.bearer_token_file


def _check_token(text: str) -> None:
    token = text.strip()
    if not token:
        raise ValueError("the file is empty; write the token into it")
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token is one word of letters, digits and -._~+/ (RFC 6750)")


def _context(table: TlsConfig, texts: Mapping[str, str]) -> ssl.SSLContext:
    authorities = None if table.client_ca is None else texts[table.client_ca]
    return server_context(
        texts[table.certificate], texts[table.key], authorities, table.min_version
    )


def _read(name: str) -> tuple[str, bool]:
    """Return the text of a file, and whether everybody may read it.

    Raises:
        OSError: it can't be read.
        ValueError: it is no file, or too large.
    """
    # Without O_NONBLOCK the open(2) of a FIFO would wait for somebody who writes to it.
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("larger than 1 MiB, which no such file is")
    return data.decode("latin-1"), bool(status.st_mode & stat.S_IROTH)

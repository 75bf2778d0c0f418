"""Certificates for tests, made when they are needed: no key lies in the repository."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import trustme


@cache
def authority() -> trustme.CA:
    """Return the authority that issues them."""
    return trustme.CA()


@dataclass(frozen=True, slots=True)
class Issued:
    """The files of a certificate."""

    certificate: Path
    key: Path
    ca: Path

    def table(self, *more: str) -> str:
        """Return the value of ``tls`` in a configuration."""
        return f"{{ {', '.join((*self.lines().splitlines(), *more))} }}"

    def lines(self) -> str:
        """Return the keys of ``tls`` for under a header."""
        return f'certificate = "{self.certificate}"\nkey = "{self.key}"\n'


def issue(
    directory: Path, name: str = "tls", *, before: float = -90.0, after: float = 90.0
) -> Issued:
    """Issue a certificate for localhost, in files that only their owner can read.

    Args:
        directory: for the files.
        name: of the files, without what tells them apart.
        before: from when it is valid, in days from now.
        after: until when.
    """
    now = datetime.now(UTC)
    made = authority().issue_cert(
        "localhost",
        "127.0.0.1",
        not_before=now + timedelta(before),
        not_after=now + timedelta(after),
    )
    issued = Issued(*(directory / f"{name}.{kind}" for kind in ("pem", "key", "ca")))
    for path, content in (
        (issued.certificate, b"".join(each.bytes() for each in made.cert_chain_pems)),
        (issued.key, made.private_key_pem.bytes()),
        (issued.ca, authority().cert_pem.bytes()),
    ):
        path.touch(0o600)
        path.write_bytes(content)
    return issued

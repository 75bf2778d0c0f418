"""What is no mistake of a configuration, but will be trouble: dates, and files open to everybody.

A certificate that has expired can still be presented, and not every client looks; to refuse it
would end a service that half works. So these are warnings: of ``lpechod check``, and in the log.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from lpechod.net.certificate import Validity, certificates, validity
from lpechod.ops.config import Config
from lpechod.ops.credentials import TOKEN, Credentials, tls_tables
from lpechod.ops.toml import KeyPath

_LATE: Final = 6
"""Who renews certificates by program does so with a third of their life left, or for short ones a
half; with less than a sixth it has failed for some time: 15 days of 90."""


@dataclass(frozen=True, slots=True)
class Concern:
    """One thing to look after.

    Attributes:
        key: the key that names the file.
        event: its name in the log.
        fields: what the log has besides.
        text: the same for a person.
    """

    key: KeyPath
    event: str
    fields: Mapping[str, str]
    text: str


def certificate_expiry(config: Config, credentials: Credentials) -> dict[str, float]:
    """Tell for each address with TLS when the first certificate of its chain expires.

    Returns:
        Unix time by address, as it is in the configuration; the earliest if that comes twice.
    """
    expiry: dict[str, float] = {}
    for _, address, table in tls_tables(config):
        ends = min(each.not_after for each in _chain(credentials.texts[table.certificate]))
        expiry[str(address)] = min(ends, expiry.get(str(address), ends))
    return expiry


def concerns(config: Config, credentials: Credentials, now: float) -> list[Concern]:
    """List what should be looked after, for each file once.

    Args:
        config: the configuration.
        credentials: the contents of its files.
        now: the Unix time.
    """
    found: dict[tuple[str, str], Concern] = {}
    for concern in _all(config, credentials, now):
        found.setdefault((concern.event, concern.fields["path"]), concern)
    return list(found.values())


def _all(config: Config, credentials: Credentials, now: float) -> Iterator[Concern]:
    for key, _, table in tls_tables(config):
        pem = credentials.texts[table.certificate]
        yield from _dates((*key, "tls", "certificate"), table.certificate, pem, now)
        if table.client_ca is not None:
            authorities = credentials.texts[table.client_ca]
            yield from _dates((*key, "tls", "client_ca"), table.client_ca, authorities, now)
        if table.key in credentials.exposed:
            yield _exposed((*key, "tls", "key"), "private_key_exposed", table.key)
    token = config.metrics.bearer_token_file
    if token is not None and token in credentials.exposed:
        yield _exposed(TOKEN, "token_exposed", token)


def _dates(key: KeyPath, path: str, pem: str, now: float) -> Iterator[Concern]:
    for each in _chain(pem):
        starts, ends = _date(each.not_before), _date(each.not_after)
        left = (each.not_after - now) / (each.not_after - each.not_before or 1)
        if now > each.not_after:
            event, text = "certificate_expired", f"expired on {ends}"
        elif now < each.not_before:
            event, text = "certificate_not_yet_valid", f"is not valid before {starts}"
        elif left * _LATE < 1:
            event, text = "certificate_expires", f"expires on {ends}"
        else:
            continue
        fields = {"path": path, "not_before": starts, "not_after": ends}
        yield Concern(key, event, fields, f"a certificate in {path} {text}; renew it")


def _exposed(key: KeyPath, event: str, path: str) -> Concern:
    hint = f"chmod o-r {path}"
    return Concern(
        key, event, {"path": path, "hint": hint}, f"{path} is readable by everybody; chmod o-r"
    )


def _chain(pem: str) -> list[Validity]:
    return [validity(der) for der in certificates(pem)]


def _date(moment: float) -> str:
    # Not fromtimestamp: on some platforms that goes no farther than their time_t.
    return (datetime.fromtimestamp(0, UTC) + timedelta(seconds=moment)).strftime(
        "%Y-%m-%d %H:%M UTC"
    )

"""Warnings: certificates that have expired or soon will, and secrets that everybody can read."""

import time
from pathlib import Path

import pytest

from lpechod.net.certificate import certificates, validity
from lpechod.ops.credentials import Credentials, load
from lpechod.ops.validity import Concern, certificate_expiry, concerns
from tests.certificates import Issued, issue

DAY = 86400


def configuration(issued: Issued, token: Path | None = None) -> str:
    """Write a configuration with a certificate in two places, and maybe a token."""
    more = f'bearer_token_file = "{token}"\n' if token else ""
    return (
        f'[[listen]]\naddress = ":1"\ntls = {issued.table()}\n'
        f'[metrics]\naddress = "unix:/m"\n{more}tls = {issued.table()}\n'
    )


def found(tmp_path: Path, issued: Issued, now: float | None = None) -> list[Concern]:
    """Return what is to be looked after."""
    path = tmp_path / "config.toml"
    path.write_text(configuration(issued))
    loaded = load(path)
    return concerns(loaded.config, loaded.credentials, time.time() if now is None else now)


def test_nothing_to_look_after(tmp_path: Path) -> None:
    """A certificate in the middle of its life, whose key is private, is no concern."""
    assert found(tmp_path, issue(tmp_path)) == []


@pytest.mark.parametrize(
    ("before", "after", "event", "words"),
    [
        (-90, -1, "certificate_expired", "expired on"),
        (1, 90, "certificate_not_yet_valid", "is not valid before"),
        (-80, 10, "certificate_expires", "expires on"),
    ],
)
def test_a_date_that_matters(
    tmp_path: Path, before: float, after: float, event: str, words: str
) -> None:
    """Of a certificate with a bad date, each file is named once, with the date."""
    issued = issue(tmp_path, before=before, after=after)
    (concern,) = found(tmp_path, issued)
    assert (concern.key, concern.event) == (("listen", 0, "tls", "certificate"), event)
    dates = validity(certificates(issued.certificate.read_text())[0])
    starts, ends = (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(each))
        for each in (dates.not_before, dates.not_after)
    )
    assert concern.fields == {
        "path": str(issued.certificate),
        "not_before": starts,
        "not_after": ends,
    }
    date = starts if event == "certificate_not_yet_valid" else ends
    assert concern.text == f"a certificate in {issued.certificate} {words} {date}; renew it"


def test_the_moments_at_which_that_changes(tmp_path: Path) -> None:
    """The warning comes with a sixth of the life left, and both dates are of the life."""
    issued = issue(tmp_path)
    dates = validity(certificates(issued.certificate.read_text())[0])
    late = dates.not_after - (dates.not_after - dates.not_before) / 6
    events = {
        moment: [concern.event for concern in found(tmp_path, issued, moment)]
        for moment in (
            dates.not_before - 1,
            dates.not_before,
            late - 1,
            late + 1,
            dates.not_after,
            dates.not_after + 1,
        )
    }
    assert [*events.values()] == [
        ["certificate_not_yet_valid"],
        [],
        [],
        ["certificate_expires"],
        ["certificate_expires"],
        ["certificate_expired"],
    ]


def test_an_intermediate_certificate(tmp_path: Path) -> None:
    """Of a chain, each certificate counts: one that has expired makes the others useless."""
    issued, old = issue(tmp_path), issue(tmp_path, "old", after=-10)
    issued.certificate.write_text(issued.certificate.read_text() + old.certificate.read_text())
    (concern,) = found(tmp_path, issued)
    assert concern.event == "certificate_expired"
    assert concern.fields["path"] == str(issued.certificate)


def test_a_certificate_that_ends_as_it_begins(tmp_path: Path) -> None:
    """A life of no length is no division by zero."""
    issued = issue(tmp_path, before=0.0, after=0.0)
    moment = validity(certificates(issued.certificate.read_text())[0]).not_after
    assert [each.event for each in found(tmp_path, issued, moment)] == ["certificate_expires"]


def test_secrets_that_everybody_can_read(tmp_path: Path) -> None:
    """A key or a token that everybody may read is named with what to do about it."""
    issued, token = issue(tmp_path), tmp_path / "token"
    token.write_text("x")
    for each in (issued.key, token, issued.certificate):
        each.chmod(0o644)
    path = tmp_path / "config.toml"
    path.write_text(configuration(issued, token))
    loaded = load(path)
    key, word = concerns(loaded.config, loaded.credentials, time.time())
    assert (key.key, key.event) == (("listen", 0, "tls", "key"), "private_key_exposed")
    assert key.fields == {"path": str(issued.key), "hint": f"chmod o-r {issued.key}"}
    assert key.text == f"{issued.key} is readable by everybody; chmod o-r"
    assert (word.key, word.event) == (("metrics", "bearer_token_file"), "token_exposed")
    assert word.text == f"{token} is readable by everybody; chmod o-r"


def test_when_the_first_certificate_of_a_chain_expires(tmp_path: Path) -> None:
    """For each address it is the earliest end of its chain, in Unix time."""
    issued, old = issue(tmp_path), issue(tmp_path, "old", after=10)
    path = tmp_path / "config.toml"
    for more, expected in (("", issued), (old.certificate.read_text(), old)):
        issued.certificate.write_text(issued.certificate.read_text() + more)
        path.write_text(configuration(issued))
        loaded = load(path)
        ends = validity(certificates(expected.certificate.read_text())[0]).not_after
        expiry = certificate_expiry(loaded.config, loaded.credentials)
        assert expiry == {":1": ends, "unix:/m": ends}


def test_the_same_address_twice(tmp_path: Path) -> None:
    """Two listeners with a port of the kernel's choice have one series, of the earlier end."""
    late, soon = issue(tmp_path, "late", after=80), issue(tmp_path, "soon", after=70)
    path = tmp_path / "config.toml"
    ends = validity(certificates(soon.certificate.read_text())[0]).not_after
    for tables in ((late, soon), (soon, late)):
        path.write_text(
            "".join(f'[[listen]]\naddress = "[::]:0"\ntls = {each.table()}\n' for each in tables)
        )
        loaded = load(path)
        assert certificate_expiry(loaded.config, loaded.credentials) == {"[::]:0": ends}


def test_without_tls_there_is_nothing(tmp_path: Path) -> None:
    """A configuration without files has no dates and no concerns."""
    path = tmp_path / "config.toml"
    path.write_text("")
    config = load(path).config
    assert certificate_expiry(config, Credentials()) == {}
    assert concerns(config, Credentials(), 0.0) == []


def test_an_authority_that_has_expired(tmp_path: Path) -> None:
    """Of the authorities of client certificates, one that has expired is named, too."""
    ours, theirs = issue(tmp_path), tmp_path / "theirs"
    theirs.mkdir()
    old = issue(theirs, before=-90, after=-1)
    path = tmp_path / "config.toml"
    table = ours.table().replace("}", f', client_ca = "{old.certificate}" }}')
    path.write_text(f'[[listen]]\naddress = ":1"\ntls = {table}\n')
    loaded = load(path)
    (concern,) = concerns(loaded.config, loaded.credentials, time.time())
    assert concern.key == ("listen", 0, "tls", "client_ca")
    assert concern.event == "certificate_expired"

"""The files that a configuration names: read once, complained of all at once, and kept secret."""

import json
import os
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from lpechod.ops.config import Config, ConfigError, load_config
from lpechod.ops.credentials import (
    MAX_FILE_BYTES,
    Credentials,
    load,
    metrics_token,
    tls_contexts,
)
from tests.certificates import Issued, issue
from tests.net.harness import descriptors


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


@pytest.fixture(name="issued")
def _issued(tmp_path: Path) -> Issued:
    return issue(tmp_path)


def listening(*tables: str, metrics: str = "") -> str:
    """Write a configuration with these values of ``tls``, each on the third line of its table."""
    listen = (
        f'[[listen]]\naddress = ":{port}"\ntls = {table}\n' for port, table in enumerate(tables, 1)
    )
    return f"{''.join(listen)}[metrics]\n{metrics}\n"


def problems(path: Path, text: str) -> list[str]:
    """Return the problems of a text, without the name of the file; nothing may be left open."""
    path.write_text(text)
    load_config(path)
    before = descriptors()
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert descriptors() == before
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_what_is_named_is_read(path: Path, issued: Issued, tmp_path: Path) -> None:
    """Each file is read as it is, and makes the contexts and the token."""
    token = tmp_path / "token"
    token.write_text("  s3cr3t=\n\n")
    token.chmod(0o600)
    authorities = f'client_ca = "{issued.ca}"'
    path.write_text(
        listening(
            issued.table(authorities, 'min_version = "1.3"'),
            issued.table(),
            metrics=f'bearer_token_file = "{token}"\ntls = {issued.table()}',
        )
    )
    loaded = load(path)
    assert loaded.config == load_config(path)
    assert loaded.lines["listen", 1, "tls"] == 6
    texts = {str(each): each.read_text() for each in (issued.certificate, issued.key, issued.ca)}
    assert loaded.credentials == Credentials(texts | {str(token): token.read_text()}, frozenset())
    assert metrics_token(loaded.config, loaded.credentials) == "s3cr3t="
    contexts = tls_contexts(loaded.config, loaded.credentials)
    assert contexts.keys() == {("listen", 0), ("listen", 1), ("metrics",)}
    assert len({*contexts.values()}) == 3
    assert contexts["listen", 0].minimum_version == ssl.TLSVersion.TLSv1_3
    assert contexts["listen", 0].verify_mode == ssl.CERT_REQUIRED
    assert contexts["listen", 1].verify_mode == ssl.CERT_NONE


def test_nothing_is_named(path: Path) -> None:
    """A configuration without files needs none, and its metrics no token."""
    path.write_text("")
    loaded = load(path)
    assert loaded.credentials == Credentials()
    assert tls_contexts(loaded.config, loaded.credentials) == {}
    assert metrics_token(loaded.config, loaded.credentials) is None


def test_what_is_off_needs_no_files(path: Path) -> None:
    """Without an address for metrics, the files for them are not looked at."""
    path.write_text(
        '[metrics]\naddress = "off"\nbearer_token_file = "/none"\n'
        'tls = { certificate = "/none", key = "/none" }\n'
    )
    loaded = load(path)
    assert loaded.credentials == Credentials()
    assert tls_contexts(loaded.config, loaded.credentials) == {}
    assert metrics_token(loaded.config, loaded.credentials) is None


def test_every_problem_is_reported_at_once(path: Path, issued: Issued, tmp_path: Path) -> None:
    """Whatever is wrong with any file stands on a line of its own, with the key that names it."""
    fifo, large, empty, binary = (tmp_path / name for name in ("fifo", "large", "empty", "binary"))
    os.mkfifo(fifo)
    large.write_bytes(bytes(MAX_FILE_BYTES + 1))
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\0")
    other = issue(tmp_path, "other")
    crossed = replace(issued, key=other.key)
    bad_authorities = f'client_ca = "{issued.key}"'
    text = listening(
        f'{{ certificate = "{tmp_path}", key = "{tmp_path}/none" }}',
        f'{{ certificate = "{fifo}", key = "{large}" }}',
        f'{{ certificate = "{binary}", key = "{issued.certificate}" }}',
        crossed.table(),
        issued.table(bad_authorities),
        '{ certificate = "/proc/self/mem", key = "/dev/null" }',
        metrics=f'bearer_token_file = "{empty}"',
    )
    no_certificate = "there is no certificate in it (-----BEGIN CERTIFICATE-----)"
    no_key = "there is no private key in it (-----BEGIN PRIVATE KEY-----)"
    assert problems(path, text) == [
        f"3: listen[0].tls.certificate: {tmp_path}: not a regular file",
        f"3: listen[0].tls.key: {tmp_path}/none can't be read: No such file or directory",
        f"6: listen[1].tls.certificate: {fifo}: not a regular file",
        f"6: listen[1].tls.key: {large}: larger than 1 MiB, which no such file is",
        f"9: listen[2].tls.certificate: {binary}: {no_certificate}",
        f"9: listen[2].tls.key: {issued.certificate}: {no_key}",
        f"12: listen[3].tls.key: {other.key}: the key does not belong to the certificate",
        f"15: listen[4].tls.client_ca: {issued.key}: {no_certificate}",
        "18: listen[5].tls.certificate: /proc/self/mem can't be read: Input/output error",
        "18: listen[5].tls.key: /dev/null: not a regular file",
        f"20: metrics.bearer_token_file: {empty}: the file is empty; write the token into it",
    ]


def test_lines_of_a_table_with_a_header(path: Path, issued: Issued) -> None:
    """Under a header of its own, each key of the table has its own line."""
    text = f'[metrics]\n[metrics.tls]\nkey = "/none"\n\ncertificate = "{issued.ca}.none"\n'
    assert problems(path, text) == [
        "3: metrics.tls.key: /none can't be read: No such file or directory",
        f"5: metrics.tls.certificate: {issued.ca}.none can't be read: No such file or directory",
    ]


def test_one_file_in_two_places(path: Path, issued: Issued) -> None:
    """A file that two keys name is complained of at both, and fits one of them maybe."""
    issued.key.unlink()
    text = listening(issued.table(), issued.table())
    reason = f"{issued.key} can't be read: No such file or directory"
    assert problems(path, text) == [
        f"3: listen[0].tls.key: {reason}",
        f"6: listen[1].tls.key: {reason}",
    ]


def test_a_file_of_the_largest_size(path: Path, issued: Issued) -> None:
    """A file of 1 MiB is read, what stands around the certificate included."""
    text = issued.certificate.read_text()
    issued.certificate.write_text(text + "#" * (MAX_FILE_BYTES - len(text)))
    path.write_text(listening(issued.table()))
    assert len(load(path).credentials.texts[str(issued.certificate)]) == MAX_FILE_BYTES


@pytest.mark.parametrize("token", ["two words", "one\ntwo", "é", "a,b", "=", 'quote"'])
def test_what_is_no_token(path: Path, tmp_path: Path, token: str) -> None:
    """What could not stand in the header is refused, and is not shown."""
    file = tmp_path / "file"
    file.write_text(token)
    assert problems(path, f'[metrics]\nbearer_token_file = "{file}"') == [
        (
            f"2: metrics.bearer_token_file: {file}: "
            "a token is one word of letters, digits and -._~+/ (RFC 6750)"
        )
    ]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o640, 0o600])
def test_who_may_read_a_file(path: Path, issued: Issued, mode: int) -> None:
    """Exposed is a file that everybody may read, not one that a group may."""
    issued.key.chmod(mode)
    path.write_text(listening(issued.table()))
    expected = frozenset([str(issued.key)] if mode & 0o004 else [])
    assert load(path).credentials.exposed == expected


def test_contents_are_not_shown(path: Path, issued: Issued) -> None:
    """Neither the contents nor what is made of them show in a text that may get into a log."""
    issued.key.chmod(0o644)
    path.write_text(listening(issued.table()))
    loaded = load(path)
    assert str(issued.key) in str(loaded)
    assert "BEGIN" not in f"{loaded} {loaded!r} {loaded.credentials}"


def test_what_is_described_is_restored(path: Path, issued: Issued) -> None:
    """Over JSON each byte of each file survives, whatever its encoding."""
    issued.key.chmod(0o644)
    issued.certificate.write_bytes(issued.certificate.read_bytes() + bytes(range(256)))
    path.write_text(listening(issued.table()))
    credentials = load(path).credentials
    described = json.loads(json.dumps(credentials.describe()))
    assert Credentials.restore(described) == credentials
    assert credentials.texts[str(issued.certificate)].endswith(bytes(range(256)).decode("latin-1"))


def test_a_context_needs_what_was_read() -> None:
    """Without its files no context is made, rather than one that demands less."""
    table = {"certificate": "/a", "key": "/b"}
    config = Config.model_validate({"listen": [{"tls": table}]})
    with pytest.raises(KeyError):
        tls_contexts(config, Credentials())

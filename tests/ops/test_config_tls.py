"""TLS and the files of secrets, in the configuration: how they are written, and written wrong."""

from pathlib import Path

import pytest

from lpechod.ops.config import Config, ConfigError, TlsConfig, dump_config, load_config
from lpechod.process.worker import service_settings


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(path: Path, text: str) -> Config:
    """Load a text."""
    path.write_text(text)
    return load_config(path)


def problems(path: Path, text: str) -> list[str]:
    """Return the problems of a text, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        load(path, text)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_a_table_in_either_form(path: Path) -> None:
    """The table may stand on a line or under a header, and is the one that comes last above it."""
    config = load(
        path,
        '[[listen]]\naddress = ":1"\ntls = { certificate = "/a", key = "/b" }\n'
        '[[listen]]\naddress = ":2"\n'
        '[[listen]]\naddress = ":3"\n[listen.tls]\ncertificate = "/c"\nkey = "/d"\n'
        'client_ca = "/e"\nmin_version = "1.3"\n'
        '[metrics]\nbearer_token_file = "/f"\n[metrics.tls]\ncertificate = "/a"\nkey = "/b"\n',
    )
    first = TlsConfig(certificate="/a", key="/b")
    third = TlsConfig(certificate="/c", key="/d", client_ca="/e", min_version="1.3")
    assert [table.tls for table in config.listen] == [first, None, third]
    assert (first.client_ca, first.min_version) == (None, "1.2")
    assert (config.metrics.tls, config.metrics.bearer_token_file) == (first, "/f")
    assert load(path, dump_config(config)) == config


def test_what_is_absent_is_not_written() -> None:
    """TOML has no null: a key without a value is left out of the effective configuration."""
    text = dump_config(Config())
    assert "tls" not in text
    assert "bearer" not in text


def test_handshakes_reach_the_service(path: Path) -> None:
    """How many handshakes may be under way is passed on to the workers' service."""
    assert service_settings(Config()).max_handshakes == 256
    config = load(path, "[limits]\nmax_handshakes = 7\n")
    assert service_settings(config).max_handshakes == 7
    assert problems(path, "[limits]\nmax_handshakes = 0\n") == [
        "2: limits.max_handshakes: expected at least 1, found 0"
    ]


PATH_EXPECTED = 'expected an absolute path such as "/etc/lpechod/tls.pem"'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '[[listen]]\ntls = { certificte = "/a", key = "/b" }',
            [
                "2: listen[0].tls.certificate: is missing; this key has no default",
                "2: listen[0].tls.certificte: unknown key (did you mean certificate?)",
            ],
        ),
        (
            '[[listen]]\n[listen.tls]\ncertificate = "tls.pem"\n\nkey = 5',
            [
                f"3: listen[0].tls.certificate: {PATH_EXPECTED}; it begins with a slash",
                f"5: listen[0].tls.key: {PATH_EXPECTED}, found 5",
            ],
        ),
        ("[[listen]]\ntls = true", ["2: listen[0].tls: expected a table, found true"]),
        (
            '[metrics]\ntls = { certificate = "/a", key = "/b", min_version = 1.2 }',
            [
                (
                    "2: metrics.tls.min_version: expected one of 1.2, 1.3, found 1.2; "
                    'write it in quotes, "1.2"'
                )
            ],
        ),
        (
            '[metrics]\ntls = { certificate = "/a", key = "/b", min_version = "1.1" }',
            ['2: metrics.tls.min_version: expected one of 1.2, 1.3, found "1.1"'],
        ),
        (
            '[[listen]]\nclient_ca = "/a"',
            [
                (
                    "2: listen[0].client_ca: unknown key "
                    "(did you mean listen.tls.client_ca or metrics.tls.client_ca?)"
                )
            ],
        ),
        (
            '[tls]\nkey = "/a"',
            ["1: tls: unknown key (did you mean listen.tls or metrics.tls?)"],
        ),
        (
            '[metrics]\nbearer_token_file = "/a\\u0000b"',
            ["2: metrics.bearer_token_file: the path holds a character that can't be shown"],
        ),
        (
            '[metrics]\nbearer_token_file = "/a\\nb"',
            ["2: metrics.bearer_token_file: the path holds a character that can't be shown"],
        ),
    ],
)
def test_mistakes(path: Path, text: str, found: list[str]) -> None:
    """Every mistake in a nested table is named with its line, its whole path and the way out."""
    assert problems(path, text) == found


def test_a_secret_in_the_place_of_its_file_is_not_shown(path: Path) -> None:
    """Who writes the token or the key itself does not find it in a message, which may be logged."""
    found = problems(
        path,
        '[metrics]\nbearer_token_file = "s3cr3t"\n'
        '[metrics.tls]\ncertificate = "/a"\nkey = """\n-----BEGIN PRIVATE KEY-----\ns3cr3t"""\n',
    )
    assert len(found) == 2
    assert all("s3cr3t" not in line and "BEGIN" not in line for line in found)

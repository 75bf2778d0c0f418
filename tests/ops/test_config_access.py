"""Who may connect, in the configuration: access lists and trusted proxies of a listener."""

from pathlib import Path

import pytest

from lpechod.ops.config import Config, ConfigError, dump_config, load_config


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(path: Path, text: str) -> Config:
    """Load a [[listen]] with these lines."""
    path.write_text(f"[[listen]]\n{text}\n")
    return load_config(path)


def problem(path: Path, text: str) -> str:
    """Return the one problem of a [[listen]] with these lines."""
    with pytest.raises(ConfigError) as caught:
        load(path, text)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(f"{path}:")


def test_everything_at_once(path: Path) -> None:
    """Networks of both families are read, written back, and read again as the same."""
    config = load(
        path,
        "proxy_protocol = true\n"
        'trusted_proxies = ["192.0.2.1", "2001:db8::/32"]\n'
        'allow = ["10.0.0.0/8"]\n'
        'deny = ["10.1.0.0/16", "::/0"]',
    )
    text = dump_config(config)
    assert 'trusted_proxies = ["192.0.2.1/32", "2001:db8::/32"]' in text
    path.write_text(text)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('allow = ["10.0.0.1/8"]', "2: listen[0].allow[0]: "),
        ('deny = ["10.0.0.0/8", "example.org"]', "2: listen[0].deny[1]: "),
        ("allow = [5]", "2: listen[0].allow[0]: expected a network such as "),
        ('allow = "10.0.0.0/8"', '2: listen[0].allow: expected an array, found "10.0.0.0/8"'),
        ("proxy_protocol = 1", "2: listen[0].proxy_protocol: expected true or false, found 1"),
    ],
)
def test_what_is_no_network(path: Path, text: str, expected: str) -> None:
    """What can't be a network is named with its place in the array."""
    assert problem(path, text).startswith(expected)


def test_a_network_in_both_lists(path: Path) -> None:
    """A network that is both allowed and denied is an error, however it is written."""
    found = problem(path, 'allow = ["10.0.0.0/8"]\ndeny = ["::ffff:10.0.0.0/104"]')
    assert found.startswith("3: listen[0].deny: both allowed and denied: 10.0.0.0/8")


def test_proxies_that_nobody_trusts(path: Path) -> None:
    """Where proxies are expected, they have to be named: anybody could pretend to be one."""
    found = problem(path, "proxy_protocol = true")
    assert found.startswith("1: listen[0].trusted_proxies: with proxy_protocol, name the networks")
    assert load(path, 'address = "unix:/run/x"\nproxy_protocol = true').listen[0].proxy_protocol


def test_proxies_that_nobody_expects(path: Path) -> None:
    """Trusting proxies without expecting a header of them is a mistake."""
    found = problem(path, 'trusted_proxies = ["192.0.2.1"]')
    assert found == (
        "2: listen[0].trusted_proxies: no proxy is expected here; add proxy_protocol = true"
    )

"""The units as text; how systemd takes them is seen where it runs (tests/boot)."""

import re
from pathlib import Path

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"

SEAL = {
    "PrivateNetwork=yes",
    "RestrictAddressFamilies=AF_UNIX",
    "IPAddressDeny=any",
    "Sockets=lpechod-sealed.socket lpechod-sealed-metrics.socket",
}
UNSEALED = {
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "FileDescriptorStoreMax=256",
}


def directives(unit: str, section: str) -> set[str]:
    """Return the assignments in a section of a unit file."""
    text = (UNITS / unit).read_text()
    found = re.search(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found
    return {line for line in found[1].splitlines() if line and not line.startswith("#")}


def test_the_sealed_unit_is_the_other_one_but_for_the_seal() -> None:
    """What one service is given the other one is, too, apart from what their comments name."""
    plain = directives("lpechod.service", "Service")
    sealed = directives("lpechod-sealed.service", "Service")
    assert sealed - plain == SEAL
    assert plain - sealed == UNSEALED


def test_there_is_no_signal_for_a_reload_beside_systemds_own() -> None:
    """With Type=notify-reload systemd sends SIGHUP itself, so there must be no ExecReload=."""
    for unit in ("lpechod.service", "lpechod-sealed.service"):
        service = directives(unit, "Service")
        assert "Type=notify-reload" in service
        assert not [each for each in service if each.startswith("ExecReload=")]
    assert {"Type=notify", "ExecReload=/bin/kill -HUP $MAINPID"} < directives(
        "bookworm.conf", "Service"
    )


def test_the_sockets_are_those_of_the_packaged_configuration() -> None:
    """The sealed pair listens where the configuration that comes with the package does."""
    config = (UNITS.parents[1] / "packaging" / "debian" / "config.toml").read_text()
    addresses = re.findall(r'^address = "(.*)"', config, re.MULTILINE)
    assert [
        each.removeprefix("ListenStream=")
        for unit in ("lpechod-sealed.socket", "lpechod-sealed-metrics.socket")
        for each in directives(unit, "Socket")
        if each.startswith("ListenStream=")
    ] == addresses

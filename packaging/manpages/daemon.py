"""lpechod(8): the command line from its parser, the metrics from their collector, and the rest.

What a signal does, and how connections end, is told at more length in README.md.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Final

from prometheus_client.core import Metric

import lpechod
from lpechod.ops.config import DEFAULT_PATH
from lpechod.ops.counters import Totals
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.wire.states import CloseReason
from manpages.roff import Page

_DESCRIPTION: Final = (
    """`lpechod` is the responder at the far end of a path: what a client sends over TCP comes back,
    byte for byte, in order, as soon as it has arrived whole. It is there to measure latency and
    throughput through real load balancers and firewalls, to check what these do to long-lived,
    half-closed, slow or pipelined connections, and to test client libraries against.""",
    """Clients send frames: a length, four bytes, most significant first, and then so many bytes.
    Who can connect can use it, within the limits of the configuration, unless that has a list of
    networks or demands TLS and a certificate.""",
    """A supervisor binds the addresses and serves the metrics; worker processes share the listening
    sockets and own their connections. A worker that dies or hangs is replaced. The daemon stays in
    the foreground, writes no PID file, and logs to standard error, in JSON unless that is a
    terminal. It runs from one file, see lpechod.toml(5).""",
)

_COMMANDS: Final = {
    "serve": "It runs until a signal ends it, see SIGNALS.",
    "check": """Problems go to standard error, one a line, all of them at once; the exit status is
        then 78. Certificates and keys are looked at as well, once the file itself is right; what
        will be trouble soon is a warning. No address is bound, and a daemon that runs is not
        touched.""",
    "config": "That is every key, those included that the file leaves at their defaults.",
    "schema": "Editors that know the schema complete keys and show what they mean.",
}

_SIGNALS: Final = {
    "`SIGTERM`, `SIGINT`": (
        """To the supervisor: stop. The listeners are closed, each connection is ended at a frame
        boundary, and the exit status is 0. They have `server.drain_timeout` for it: they are
        told over a third of that time, so that their clients do not all come back in the same
        instant, and who is left when it is over is cut off. A second signal ends all at once.""",
        "To a worker: drain. Another worker is started in its place first.",
    ),
    "`SIGHUP`": (
        """To the supervisor: reload, which is also the upgrade. A fresh process, which runs the
        code that is now on disk, checks the file and binds new addresses. If anything is wrong, the
        log says what and where, `lpechod_config_last_reload_successful` is 0, and nothing else has
        changed. Otherwise the supervisor replaces itself by the new code, with the same process
        ID, starts new workers, and has the old ones drain as soon as the new ones serve. Every key
        of the file takes effect; sockets and counters live on; nobody is refused or reset.""",
        "To a worker: nothing.",
    ),
    "`SIGUSR1`, `SIGUSR2`": ("To either: nothing.",),
    "`SIGKILL`": (
        """To the supervisor: the workers notice, drain and end. Two `SIGTERM` end them at once.""",
        """To a worker: its connections are lost. Another worker takes its place, and serves what
        waited to be accepted.""",
    ),
}

_CONNECTIONS: Final = """\
    Every connection has a reason for its end, which is in the log line `connection_closed` and in
    the label of `lpechod_connections_closed_total`. When `lpechod` ends a connection, a FIN follows
    the last echo; what still arrives within two seconds is read and dropped, so that no reset
    destroys an echo on its way. Only `drain_timeout`, and `overload` of whoever holds
    most memory, close at once; and on `write_timeout` and `missing_close_notify`, echoes that
    nobody has taken are dropped, so the last one may be cut."""

_REASONS: Final = {
    CloseReason.PEER_CLOSED: "The client was done, at a frame boundary, and got every echo.",
    CloseReason.TRUNCATED_FRAME: "The client was done in the middle of a frame. It got the echoes "
    "of the frames before.",
    CloseReason.FRAME_TOO_LARGE: "The client announced a frame of more than `limits.max_frame`. "
    "It got the echoes of the frames before.",
    CloseReason.RESET: "The client, or the network, reset the connection.",
    CloseReason.IDLE_TIMEOUT: "The client sent nothing for `timeouts.idle`.",
    CloseReason.FRAME_TIMEOUT: "A frame took longer to arrive than `timeouts.frame` and its length "
    "divided by `timeouts.min_rate`.",
    CloseReason.WRITE_TIMEOUT: "The client took no byte of its echoes for `timeouts.write`.",
    CloseReason.HANDSHAKE_TIMEOUT: "What has to precede the first frame, such as a PROXY header, "
    "was not complete within `timeouts.handshake`.",
    CloseReason.LIFETIME: "The connection was older than `timeouts.lifetime`, and at a frame "
    "boundary.",
    CloseReason.DRAINED: "A stop or a reload ended the connection at a frame boundary.",
    CloseReason.DRAIN_TIMEOUT: "`server.drain_timeout` was over after a stop or a reload.",
    CloseReason.OVERLOAD: "`limits.max_connections` or `limits.max_buffered` was nearly used up. "
    "The connection was silent for `timeouts.overload_idle`, or inside a frame for longer than "
    "`timeouts.overload_frame`, and had been so for longest; or it was among those that held most "
    "memory.",
    CloseReason.TLS_ERROR: "The client broke the rules of TLS, or had no certificate where one is "
    "demanded; the log line `handshake_failed` or `tls_failed` says what is wrong.",
    CloseReason.MISSING_CLOSE_NOTIFY: "The client ended the connection without saying so in TLS. "
    "Anybody on the path could have done that; echoes that it had not taken yet are lost.",
    CloseReason.PROXY_ERROR: "The PROXY header was cut off or is none; the log line "
    "`handshake_failed` says what is wrong.",
    CloseReason.REJECTED: "An access list or a limit turned the client away once the PROXY header "
    "had told who it is.",
    CloseReason.INTERNAL_ERROR: "The worker that owned the connection died, or a defect of "
    "`lpechod` ended it; the log says more.",
}

_METRICS: Final = (
    """The supervisor serves `/metrics` for Prometheus at `metrics.address`, and besides a landing
    page at `/`, `/-/healthy`, and `/-/ready`, which answers 503 while the daemon stops and without
    a worker. Every series exists from the start. No counter goes back over a crash, a reload or an
    upgrade. Labels never hold anything of a client.""",
    """A worker is `starting`, `ready`, `draining`, or `stalled` if it has given no sign of life for
    a second. The usual `process_*` metrics are there too, of the supervisor.""",
)

_STATUSES: Final = {
    0: "this includes a daemon that a signal has stopped.",
    1: "for example, an address can't be listened on, or no worker can be started.",
    2: "an unknown command or option. Standard error has the known ones.",
    78: "the file can't be read or used. Standard error has every problem. This is EX_CONFIG of "
    "<sysexits.h>, and systemd shows it by that name.",
}

_ENVIRONMENT: Final = {
    "`NOTIFY_SOCKET`": """Where the service manager is told of the start, of reloads, of the end and
        of how they proceed (sd_notify(3)). Units have `Type=notify-reload`, or `Type=notify`.""",
    "`WATCHDOG_USEC`, `WATCHDOG_PID`": """How often the service manager wants a sign of life
        (sd_watchdog_enabled(3)). It gets one only while every worker gives one.""",
    "`LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`": """Sockets that the service manager passes on
        (sd_listen_fds(3)). They are matched by address to those of the file, and what is missing
        is bound; a host name is not missing if there is a socket for one of its addresses.""",
    "`FDSTORE`": """Whether the service manager keeps descriptors. If it does, it gets the listening
        sockets, so that clients can connect over a restart or a crash.""",
    "`JOURNAL_STREAM`": """If standard error is the journal (systemd.exec(5)), each line has its
        priority in front.""",
    "`NO_COLOR`, `TERM`": "On a terminal, no colours if the first is set or the second is `dumb`.",
}

_FILES: Final = {
    f"`{DEFAULT_PATH}`": "The configuration, see lpechod.toml(5).",
    "`/usr/lib/systemd/system/lpechod.service`": "The unit. Its comments tell what to change for "
    "ports below 1024, and the like.",
    "`/usr/lib/systemd/system/lpechod-sealed.service`": "The same without a network of its own: it "
    "serves only the sockets of its socket units.",
}

_ECHO: Final = r"""
$ printf '\0\0\0\5hello' | nc -N localhost 9000 | xxd
00000000: 0000 0005 6865 6c6c 6f                   ....hello
"""
_RELOAD: Final = """
# lpechod check && systemctl reload lpechod
"""
_ADDRESS: Final = """
[[listen]]
address = "[::]:9000"
"""


def page(parser: argparse.ArgumentParser, date: str) -> str:
    """Return the source of the page.

    Args:
        parser: of the command line.
        date: in ISO 8601, or empty.

    Raises:
        KeyError: there is a command, an exit status or a reason that this module does not explain.
    """
    package, _, summary = (lpechod.__doc__ or "").partition(": ")
    manual = Page(
        package,
        8,
        date=date,
        version=f"{package} {lpechod.__version__}",
        summary=summary.removeprefix("a ").rstrip("."),
    )
    _command_line(manual, parser)
    _items(manual, "SIGNALS", _SIGNALS)
    manual.section("CONNECTIONS")
    manual.paragraph(_CONNECTIONS)
    for reason in CloseReason:
        manual.item(f"`{reason.value}`", _REASONS[reason])
    _metrics(manual)
    _exit_status(manual, parser)
    _items(manual, "ENVIRONMENT", {name: (text,) for name, text in _ENVIRONMENT.items()})
    manual.section("FILES")
    for path, text in _FILES.items():
        manual.item(path, text)
    _examples(manual)
    manual.section("SEE ALSO")
    manual.paragraph(
        "journalctl(1), nc(1), systemctl(1), lpechod.toml(5), systemd.service(5), systemd.socket(5)"
    )
    return str(manual)


def _command_line(manual: Page, parser: argparse.ArgumentParser) -> None:
    commands, helps = _commands(parser)
    manual.section("SYNOPSIS")
    for name, command in commands.items():
        manual.line(_usage(f"{parser.prog} {name}", command))
    for option in _arguments(parser):
        manual.line(f"`{parser.prog}` {_tag(option, option.option_strings[-1:])}")
    manual.section("DESCRIPTION")
    for text in _DESCRIPTION:
        manual.paragraph(text)
    manual.section("COMMANDS")
    for name in commands:
        manual.item(f"`{name}`", f"{_capital(helps[name])}. {_COMMANDS[name]}")
    manual.section("OPTIONS")
    options: dict[tuple[str, str], list[str]] = {}
    for name, each in {"": parser, **commands}.items():
        for option in _arguments(each):
            text = _capital((option.help or "") % {**vars(option), "prog": each.prog})
            options.setdefault((_tag(option), text), []).append(name)
    for (tag, text), names in options.items():
        of = "" if "" in names else f"For {', '.join(f'`{name}`' for name in names)}."
        manual.item(tag, f"{text}. {of}")


def _commands(
    parser: argparse.ArgumentParser,
) -> tuple[Mapping[str, argparse.ArgumentParser], Mapping[str, str]]:
    """Return the parser of each command, and the help of each."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices, {each.dest: each.help or "" for each in action._choices_actions}
    raise ValueError(f"{parser.prog} has no commands")


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what the parser takes, beside a command."""
    return [
        action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)
    ]


def _usage(command: str, parser: argparse.ArgumentParser) -> str:
    """Write a line of the synopsis, without what every command has."""
    arguments = [
        f"[{_tag(each)}]" if each.option_strings else _tag(each)
        for each in _arguments(parser)
        if not isinstance(each, argparse._HelpAction)
    ]
    return " ".join([f"`{command}`", *arguments])


def _tag(action: argparse.Action, names: Sequence[str] | None = None) -> str:
    """Write an argument as it is written on the command line, under some of its names or all."""
    value = "" if action.nargs == 0 else f"*{action.metavar or action.dest.upper()}*"
    names = action.option_strings if names is None else names
    return ", ".join(f"`{name}` {value}".rstrip() for name in names) if names else value


def _capital(phrase: str) -> str:
    """Let a phrase begin like a sentence; `str.capitalize` would make "toml" out of TOML."""
    return phrase[:1].upper() + phrase[1:]


def _items(manual: Page, title: str, items: Mapping[str, tuple[str, ...]]) -> None:
    manual.section(title)
    for tag, texts in items.items():
        manual.item(tag, *texts)


def _metrics(manual: Page) -> None:
    manual.section("METRICS")
    for text in _METRICS:
        manual.paragraph(text)
    # What it would collect does not matter: it is asked what it could.
    for family in DaemonCollector(Totals, _no_standing).describe():
        manual.item(*_metric(family))


def _no_standing() -> Standing:
    raise AssertionError("a description needs no values")


def _metric(family: Metric) -> tuple[str, str]:
    """Return a metric as it is exposed, and what is said of it."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels: tuple[str, ...] = getattr(family, "_labelnames", ())
    braces = f"{{{', '.join(f'*{label}*' for label in labels)}}}" if labels else ""
    reasons = [sample.labels["reason"] for sample in family.samples if "reason" in sample.labels]
    values = f" Reasons: {', '.join(f'`{reason}`' for reason in reasons)}." if reasons else ""
    return f"`{name}`{braces} ({family.type})", family.documentation + values


def _exit_status(manual: Page, parser: argparse.ArgumentParser) -> None:
    """Explain the statuses that the help of the command line lists."""
    manual.section("EXIT STATUS")
    for status, meaning in re.findall(r"(\d+) ([\w ]+)", parser.epilog or ""):
        manual.item(f"`{status}`", f"{_capital(meaning)}: {_STATUSES[int(status)]}")


def _examples(manual: Page) -> None:
    manual.section("EXAMPLES")
    manual.paragraph("Send a frame of five bytes, and look at what comes back:")
    manual.example(_ECHO)
    manual.paragraph("Change the configuration of the service, without dropping a connection:")
    manual.example(_RELOAD)
    manual.paragraph(
        f"""Open a daemon that only its own machine can reach to the network: write this into
        `{DEFAULT_PATH}` in place of the address that is there, and reload."""
    )
    manual.example(_ADDRESS)

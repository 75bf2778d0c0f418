"""lpechod.toml(5): every table and key from the models, and what a line for each can't hold."""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lpechod import __version__
from lpechod.ops import toml
from lpechod.ops.config import DEFAULT_PATH
from lpechod.ops.config_types import (
    Count,
    Duration,
    FilePath,
    ListenAddress,
    Network,
    OptionalAddress,
    Poller,
    Rate,
    Size,
    Switch,
    Timeout,
    Workers,
)
from manpages.roff import Page

_KINDS: Final[tuple[tuple[Any, str], ...]] = (
    (str, "*string*"),
    (Poller, "*string*"),
    (Count, "*integer*"),
    (Workers, '*integer* | `"auto"`'),
    (Rate, "*number*"),
    (Switch, "`true` | `false`"),
    (tuple[Network, ...], "[*network*, ...]"),
    (FilePath, "*path*"),
    (Duration, "*duration*"),
    (Timeout, '*duration* | `"off"`'),
    (Size, "*size*"),
    (ListenAddress, "*address*"),
    (OptionalAddress, '*address* | `"off"`'),
)
"""What a value is called. A sequence, since not every type can be hashed."""

_BOUNDS: Final = (
    (Ge, "ge", "at least"),
    (Gt, "gt", "more than"),
    (Le, "le", "at most"),
    (Lt, "lt", "less than"),
)

_VALUES: Final = {
    "*string*": "Text in quotes: one of the words that its key knows.",
    "*integer*": "A whole number, without quotes.",
    "*number*": "A number, without quotes. It may have a fraction.",
    "*duration*": """A number and a unit in quotes, or several that are added up: `"500ms"`,
        `"30s"`, `"5min"`, `"1h 30min"`. Units are `us`, `ms`, `s`, `min`, `h`, `d` and `w`, as in
        systemd.time(7). Without quotes it is a number of seconds. Where `"off"` can be written, 0
        means the same: no limit.""",
    "*size*": """A number and a unit in quotes, or a number of bytes without: `"64KiB"`, `"1MB"`,
        `65536`. `KiB`, `MiB`, `GiB` and `TiB` are powers of 1024; `kB`, `MB`, `GB` and `TB` are
        powers of 1000. `K`, `M`, `G` and `T` are refused, since programs read them either way.""",
    "*address*": """In quotes, one of `"host:port"`, `"[v6]:port"`, `":port"` for every interface,
        and `"unix:/path"`. A host name stands for each of its addresses. `"[::]:port"` and
        `":port"` serve IPv4 too. With port 0 the kernel chooses one, and the log says which. The
        path of a UNIX socket is absolute; a stale file in its place is replaced, a live one is
        not.""",
    "*path*": """In quotes, the absolute path of a file. It is read when the configuration is, and
        at no other time: after a change, reload.""",
    "*network*": """In quotes, an address and the length of a prefix: `"192.0.2.0/24"`,
        `"2001:db8::/32"`. An address alone is a network of its own. IPv4 addresses in IPv6 notation
        (`::ffff:192.0.2.1`) are IPv4 addresses.""",
}

_DESCRIPTION: Final = (
    f"""lpechod(8) reads `{DEFAULT_PATH}`, or the file that `--config` names. It is a TOML document
    in UTF-8 (https://toml.io). Every key has a default, so an empty file is a valid one. `lpechod
    config` prints the configuration with all its keys.""",
    """A change takes effect with a reload (`systemctl reload lpechod`, or `SIGHUP` to the
    supervisor), whichever key it is, and no connection is refused or reset for it.""",
    """A key that does not exist is a mistake, and so is a value of another type or out of range.
    All problems are reported at once, each with its file, line and key; `lpechod check` does so
    without starting anything. If there are any on a reload, they are logged, and the daemon goes on
    as before.""",
)

_PROBLEMS: Final = """
config.toml:2: server.worker: unknown key (did you mean workers?)
config.toml:5: limits.max_frame: "1M" is ambiguous; write 1MiB or 1MB
"""
"""What `lpechod check` prints for some file; a test has it printed."""

_NOTES: Final = {
    "server.poller": """`"auto"` takes the best that the system has, on Linux `epoll`. With
        `"select"`, `limits.max_connections` is at most 960.""",
    "server.watchdog": """At least `"1s"`. Under systemd it is not more than half of
        `WatchdogSec=`, even if it is `"off"` here, but at least a second.""",
    "listen.proxy_protocol": """Whoever connects has to send a header before the first frame, within
        `timeouts.handshake`. The address in it is the client's, in logs and for every limit. A
        header that names no TCP client is served whatever the lists and limits of an address say:
        what the proxy sends for itself (`LOCAL`, `UNKNOWN`), to check that lpechod lives, or for a
        client of a UNIX socket.""",
    "listen.trusted_proxies": """Needed with `proxy_protocol`, but for UNIX sockets: there the
        permissions of the file decide who is trusted.""",
    "listen.allow": """With `proxy_protocol` it is the client that counts, and not the proxy. Who
        is turned away is counted in `lpechod_connections_rejected_total` as `denied`.""",
    "limits.max_connections": """Each takes a descriptor. The limit of open files is raised as far
        as the hard limit allows, and the log warns if that is not far enough.""",
    "limits.max_connections_per_ip": """Workers that accept in the same moment do not see each
        other's connection, so it may be passed by one for each of the other workers. Connections
        count that were accepted while it was set, by prefixes of the same length. It takes 512 KiB
        of memory for each worker.""",
    "limits.connection_rate": """Each worker counts for itself, so an address may come so often to
        each of them.""",
    "limits.low_watermark": "Less than `high_watermark`.",
    "limits.max_buffered": """At least three buffers for a frame of `max_frame` and two of 256 KiB;
        and `high_watermark` with five of those, or with `2 * max_frame`. A buffer has 1 KiB,
        4 KiB, 16 KiB and so on to 1 MiB, then 2 MiB, 4 MiB, 8 MiB and so on, and 64 bytes more; so
        that is 3585 KiB by default. Past `overload_threshold` percent of it, those who take longer
        than `timeouts.overload_frame` for a frame are closed. If that is not enough, those who need
        more are paused; and those who hold most are shed if that has not helped within a second,
        or if the limit itself would be passed. 16 MiB, or up to a quarter of it where `max_frame`
        is large, stay with the process when nobody needs them.""",
    "limits.overload_threshold": """Between 50 and 100. From there on, connections that are overdue
        by `timeouts.overload_idle` or `timeouts.overload_frame` are closed, the longest overdue
        first, until there is room again. With 100 that begins when all places are taken.""",
    "timeouts.handshake": "That is the PROXY header and the handshake of TLS, together.",
    "timeouts.overload_idle": """Longer than `idle`, it has no effect. What precedes the first frame
        counts as silence.""",
    "timeouts.overload_frame": """A frame gets its length divided by `min_rate` as extra time.
        Longer than `frame`, it has no effect.""",
    "log.burst": """How many were withheld stands in the next line of the event, as
        `suppressed`.""",
    "limits.max_handshakes": """They cost much more processor time than frames do: with too many at
        once, none would end in time. How many had to wait is in
        `lpechod_tls_handshakes_delayed_total`.""",
    "metrics.address": """Without `bearer_token_file` nobody is asked for a password there: keep it
        off public networks.""",
    "metrics.bearer_token_file": """As `credentials_file` in the configuration of Prometheus.
        `/-/healthy` and `/-/ready` need no token. Without TLS, the token can be read on the
        way.""",
    "tls.certificate": """With a chain it is what ACME clients call `fullchain.pem`. `lpechod check`
        and the log warn when less than a sixth of its life is left.""",
    "tls.key": """Only the user that lpechod runs as should be able to read it. It may be in the
        file of the certificate.""",
    "tls.client_ca": "Clients without such a certificate are turned away in the handshake.",
}
"""What an operator has to know of a key besides. What is about a value is tested with one."""

EXAMPLES: Final = {
    "For this machine only, over IPv4 and IPv6:": """
[[listen]]
address = "127.0.0.1:9000"

[[listen]]
address = "[::1]:9000"
""",
    "For the network, on all processors, with limits for strangers:": """
[server]
workers = "auto"

[[listen]]
address = "[::]:9000"

[limits]
max_frame = "64KiB"
max_connections = 5000
max_connections_per_ip = 50

[timeouts]
idle = "1min"
lifetime = "1h"
""",
    """On a UNIX socket, in the directory that the unit of systemd provides; the unit's `UMask=`
    decides who may connect:""": """
[[listen]]
address = "unix:/run/lpechod/echo.sock"
""",
    "Over TLS, and only for clients that have a certificate of one's own authority:": """
[[listen]]
address = "[::]:9443"

[listen.tls]
certificate = "/etc/lpechod/tls.pem"
key = "/etc/lpechod/tls.key"
client_ca = "/etc/lpechod/clients.pem"
""",
}


def page(config: type[BaseModel], date: str) -> str:
    """Return the source of the page.

    Args:
        config: the model of the file, whose fields are tables or arrays of tables.
        date: in ISO 8601, or empty.

    Raises:
        KeyError: a value is of a type that this module has no word for.
    """
    manual = Page(
        "lpechod.toml",
        5,
        date=date,
        version=f"lpechod {__version__}",
        summary="configuration file of lpechod",
    )
    manual.section("DESCRIPTION")
    for text in _DESCRIPTION:
        manual.paragraph(text)
    manual.example(_PROBLEMS)
    manual.section("VALUES")
    for tag, text in _VALUES.items():
        manual.item(tag, text)
    shared: dict[Any, list[str]] = {}
    for name, field in config.model_fields.items():
        _table(manual, name, field, shared)
    for model, places in shared.items():
        manual.section(", ".join(f"[{place}]" for place in places))
        manual.paragraph(model.__doc__ or "")
        _keys(manual, places[0].rpartition(".")[2], model)
    manual.section("EXAMPLES")
    for text, example in EXAMPLES.items():
        manual.paragraph(text)
        manual.example(example)
    manual.section("FILES")
    manual.item(f"`{DEFAULT_PATH}`", "The file, unless `--config` names another.")
    manual.item(
        "`/usr/share/doc/lpechod/examples/config.example.toml`",
        "Every key at its default, with a comment.",
    )
    manual.section("SEE ALSO")
    manual.paragraph("lpechod(8), systemd.time(7), systemd.service(5)")
    return str(manual)


def _table(manual: Page, name: str, field: FieldInfo, shared: dict[Any, list[str]]) -> None:
    """Write about a table; those within it go to ``shared``, each with the places it is in."""
    repeated = get_origin(field.annotation) is tuple
    model: Any = get_args(field.annotation)[0] if repeated else field.annotation
    manual.section(f"[[{name}]]" if repeated else f"[{name}]")
    manual.paragraph(field.description or "")
    _keys(manual, name, model)
    for key, of in model.model_fields.items():
        if inner := _inner_table(of.annotation):
            shared.setdefault(inner, []).append(f"{name}.{key}")


def _keys(manual: Page, name: str, model: Any) -> None:
    types = get_type_hints(model, include_extras=True)
    defaults = model.model_construct().model_dump(mode="json")
    for key, of in model.model_fields.items():
        note = _NOTES.get(f"{name}.{key}", "")
        kind = "*table*" if _inner_table(of.annotation) else _kind(types[key])
        manual.item(f"`{key}` = {kind}", f"{of.description} {note}")
        manual.line(_range(of, {key: defaults.get(key)}))


def _inner_table(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a key that is a table, or nothing."""
    inner = next((each for each in get_args(annotation) if each is not NoneType), annotation)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _kind(annotation: Any) -> str:
    """Say in words what type a value is of."""
    if get_origin(annotation) is Literal:
        annotation = str
    if NoneType in get_args(annotation) and annotation != OptionalAddress:
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    for known, word in _KINDS:
        if annotation == known:
            return word
    raise KeyError(f"there is no word for {annotation}")


def _range(field: FieldInfo, default: Mapping[str, object]) -> str:
    """Say what a value is if nothing is written, and which ones may be."""
    if field.is_required():
        return "No default: it has to be written."
    if None in default.values():
        return "Default: none."
    value = toml.dumps(default).partition(" = ")[2].strip()
    limits = ", ".join(_bounds(field))
    return f"Default: `{value}`" + (f" ({limits})" if limits else "")


def _bounds(field: FieldInfo) -> Iterator[str]:
    for kind, bound, words in _BOUNDS:
        for each in field.metadata:
            if isinstance(each, kind):
                yield f"{words} {getattr(each, bound)}"

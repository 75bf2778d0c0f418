"""What an operator reads when a key is wrong: every problem, its line, and the way out."""

import select
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.ops.config import (
    Config,
    ConfigError,
    LimitsConfig,
    Problem,
    TimeoutsConfig,
    load_config,
)
from lpechod.ops.toml import dumps


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def problems(path: Path, text: str) -> list[str]:
    """Return the lines of the report on a text, without the name of the file."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    lines = str(caught.value).split("\n")
    assert lines == [str(problem) for problem in caught.value.problems]
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(path: Path) -> None:
    """One run names everything there is to mend, so that one edit mends it."""
    assert problems(
        path,
        """\
max_frame = "1MiB"

[server]
poller = "epol"
workers = "ten"
drain_timeout = "off"

[[listen]]
address = "9000"
[[listen]]
backlog = 0
tsl = { certificate = "x" }

[limits]
max_fram = 5
max_frame = "64k"
low_watermark = "1GiB"
max_connections = 1.5

[timeouts]
drain_timeout = "5s"
idle = "5 parsecs"
min_rate = 0

[log]
level = "warn"
rate = 0
burst = true

[metric]
address = ":1"
""",
    ) == [
        "1: max_frame: unknown key (did you mean limits.max_frame?)",
        (
            "4: server.poller: expected one of auto, epoll, epoll-et, poll, select, kqueue, "
            'found "epol" (did you mean epoll?)'
        ),
        '5: server.workers: expected 1 to 1024 or "auto", found "ten"',
        '6: server.drain_timeout: can\'t be "off"; "0s" means at once',
        '9: listen[0].address: "9000" has no colon; write ":9000" for every interface',
        "11: listen[1].backlog: expected at least 1, found 0",
        "12: listen[1].tsl: unknown key (did you mean tls?)",
        "15: limits.max_fram: unknown key (did you mean max_frame?)",
        '16: limits.max_frame: "64k" is ambiguous; write 64KiB or 64kB',
        (
            "17: limits.low_watermark: 1GiB must be less than high_watermark, 256KiB, "
            "or reading would stop and resume with every echo"
        ),
        "18: limits.max_connections: expected a whole number, found 1.5",
        "21: timeouts.drain_timeout: unknown key (did you mean server.drain_timeout?)",
        '22: timeouts.idle: unknown unit "parsecs" in "5 parsecs"; use us, ms, s, min, h, d or w',
        "23: timeouts.min_rate: expected at least 1, found 0",
        (
            "26: log.level: expected one of debug, info, warning, error, "
            'found "warn" (did you mean warning?)'
        ),
        "27: log.rate: expected more than 0, found 0",
        "28: log.burst: expected a whole number, found true",
        "30: metric: unknown key (did you mean metrics?)",
    ]


ODD = [
    "true",
    '""',
    "-1",
    "nan",
    "-inf",
    "[]",
    "{ a = 1 }",
    "07:32:00",
    "1979-05-27T07:32:00Z",
    '"\\u001b[31m"',
    f"0x{'f' * 5000}",
    f'"{"9" * 100_000}"',
]


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        (name, key, value)
        for name, table in Config().model_dump(mode="json").items()
        for key, default in (table[0] if isinstance(table, list) else table).items()
        for value in ODD
        if (type(default), value) not in ((bool, "true"), (list, "[]"))
        and (key, value) != ("tls", "{ a = 1 }")
    ],
)
def test_no_key_takes_what_it_can_not_mean(path: Path, table: str, key: str, value: str) -> None:
    """A wrong type or an absurd value of any key is one short, printable line about that key."""
    header, name = (f"[[{table}]]", f"{table}[0]") if table == "listen" else (f"[{table}]", table)

    (line,) = problems(path, f"{header}\n{key} = {value}\n")

    assert line.startswith(f"2: {name}.{key}: ")
    assert line.isprintable()
    assert len(line) < 200
    for jargon in ("Input", "input", "pydantic", "http", "another value", "dictionary", "str"):
        assert jargon not in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("limits = 5", "1: limits: expected a table, found 5"),
        ("[[limits]]", "1: limits: expected a table, found an array"),
        (
            "\n[listen]\naddress = ':1'",
            "2: listen: expected an array of tables (in two brackets: [[listen]]), found a table",
        ),
        ("listen = []", "1: listen: at least one [[listen]] is needed"),
        ("listen = [5]", "1: listen[0]: expected a table, found 5"),
        (
            "listen = [\n{ address = ':1' },\n{ adress = ':2' },\n]",
            "1: listen[1].adress: unknown key (did you mean address?)",
        ),
        (
            "address = ':1'",
            "1: address: unknown key (did you mean listen.address or metrics.address?)",
        ),
        ("[log]\nLEVEL = 'info'", "2: log.LEVEL: unknown key (did you mean level?)"),
        ("[log]\n'b c' = 1", '2: log."b c": unknown key'),
        ("[a.b.c]\nd = 1", "1: a: unknown key"),
        (
            "[limits]\nmax_frame = '4GiB'",
            "2: limits.max_frame: expected at most 4294967295, found 4294967296",
        ),
        ("[limits]\nmax_frame = 0", "2: limits.max_frame: expected at least 1, found 0"),
        (
            "[limits]\nmax_connections = 3000000000",
            "2: limits.max_connections: expected at most 2147483647, found 3000000000",
        ),
        (
            "[limits]\nmax_connections_per_ip = -1",
            "2: limits.max_connections_per_ip: expected at least 0, found -1",
        ),
        ("[server]\nworkers = 1025", '2: server.workers: expected 1 to 1024 or "auto", found 1025'),
        ("[log]\nburst = 0", "2: log.burst: expected at least 1, found 0"),
        ("[log]\nrate = 2e6", "2: log.rate: expected at most 1000000, found 2000000.0"),
        ("[log]\nrate = inf", "2: log.rate: expected a finite number, found inf"),
        (
            "[[listen]]\nbacklog = 65536",
            "2: listen[0].backlog: expected at most 65535, found 65536",
        ),
    ],
)
def test_a_problem_says_what_is_expected_and_what_was_found(
    path: Path, text: str, line: str
) -> None:
    """Every kind of problem has words that name the key and the way out."""
    assert [line] == problems(path, text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[[listen]]\naddress = "[::0]:1"\n[[listen]]\naddress = "[::]:1"\n',
            "4: listen[1].address: [::]:1 is the address of listen[0] already",
        ),
        (
            '[metrics]\naddress = ":1"\n[[listen]]\naddress = ":1"\n',
            "2: metrics.address: :1 is the address of listen[0] already",
        ),
        (
            '\n[[listen]]\naddress = "127.0.0.1:10862"\n',
            "3: metrics.address: 127.0.0.1:10862 is the address of listen[0] already",
        ),
        (
            '[limits]\nhigh_watermark = "64KiB"\n',
            (
                "2: limits.low_watermark: 64KiB must be less than high_watermark, 64KiB, "
                "or reading would stop and resume with every echo"
            ),
        ),
        (
            '[limits]\nmax_connections = 1\n\nmax_frame = "200MiB"\n',
            (
                "4: limits.max_buffered: 256MiB is less than 786945KiB; three buffers for a "
                "frame of max_frame, each up to four times as large as that, and two of "
                "256KiB must fit; and high_watermark, with five of those or with "
                "2 * max_frame"
            ),
        ),
        (
            "[limits]\nmax_buffered = 9\nmax_frame = 4\nhigh_watermark = 2\nlow_watermark = 1\n",
            (
                "2: limits.max_buffered: 9 is less than 1281KiB; three buffers for a "
                "frame of max_frame, each up to four times as large as that, and two of "
                "256KiB must fit; and high_watermark, with five of those or with "
                "2 * max_frame"
            ),
        ),
        (
            '[server]\npoller = "select"\n[limits]\nmax_connections = 961\n',
            (
                "4: limits.max_connections: 961 is more than 960, the most that poller "
                '"select" can serve; lower it or use another server.poller'
            ),
        ),
        (
            '[server]\npoller = "select"\n',
            (
                "2: limits.max_connections: 10000 is more than 960, the most that poller "
                '"select" can serve; lower it or use another server.poller'
            ),
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_reported_at_the_one_that_was_written(
    path: Path, text: str, line: str
) -> None:
    """A conflict names the key to change; when that is a default, the line of the key it meets."""
    assert [line] == problems(path, text)


def test_every_duplicate_address_is_reported(path: Path) -> None:
    """Three equal addresses are two problems."""
    text = '[[listen]]\naddress = "unix:/s"\n' * 3

    assert problems(path, text) == [
        "4: listen[1].address: unix:/s is the address of listen[0] already",
        "6: listen[2].address: unix:/s is the address of listen[0] already",
    ]


def test_a_poller_of_another_platform_is_refused_with_those_of_this_one(path: Path) -> None:
    """No platform has both epoll and kqueue; the message lists what can be used here."""
    (missing,) = (name for name in ("epoll", "kqueue") if not hasattr(select, name))

    (line,) = problems(path, f'[server]\npoller = "{missing}"\n')

    assert line.startswith(f"2: server.poller: {sys.platform} has no {missing}; available are auto")
    assert missing not in line.partition("available")[2]


SCALARS = st.booleans() | st.floats() | st.integers() | st.text()
KEYS = st.text(max_size=8) | st.sampled_from(
    [*Config.model_fields, *LimitsConfig.model_fields, *TimeoutsConfig.model_fields]
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


@given(st.dictionaries(KEYS, VALUES | TABLES | st.lists(TABLES, min_size=1, max_size=2)))
def test_any_document_is_a_configuration_or_a_report(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, object]
) -> None:
    """Loading has two ends and no third: whatever a file holds, it is accepted or explained."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(dumps(document), encoding="utf-8", newline="")

    found: tuple[Problem, ...] = ()
    try:
        load_config(path)
    except ConfigError as error:
        found = error.problems

    assert all(problem.line and str(problem).isprintable() for problem in found)

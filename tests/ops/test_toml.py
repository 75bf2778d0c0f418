"""Line numbers of TOML keys, against documents whose lines are known, and the writer."""

import datetime as dt
import time
import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.ops.toml import KeyPath, dumps, format_path, locate, nearest_line, shown


def test_every_kind_of_statement_is_located() -> None:
    """Keys map to their own lines, whatever stands on the lines between."""
    text = """\
# [not.a.table]
title = "x # [no] = 1"

[server]
a.b.c = 1
"quoted.key" = [  # [comment]
  "]", # ]
  { x = "}" },
]
text = \"""
[fake]
k = 1
"\"""
after = 1
[[listen]]
address = '''
[[listen]]
'''
[listen.tls]
key = 1
[[listen]]
address = "="
[ a . "b c" ]
k = 1
"""

    assert locate(text) == {
        ("title",): 2,
        ("server",): 4,
        ("server", "a"): 5,
        ("server", "a", "b"): 5,
        ("server", "a", "b", "c"): 5,
        ("server", "quoted.key"): 6,
        ("server", "text"): 10,
        ("server", "after"): 14,
        ("listen",): 15,
        ("listen", 0): 15,
        ("listen", 0, "address"): 16,
        ("listen", 0, "tls"): 19,
        ("listen", 0, "tls", "key"): 20,
        ("listen", 1): 21,
        ("listen", 1, "address"): 22,
        ("a",): 23,
        ("a", "b c"): 23,
        ("a", "b c", "k"): 24,
    }


def test_a_header_of_its_own_outranks_an_earlier_mention() -> None:
    """A table that is first implied and later opened is located where it is opened."""
    assert locate("[a.b]\n\n[a]\n")["a",] == 3


def test_arrays_inside_arrays_count_afresh() -> None:
    """Elements of an inner array of tables are numbered within the newest outer element."""
    lines = locate("[[a]]\n[[a.b]]\n[[a.b]]\n[[a]]\n[[a.b]]\nk = 1\n")

    assert lines["a", 0, "b", 1] == 3
    assert lines["a", 1, "b", 0] == 5
    assert lines["a", 1, "b", 0, "k"] == 6


def test_windows_line_ends_are_counted_once() -> None:
    """A document with CR LF has the same lines as one with LF."""
    text = '[a] # c\nb = """\n\n"""\nc = [\n1]\nd = 1\n'

    assert locate(text) == locate(text.replace("\n", "\r\n"))


def test_keys_of_inline_tables_are_found_at_their_statement() -> None:
    """A path that is not known itself is looked up by its longest known prefix."""
    lines = locate("[a]\nb = { c = 1 }\n")

    assert nearest_line(lines, ("a", "b", "c")) == 2
    assert nearest_line(lines, ("a", "missing")) == 1
    assert nearest_line(lines, ("missing",)) is None


def test_the_time_to_locate_grows_with_the_length_only() -> None:
    """Ten times the lines take about ten times as long: no statement makes it look back."""
    for unit in ('"x", # y\n', "{ a = [1] },\n"):
        small, large = (f"a = [\n{unit * count}]\nb = 1\n" for count in (10_000, 100_000))
        assert _seconds_to_locate(large) < 40 * _seconds_to_locate(small)
    for unit in ("[[t]]\nk = 1\n", 's = """x"x""x\n"""\n[[t]]\n'):
        assert _seconds_to_locate(unit * 10_000) < 40 * _seconds_to_locate(unit * 1000)


def _seconds_to_locate(text: str) -> float:
    """Return the best of three, which is what the machine can do when left alone."""

    def once() -> float:
        begin = time.perf_counter()
        locate(text)
        return time.perf_counter() - begin

    return min(once() for _ in range(3))


# Values that try to look like statements, headers and ends of themselves.
VALUES = [
    "1",
    "1979-05-27T07:32:00Z",
    '"a # b = [c"',
    "'x]'",
    '"esc \\" # ["',
    '"""\n[not.a.header]\nk = 1\n"""',
    "'''\n[[no]]\n'''",
    '""""quoted"""""',
    "''''quoted'''''",
    '"""a \\""" b\\\\"""',
    '""',
    "[\n  1, # ]\n  '''\n]''',\n]",
    "[[1], [2]]",
    '{ a = 1, b = "}", c = [{ d = 1 }] }',
]
NAMES = st.text(st.sampled_from("ab-1.=[]#\"'{} \n\u00e9"), min_size=0, max_size=4)
NOISE = st.lists(st.sampled_from(["", "   ", "# [x]", '\t# """', "# k = '''"]), max_size=3)


@dataclass
class Document:
    """TOML under construction, and where its keys have been put."""

    text: str = ""
    truth: dict[KeyPath, int] = field(default_factory=dict)

    def add(self, draw: st.DrawFn, path: KeyPath, statement: str) -> None:
        """Append a statement after some noise, and note its line."""
        self.text += "".join(f"{line}\n" for line in draw(NOISE))
        self.truth[path] = self.text.count("\n") + 1
        self.text += draw(st.sampled_from(["", "  "])) + statement
        self.text += draw(st.sampled_from(["\n", " # [c] = '''\n"]))

    def add_keys(self, draw: st.DrawFn, table: KeyPath) -> list[str]:
        """Append keys, plain and dotted, to the table that is open; return their first names."""
        names = draw(st.lists(NAMES, max_size=3, unique=True))
        for name in names:
            inner = draw(st.lists(NAMES, max_size=2))
            dotted = draw(st.sampled_from([".", " . "])).join(
                format_path((step,)) for step in (name, *inner)
            )
            equals = draw(st.sampled_from(["=", " = "]))
            value = draw(st.sampled_from(VALUES))
            self.add(draw, (*table, name, *inner), f"{dotted}{equals}{value}")
        return names


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Draw a document with keys, tables, arrays of tables and sub-tables of both."""
    document = Document()
    taken = document.add_keys(draw, ())
    tables = st.lists(NAMES.filter(lambda name: name not in taken), max_size=3, unique=True)
    for name in draw(tables):
        key = format_path((name,))
        elements = draw(st.integers(0, 3))
        for index in range(max(elements, 1)):
            path: KeyPath = (name, index) if elements else (name,)
            document.add(draw, path, f"[[ {key} ]]" if elements else f"[{key}]")
            inside = document.add_keys(draw, path)
            sub = draw(NAMES)
            if sub not in inside:
                document.add(draw, (*path, sub), f"[{key}.{format_path((sub,))}]")
                document.add_keys(draw, (*path, sub))
    return document


@given(documents(), st.sampled_from(["\n", "\r\n"]))
def test_generated_documents_are_located_as_they_were_written(
    document: Document, newline: str
) -> None:
    """Every key, header and element of a valid document is found on the line it was put on."""
    text = document.text.replace("\n", newline)
    parsed = tomllib.loads(text)

    lines = locate(text)

    assert document.truth == {path: lines[path] for path in document.truth}
    for path in lines:
        _follow(parsed, path)


def _follow(parsed: Any, path: KeyPath) -> None:
    """Fail unless the path leads somewhere: locate invents nothing."""
    for step in path:
        parsed = parsed[step]


def test_tables_are_written_after_the_keys_of_the_table_around_them() -> None:
    """The writer keeps the order of keys, and moves tables behind them so that none is captured."""
    text = dumps(
        {
            "a": {"x": {"deep": 1}, "y": True},
            "list": [{"k": "v"}, {}],
            "top": 1.5,
            "empty": [],
            "numbers": [1, 2],
        }
    )

    assert text == (
        "top = 1.5\n"
        "empty = []\n"
        "numbers = [1, 2]\n"
        "\n[a]\ny = true\n"
        "\n[a.x]\ndeep = 1\n"
        '\n[[list]]\nk = "v"\n'
        "\n[[list]]\n"
    )


def test_a_key_without_a_value_is_left_out() -> None:
    """TOML has no null, so a key whose value is None is not written, in inner tables neither."""
    assert dumps({"a": None, "b": 1, "c": {"d": None}}) == "b = 1\n\n[c]\n"


def test_what_toml_has_no_form_for_is_refused() -> None:
    """None, and a table, among plain values raise TypeError."""
    with pytest.raises(TypeError, match="no TOML for NoneType"):
        dumps({"a": [1, None]})
    with pytest.raises(TypeError, match="no TOML for dict"):
        dumps({"a": [1, {}]})


SCALARS = (
    st.text()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.lists(st.integers() | st.text(), max_size=3)
)
MAPPINGS = st.recursive(
    st.dictionaries(st.text(max_size=5), SCALARS, max_size=3),
    lambda inner: st.dictionaries(
        st.text(max_size=5), SCALARS | inner | st.lists(inner, min_size=1, max_size=2), max_size=3
    ),
    max_leaves=8,
)


@given(MAPPINGS)
def test_written_documents_read_back_as_the_same(mapping: dict[str, object]) -> None:
    """Any key and value survives writing and reading, escapes and nesting included."""
    assert mapping == tomllib.loads(dumps(mapping))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("limits", "max_frame"), "limits.max_frame"),
        (("listen", 0, "address"), "listen[0].address"),
        (("a b", "c.d"), '"a b"."c.d"'),
        (("",), '""'),
        (("esc\x1b[2J",), '"esc\\U0000001B[2J"'),
    ],
)
def test_paths_are_named_as_they_are_written(path: KeyPath, text: str) -> None:
    """A message names a key as TOML would, and can't be made to control a terminal."""
    assert text == format_path(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", '"x"'),
        ("y" * 41, f'"{"y" * 40}"...'),
        ("\x1b\u202e", '"\\U0000001B\\U0000202E"'),
        (True, "true"),
        (1.5, "1.5"),
        (1 << 100, "an integer of 101 bits"),
        ({"a": 1}, "a table"),
        ([1], "an array"),
        (dt.date(2024, 2, 29), "2024-02-29"),
    ],
)
def test_values_are_shown_as_in_a_file_and_cut(value: object, text: str) -> None:
    """What a message quotes is short, printable and looks like the file."""
    assert text == shown(value)

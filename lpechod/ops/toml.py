"""What tomllib leaves out: on which line a key stands, and writing TOML.

An operator fixes a file by line number, but a parsed document has none. `locate` recovers them
without being a second parser: one regular expression cuts a document *that tomllib has accepted*
into statements, and tomllib itself reads the key or header each begins with. Being wrong can cost a
line number in a message, never a value.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias, cast

KeyPath: TypeAlias = tuple[str | int, ...]

# Everything that can hide or end a statement. Possessive, so that the scan stays linear.
# A multi-line string may end in up to two quotes of its own before the closing three (TOML 1.0).
_TOKEN: Final = re.compile(
    r'''
      """ (?: [^"\\] | \\. | "(?!"") )*+ "{3,5}
    | \'\'\' (?: [^'] | '(?!\'\') )*+ '{3,5}
    | " (?: [^"\\\n] | \\. )*+ "
    | ' [^'\n]*+ '
    | \# [^\n]*+
    | [\[\]{}=\n]
    ''',
    re.VERBOSE | re.DOTALL,
)

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SHOWN_CHARACTERS: Final = 40


def locate(text: str) -> dict[KeyPath, int]:
    """Map every key path of a TOML document to the line it is set on.

    Tables and elements of arrays of tables map to their header; the keys of an inline table have no
    entry of their own, see `nearest_line`.

    Args:
        text: A document that `tomllib.loads` accepts.

    Returns:
        Line numbers, counted from 1, by path; elements of arrays of tables are numbered from 0.

    """
    lines: dict[KeyPath, int] = {}
    newest: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, head in _statements(text):
        if not head.startswith("["):
            names, _ = _read(f"{head} = 0")
            path = (*table, *names)
        else:
            names, is_array = _read(head)
            path = table = _resolve(names, newest, is_array=is_array)
        for length in range(1, len(path)):
            lines.setdefault(path[:length], line)
        lines[path] = line
    return lines


def nearest_line(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """Return the line of the longest known prefix of a path, None when no part of it is there."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and head of each statement: a table header, or the text before its ``=``."""
    text += "\n"
    begin, line, newlines, depth = 0, 1, 0, 0
    equals: int | None = None
    for token in _TOKEN.finditer(text):
        mark = token[0]
        newlines += mark.count("\n")
        if mark in {"[", "{"}:
            depth += 1
        elif mark in {"]", "}"}:
            depth -= 1
        elif mark == "=" and equals is None:
            equals = token.start()
        elif mark == "\n" and depth == 0:
            head = text[begin : token.start() if equals is None else equals].strip()
            if head and not head.startswith("#"):
                yield line, head
            begin, line, equals = token.end(), newlines + 1, None


def _read(statement: str) -> tuple[list[str], bool]:
    """Return the names a statement leads through, and whether it opens an element of an array."""
    node: Any = tomllib.loads(statement)
    names = []
    while isinstance(node, dict) and node:
        ((name, node),) = node.items()
        names.append(name)
    return names, isinstance(node, list)


def _resolve(names: list[str], newest: dict[KeyPath, int], *, is_array: bool) -> KeyPath:
    """Put the element numbers into the path of a header, counting a new element if it opens one."""
    path: KeyPath = ()
    for name in names[:-1]:
        path += (name,)
        if path in newest:
            path += (newest[path],)
    path += (names[-1],)
    if is_array:
        newest[path] = newest.get(path, -1) + 1
        path += (newest[path],)
    return path


def dumps(mapping: Mapping[str, object]) -> str:
    """Write a mapping as a TOML document.

    Args:
        mapping: Strings, booleans, numbers, lists of these, mappings, and lists of mappings, which
            become arrays of tables. A key whose value is None is left out.

    Raises:
        TypeError: A value is of another type.

    """
    return "\n".join(_table(mapping, (), "")).lstrip("\n") + "\n"


def _table(mapping: Mapping[str, object], path: KeyPath, header: str) -> Iterator[str]:
    """Yield the lines of a table, its own keys before the tables inside it."""
    if header:
        yield ""
        yield header
    inner: list[tuple[KeyPath, str, Mapping[str, object]]] = []
    for key, value in mapping.items():
        below = (*path, key)
        match value:
            case None:
                pass
            case Mapping():
                inner.append((below, f"[{format_path(below)}]", value))
            case [*elements] if elements and all(isinstance(e, Mapping) for e in elements):
                tables = cast("list[Mapping[str, object]]", elements)
                inner += [(below, f"[[{format_path(below)}]]", element) for element in tables]
            case _:
                yield f"{format_path((key,))} = {_inline(value)}"
    for below, inner_header, table in inner:
        yield from _table(table, below, inner_header)


def _inline(value: object) -> str:
    """Write a value that stands on its key's line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _quote(value)
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_inline, value))}]"
        case _:
            raise TypeError(f"no TOML for {type(value).__name__}")


def _quote(text: str) -> str:
    """Write a basic string; what does not print is escaped, so it is also safe on a terminal."""
    body = (_ESCAPES.get(c) or (c if c.isprintable() else f"\\U{ord(c):08X}") for c in text)
    return f'"{"".join(body)}"'


def format_path(path: KeyPath) -> str:
    """Write a key path the way messages name it: ``limits.max_frame``, ``listen[0].address``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            key = step if _BARE_KEY.fullmatch(step) else _quote(step)
            text += f".{key}" if text else key
    return text


def shown(value: object) -> str:
    """Show a parsed value in a message: as it would stand in the file, cut to a readable length."""
    match value:
        case dict():
            return "a table"
        case list() | tuple():
            return "an array"
        case str() if len(value) > _SHOWN_CHARACTERS:
            return f"{_quote(value[:_SHOWN_CHARACTERS])}..."
        case int() if value.bit_length() > 64:
            # repr() refuses integers of thousands of digits, and hexadecimal ones get this far.
            return f"an integer of {value.bit_length()} bits"
        case str() | int() | float():
            return _inline(value)
        case _:
            # What is left is TOML's dates and times, which print as they are written.
            return str(value)

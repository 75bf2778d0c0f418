"""A page in the macros of man(7), written from plain text with a little markup.

The markup is what the code and README.md write anyway: `literal` comes out bold, *word* (what
stands for something else) in italics, and of a reference such as accept(2) the name in bold.

Invariants: whatever roff would take for an escape or a request is data; a sentence starts on a new
line, which is how roff knows where it ends; lines are short, and the source is ASCII.
"""

import re
import textwrap
from typing import Final

_INLINE: Final = re.compile(
    r"`(?P<literal>[^`]+)`|\*(?P<word>\w+)\*|\b(?P<page>[a-z][\w.-]*)(?P<section>\([1-8]\))"
)
_SENTENCE_END: Final = re.compile(r"(?<=[.!?]) +(?=[A-Z`*\"(\[])")
_WIDTH: Final = 79

# Every hyphen is a minus, as in the pages of systemd: for a plain one groff may show U+2010, which
# a shell does not know and a search does not find.
_ESCAPES: Final = str.maketrans(
    {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}
)


class Page:
    """A manual page that grows from top to bottom; ``str()`` gives its source.

    Args:
        name: as man(1) is asked for it.
        section: of the manual.
        date: of the page, in ISO 8601; empty if it has none.
        version: name and version of the package.
        summary: a phrase, for whatis(1).
    """

    def __init__(self, name: str, section: int, *, date: str, version: str, summary: str) -> None:
        self._lines = [
            rf".\" Made from the code of {version}.",
            f'.TH {_argument(name.upper())} {section} "{date}" {_argument(version)}',
            # Names of keys and metrics are not to be hyphenated, nor lines stretched for want of
            # that. With each paragraph, groff goes back to what HY and AD say.
            *(".nr HY 0", ".ds AD l", ".nh", ".ad l"),
        ]
        self.section("NAME")
        self._lines.append(f"{_escape(name)} \\- {_escape(summary)}")

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def section(self, title: str) -> None:
        """Begin a section."""
        self._lines.append(f".SH {_argument(title)}")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        if not self._lines[-1].startswith(".SH"):
            self._lines.append(".PP")
        self._lines += _fill(text)

    def line(self, text: str) -> None:
        """Go on with a text on a line of its own."""
        if not self._lines[-1].startswith(".SH"):
            self._lines.append(".br")
        self._lines += _fill(text)

    def item(self, tag: str, *paragraphs: str) -> None:
        """Add what stands under a tag of its own."""
        first, *others = paragraphs
        self._lines += [".TP", _guard(_markup(tag)), *_fill(first)]
        for text in others:
            self._lines += [".IP", *_fill(text)]

    def example(self, text: str) -> None:
        """Add lines as they are, indented."""
        lines = [_guard(_escape(line)) for line in text.strip("\n").split("\n")]
        self._lines += [".PP", ".RS 4", ".EX", *lines, ".EE", ".RE"]


def _fill(text: str) -> list[str]:
    """Break a text into lines of source."""
    return [
        _guard(line)
        for sentence in _SENTENCE_END.split(" ".join(text.split()))
        for line in textwrap.wrap(
            _markup(sentence), _WIDTH, break_long_words=False, break_on_hyphens=False
        )
    ]


def _markup(text: str) -> str:
    """Turn markup into changes of the font."""
    done, position = "", 0
    for found in _INLINE.finditer(text):
        done += _escape(text[position : found.start()])
        position = found.end()
        if found["literal"]:
            literal = _escape(found["literal"]).replace(" ", r"\~")  # It is not to be broken.
            done += rf"\fB{literal}\fR"
        elif found["word"]:
            done += rf"\fI{_escape(found['word'])}\fR"
        else:
            done += rf"\fB{_escape(found['page'])}\fR{found['section']}"
    return done + _escape(text[position:])


def _escape(text: str) -> str:
    """Make a text mean itself."""
    escaped = text.translate(_ESCAPES)
    return "".join(each if each.isascii() else rf"\[u{ord(each):04X}]" for each in escaped)


def _argument(text: str) -> str:
    """Quote a text for the line of a macro."""
    escaped = _escape(text).replace('"', r"\(dq")
    return f'"{escaped}"'


def _guard(line: str) -> str:
    """Keep a line of text from being a request; an apostrophe in front is escaped anyway."""
    return rf"\&{line}" if line.startswith(".") else line

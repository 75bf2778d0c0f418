"""The manual pages are sound in form, the same each time, and leave nothing unexplained."""

import argparse
import re
from pathlib import Path

import pytest
from manpages import configuration, daemon
from manpages.roff import Page
from pydantic import Field

from lpechod import __version__
from lpechod.cli import build_parser
from lpechod.ops.config_tables import Table
from tests.packaging.reading import (
    DATE,
    EPOCH,
    ROOT,
    items,
    output,
    program,
    rendered,
    section,
    write_pages,
)

NAMES = ("lpechod.8", "lpechod.toml.5")


def test_the_pages_are_sound(sources: dict[str, bytes], tmp_path: Path) -> None:
    """Neither mandoc nor whatis finds fault with a page, and its source is ASCII."""
    assert sorted(sources) == sorted(NAMES)
    for name, source in sources.items():
        (tmp_path / name).write_bytes(source)
        assert output(program("mandoc", "mandoc"), "-T", "lint", name, cwd=tmp_path) == ""
        whatis = output(program("lexgrog", "man-db"), name, cwd=tmp_path)
        page = re.escape(name[: name.rindex(".")])
        assert re.fullmatch(rf'.*: "{page} - [\w -]+"\n', whatis)
        assert source.isascii()


def test_no_line_is_hyphenated_or_stretched(sources: dict[str, bytes]) -> None:
    """On a common terminal names stay whole, and words keep their distance."""
    for source in sources.values():
        page = rendered(source.decode(), columns=80)
        assert "\u2010" not in page
        assert re.findall(r"^ {14}\S.*\w {2,}\w.*$", page, re.MULTILINE) == []


def test_the_footer_has_version_and_date(command: str, file: str) -> None:
    """A page tells of which version it is, and the date of SOURCE_DATE_EPOCH."""
    for page in (command, file):
        assert re.search(rf"^lpechod {re.escape(__version__)} +{DATE} ", page, re.MULTILINE)


def test_the_same_code_gives_the_same_bytes(sources: dict[str, bytes], tmp_path: Path) -> None:
    """Neither time zone, locale nor the seed of hashes changes a page, and no date is made up."""
    surroundings = {"PYTHONHASHSEED": "7", "TZ": "LINT-14", "LC_ALL": "C"}
    assert write_pages(tmp_path / "again", SOURCE_DATE_EPOCH=EPOCH, **surroundings) == sources
    dateless = {name: source.replace(DATE.encode(), b"") for name, source in sources.items()}
    assert write_pages(tmp_path / "dateless") == dateless


def test_text_is_never_taken_for_a_request() -> None:
    """Whatever a text holds is shown as it is, in paragraphs, headings, tags and examples."""
    hostile = r""".SH '"\fBx\n(.k -- --x ^~`' "" "a b" ... µ ü \e"""
    page = Page("name", 8, date="", version="1", summary="summary")
    page.section(f"{hostile} in a heading")
    page.paragraph(f"{hostile} 'here' \\")
    page.item(f".TP {hostile}", f"'{hostile}", f".{hostile}")
    page.line(f".{hostile}")
    page.example(f"{hostile}\n.PP {hostile}\n\n'  {hostile}")
    shown = rendered(str(page))
    for text in (
        f"\n{hostile} in a heading\n",
        f"\n       {hostile} 'here' \\\n",
        f"\n       .TP {hostile}\n",
        f"\n              '{hostile}\n",
        f"\n              .{hostile}\n              .{hostile}\n",
        f"\n           {hostile}\n           .PP {hostile}\n\n           '  {hostile}\n",
    ):
        assert text in shown


def test_markup_changes_fonts_only() -> None:
    """Literals come out bold, placeholders in italics, and names of other pages bold."""
    page = Page("name", 8, date="", version="1", summary="summary")
    page.section("FONTS")
    page.paragraph("Write `--config` *FILE*, see accept(2).")
    assert r"Write \fB\-\-config\fR \fIFILE\fR, see \fBaccept\fR(2)." in str(page)


def test_the_files_are_those_of_the_package(command: str, file: str) -> None:
    """Each file named is one that the daemon reads, or that the package installs."""
    units = {path.name for path in (ROOT / "deploy" / "systemd").iterdir()}
    examples = (ROOT / "packaging" / "debian" / "lpechod.examples").read_text().split()
    for path in {*items(section(command, "FILES")), *items(section(file, "FILES"))}:
        folder, _, name = path.rpartition("/")
        match folder:
            case "/usr/lib/systemd/system":
                assert name in units
            case "/usr/share/doc/lpechod/examples":
                assert name in examples
            case _:
                assert path == "/etc/lpechod/config.toml"


def test_nothing_goes_unexplained() -> None:
    """A command, a status or a kind of value that the pages do not explain ends the build."""
    parser = build_parser()
    (choice,) = (each for each in parser._actions if each.choices)
    assert isinstance(choice, argparse._SubParsersAction)
    choice.add_parser("dance", help="dance")
    with pytest.raises(KeyError, match="dance"):
        daemon.page(parser, DATE)

    parser = build_parser()
    parser.epilog = f"{parser.epilog} 3 rain."
    with pytest.raises(KeyError, match="3"):
        daemon.page(parser, DATE)

    class Strange(Table):
        key: bytes = Field(default=b"", description="Strange.")

    class File(Table):
        table: Strange = Field(default_factory=Strange, description="A table.")

    with pytest.raises(KeyError, match="bytes"):
        configuration.page(File, DATE)

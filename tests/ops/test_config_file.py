"""Files that are no configuration at all: what is answered when there is nothing to validate."""

from pathlib import Path

import pytest

from lpechod.ops.config import ConfigError, Problem, load_config


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def problem(path: Path) -> Problem:
    """Return the only problem with a file."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    (only,) = caught.value.problems
    assert str(only) == str(caught.value)
    return only


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n\nworkers 5\n", "3: not TOML: Expected '=' after a key in a key/value pair"),
        ("a = 1\na = 2\n", "2: not TOML: Cannot overwrite a value"),
        ("\na = [\n1,\n\n", "3: not TOML: Invalid value"),
        (b"# caf\xe9\n", "1: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a = 1".encode("utf-16"), "1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"\xef\xbb\xbf[log]", "1: begins with a byte order mark; save it as UTF-8 without one"),
        (f"a = {'[' * 5000}", " arrays or tables are nested too deeply"),
        (f"a = {'9' * 5000}", " a number has too many digits"),
    ],
)
def test_what_is_no_toml_is_one_problem_on_its_line(
    path: Path, text: str | bytes, line: str
) -> None:
    """A file that can't be parsed says where and why; there is nothing else to report then."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    assert f"{path}:{line}" == str(problem(path))


def test_a_file_that_is_missing_names_the_way_to_another(path: Path) -> None:
    """The first start without a configuration tells what to do."""
    reason = (
        "can't be read: No such file or directory; "
        "create it, or name another: lpechod serve --config FILE"
    )

    assert problem(path) == Problem(file=str(path), line=None, key="", message=reason)
    assert str(problem(path)) == f"{path}: {reason}"


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    """Naming the directory instead of the file in it is answered as such."""
    assert problem(tmp_path).message == (
        "can't be read: Is a directory; name a file: lpechod serve --config FILE"
    )


def test_a_file_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages carry the operator's own spelling of the path, which editors can jump to."""
    monkeypatch.chdir(tmp_path)
    Path("relative.toml").write_text("x = 1\n")

    assert str(problem(Path("relative.toml"))) == "relative.toml:1: x: unknown key"


def test_windows_line_ends_are_fine(path: Path) -> None:
    """A file saved with CR LF is read, and its problems are on the lines an editor shows."""
    path.write_bytes(b"[log]\r\nlevel = 'info'\r\nx = 1\r\n")

    assert problem(path).line == 3

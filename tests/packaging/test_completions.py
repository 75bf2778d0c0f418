"""The shells complete what the parser takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.reading import PATIENCE_SECONDS, program

ROOT = Path(__file__).resolve().parent.parent.parent

COMPLETE = """\
source "$1"; shift
registered=$(complete -p lpechod)
function=${registered##*-F }; function=${function%% *}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$function" lpechod "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does when somebody presses the key: the words of the line in, the replies out."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files, as a package would have them."""
    directory = tmp_path_factory.mktemp("completions") / "new"
    subprocess.run(
        [sys.executable, ROOT / "packaging" / "completions.py", directory],
        cwd=directory.parent,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert {path.name for path in directory.iterdir()} == {"lpechod.bash", "_lpechod"}
    return directory


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lpechod", ""], {"serve", "check", "config", "schema"}),
        (["lpechod", "s"], {"serve", "schema"}),
        (["lpechod", "--v"], {"--version"}),
        (["lpechod", "serve", "--c"], {"--config"}),
        (["lpechod", "schema", "--"], {"--help"}),
        (["lpechod", "check", "--config", "al"], {"alpha.toml", "also"}),
    ],
)
def test_bash_completes(
    directory: Path, tmp_path: Path, words: list[str], expected: set[str]
) -> None:
    """The key for it offers commands, their options, and files where one is asked for."""
    (tmp_path / "alpha.toml").touch()
    (tmp_path / "beta.toml").touch()
    (tmp_path / "also").mkdir()
    bash = [program("bash", "bash"), "--norc", "--noprofile", "-c", COMPLETE, "bash"]
    run = subprocess.run(
        [*bash, directory / "lpechod.bash", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert set(run.stdout.split()) == expected
    assert run.stderr == ""


def test_zsh_can_read_its_file(directory: Path) -> None:
    """The file for zsh has no mistake of syntax, and names the program and its commands."""
    path = directory / "_lpechod"
    run = subprocess.run(
        [program("zsh", "zsh"), "-n", path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert run.stderr == ""
    text = path.read_text()
    assert text.startswith("#compdef lpechod\n")
    for command in ("serve", "check", "config", "schema"):
        assert f"{command}) _arguments" in text
    assert text.count(":_files") == 3

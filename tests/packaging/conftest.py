"""The manual pages, as a package would have them and as they are read."""

import pytest

from tests.packaging.reading import EPOCH, rendered, write_pages


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return write_pages(tmp_path_factory.mktemp("manuals") / "new", SOURCE_DATE_EPOCH=EPOCH)


@pytest.fixture(scope="session")
def command(sources: dict[str, bytes]) -> str:
    """lpechod(8), as it is read."""
    return rendered(sources["lpechod.8"].decode())


@pytest.fixture(scope="session")
def file(sources: dict[str, bytes]) -> str:
    """lpechod.toml(5), as it is read."""
    return rendered(sources["lpechod.toml.5"].decode())

"""Documents that go to another program as a descriptor."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.process.documents import read_document, write_document
from tests.net.harness import descriptors

LEAVES = st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=()))
VALUES = st.recursive(
    LEAVES | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_a_document_is_read_as_it_was_written(document: dict[str, object]) -> None:
    """Whatever JSON can say comes back, and no descriptor is left."""
    before = descriptors()
    assert read_document(write_document(document)) == document
    assert descriptors() == before


def test_a_document_may_be_long() -> None:
    """A document of megabytes is no matter."""
    document = {"paths": ["x" * 1000] * 5000}
    assert read_document(write_document(document)) == document


def test_a_document_is_read_from_its_start() -> None:
    """Whoever has used the descriptor before, and left it anywhere, does not matter."""
    fd = write_document({"a": 1})
    os.lseek(fd, 0, os.SEEK_END)
    assert read_document(fd) == {"a": 1}


def test_a_document_is_for_those_it_is_meant_for() -> None:
    """A descriptor is closed on execve(2), until somebody decides otherwise."""
    fd = write_document({})
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_what_is_no_document_is_an_error() -> None:
    """A descriptor without JSON is a ValueError and closed, and one that is not open an OSError."""
    before = descriptors()
    with pytest.raises(ValueError, match="Expecting value"):
        read_document(os.memfd_create("empty"))
    assert descriptors() == before
    fd = write_document({})
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_document(fd)

"""The token of the metrics: who has to show it, and what happens without."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from lpechod.ops.pages import Pages

TOKEN = "s3cr3t.Token-5="  # noqa: S105 - of these tests only.
GUARDED = ("/", "/metrics", "/metrics?name[]=up", "http://localhost/metrics")
OPEN = ("/-/healthy", "/-/ready")
SENT = f"Bearer {TOKEN}".encode()


@pytest.fixture(name="pages")
def _pages() -> Pages:
    return Pages(CollectorRegistry(), lambda: True, TOKEN)


@pytest.mark.parametrize("target", GUARDED)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_without_the_token(pages: Pages, method: str, target: str) -> None:
    """Who has no token gets no page and is told what is missing, whatever the method."""
    page = pages.answer(method, target)
    assert (page.status, page.body) == (401, b"Unauthorized.\n")
    assert page.headers == (("WWW-Authenticate", "Bearer"),)


@pytest.mark.parametrize("target", GUARDED)
def test_with_the_token(pages: Pages, target: str) -> None:
    """Who has it gets the page, however the name of the scheme is written."""
    for sent in (SENT, SENT.replace(b"Bearer", b"bearer"), SENT.replace(b" ", b"  ")):
        assert pages.answer("GET", target, sent).status == 200
        assert pages.answer("POST", target, sent).status == 405


@pytest.mark.parametrize("target", OPEN)
def test_health_needs_no_token(pages: Pages, target: str) -> None:
    """Whether the daemon lives and serves is told to everybody: load balancers have no token."""
    assert pages.answer("GET", target).status == 200
    assert pages.answer("GET", target, b"Bearer wrong").status == 200


def test_without_a_token_in_the_configuration() -> None:
    """If none is configured, none is needed, and one that is sent does not matter."""
    pages = Pages(CollectorRegistry(), lambda: True)
    for target in GUARDED + OPEN:
        assert pages.answer("GET", target).status == 200
        assert pages.answer("GET", target, SENT).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        TOKEN.encode(),
        f"Basic {TOKEN}".encode(),
        SENT[:-1],
        SENT + b"x",
        SENT.lower(),
        SENT + b" " + TOKEN.encode(),
        SENT + b"\n" + SENT,
        b"Bearer \xff\xfe",
    ],
)
def test_what_is_not_the_token(pages: Pages, sent: bytes) -> None:
    """Whatever is not exactly the token is none, a part of it and two of them included."""
    assert pages.answer("GET", "/metrics", sent).status == 401


@given(st.binary())
def test_any_header_but_one(sent: bytes) -> None:
    """Of all headers only that with the token opens the page."""
    pages = Pages(CollectorRegistry(), lambda: True, TOKEN)
    is_right = sent[:7].lower() == b"bearer " and sent[7:].strip() == TOKEN.encode()
    assert (pages.answer("GET", "/metrics", sent).status == 200) == is_right

"""Servers for the tests of this ring, held to `EchoServer.finish` when a test ends."""

from collections.abc import Callable, Iterator

import pytest

from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from tests.net.harness import POLLERS, EchoServer

Serve = Callable[..., EchoServer]


@pytest.fixture(name="poller_name", params=list(POLLERS))
def _poller_name(request: pytest.FixtureRequest) -> str:
    """Name each poller in turn; a module that does not care overrides this."""
    return str(request.param)


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    """What listeners demand, unless a test says otherwise; a module that cares overrides this."""
    return OPEN_TO_ALL


@pytest.fixture(name="serve")
def _serve(poller_name: str, entrance: Entrance) -> Iterator[Serve]:
    """Start servers; arguments as for `EchoServer`, without the poller."""
    servers: list[EchoServer] = []

    def serve(*addresses: str, **settings: object) -> EchoServer:
        settings = {"entrance": entrance, **settings}
        server = EchoServer(poller_name, *addresses, **settings)  # type: ignore[arg-type]
        servers.append(server)
        return server

    yield serve
    for server in reversed(servers):
        server.finish()

"""The pytest fixtures of the local Hub: `hub`, and clients that drive it. A conftest.py imports those that it needs."""

from collections.abc import Iterator

import pytest

from tests.hub.client import Client
from tests.hub.server import LocalHub


@pytest.fixture(scope="session")
def running_hub() -> Iterator[LocalHub]:
    """The one Hub of a session, at one address. Tests take `hub`, which is emptied before each."""
    with LocalHub() as running:
        yield running


@pytest.fixture
def hub(running_hub: LocalHub) -> Iterator[LocalHub]:
    """An empty Hub with Xet."""
    running_hub.reset()
    yield running_hub
    assert running_hub.errors == [], "the Hub itself went wrong"


@pytest.fixture
def hub_without_xet(hub: LocalHub) -> LocalHub:
    """An empty Hub that does not know Xet, as a self-hosted one. It is the one of `hub`: a test takes either."""
    hub.reset(xet=False)
    return hub


@pytest.fixture(scope="session")
def xet_client(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The real client as it comes: large files go over Xet."""
    with Client(running_hub.env(cache=tmp_path_factory.mktemp("xet_client"))) as client:
        yield client


@pytest.fixture(scope="session")
def lfs_client(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The real client with Xet switched off."""
    with Client(running_hub.env(cache=tmp_path_factory.mktemp("lfs_client"), xet=False)) as client:
        yield client


@pytest.fixture(params=["xet", "lfs"])
def client(request: pytest.FixtureRequest) -> Client:
    """Both, one after the other."""
    found: Client = request.getfixturevalue(f"{request.param}_client")
    return found

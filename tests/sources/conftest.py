"""The local Hub, and `lora-merge aggregate` against it, over Xet and without."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.fixture import hub, running_hub
from tests.hub.server import LocalHub
from tests.sources.federation import Puller, impatient

__all__ = ["hub", "running_hub"]


@pytest.fixture(scope="session")
def pullers(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Puller]]:
    """A process with Xet and one without."""
    made = {}
    for xet in (True, False):
        home = tmp_path_factory.mktemp("home")
        made[xet] = Puller(
            Client(impatient(running_hub.env(cache=home, xet=xet))), home, tmp_path_factory.mktemp("folder")
        )
    yield made
    for puller in made.values():
        puller.client.close()


@pytest.fixture(params=["xet", "lfs"])
def pull(request: pytest.FixtureRequest, hub: LocalHub, pullers: dict[bool, Puller], tmp_path: Path) -> Puller:
    """`pull("org/client-*", "-o", "global")` with an empty cache, in an empty folder; over Xet, then without."""
    return fresh(pullers[request.param == "xet"], tmp_path)


@pytest.fixture
def pull_once(hub: LocalHub, pullers: dict[bool, Puller], tmp_path: Path) -> Puller:
    """As `pull`, without Xet only: for what does not depend on it."""
    return fresh(pullers[False], tmp_path)


def fresh(puller: Puller, folder: Path) -> Puller:
    """The puller with an empty cache, in a folder."""
    puller.forget()
    return Puller(puller.client, puller.home, folder)

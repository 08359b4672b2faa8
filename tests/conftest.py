"""What every test shares: no network, one thread, and the adapters of each kind, written once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import Federation, Kind, federation


@pytest.fixture(scope="session")
def federations(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Federation]:
    """`federations(kind)`: the folders of a kind's base and clients. Read them; copy before you change one."""
    made: dict[str, Federation] = {}

    def get(kind: Kind) -> Federation:
        if kind.name not in made:
            made[kind.name] = federation(kind, tmp_path_factory.mktemp("federation"))
        return made[kind.name]

    return get


@pytest.fixture
def plain(federations: Callable[[Kind], Federation]) -> tuple[Path, ...]:
    """The folders of three plain LoRA clients of one shape."""
    from tests.adapters import PLAIN

    return federations(PLAIN).clients

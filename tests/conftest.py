"""What every test shares: no network, one thread, and the adapters of each kind, written once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from lora_merge.aggregation.schedule import default_workers
from tests.adapters import PLAIN, Federation, Kind, federation

Federations: TypeAlias = Callable[[Kind], Federation]

gc.disable()  # while modules are imported: none of them is garbage, and looking for some takes a third longer


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through again and again."""
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`, one more than there are cores: some tests wait, for what they kill or for a Hub that stalls."""
    return default_workers() + 1


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def federations(tmp_path_factory: pytest.TempPathFactory) -> Federations:
    """`federations(kind)`: the folders of a kind's base and clients. Read them; copy before you change one."""
    made: dict[str, Federation] = {}

    def get(kind: Kind) -> Federation:
        if kind.name not in made:
            made[kind.name] = federation(kind, tmp_path_factory.mktemp("federation"))
        return made[kind.name]

    return get


@pytest.fixture
def plain(federations: Federations) -> tuple[Path, ...]:
    """The folders of three plain LoRA clients of one shape."""
    return federations(PLAIN).clients

"""Folding: whatever the order in which clients arrive, are replaced or withdrawn, the end is that of one merge."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_merge import aggregate
from lora_merge.onto import fold
from lora_merge.verify import verify
from tests.adapters import KINDS, Kind, edited
from tests.conftest import Federations, digests

Folders = tuple[Path, ...]
SAME = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")


def same_as_one_merge(folded: Path, folders: list[Path], scratch: Path, **options: Any) -> None:
    """The bytes that a fold promises are those of one merge of the same folders."""
    aggregate(folders, scratch, screening=None, **options)
    one, other = digests(scratch), digests(folded)
    assert {name: other[name] for name in SAME} == {name: one[name] for name in SAME}
    shutil.rmtree(scratch)


def thin(name: str) -> Kind:
    """A kind whose clients' ranks together stay below its modules' widths."""
    kind = next(kind for kind in KINDS if kind.name == name)
    if name == "convolutions":  # a grouped one's r counts both of its groups; others are narrower than two clients
        common: dict[str, Any] = {"r": 2, "target_modules": ["square", "grouped", "line"]}
        return replace(kind, name=f"thin {name}", clients=tuple(replace(c, lora=common) for c in kind.clients[:3]))
    ranks = (1, 2, 1, 1)
    thinner = [replace(client, lora={**client.lora, "r": r}) for client, r in zip(kind.clients, ranks, strict=False)]
    return replace(kind, name=f"thin {name}", clients=tuple(thinner))


STACKED = [
    thin(name)
    for name in (
        "linear",
        "ranks, scalings, modules and float types of each client's own",
        "Conv1D",
        "tied embedding",
        "convolutions",
        "experts",
        "experts of one parameter",
        "experts that some lack",
        "Mixtral",
        "names that end in each other, with ranks and scalings of their own",
        "MultiheadAttention",
    )
]


@pytest.mark.parametrize("kind", STACKED, ids=lambda kind: kind.name)
def test_one_after_the_other_gives_the_bytes_of_one_merge(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    folders = list(federations(kind).clients)
    for order in (folders, folders[::-1], [*folders[1:], folders[0]]):
        onto = tmp_path / "global"
        for i in range(len(order)):
            assert fold(order[i : i + 1], onto).again is None
            same_as_one_merge(onto, order[: i + 1], tmp_path / "one")
        shutil.rmtree(onto)


def test_a_mean_is_folded_and_made_again_in_the_order_of_its_arrivals(federations: Federations, tmp_path: Path) -> None:
    folders = list(federations(thin("linear")).clients)
    for method, options in (("svd", {"rank": 2}), ("fedavg", {})):
        kind = folders if method == "svd" else [edited(folders[0], tmp_path / f"same-{i}") for i in range(3)]
        onto = tmp_path / method
        fold(kind[:1], onto, method=method, **options)
        fold(kind[1:2], onto)
        assert fold(kind[2:], onto).again is None
        assert verify(onto, kind).verdict == "identical"

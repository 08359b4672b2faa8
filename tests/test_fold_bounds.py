"""What a folded mean says of its distance from the mean of all clients: never less than it is."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.errors import NotFoundError
from lora_merge.folding.onto import fold, plan
from lora_merge.verify import verify
from tests.conftest import digests
from tests.folds import FILES, error, mean_of, truncated, write_client

CORE = "aggregation_core.safetensors"


def clients(root: Path, count: int, *, r: int = 4, drift: float | None = None) -> list[Path]:
    """Clients of one 32 x 32 module: trained alike, of nothing in common, or that far from one start of lora_A."""
    folders = [write_client(root / f"client-{i}", i, 32, r, trained=drift is not None) for i in range(count)]
    first = load_file(folders[0] / FILES[0])
    for folder in folders if drift is not None else ():
        own = load_file(folder / FILES[0])
        mixed = {n: first[n] + drift * (own[n] - first[n]) if "lora_A" in n else own[n] for n in own}
        save_file(mixed, folder / FILES[0])
    return folders


def folded(folders: list[Path], onto: Path, seed: int, **options: Any) -> None:
    """The folders, in groups of random size."""
    chance, left = random.Random(seed), list(folders)
    while left:
        group = [left.pop(0) for _ in range(min(len(left), chance.randint(1, 3)))]
        fold(group, onto, screening=None, **({} if onto.exists() else options))


def bound_of(folder: Path) -> float:
    """The bound in a ledger; infinite where there is no guarantee."""
    certificate = json.loads((folder / "aggregation.json").read_text())["certificate"]
    assert certificate["measured_by"] in ("exact", "bound")
    return certificate["whole"]["relative_error"] if certificate["whole"] else math.inf


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drift", [None, 0.0, 0.05, 1.0])
@pytest.mark.parametrize(("method", "options"), [("svd", {"rank": 2}), ("svd", {"rank": 5}), ("fedavg", {})])
def test_the_bound_covers_the_error(
    method: str, options: dict[str, Any], drift: float | None, seed: int, tmp_path: Path
) -> None:
    folders = clients(tmp_path, 6, drift=drift)
    random.Random(seed).shuffle(folders)
    folded(folders, tmp_path / "global", seed, method=method, **options)
    assert error(tmp_path / "global", mean_of(folders)) <= bound_of(tmp_path / "global")


def test_a_fedavg_of_one_start_has_a_bound_that_says_something(tmp_path: Path) -> None:
    folders = clients(tmp_path, 4, drift=0.02)
    for folder in folders:
        fold([folder], tmp_path / "global", method="fedavg", screening=None)
    assert 0 < error(tmp_path / "global", mean_of(folders)) <= bound_of(tmp_path / "global") < 0.5


@pytest.mark.parametrize(("r", "rank"), [(4, 2), (4, 4), (8, 3)])
def test_a_core_of_trained_clients_stays_within_five_percent_of_one_merge(r: int, rank: int, tmp_path: Path) -> None:
    folders = [write_client(tmp_path / f"client-{i}", i, 64, r, trained=True) for i in range(20)]
    arrived, once, _ = truncated(tmp_path, folders, rank)
    assert arrived <= 1.05 * once


def test_a_truncated_mean_without_a_core_stands_for_itself_where_files_are_gone(tmp_path: Path) -> None:
    folders, onto = clients(tmp_path, 5, drift=0.02), tmp_path / "global"
    aggregate(folders[:3], onto, method="svd", rank=4, screening=None)
    made = fold(folders[3:4], onto, screening=None)
    assert made.again is None
    [said] = [warning for warning in made.warnings if CORE in warning]
    assert f"has no {CORE}, and the files of the clients in it are not all there (Folders are" in said
    assert "what that had cut off of their updates is lost" in said
    assert "Name those clients' folders among the sources too" in said
    assert not (onto / CORE).exists()
    fold(folders[4:], onto, screening=None)
    assert error(onto, mean_of(folders)) <= bound_of(onto) < 1
    assert verify(onto, folders).verdict == "identical"


def test_a_core_that_was_taken_away_is_told_of_and_comes_back_with_the_files(tmp_path: Path) -> None:
    folders, onto = clients(tmp_path, 5, drift=0.02), tmp_path / "global"
    fold(folders[:3], onto, method="svd", rank=4, screening=None)
    (onto / CORE).unlink()
    made = fold(folders[3:4], onto, screening=None)
    assert any(f"has lost its {CORE}" in warning for warning in made.warnings)
    made = fold(folders, onto, screening=None)
    assert made.again
    assert not made.warnings
    assert (onto / CORE).exists()


def test_a_truncated_mean_without_a_core_is_merged_again_where_files_are_there(tmp_path: Path) -> None:
    folders, onto = clients(tmp_path, 4, drift=0.02), tmp_path / "global"
    aggregate(folders[:3], onto, method="svd", rank=4, screening=None)
    assert fold(folders, onto, screening=None).again
    assert (onto / CORE).exists()


def test_naming_all_who_are_in_makes_good_what_a_fold_without_a_core_lost(tmp_path: Path) -> None:
    folders, onto, once = clients(tmp_path, 5), tmp_path / "global", tmp_path / "once"
    aggregate(folders[:4], onto, method="svd", rank=4, screening=None)
    fold(folders[4:], onto, screening=None)
    assert bound_of(onto) == math.inf
    planned = plan(folders, onto, screening=None)
    made = fold(folders, onto, screening=None)
    assert made.changed
    assert made.again == planned.again == "the global adapter had no core that arrivals can be folded into"
    aggregate(folders, once, method="svd", rank=4, screening=None)
    assert digests(onto)[FILES[0]] == digests(once)[FILES[0]]
    assert (onto / CORE).exists()
    assert verify(onto, folders).verdict == "identical"
    assert not fold(folders, onto, screening=None).changed
    assert plan(folders, onto, screening=None).again is None


def test_a_lora_a_that_all_share_with_files_gone_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    folders, onto = clients(tmp_path, 3, drift=0.0), tmp_path / "global"
    aggregate(folders[:2], onto, screening=None)
    before = digests(onto)
    with pytest.raises(NotFoundError, match="Nothing was changed") as caught:
        fold(folders[2:], onto, screening=None)
    assert caught.value.exit_code == 4
    assert digests(onto) == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []

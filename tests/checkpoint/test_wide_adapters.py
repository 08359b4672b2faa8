"""An adapter is wider than a client's may be only beside a valid ledger, and never wider than its modules."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_merge import aggregate, fold
from lora_merge.checkpoint.peft_folder import FolderRefused, open_folder
from lora_merge.verify import verify
from tests.adapters import CONFIG, rewrite_json
from tests.large import write_client

LEDGER = "aggregation.json"
WIDTH = 1030


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A global adapter as wide as its module."""
    root = tmp_path_factory.mktemp("wide")
    clients = [write_client(root / f"client-{i}", seed=i, modules=1, width=WIDTH, rank=520) for i in range(2)]
    aggregate(clients, root / "global", certificate="off", screening=None)
    return root / "global"


def test_a_global_adapter_is_as_wide_as_its_modules(merged: Path) -> None:
    opened = open_folder(merged)
    opened.close()
    assert [spec.r for spec in opened.specs.values()] == [WIDTH]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / LEDGER).unlink(), "^r: must be a whole number from 1 to 1024"),
        (lambda folder: (folder / LEDGER).write_text("{}"), "aggregation.json, schema_version"),
        (lambda folder: (folder / LEDGER).write_text("nothing"), "aggregation.json"),
        (lambda folder: rewrite_json(folder / LEDGER, {"contributions": []}), "aggregation.json, contributions"),
        (lambda folder: rewrite_json(folder / CONFIG, {"rank_pattern": {"nowhere": 1031}}), "which no module has"),
    ],
)
def test_a_wide_one_that_no_ledger_accounts_for_is_refused(
    spoil: Callable[[Path], None], reason: str, merged: Path, tmp_path: Path
) -> None:
    spoil(Path(shutil.copytree(merged, tmp_path / "global")))
    with pytest.raises(FolderRefused, match=reason):
        open_folder(tmp_path / "global")


@pytest.mark.parametrize("weight", [1e-3, 4e-4, 1e-6, 1e-30])
def test_small_weights_give_a_large_scaling_that_only_a_ledger_accounts_for(weight: float, tmp_path: Path) -> None:
    clients = [write_client(tmp_path / f"client-{i}", seed=i, modules=2, width=32, rank=3) for i in range(3)]
    weights = {f"client-{i}": weight for i in range(2)}
    aggregate(clients[:2], tmp_path / "global", weights=weights, screening=None)
    assert verify(tmp_path / "global", clients).verdict == "identical"
    fold(clients[2:], tmp_path / "global", weights={"client-2": weight}, screening=None)
    assert verify(tmp_path / "global", clients).verdict == "identical"
    (tmp_path / "global" / LEDGER).unlink()
    if weight < 1e-3 / 3:
        with pytest.raises(FolderRefused, match="lora_alpha"):
            open_folder(tmp_path / "global")


def test_a_ledger_lets_nobody_be_wider_than_its_modules(merged: Path, tmp_path: Path) -> None:
    folder = write_client(tmp_path / "client", seed=0, modules=1, width=16, rank=WIDTH)
    shutil.copy(merged / LEDGER, folder / LEDGER)
    with pytest.raises(FolderRefused, match="has rank 1030, above its size"):
        open_folder(folder)

"""`verify` believes no record: what a ledger or a lock says of a merge is held against the merge made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lora_merge import aggregate, fold
from lora_merge.errors import NotFoundError
from lora_merge.verify import Verification, verify
from tests.folds import SCREENING, write_client

Folders = tuple[Path, ...]


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n")


def first_client(**changes: Any) -> Callable[[Any], None]:
    return lambda ledger: ledger["contributions"][0].update(changes)


UNTRUTHS: dict[str, Callable[[Any], Any]] = {
    "share": first_client(share=0.9),
    "weight": first_client(weight=77.0),
    "num_examples": first_client(num_examples=3),
    "sha256": lambda ledger: ledger["contributions"][0]["sha256"].update({"adapter_model.safetensors": "0" * 64}),
    "commit": first_client(commit="0" * 40),
    "is not in the merge": first_client(client_id="mallory/evil"),
    "is missing": lambda ledger: ledger["contributions"].pop(),
    "method": lambda ledger: ledger.update(method="svd"),
    "options": lambda ledger: ledger.update(options={"rank": 3}),
    "base_model": lambda ledger: ledger.update(base_model="org/other"),
    "weighting": lambda ledger: ledger.update(weighting="uniform"),
    "global_lr": lambda ledger: ledger.update(global_lr=0.5),
    "certificate.whole": lambda ledger: ledger["certificate"].update(whole={"relative_error": 0.0}),
}


@pytest.fixture(params=["at once", "folded"])
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A merge of three clients, and their folders; bf16, so that its certificate is not of rounding only."""
    clients = [write_client(tmp_path / "in" / f"client-{seed}", seed, 48, 2, trained=True) for seed in range(3)]
    target = tmp_path / "global"
    if request.param == "at once":
        aggregate(clients, target, dtype="bf16", screening=SCREENING)
    else:
        aggregate(clients[:2], target, dtype="bf16", screening=SCREENING)
        fold(clients[2:], target, screening=SCREENING)
    return target, clients


@pytest.mark.parametrize("name", UNTRUTHS)
def test_what_the_ledger_says_and_is_not_so_is_named(name: str, merged: tuple[Path, list[Path]]) -> None:
    target, clients = merged
    honest = verify(target, clients)
    assert (honest.verdict, honest.reasons) == ("identical", ())
    rewrite(target, "aggregation.json", UNTRUTHS[name])
    assert_untrue(verify(target, clients), name)


def test_a_number_of_examples_that_nobody_states_is_an_untruth_of_the_lock_and_of_the_ledger(
    plain: Folders, tmp_path: Path
) -> None:
    aggregate(plain, tmp_path / "global", weights="uniform")
    for name in ("aggregation.json", "lora-merge.lock"):
        rewrite(tmp_path / "global", name, lambda record: record.update(weighting="examples"))
    assert_untrue(verify(tmp_path / "global", plain), "weighting")


@pytest.mark.parametrize(
    ("name", "changes"),
    [("base_model", {"base_model": "org/other"}), ("options", {"options": {"push": {"a": 1}}})],
)
def test_what_the_lock_says_and_is_not_so_is_named(
    name: str, changes: dict[str, Any], plain: Folders, tmp_path: Path
) -> None:
    aggregate(plain, tmp_path / "global")
    rewrite(tmp_path / "global", "lora-merge.lock", lambda lock: lock.update(changes))
    assert_untrue(verify(tmp_path / "global", plain), name)


def assert_untrue(found: Verification, name: str) -> None:
    assert found.verdict == "different"
    assert any(name in reason for reason in found.reasons), found.reasons


def test_a_url_in_a_lock_is_opened_only_where_the_user_names_it(
    plain: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    for folder in plain:
        MemoryFileSystem().put(str(folder), f"/clients/{folder.name}", recursive=True)
        places.append(f"memory://clients/{folder.name}")
    aggregate(places, tmp_path / "global")
    opened: list[str] = []
    listed = MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem, "ls", lambda self, path, **how: opened.append(path) or listed(self, path, **how)
    )
    with pytest.raises(NotFoundError, match=r"or at URLs: memory:///clients/"):
        verify(tmp_path / "global")
    with pytest.raises(NotFoundError, match="were not found"):
        verify(tmp_path / "global", plain[:1])
    assert opened == []
    assert verify(tmp_path / "global", places).verdict == "identical"
    assert opened

"""Inputs that change while they are being merged: the record names the bytes that went in, or there is no result."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_merge import aggregate
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import LoraMergeError
from tests.adapters import CONFIG, WEIGHTS, edited, rewrite_json
from tests.checkpoint.spoil import Q0_B, one, with_entry
from tests.conftest import digests

Folders = tuple[Path, ...]


def replaced_by_a_rename(folder: Path) -> None:
    new = shutil.copytree(folder, folder.with_name("new"))
    one(Q0_B, with_entry(9.0)).act(new)
    os.replace(new / WEIGHTS, folder / WEIGHTS)


def written_in_place(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 3000)


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def given_another_scaling(folder: Path) -> None:
    rewrite_json(folder / CONFIG, {"lora_alpha": 80})


@pytest.mark.parametrize("when", ["before it is hashed", "before the first module", "after the last module"])
@pytest.mark.parametrize(
    "act",
    [replaced_by_a_rename, written_in_place, cut_short, removed, given_another_scaling],
    ids=lambda act: act.__name__,
)
def test_a_client_that_changes_meanwhile_is_an_error_or_was_merged_as_the_record_says(
    act: Callable[[Path], None], when: str, plain: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = edited(plain[1], tmp_path / "in" / "client-1")
    before = digests(client)
    aggregate([plain[0], client], tmp_path / "wanted")
    (tmp_path / "out").mkdir()

    @contextmanager
    def progress(what: str, *_: object) -> Iterator[Callable[[int], None]]:
        if when == "before the first module":
            act(client)
        yield lambda steps: None
        if when == "after the last module":
            act(client)

    hashed = PeftFolder.sha256

    def change_and_hash(folder: PeftFolder) -> dict[str, str]:
        if folder.folder == client and when == "before it is hashed":
            act(client)
        return hashed(folder)

    monkeypatch.setattr(PeftFolder, "sha256", change_and_hash)
    try:
        aggregate([plain[0], client], tmp_path / "out" / "global", progress=progress, workers=1)
    except LoraMergeError:
        assert list((tmp_path / "out").iterdir()) == []
    else:
        contributions = json.loads((tmp_path / "out" / "global" / "aggregation.json").read_text())["contributions"]
        recorded = next(c["sha256"] for c in contributions if c["client_id"] == "org/client-1")
        assert recorded == {name: before[name] for name in recorded}
        assert digests(tmp_path / "out" / "global")[WEIGHTS] == digests(tmp_path / "wanted")[WEIGHTS]

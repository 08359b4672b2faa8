"""A ledger knows the adapter that was merged: whoever builds on other files than those is told, and nothing is made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_merge import aggregate
from lora_merge.checkpoint.intact import OWN_NAMES, own_hashes
from lora_merge.errors import RefusedError
from lora_merge.folding.onto import fold, plan
from lora_merge.inspection.check import check
from lora_merge.intake import Reading
from lora_merge.publish.prepare import prepare
from lora_merge.verify import verify
from lora_merge.watching.watch import watch
from tests.conftest import digests
from tests.folds import SCREENING, write_client

CONFIG, WEIGHTS, CORE = OWN_NAMES
WAYS: dict[str, Callable[[Path, Path], object]] = {
    "fold": lambda onto, late: fold([late], onto, screening=SCREENING),
    "withdraw": lambda onto, late: fold([onto.parent / "a"], onto, withdraw=["org/b"], screening=SCREENING),
    "dry run": lambda onto, late: plan([late], onto, screening=SCREENING),
    "watch": lambda onto, late: list(watch([late], onto, seconds=1, wait=lambda seconds: None)),
    "verify": lambda onto, late: verify(onto, [onto.parent / name for name in "ab"]),
    "push": lambda onto, late: prepare(onto, "org/global"),
}


@pytest.fixture
def late(tmp_path: Path) -> Path:
    return write_client(tmp_path / "c", 3, 24, 2)


@pytest.fixture
def onto(tmp_path: Path) -> Path:
    clients = [write_client(tmp_path / name, seed, 24, 2) for seed, name in enumerate("ab")]
    made = fold(clients, tmp_path / "global", method="svd", rank=2, screening=SCREENING)
    assert made.ledger.files == recorded(made.output)
    return made.output


def recorded(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "aggregation.json").read_text())["files"]
    return found


def record(folder: Path, files: dict[str, str] | None) -> None:
    ledger = json.loads((folder / "aggregation.json").read_text())
    (folder / "aggregation.json").write_text(json.dumps(ledger | {"files": files}))


def alter(path: Path) -> None:
    """Another number in a tensor, another setting in a config: a file that reads as well as the old one."""
    content = path.read_bytes()
    last = b"1" if content[-4:-3] != b"1" else b"2"
    path.write_bytes(content[:-4] + last + content[-3:] if path.suffix == ".safetensors" else content + b"\n")


def test_the_ledger_has_the_hashes_of_the_files_beside_it(onto: Path, late: Path) -> None:
    assert recorded(onto) == own_hashes(onto)
    fold([late], onto, screening=SCREENING)
    assert recorded(onto) == own_hashes(onto)
    aggregate([late], late.parent / "one", screening=None)
    assert recorded(late.parent / "one").keys() == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_an_altered_file_is_refused_by_name(way: str, name: str, onto: Path, late: Path) -> None:
    alter(onto / name)
    before = digests(onto)
    with pytest.raises(RefusedError, match=f"{name}: was damaged or altered since it was merged") as caught:
        WAYS[way](onto, late)
    assert "merge its clients anew" in caught.value.hint
    assert digests(onto) == before


def test_check_says_it_too(onto: Path) -> None:
    assert not check(str(onto), Reading()).refusals
    alter(onto / WEIGHTS)
    [refusal] = check(str(onto), Reading()).refusals
    assert (refusal.field, refusal.by) == (WEIGHTS, ["push"])


@pytest.mark.parametrize("way", WAYS)
def test_a_ledger_of_before_there_were_hashes_is_taken_as_it_is(way: str, onto: Path, late: Path) -> None:
    record(onto, None)
    WAYS[way](onto, late)


def test_a_core_may_be_taken_away_and_none_may_be_put_beside(onto: Path, late: Path) -> None:
    files = recorded(onto)
    record(onto, {name: files[name] for name in (CONFIG, WEIGHTS)})
    with pytest.raises(RefusedError, match=f"{CORE}: is not among the files that aggregation.json names"):
        fold([late], onto, screening=SCREENING)
    (onto / CORE).unlink()
    assert fold([late], onto, screening=SCREENING).added == ["org/c"]


@pytest.mark.parametrize("way", WAYS)
def test_a_core_beside_a_merge_that_has_none_is_refused(way: str, onto: Path, late: Path) -> None:
    exact = fold([onto.parent / "a", onto.parent / "b"], onto.parent / "exact", screening=SCREENING).output
    shutil.copy(onto / CORE, exact / CORE)
    before = digests(exact)
    with pytest.raises(RefusedError, match=f"{CORE}: is not among the files that aggregation.json names"):
        WAYS[way](exact, late)
    assert digests(exact) == before


def test_without_its_core_a_fold_is_still_verified_as_what_it_is(onto: Path, late: Path) -> None:
    fold([late], onto, screening=SCREENING)
    (onto / CORE).unlink()
    assert verify(onto, [onto.parent / name for name in "abc"]).verdict == "identical"


def test_a_signature_of_the_lock_before_is_not_kept_in_silence(onto: Path, late: Path) -> None:
    assert not any(".sig" in warning for warning in fold([late], onto, screening=SCREENING).warnings)
    signature = onto / "lora-merge.lock.sig"
    signature.write_text("of the lock as it was")
    assert not any(".sig" in warning for warning in fold([late], onto, screening=SCREENING).warnings)
    assert signature.exists()  # nothing was new, so nothing was written
    made = fold([write_client(late.parent / "d", 4, 24, 2)], onto, screening=SCREENING)
    assert any(warning.startswith("lora-merge.lock.sig was taken away") for warning in made.warnings)
    assert not signature.exists()


@pytest.mark.parametrize(
    "put", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")], ids=["folder", "pipe", "link to nothing"]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_core_that_is_no_file_is_refused_by_its_name(
    way: str, put: Callable[[Path], object], onto: Path, late: Path
) -> None:
    (onto / CORE).unlink()
    put(onto / CORE)
    with pytest.raises(RefusedError) as caught:
        WAYS[way](onto, late)
    assert {problem.field for problem in caught.value.problems} == {CORE}
    assert {refusal.field for refusal in check(str(onto), Reading()).refusals} == {CORE}


def test_a_pattern_leaves_out_a_merged_adapter_whose_record_links_to_nothing(onto: Path, late: Path) -> None:
    (onto / "aggregation.json").unlink()
    (onto / "aggregation.json").symlink_to("gone")
    merged = aggregate([str(onto.parent / "*")], onto.parent / "out" / "merged", screening=SCREENING)
    assert [each.source for each in merged.ledger.contributions] == ["a", "b", "c"]

"""The lock says what a merge was made of; `verify` makes it again and finds every difference."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_merge import aggregate
from lora_merge.checkpoint.intact import own_hashes
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import NotFoundError, RefusedError, StorageError, UsageError, VerificationError
from lora_merge.lock import FILE_NAME, Lock, LockError
from lora_merge.locking import read_lock, write_lock
from lora_merge.verify import verify
from tests.conftest import digests

Folders = tuple[Path, ...]


@pytest.fixture
def merged(plain: Folders, tmp_path: Path) -> Path:
    return aggregate(plain, tmp_path / "global").output


def changed_lock(folder: Path, change: Callable[[Lock], Lock]) -> None:
    write_lock(change(read_lock(folder / FILE_NAME)), folder / FILE_NAME)


def flip_a_bit(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def record_anew(folder: Path) -> None:
    """Let the ledger say that what lies there is what was written, as whoever alters a merge on purpose would."""
    ledger = json.loads((folder / "aggregation.json").read_text())
    (folder / "aggregation.json").write_text(json.dumps(ledger | {"files": own_hashes(folder)}))


def test_a_lock_is_canonical_and_reading_it_back_gives_it_again(merged: Path) -> None:
    text = (merged / FILE_NAME).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) + "\n"
    assert read_lock(merged / FILE_NAME).to_json() == text


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 2}, {"method": "svd"}, {"dtype": "bf16"}])
def test_an_honest_merge_is_identical(options: dict[str, Any], plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", **options)
    found = verify(tmp_path / "global", plain)
    assert (found.verdict, found.reasons, found.inputs) == ("identical", (), 3)


def test_a_changed_tensor_is_found_and_named(merged: Path, plain: Folders) -> None:
    flip_a_bit(merged / "adapter_model.safetensors")
    record_anew(merged)
    found = verify(merged, plain)
    assert found.verdict == "different"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith("model.layers.")


def test_a_last_bit_is_equivalent_only_where_the_environment_is_another_one(merged: Path, plain: Folders) -> None:
    flip_a_bit(merged / "adapter_model.safetensors", at=-4)  # the lowest bit of an fp32 number
    record_anew(merged)
    assert verify(merged, plain).verdict == "different"
    changed_lock(merged, lambda lock: replace(lock, environment={**lock.environment, "torch": "0.0"}))
    found = verify(merged, plain)
    assert found.verdict == "equivalent"
    assert found.relative_error is not None
    assert 0 < found.relative_error <= 1e-6
    assert list(found.environment) == ["torch"]


def test_what_was_merged_on_a_device_that_is_not_here_is_equivalent_at_best(merged: Path, plain: Folders) -> None:
    flip_a_bit(merged / "adapter_model.safetensors", at=-4)
    record_anew(merged)
    changed_lock(merged, lambda lock: replace(lock, environment={**lock.environment, "device": "Another 9000"}))
    found = verify(merged, plain)
    assert found.verdict == "equivalent"
    assert found.note == "merged on Another 9000, here on the CPU: equivalent at best"
    assert found.environment == {"device": ("Another 9000", "cpu")}


def test_the_inputs_are_hashed_once(merged: Path, plain: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    known = PeftFolder.sha256

    def counted(folder: PeftFolder) -> dict[str, str]:
        hashed.append(folder.folder)
        return known(folder)

    monkeypatch.setattr(PeftFolder, "sha256", counted)
    assert verify(merged, plain).verdict == "identical"
    assert sorted(hashed) == sorted(map(Path, plain))


def test_a_changed_setting_is_found_and_named(merged: Path, plain: Folders) -> None:
    config = json.loads((merged / "adapter_config.json").read_text())
    (merged / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    record_anew(merged)
    found = verify(merged, plain)
    assert found.verdict == "different"
    assert any("lora_alpha" in reason for reason in found.reasons)


def test_an_input_that_is_not_the_locked_one_is_named_with_its_file(
    merged: Path, plain: Folders, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(plain[1], tmp_path / "in" / "other"))
    flip_a_bit(other / "adapter_model.safetensors")
    found = verify(merged, [plain[0], other, plain[2]])
    assert found.verdict == "different"
    assert len(found.reasons) == 1
    assert "org/client-1" in found.reasons[0]
    assert "adapter_model.safetensors" in found.reasons[0]


def test_folders_that_are_not_in_the_lock_are_left_aside(plain: Folders, tmp_path: Path) -> None:
    merged = aggregate(plain[:2], tmp_path / "global").output
    found = verify(merged, plain)
    assert (found.verdict, found.inputs, found.surplus) == ("identical", 2, ["org/client-2"])
    flip_a_bit(merged / "adapter_model.safetensors")
    record_anew(merged)
    found = verify(merged, plain)
    assert (found.verdict, found.surplus) == ("different", ["org/client-2"])
    assert found.relative_error
    flip_a_bit(plain[0] / "adapter_model.safetensors")
    found = verify(merged, plain)
    assert [reason.partition(":")[0] for reason in found.reasons] == ["input org/client-0"]


def test_inputs_that_nobody_names_are_not_found(merged: Path, plain: Folders) -> None:
    with pytest.raises(NotFoundError):
        verify(merged)
    with pytest.raises(NotFoundError, match="client-2"):
        verify(merged, plain[:2])


def test_a_merge_without_a_lock_cannot_be_verified(merged: Path, plain: Folders) -> None:
    (merged / FILE_NAME).unlink()
    with pytest.raises(NotFoundError):
        verify(merged, plain)


def test_locked_merges_again_what_the_lock_says_and_nothing_else(plain: Folders, tmp_path: Path) -> None:
    lock = tmp_path / "my.lock"
    aggregate(plain, tmp_path / "one", lock=lock)
    aggregate(plain, tmp_path / "two", lock=lock, locked=True)
    assert (tmp_path / "two" / FILE_NAME).read_bytes() == lock.read_bytes()
    for sources, options, named in [
        (plain[:2], {}, "client-2"),
        (plain, {"global_lr": 0.5}, "global_lr"),
        (plain, {"method": "svd"}, "method"),
        (plain, {"weights": "uniform"}, "weight"),
    ]:
        with pytest.raises(VerificationError, match=named):
            aggregate(sources, tmp_path / "three", lock=lock, locked=True, **options)
    assert not (tmp_path / "three").exists()


def test_without_locked_the_lock_follows_the_merge(plain: Folders, tmp_path: Path) -> None:
    lock = tmp_path / "my.lock"
    aggregate(plain, tmp_path / "one", lock=lock)
    aggregate(plain[:2], tmp_path / "two", lock=lock)
    assert [entry.client_id for entry in read_lock(lock).inputs] == ["org/client-0", "org/client-1"]


def test_a_lock_that_is_new_is_said_to_be(plain: Folders, tmp_path: Path) -> None:
    lock, said = tmp_path / "my.lock", list[str]()
    for output in ("one", "two"):
        aggregate(plain, tmp_path / output, lock=lock, tell=said.append)
    assert said == [f"Lock written: {lock}. There was none, so no commit was pinned by it."]


def test_no_lock_is_written_into_an_adapters_folder(plain: Folders, tmp_path: Path) -> None:
    first, output = tmp_path / "first", tmp_path / "output"
    aggregate(plain, first)
    before = digests(first)
    for slip in (first / "lora-merge.lok", first / "new" / "my.lock", output / "my.lock"):
        with pytest.raises(UsageError, match="There is no lock"):
            aggregate(plain, output, lock=slip)
        assert not output.exists()
    aggregate(plain[:2], output, lock=first / FILE_NAME)
    assert digests(first) == before
    aggregate(plain, output, lock=output / FILE_NAME, force=True)
    assert len(read_lock(output / FILE_NAME).inputs) == len(plain)


def test_a_lock_that_cannot_be_written_is_said_before_the_merge(plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no lock"):
        aggregate(plain, tmp_path / "global", lock=tmp_path / "global")
    with pytest.raises(UsageError, match="too long"):
        aggregate(plain, tmp_path / "global", lock=tmp_path / ("a" * 300))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is not a folder"):
        aggregate(plain, tmp_path / "global", lock=tmp_path / "file" / "my.lock")
    with pytest.raises(UsageError, match="nobody"):  # of another kind; then no folder is left that it was to lie in
        aggregate(plain, tmp_path / "global", weights={"nobody": 1.0}, lock=tmp_path / "new" / "deep" / "my.lock")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file"}


def test_locked_without_a_lock_is_not_found(plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        aggregate(plain, tmp_path / "global", locked=True)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"inputs": "all"},
        {"method": 3},
        {"global_lr": -1},
        {"global_lr": True},
        {"schema_version": 2},
        {"surprise": 1},
        {"environment": {"cpu": "\x1b[2J"}},
    ],
)
def test_a_malformed_lock_is_refused(change: dict[str, Any], merged: Path) -> None:
    data = json.loads((merged / FILE_NAME).read_text()) | change
    with pytest.raises(LockError):
        Lock.from_json(data)
    (merged / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(RefusedError):
        read_lock(merged / FILE_NAME)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": "svd", "options": {"rank": "1e5"}}, "options.rank"),
        ({"method": "svd", "options": {"rank": "auto", "energy": "most"}}, "options.energy"),
        ({"method": "ties", "options": {"rank": 2, "density": 7}}, "options.density"),
        ({"method": "mean"}, "method"),
        ({"dtype": "int8"}, "dtype"),
        ({"options": {"seed": -5}}, "options.seed"),
        ({"options": {"robust": "krum", "byzantine": 10**200}}, "options.byzantine"),
        ({"options": {"robust": ["krum"]}}, "options.robust"),
        ({"options": {"clip": "1e400x"}}, "options.clip"),
        ({"global_lr": 0}, "global_lr"),
        ({"global_lr": 1e39}, "global_lr"),
    ],
)
def test_a_setting_that_no_merge_takes_is_the_locks_fault(
    change: dict[str, Any], field: str, merged: Path, plain: Folders
) -> None:
    path = merged / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for call in (lambda: verify(merged, plain), lambda: aggregate(plain, merged, locked=True)):
        with pytest.raises(RefusedError) as caught:
            call()
        assert [(each.client, each.field) for each in caught.value.problems] == [(FILE_NAME, field)]


@pytest.mark.parametrize(
    ("weight", "field"), [(1e-320, "inputs[0].weight"), (1e300, "inputs[0].weight"), (0, "inputs")]
)
def test_weights_that_no_merge_takes_are_the_locks_fault(
    weight: float, field: str, merged: Path, plain: Folders
) -> None:
    changed_lock(merged, lambda lock: replace(lock, inputs=[replace(each, weight=weight) for each in lock.inputs]))
    with pytest.raises(RefusedError) as caught:
        verify(merged, plain)
    assert [(each.client, each.field) for each in caught.value.problems] == [(FILE_NAME, field)]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_lock_can_be_signed_and_a_changed_one_fails(merged: Path, tmp_path: Path) -> None:
    def ssh_keygen(*arguments: str, stdin: bytes | None = None) -> int:
        return subprocess.run(["ssh-keygen", *arguments], input=stdin, capture_output=True, cwd=tmp_path).returncode

    lock = merged / FILE_NAME
    assert ssh_keygen("-q", "-t", "ed25519", "-N", "", "-f", "key") == 0
    (tmp_path / "allowed").write_text("me@example.org " + (tmp_path / "key.pub").read_text())
    assert ssh_keygen("-Y", "sign", "-f", "key", "-n", "lora-merge", str(lock)) == 0
    check = ("-Y", "verify", "-f", "allowed", "-I", "me@example.org", "-n", "lora-merge", "-s", f"{lock}.sig")
    assert ssh_keygen(*check, stdin=lock.read_bytes()) == 0
    assert ssh_keygen(*check, stdin=lock.read_bytes().replace(b"exact", b"svd")) != 0

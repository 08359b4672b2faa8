"""What identifies a base model's weights, and which device trains it."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from lora_merge.errors import UsageError
from lora_merge.sources.base_models import weight_files, weights_sha256
from lora_merge.training.fit import pick_device, sound_dtype


def sharded(folder: Path) -> Path:
    (folder / "model-1.safetensors").write_bytes(b"one")
    (folder / "model-2.safetensors").write_bytes(b"two")
    index = {"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors", "c": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_the_weights_hash_is_that_of_the_files_names_and_hashes(tmp_path: Path) -> None:
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    listing = f"model-1.safetensors {one}\nmodel-2.safetensors {two}\n"
    assert weights_sha256(sharded(tmp_path)) == hashlib.sha256(listing.encode()).hexdigest()


def test_files_that_the_model_is_not_made_of_do_not_count(tmp_path: Path) -> None:
    before = weights_sha256(sharded(tmp_path))
    (tmp_path / "consolidated.safetensors").write_bytes(b"again")
    (tmp_path / "README.md").write_bytes(b"words")
    assert weights_sha256(tmp_path) == before
    (tmp_path / "model-2.safetensors").write_bytes(b"twO")
    assert weights_sha256(tmp_path) != before


def test_missing_weights_and_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="only safetensors"):
        weight_files(tmp_path)
    (sharded(tmp_path) / "model-1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lack model-1\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "[" * 100_000, '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {}}'],
    ids=range(5),
)
def test_a_wrong_index_of_weights_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "mps:0", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="must be auto, cpu, cuda, mps or cuda:INDEX"):
        pick_device(device)


def test_a_device_that_is_not_there_is_refused_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(UsageError, match="no such device"):
            pick_device(device)
    assert pick_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("visible", "device", "shown"),
    [(None, "auto", "0"), (None, "cuda:3", "3"), ("4,5", "cuda:1", "5"), ("4,5", "auto", "4"), ("", "auto", "")],
)
def test_one_client_sees_one_cuda_device(
    visible: str | None, device: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pick_device(device) == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


def test_a_cuda_device_beyond_those_shown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=4 shows 1"):
        pick_device("cuda:1")


def test_bf16_is_used_only_where_it_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sound_dtype("bf16", "cpu") == "bf16"
    assert sound_dtype("bf16", "mps") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert sound_dtype("bf16", "cuda") == "fp32"
    assert sound_dtype("fp32", "cpu") == "fp32"

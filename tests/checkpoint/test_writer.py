"""A file that threads fill in any order is hashed while it is filled."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_merge.checkpoint import writer
from lora_merge.checkpoint.writer import SafetensorsWriter


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_hash_is_the_files_for_any_order_and_any_threads(
    tmp_path: Path, seed: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE", 1 << 10)
    monkeypatch.setattr(writer, "BATCH", 1 << 12)  # so that the disk is asked too
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    tensors = {f"layer.{i}": torch.randn(chance.randrange(1, 900), 3, generator=generator) for i in range(40)}
    made = SafetensorsWriter(tmp_path / "a", {name: tuple(each.shape) for name, each in tensors.items()}, "F32")
    order = chance.sample(sorted(tensors), len(tensors))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda name: made.write(name, tensors[name]), order))
    found = made.sha256()
    made.close()
    assert found == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert all(torch.equal(each, tensors[name]) for name, each in load_file(tmp_path / "a").items())


def test_what_is_in_order_is_hashed_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SafetensorsWriter(tmp_path / "a", dict.fromkeys("abc", (8,)), "F32")
    hashed: list[int] = []
    monkeypatch.setattr(made, "_hash_to", hashed.append)
    for name, after in (("b", 0), ("a", 2), ("c", 3)):
        made.write(name, torch.zeros(8))
        assert len(hashed) == after
    made.close()


def test_a_file_without_tensors_is_its_header(tmp_path: Path) -> None:
    made = SafetensorsWriter(tmp_path / "a", {}, "F32")
    assert made.sha256() == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    made.close()


def test_a_file_that_somebody_cuts_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    made = SafetensorsWriter(tmp_path / "a", {"a": (8,), "b": (8,)}, "F32")
    made.write("b", torch.zeros(8))
    os.truncate(tmp_path / "a", 8)
    with pytest.raises(OSError, match="has cut the file"):
        made.write("a", torch.zeros(8))  # "b" is not behind it any more
    made.close()

"""The device changes where the arithmetic runs, not what it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_merge import aggregate
from lora_merge.aggregation.robust import Robust
from lora_merge.checkpoint.compare import compare
from lora_merge.checkpoint.peft_folder import open_folder
from lora_merge.errors import UsageError
from tests.adapters import KINDS, Kind
from tests.conftest import Federations, digests
from tests.dense import error, mean_model

Folders = tuple[Path, ...]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROBUST = [Robust(clip="0.9x"), Robust(rule="geometric-median"), Robust(rule="median"), Robust(rule="trimmed-mean")]
TRIED = KINDS if torch.cuda.is_available() else KINDS[:1]


def compared(one: Path, two: Path) -> float:
    """The relative error of the second adapter's update."""
    mine, theirs = open_folder(one), open_folder(two)
    try:
        return compare(mine, theirs).relative_error
    finally:
        mine.close()
        theirs.close()


@needs_cuda
@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": "lossless"}], ids=str)
def test_cuda_gives_the_mean_of_the_whole_models_too(
    options: dict[str, Any], kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", base=made.base_argument, device="cuda", **options)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < 5e-6


@needs_cuda
@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.rule or "clip")
def test_cuda_gives_what_the_cpu_gives_by_every_rule(
    rule: Robust, kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    if rule.by_coordinate and not kind.by_coordinate:
        return  # refused
    made = federations(kind)
    for device in ("cpu", "cuda"):
        aggregate(made.clients, tmp_path / device, base=made.base, device=device, robust=rule, screening=None)
    assert compared(tmp_path / "cpu", tmp_path / "cuda") < 1e-5


@needs_cuda
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_cuda_gives_what_the_cpu_gives_by_leaving_entries_out(method: str, plain: Folders, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        aggregate(plain, tmp_path / device, device=device, method=method, rank="lossless")
    assert compared(tmp_path / "cpu", tmp_path / "cuda") < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_is_the_cpu_where_there_is_no_cuda_and_cuda_is_a_usage_error(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "auto", device="auto")
    aggregate(plain, tmp_path / "cpu", device="cpu")
    assert digests(tmp_path / "auto") == digests(tmp_path / "cpu")
    for device in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(UsageError, match="cuda"):
            aggregate(plain, tmp_path / "global", device=device)

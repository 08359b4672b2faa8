"""The device changes where the arithmetic runs, not what it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_merge import aggregate
from lora_merge.errors import UsageError
from tests.adapters import KINDS, Kind
from tests.conftest import Federations, digests
from tests.dense import error, mean_model

Folders = tuple[Path, ...]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRIED = KINDS if torch.cuda.is_available() else KINDS[:1]


@needs_cuda
@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": "lossless"}], ids=str)
def test_cuda_gives_the_mean_of_the_whole_models_too(
    options: dict[str, Any], kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", base=made.base_argument, device="cuda", **options)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < 5e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_is_the_cpu_where_there_is_no_cuda_and_cuda_is_a_usage_error(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "auto", device="auto")
    aggregate(plain, tmp_path / "cpu", device="cpu")
    assert digests(tmp_path / "auto") == digests(tmp_path / "cpu")
    for device in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(UsageError, match="cuda"):
            aggregate(plain, tmp_path / "global", device=device)

"""The devices that a name may mean."""

import pytest
import torch

from lora_merge.environment import device_kind, device_named
from lora_merge.errors import UsageError


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cpu:1", "mps", "meta", ""])
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"must be auto, cpu, cuda or cuda:INDEX, is '{name}'"):
        device_named(name)


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="There is no CUDA device cuda:2 here"):
        device_named("cuda:2")


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(there: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_named("auto") == torch.device(kind)


def test_an_index_is_of_cuda_only() -> None:
    assert device_kind("cuda:3") == ("cuda", 3)
    assert device_kind("mps", ("cpu", "mps")) == ("mps", 0)

"""`svd` against torch's dense SVD: no adapter of the same rank is nearer to the mean (Eckart & Young)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_merge import aggregate
from lora_merge.aggregation import lowrank
from lora_merge.errors import UsageError
from tests.adapters import KINDS, PLAIN, edited
from tests.conftest import Federations
from tests.dense import delta_weights, mean_deltas

Folders = tuple[Path, ...]


def tail(M: Tensor, rank: int) -> float:
    """The least error of any rank-`rank` approximation of M."""
    return float(torch.linalg.svdvals(M.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_a_rank_of_n_is_as_near_to_the_mean_as_the_dense_svd(rank: int, plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", method="svd", rank=rank)
    wanted, got = mean_deltas(PLAIN, plain), delta_weights(PLAIN, tmp_path / "global")
    for name, M in wanted.items():
        error = float((got[name] - M).norm())
        assert error == pytest.approx(tail(M, rank), rel=1e-6, abs=1e-6 * float(M.norm()))


BLOCKWISE = {
    "Conv1D": {"transformer.h.0.attn.c_attn.weight": lambda M: M.T[None]},
    "embedding": {"model.embed_tokens.weight": lambda M: M.T[None]},
    "modules_to_save of a classifier": {
        "square.weight": lambda M: M.flatten(1)[None],
        "point.weight": lambda M: M.flatten(1)[None],
        "line.weight": lambda M: M.flatten(1)[None],
    },
    # One rank for all experts: each expert's block is truncated by itself.
    "experts": {"experts.up": lambda M: M, "experts.down": lambda M: M},
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_each_block_of_every_layout_is_as_near_as_its_own_dense_svd(
    name: str, federations: Federations, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    folders = federations(kind).clients
    aggregate(folders, tmp_path / "global", method="svd", rank=2)
    wanted, got = mean_deltas(kind, folders), delta_weights(kind, tmp_path / "global")
    for tensor, blocks in BLOCKWISE[name].items():
        least = sum(tail(block, 2) ** 2 for block in blocks(wanted[tensor])) ** 0.5
        assert float((got[tensor] - wanted[tensor]).norm()) == pytest.approx(least, rel=1e-6)


def test_a_rank_above_what_is_there_is_what_is_there(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", method="svd", rank=500)
    file = load_file(tmp_path / "global" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in file.items() if "q_proj.lora_A" in name} == {12}  # three clients of rank 4
    assert {len(tensor) for name, tensor in file.items() if "v_proj.lora_A" in name} == {8}  # an 8 x 16 module


def test_lossless_finds_the_rank_of_identical_clients(plain: Folders, tmp_path: Path) -> None:
    copies = [edited(plain[0], tmp_path / f"copy-{i}") for i in range(3)]
    aggregate(copies, tmp_path / "global", method="svd", rank="lossless")
    file = load_file(tmp_path / "global" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in file.values()} == {4}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_auto_takes_the_smallest_rank_that_keeps_the_energy(energy: float, plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", method="svd", rank="auto", energy=energy)
    file = load_file(tmp_path / "global" / "adapter_model.safetensors")
    for name, M in mean_deltas(PLAIN, plain).items():
        rank = len(file[f"base_model.model.{name.removesuffix('weight')}lora_A.weight"])
        allowed = (1 - energy) ** 0.5 * float(M.norm())
        assert tail(M, rank) <= allowed * 1.000001
        assert rank == 1 or tail(M, rank - 1) > allowed


def test_the_scaling_is_one_and_both_factors_carry_the_root_of_the_singular_values(
    plain: Folders, tmp_path: Path
) -> None:
    aggregate(plain, tmp_path / "global", method="svd", rank=3)
    config = json.loads((tmp_path / "global" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    assert not config.get("use_rslora")
    file = load_file(tmp_path / "global" / "adapter_model.safetensors")
    for name, A in file.items():
        if ".lora_A." in name:
            B = file[name.replace("lora_A", "lora_B")]
            assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-5)
            assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "all", float("nan")])
def test_a_rank_that_is_none_is_a_usage_error(rank: object, plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", method="svd", rank=rank)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, float("nan")])
def test_an_energy_outside_zero_to_one_is_a_usage_error(energy: float, plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", method="svd", rank="auto", energy=energy)


@pytest.mark.parametrize("method", ["exact", "fedavg", "ffa"])
def test_a_rank_means_nothing_to_another_method_and_is_a_usage_error(
    method: str, plain: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        aggregate(plain[:1], tmp_path / "global", method=method, rank=4)


def test_the_randomised_route_is_as_good_as_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "MAX_EXACT_CORE", 8)
    generator = torch.Generator().manual_seed(1)
    B = torch.randn(2, 120, 100, generator=generator) * torch.linspace(1, 0.01, 100)
    A = torch.randn(2, 100, 90, generator=generator)
    left, right = lowrank.truncate(B, A, 10, seed=5)
    for block in range(2):
        M = B[block].double() @ A[block].double()
        error = float((left[block].double() @ right[block].double() - M).norm())
        assert tail(M, 10) * 0.999999 <= error <= tail(M, 10) * 1.001


@pytest.mark.parametrize("shape", [(30, 4, 20), (4, 9, 20), (20, 9, 4), (6, 30, 5)])
def test_the_spectrum_is_that_of_the_dense_product(shape: tuple[int, int, int]) -> None:
    d_out, K, d_in = shape
    generator = torch.Generator().manual_seed(2)
    B = torch.randn(3, d_out, K, generator=generator)
    A = torch.randn(3, K, d_in, generator=generator)
    wanted = torch.linalg.svdvals(B.double() @ A.double())[:, : min(shape)]
    assert torch.allclose(lowrank.spectrum(B, A)[:, : min(shape)], wanted, rtol=1e-9, atol=1e-9)


def test_a_product_of_lower_rank_than_its_factors_has_no_noise_in_it() -> None:
    generator = torch.Generator().manual_seed(4)
    B, A = torch.randn(1, 20, 3, generator=generator), torch.randn(1, 3, 15, generator=generator)
    left, right = lowrank.truncate(torch.cat([B, B], 2), torch.cat([A, A], 1), 6, seed=0)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert torch.allclose(left @ right, 2 * B @ A, atol=1e-5)


def test_an_update_of_zeros_merges_into_zeros(plain: Folders, tmp_path: Path) -> None:
    def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * (".lora_B." not in name) for name, tensor in tensors.items()}

    still = [edited(folder, tmp_path / folder.name, tensors=zeros) for folder in plain]
    for rank in (2, "auto", "lossless"):
        aggregate(still, tmp_path / f"global-{rank}", method="svd", rank=rank)
        assert delta_weights(PLAIN, tmp_path / f"global-{rank}") == {}

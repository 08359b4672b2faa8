"""`ties` and `dare` against slow dense twins; what is random in them depends on the seed, the module and the client."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_merge import aggregate
from lora_merge.adapter import Factors
from lora_merge.aggregation import target
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options
from lora_merge.errors import RefusedError, UsageError
from tests.adapters import KINDS, PLAIN
from tests.aggregation.updates import boosted, delta, deltas, module, update
from tests.conftest import Federations, digests
from tests.dense import delta_weights, mean_deltas, relative

each_method = pytest.mark.parametrize("method", ["ties", "dare"])


def merged(method: str, updates: list[Factors], n: list[float] | None = None, **options: Any) -> Tensor:
    found = module(updates, n)
    return delta(METHODS[method].plan(found, Options(rank="lossless", **options)).merge())


def ties_twin(dense: Tensor, n: list[float], density: float) -> Tensor:
    """TIES by the letter of its paper, entry by entry: trim, elect, merge disjointly."""
    trimmed = []
    for each in dense:
        kept = max(1, round(density * each.numel()))
        least = each.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(each.abs() >= least, each, 0.0))
    flat = torch.stack(trimmed).flatten(1).T.tolist()
    out = []
    for values in flat:
        mass = sum(weight * value for weight, value in zip(n, values, strict=True))
        agree = [(weight, value) for weight, value in zip(n, values, strict=True) if value * mass > 0]
        out.append(sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return torch.tensor(out, dtype=torch.float64).reshape(dense.shape[1:])


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_its_dense_twin(density: float) -> None:
    updates, n = [update(seed) for seed in range(5)], [1.0, 2.0, 3.0, 1.0, 2.5]
    found = merged("ties", updates, n, density=density)
    assert torch.allclose(found, ties_twin(deltas(updates), n, density), atol=1e-5)


def test_ties_divides_by_the_weight_that_agrees() -> None:
    one, other = update(1), replace(update(1), B=-update(1).B)
    assert torch.allclose(merged("ties", [one, one, other], density=1.0), delta(one), atol=1e-5)
    alone = METHODS["ties"].plan(module([one], [1.0], total=4.0), Options(rank="lossless", density=1.0))
    assert torch.allclose(delta(alone.merge()), delta(one), atol=1e-5)  # absent clients do not dilute it


def test_dare_drops_at_random_and_enlarges_what_stays() -> None:
    one = update(1, d_out=60, d_in=50)
    found = merged("dare", [one], density=0.25)
    ratio = found / delta(one)
    kept = ratio.abs() > 0.5
    assert torch.allclose(ratio[kept], torch.tensor(4.0).double(), rtol=1e-3)
    assert 0.22 < float(kept.double().mean()) < 0.28


def test_the_mean_of_dare_over_seeds_is_the_weighted_mean() -> None:
    updates, n = [update(seed) for seed in range(3)], [1.0, 2.0, 3.0]
    wanted = torch.einsum("m,meij->eij", torch.tensor(n).double() / 6, deltas(updates))
    found = torch.stack([merged("dare", updates, n, density=0.5, seed=seed) for seed in range(400)]).mean(dim=0)
    assert relative(found - wanted, wanted) < 0.1
    assert relative(merged("dare", updates, n, density=1.0) - wanted, wanted) < 1e-6


def test_dare_draws_for_each_client_and_module_and_seed_by_itself() -> None:
    one = update(1)
    two = module([one, one])
    masks = [merged("dare", [one], density=0.5, seed=seed) for seed in (0, 1)]
    assert not torch.equal(*masks)
    other = replace(module([one]), name="other")
    plan = METHODS["dare"].plan(other, Options(rank="lossless", density=0.5))
    assert not torch.equal(delta(plan.merge()), masks[0])
    both = delta(METHODS["dare"].plan(two, Options(rank="lossless", density=0.5)).merge())
    assert not torch.allclose(both, masks[0])


@each_method
@pytest.mark.parametrize("held", [1, 100])
def test_the_runs_of_rows_do_not_change_the_result(method: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [update(seed, blocks=2) for seed in range(3)]
    whole = merged(method, updates, density=0.4)
    monkeypatch.setattr(target, "HELD", held)
    monkeypatch.setattr(target, "ROWS", 1)
    assert torch.allclose(merged(method, updates, density=0.4), whole, atol=1e-5)


@each_method
def test_a_client_boosted_to_the_end_of_fp32_makes_no_nan(method: str) -> None:
    found = METHODS[method].plan(module([update(1), boosted(update(2), 1e70)]), Options(rank=3, density=0.5)).target
    assert found is not None
    assert not torch.isnan(found().M).any()


@each_method
def test_the_biases_of_lora_b_are_merged_the_same_way(method: str) -> None:
    biased = [replace(update(seed), bias=torch.arange(12.0) - 3 * seed) for seed in range(3)]
    found = METHODS[method].plan(module(biased), Options(rank=3, density=1.0)).merge()
    dense = torch.stack([2.0 * each.bias.double() for each in biased if each.bias is not None])
    wanted = ties_twin(dense, [1.0] * 3, 1.0) if method == "ties" else dense.mean(dim=0)
    assert found.bias is not None
    assert torch.allclose(found.bias.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_ties_keeps_the_largest_entries_of_a_bias_of_any_scaling(density: float) -> None:
    for seed in range(20):
        bias = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        one = replace(update(seed, scaling=(1 + seed) / 6**0.5), bias=bias)
        found = METHODS["ties"].plan(module([one, update(50)]), Options(rank=3, density=density)).merge()
        dense = torch.stack([one.scaling * bias.double(), torch.zeros(12)])
        assert found.bias is not None
        assert torch.allclose(found.bias.double(), ties_twin(dense, [1.0, 1.0], density), atol=1e-6)


@each_method
def test_the_same_seed_gives_the_same_bytes_by_any_workers_and_order_and_another_seed_of_dare_others(
    method: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    found = []
    for name, folders, given in (
        ("one", plain, {"workers": 1}),
        ("two", plain[::-1], {"workers": 3}),
        ("three", plain, {"seed": 7}),
    ):
        aggregate(folders, tmp_path / name / "global", method=method, rank=3, **given)  # type: ignore[arg-type]
        found.append(digests(tmp_path / name / "global"))
    assert found[0] == found[1]
    assert (found[0]["adapter_model.safetensors"] == found[2]["adapter_model.safetensors"]) == (method == "ties")


def test_ties_of_files_is_the_twin_of_the_dense_updates(plain: tuple[Path, ...], tmp_path: Path) -> None:
    result = aggregate(plain, tmp_path / "global", method="ties", rank="lossless", density=0.3)
    dense = [delta_weights(PLAIN, folder) for folder in plain]
    for name, found in delta_weights(PLAIN, tmp_path / "global").items():
        wanted = ties_twin(torch.stack([each[name] for each in dense]), [10.0, 20.0, 30.0], 0.3)
        assert relative(found - wanted, wanted) < 1e-5
    assert result.ledger.options == {"rank": "lossless", "energy": 0.99, "seed": 0, "density": 0.3}


def test_dare_of_density_one_is_the_mean_of_files(plain: tuple[Path, ...], tmp_path: Path) -> None:
    result = aggregate(plain, tmp_path / "global", method="dare", rank="lossless", density=1.0)
    wanted, got = mean_deltas(PLAIN, plain), delta_weights(PLAIN, tmp_path / "global")
    for name in wanted:
        assert relative(got[name] - wanted[name], wanted[name]) < 1e-6
    assert result.ledger.from_mean is not None
    assert result.ledger.from_mean["relative_error"] < 1e-6


@each_method
def test_a_rank_by_energy_keeps_it(method: str, plain: tuple[Path, ...], tmp_path: Path) -> None:
    result = aggregate(plain, tmp_path / "global", method=method, rank="auto", energy=0.9)
    assert result.ledger.certificate.whole is not None
    assert 0.05 < result.ledger.certificate.whole["relative_error"] <= 0.1**0.5


@each_method
@pytest.mark.parametrize("kind", ["DoRA", "DoRA and plain LoRA"])
def test_dora_is_refused_naming_whose_it_is_and_what_can(
    kind: str, method: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(each for each in KINDS if each.name == kind))
    with pytest.raises(RefusedError, match="cannot merge DoRA") as caught:
        aggregate(made.clients, tmp_path / "global", method=method, base=made.base)
    assert {problem.field for problem in caught.value.problems} == {"use_dora"}
    assert {problem.client for problem in caught.value.problems} <= {"org/client-0", "org/client-2"}
    assert "--method exact" in caught.value.hint


@each_method
def test_a_bias_in_two_parts_is_refused_naming_it_and_what_can(
    method: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(each for each in KINDS if each.name == "lora_bias beside trained biases"))
    with pytest.raises(RefusedError, match=r"by lora_bias, .* geometric-median") as caught:
        aggregate(made.clients, tmp_path / "global", method=method, base=made.base)
    assert {problem.field.rpartition(".")[2] for problem in caught.value.problems} == {"bias"}
    assert "--method exact" in caught.value.hint


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1, float("nan"), True])
def test_a_density_that_is_no_share_is_a_usage_error(density: float, plain: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--density"):
        aggregate(plain, tmp_path / "global", method="ties", density=density)


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1.5, True])
def test_a_seed_that_is_none_is_a_usage_error(seed: Any, plain: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seed"):
        aggregate(plain, tmp_path / "global", method="dare", seed=seed)

"""The coordinate rules against slow dense twins, through files, and what hostile clients can do to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_merge import aggregate
from lora_merge.adapter import Factors
from lora_merge.aggregation import coordinates, target
from lora_merge.aggregation.coordinates import Coordinates
from lora_merge.aggregation.registry import Options
from lora_merge.aggregation.robust import Robust
from lora_merge.errors import RefusedError
from tests.adapters import KINDS, PLAIN, Kind, edited
from tests.aggregation.updates import boosted, delta, deltas, module, rotated, update
from tests.conftest import Federations, digests
from tests.dense import delta_weights, distance_from_mean

MEDIAN, TRIMMED = Robust(rule="median"), Robust(rule="trimmed-mean", trim=0.3)
each_rule = pytest.mark.parametrize("rule", [MEDIAN, TRIMMED], ids=lambda rule: rule.rule)
RULES = [Coordinates(), Coordinates(0.3)]
each_pure = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
# PEFT adds out_proj's update twice when it merges an attention; a tied head is no tensor of its own in a dense model.
NOT_DENSE = ("MultiheadAttention", "tokens of a tied embedding")
DENSE = [kind for kind in KINDS if kind.by_coordinate and not kind.by_layer and kind.name not in NOT_DENSE]


def median(values: list[float], n: list[float]) -> float:
    """One entry's weighted median, by counting."""
    pairs = sorted(zip(values, n, strict=True))
    below, half = 0.0, sum(n) / 2
    for i, (value, weight) in enumerate(pairs):
        below += weight
        if abs(below - half) < 1e-9 * half:
            return (value + pairs[i + 1][0]) / 2
        if below > half:
            return value
    raise AssertionError


def trimmed_mean(values: list[float], n: list[float], trim: float) -> float:
    """One entry's trimmed mean: the mean of the quantile function from `trim` to 1 - `trim`."""
    total, below, found = sum(n), 0.0, 0.0
    for value, weight in sorted(zip(values, n, strict=True)):
        low, high = max(below, trim * total), min(below + weight, (1 - trim) * total)
        found += value * max(0.0, high - low)
        below += weight
    return found / ((1 - 2 * trim) * total)


def twin(rule: Robust, stacked: Tensor, n: list[float]) -> Tensor:
    """The rule, entry by entry in Python."""
    flat = stacked.flatten(1).T.tolist()
    if rule.rule == "median":
        found = [median(values, n) for values in flat]
    else:
        assert rule.trim is not None
        found = [trimmed_mean(values, n, rule.trim) for values in flat]
    return torch.tensor(found, dtype=torch.float64).reshape(stacked.shape[1:])


def formed(updates: list[Factors], rule: Coordinates, n: list[float] | None = None, **given: Any) -> Tensor:
    return delta(coordinates.plan(module(updates, n, **given), rule, "exact", Options()).merge())


@each_rule
@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.name)
def test_every_kind_of_adapter_is_the_rule_on_its_dense_updates(
    kind: Kind, rule: Robust, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", robust=rule, base=made.base_argument, screening=None)
    dense = [delta_weights(kind, folder) for folder in made.clients]
    got = delta_weights(kind, tmp_path / "global")
    names = {name for each in dense for name in each}
    assert got.keys() <= names
    n = [float(client.num_examples) for client in kind.clients]
    for name in names:
        shape = next(each[name] for each in dense if name in each)
        stacked = torch.stack([each.get(name, torch.zeros_like(shape)) for each in dense])
        found = got.get(name, torch.zeros_like(shape))
        assert float((found - twin(rule, stacked, n)).abs().max()) < 1e-5 * float(stacked.abs().max())


@each_rule
@pytest.mark.parametrize("name", ["linear", "modules_to_save", "bias all", "tokens", "tokens that some lack"])
def test_how_far_it_is_from_the_mean_is_told_of_all_that_moved(
    name: str, rule: Robust, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == name))
    record = aggregate(made.clients, tmp_path / "global", robust=rule, base=made.base, screening=None).ledger
    apart = distance_from_mean(made.kind, made.clients, tmp_path / "global")
    assert record.from_mean is not None
    assert record.from_mean["relative_error"] == pytest.approx(apart, rel=6e-3)


@each_pure
def test_an_absent_client_counts_as_an_update_of_zeros(rule: Coordinates) -> None:
    updates, still = [update(1), update(2)], update(3, scaling=0.0)
    absent = formed(updates, rule, [2.0, 1.0], total=4.5)
    assert torch.equal(absent, formed([*updates, still], rule, [2.0, 1.0, 1.5]))
    assert not torch.equal(absent, formed(updates, rule, [2.0, 1.0]))


@each_pure
@pytest.mark.parametrize("held", [1, 60, 250])
def test_the_runs_of_rows_do_not_change_the_result(
    rule: Coordinates, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [update(seed, blocks=2) for seed in range(5)]
    whole = formed(updates, rule)
    monkeypatch.setattr(target, "HELD", held)
    monkeypatch.setattr(target, "ROWS", 1)
    monkeypatch.setattr(coordinates, "SORTED", 7)
    assert torch.allclose(formed(updates, rule), whole, atol=1e-6)


@each_pure
def test_laws(rule: Coordinates) -> None:
    updates, n = [update(seed) for seed in range(5)], [1.0, 2.0, 3.0, 4.0, 5.0]
    whole = formed(updates, rule, n)
    size = float(whole.norm())
    turned = [rotated(each, seed) for seed, each in enumerate(updates)]
    assert float((formed(turned, rule, n) - whole).norm()) < 1e-5 * size
    assert float((formed(updates[::-1], rule, n[::-1]) - whole).norm()) < 1e-6 * size
    assert float((formed(updates, rule, [7e4 * weight / 3 for weight in n]) - whole).norm()) < 1e-6 * size
    assert torch.allclose(formed([updates[0]] * 4, rule), delta(updates[0]), atol=1e-5)


@each_pure
@pytest.mark.parametrize("times", [100.0, 1e70])
def test_hostile_clients_move_no_entry_beyond_the_honest_ones(rule: Coordinates, times: float) -> None:
    good = [update(seed) for seed in range(5)]
    found = formed([*good, boosted(update(50), times), boosted(update(51), times)], rule)
    dense = deltas(good)
    slack = 1e-5 * float(dense.abs().max())
    assert (found <= dense.max(dim=0).values + slack).all()
    assert (found >= dense.min(dim=0).values - slack).all()


def test_clipping_comes_before_the_rule() -> None:
    updates = [update(seed) for seed in range(3)]
    halved = Factors(updates[2].B, updates[2].A, updates[2].scaling / 2)
    clipped = formed(updates, Coordinates(scales={"client-002": 0.5}))
    assert torch.allclose(clipped, formed([*updates[:2], halved], Coordinates()))


@each_pure
def test_the_target_tells_its_distance_from_the_mean_and_of_what_is_written(rule: Coordinates) -> None:
    updates, n = [update(seed) for seed in range(4)], [1.0, 2.0, 3.0, 4.0]
    plan = coordinates.plan(module(updates, n), rule, "svd", Options(rank=2))
    assert plan.target is not None
    found = plan.target()
    mean = torch.einsum("m,meij->eij", torch.tensor(n).double() / 10, deltas(updates))
    assert found.from_mean.norm == pytest.approx(float(mean.square().sum()), rel=1e-5)
    assert found.from_mean.error == pytest.approx(float((found.M - mean).square().sum()), rel=1e-5)
    tail = torch.linalg.svdvals(found.M.double())[0, 2:].square().sum()
    error = found.squared_error(plan.merge())
    assert (error.error, error.norm) == pytest.approx((float(tail), float(found.M.double().square().sum())), rel=1e-5)
    assert plan.spec.r == 2


@each_rule
def test_the_result_reloads_at_a_rank_and_its_distance_is_told(
    rule: Robust, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    whole = aggregate(plain, tmp_path / "whole", robust=rule)
    cut = aggregate(plain, tmp_path / "cut", robust=rule, method="svd", rank=3)
    wanted, got = delta_weights(PLAIN, tmp_path / "whole"), delta_weights(PLAIN, tmp_path / "cut")
    apart = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted)
    size = sum(float(wanted[name].square().sum()) for name in wanted)
    assert cut.ledger.certificate.whole is not None
    assert cut.ledger.certificate.whole["relative_error"] == pytest.approx((apart / size) ** 0.5, rel=1e-2)
    assert whole.ledger.certificate.whole is not None
    assert whole.ledger.certificate.whole["relative_error"] < 1e-7
    assert whole.ledger.from_mean == cut.ledger.from_mean


@each_rule
def test_workers_and_the_order_of_the_clients_do_not_change_a_byte(
    rule: Robust, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    found = []
    for workers, folders in ((1, plain), (3, plain[::-1])):
        out = tmp_path / str(workers) / "global"
        aggregate(folders, out, robust=rule, method="svd", rank=3, workers=workers)
        found.append(digests(out))
    assert found[0] == found[1]


@each_rule
@pytest.mark.parametrize("kind", ["DoRA", "DoRA and plain LoRA"])
def test_dora_is_refused_naming_whose_it_is_and_what_can(
    kind: str, rule: Robust, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(each for each in KINDS if each.name == kind))
    with pytest.raises(RefusedError, match=r"cannot merge DoRA: .* geometric-median") as caught:
        aggregate(made.clients, tmp_path / "global", robust=rule, base=made.base)
    assert {problem.field for problem in caught.value.problems} == {"use_dora"}
    assert {problem.client for problem in caught.value.problems} <= {"org/client-0", "org/client-2"}
    assert list(tmp_path.iterdir()) == []


@each_rule
def test_a_bias_in_two_parts_is_refused_naming_it_and_what_can(
    rule: Robust, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(each for each in KINDS if each.name == "lora_bias beside trained biases"))
    with pytest.raises(RefusedError, match=r"by lora_bias, .* geometric-median") as caught:
        aggregate(made.clients, tmp_path / "global", robust=rule, base=made.base)
    assert {problem.field.rpartition(".")[2] for problem in caught.value.problems} == {"bias"}
    assert len(caught.value.problems) == 4
    assert list(tmp_path.iterdir()) == []


def test_the_median_withstands_a_boosted_minority_in_files(plain: tuple[Path, ...], tmp_path: Path) -> None:
    bad = edited(plain[0], tmp_path / "bad", tensors=lambda t: {name: 1e4 * value for name, value in t.items()})
    aggregate([bad, *plain], tmp_path / "global", robust=MEDIAN, weights="uniform")
    good = [delta_weights(PLAIN, folder) for folder in plain]
    for name, found in delta_weights(PLAIN, tmp_path / "global").items():
        assert float(found.abs().max()) <= max(float(each[name].abs().max()) for each in good) * 1.00001

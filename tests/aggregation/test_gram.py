"""The Gram matrix against dense inner products of what PEFT makes of each client."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_merge.aggregation import gram, inner_products
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.schedule import pool
from lora_merge.assembly import federation_of
from lora_merge.checkpoint.similarity import gram_of
from lora_merge.errors import RefusedError
from lora_merge.intake import Reading, accepted
from tests.adapters import KINDS, PLAIN, Kind, edited
from tests.aggregation.updates import boosted, delta, deltas, module, names, rotated, update
from tests.conftest import Federations
from tests.dense import delta_weights

# PEFT adds out_proj's update twice when it merges an attention, and a tied head's rows count twice as dense tensors.
DENSE = [
    kind
    for kind in KINDS
    if not kind.by_layer and kind.name not in ("MultiheadAttention", "tokens of a tied embedding")
]


def measured(folders: tuple[Path, ...], base: Path | None) -> Gram:
    with accepted(folders, "uniform", Reading()) as inputs, pool(1) as threads:
        federation = federation_of(inputs, 1.0, base, torch.device("cpu"), to_measure=base is not None)
        return gram_of(federation, threads)


def of(updates: list, n: list[float] | None = None) -> Gram:  # type: ignore[type-arg]
    found = module(updates, n)
    weights = [share.n for share in found.shares]
    return gram.total(names(found), weights, {"layer": inner_products.of_module(found, names(found))})


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-9 * wanted.abs().max())


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.name)
def test_it_holds_the_inner_products_of_the_dense_updates(kind: Kind, federations: Federations) -> None:
    made = federations(kind)
    dense = [delta_weights(kind, folder) for folder in made.clients]
    found = measured(made.clients, made.base)
    for i, one in enumerate(dense):
        for j, two in enumerate(dense):
            wanted = sum(float((one[name] * two[name]).sum()) for name in one.keys() & two.keys())
            assert float(found.matrix[i, j]) == pytest.approx(
                wanted, rel=1e-5, abs=1e-5 * float(found.norms.max()) ** 2
            )
    assert found.not_measured == ()


def test_it_is_the_sum_over_modules_whose_norms_it_keeps(plain: tuple[Path, ...]) -> None:
    found = measured(plain, None)
    assert len(found.modules) == 4
    squares = sum(found.modules.values())
    assert torch.allclose(torch.as_tensor(squares), found.norms.square())
    for i, folder in enumerate(plain):
        whole = sum(float(change.square().sum()) for change in delta_weights(PLAIN, folder).values())
        assert float(found.norms[i]) == pytest.approx(whole**0.5, rel=1e-6)


@pytest.mark.parametrize(("tile", "rank"), [(1, 1024), (300, 1024), (1 << 23, 1), (1 << 23, 7)])
def test_reading_the_clients_by_tiles_changes_nothing(tile: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [update(seed, r=1 + seed % 4, blocks=2, scaling=0.5 + seed) for seed in range(7)]
    whole = of(updates).matrix
    monkeypatch.setattr(inner_products, "TILE", tile)
    monkeypatch.setattr(inner_products, "TILE_RANK", rank)
    assert near(of(updates).matrix, whole)
    flat = deltas(updates).flatten(1)
    assert near(whole, flat @ flat.T)


def test_norms_cosines_distances_and_influence_are_those_of_the_dense_updates() -> None:
    updates, n = [update(seed) for seed in range(4)], [1.0, 5.0, 2.0, 0.5]
    found, flat = of(updates, n), deltas(updates).flatten(1)
    p = torch.tensor(n).double() / sum(n)
    mean = p @ flat
    assert near(found.norms, flat.norm(dim=1))
    assert near(found.cosines, torch.nn.functional.cosine_similarity(flat[:, None], flat, dim=2))
    assert near(found.distances, torch.cdist(flat, flat))
    assert near(found.cosines_to(found.p), flat @ mean / flat.norm(dim=1) / mean.norm())
    for i in range(4):
        rest = [j for j in range(4) if j != i]
        without = (p[rest] / p[rest].sum()) @ flat[rest]
        assert float(found.influence[i]) == pytest.approx(float((mean - without).norm() / mean.norm()))


def test_the_bias_of_lora_b_counts() -> None:
    with_bias = replace(update(1), bias=torch.arange(12.0))
    found = of([with_bias, update(2)])
    wanted = delta(with_bias).square().sum() + (2.0 * torch.arange(12.0).double()).square().sum()
    assert float(found.matrix[0, 0]) == pytest.approx(float(wanted))
    assert inner_products.squared_norm(with_bias) == pytest.approx(float(wanted))
    assert float(found.matrix[0, 1]) == pytest.approx(float((delta(with_bias) * delta(update(2))).sum()))


def test_a_rotated_client_has_the_same_row() -> None:
    updates = [update(seed) for seed in range(3)]
    turned = of([rotated(updates[0]), *updates[1:]]).matrix
    assert float((turned - of(updates).matrix).abs().max()) < 1e-5 * float(turned.max())


def test_an_update_of_zeros_has_no_cosine_and_one_client_alone_is_all_the_influence() -> None:
    still = replace(update(1), B=torch.zeros(1, 12, 3))
    found = of([still, update(2)])
    assert found.cosines[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(found.influence).all()
    assert of([update(2)]).influence.tolist() == [1.0]
    assert of([still, still]).influence.tolist() == [0.0, 0.0]


def test_a_client_boosted_to_the_end_of_fp32_leaves_the_others_as_they_are() -> None:
    updates = [update(seed) for seed in range(3)]
    found = of([*updates, boosted(update(9), 1e70)])
    assert torch.isfinite(found.matrix).all()
    assert torch.equal(found.matrix[:3, :3], of([*updates, update(9)]).matrix[:3, :3])
    assert float(found.norms[3]) == pytest.approx(1e70 * float(delta(update(9)).norm()), rel=1e-5)


def test_what_needs_the_base_is_named_where_there_is_none(federations: Federations) -> None:
    kind = next(kind for kind in KINDS if kind.name == "modules_to_save")
    found = measured(federations(kind).clients, None)
    assert found.not_measured
    assert all("lm_head" in name or "layernorm" in name for name in found.not_measured)
    assert found.norms.min() > 0


def test_a_tensor_that_is_not_finite_is_refused_with_its_client(plain: tuple[Path, ...], tmp_path: Path) -> None:
    bad = edited(plain[0], tmp_path / "bad", tensors=lambda t: {k: v * float("nan") for k, v in t.items()})
    with pytest.raises(RefusedError) as caught:
        measured((bad, *plain[1:]), None)
    assert {problem.client for problem in caught.value.problems} == {"org/bad"}


def test_workers_do_not_change_a_bit(plain: tuple[Path, ...]) -> None:
    with accepted(plain, "uniform", Reading()) as inputs:
        federation = federation_of(inputs, 1.0, None, torch.device("cpu"))
        found = []
        for workers in (1, 3):
            with pool(workers) as threads:
                found.append(gram_of(federation, threads).matrix)
    assert torch.equal(*found)

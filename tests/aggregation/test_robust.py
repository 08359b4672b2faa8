"""The weight rules against slow dense twins, and how far a few hostile clients can move each of them."""

import math

import pytest
import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import gram, inner_products, robust
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.robust import Robust, RobustError, reweigh
from tests.aggregation.updates import boosted, delta, deltas, module, names, rotated, update

WEIGHING = [
    Robust(clip="1x"),
    Robust(rule="geometric-median"),
    Robust(rule="krum", byzantine=1),
    Robust(rule="multi-krum", byzantine=1),
    Robust(clip="0.8x", rule="geometric-median"),
]
each_rule = pytest.mark.parametrize("rule", WEIGHING, ids=lambda rule: f"{rule.rule} {rule.clip}")


def of(updates: list[Factors], n: list[float] | None = None) -> Gram:
    found = module(updates, n)
    weights = [share.n for share in found.shares]
    return gram.total(names(found), weights, {"layer": inner_products.of_module(found, names(found))})


def honest(count: int, spread: float = 0.3) -> list[Factors]:
    """Clients around one update."""
    common = update(100)
    return [
        Factors(common.B + spread * update(seed).B, common.A + spread * update(seed).A, 2.0) for seed in range(count)
    ]


def result(updates: list[Factors], rule: Robust, n: list[float] | None = None) -> Tensor:
    """The dense result of the rule's weights."""
    found = reweigh(of(updates, n), rule)
    shares = torch.tensor(found.weights, dtype=torch.float64) / found.total
    return torch.einsum("m,meij->eij", shares, deltas(updates))


def geometric_median(points: Tensor, p: Tensor) -> Tensor:
    """By gradient-free descent on the dense points, far slower: Weiszfeld without smoothing from the mean."""
    v = p @ points
    for _ in range(20_000):
        w = p / (points - v).norm(dim=1).clamp(min=1e-300)
        v = (w / w.sum()) @ points
    return v


def test_clipping_scales_what_is_larger_than_the_multiple_of_the_median_norm_and_gives_its_weight_to_nobody() -> None:
    updates = [boosted(update(seed), factor) for seed, factor in enumerate([1.0, 1.1, 0.9, 50.0])]
    sizes = deltas(updates).flatten(1).norm(dim=1)
    limit = float(1.5 * (sizes.sort().values[1] + sizes.sort().values[2]) / 2)
    found = reweigh(of(updates, [1.0, 2.0, 3.0, 4.0]), Robust(clip="1.5x"))
    assert found.limit == pytest.approx(limit)
    assert found.total == 10.0
    wanted = [n * min(1.0, limit / float(size)) for n, size in zip([1, 2, 3, 4], sizes, strict=True)]
    assert found.weights == pytest.approx(wanted)
    assert sum(found.weights) < 10.0


def test_a_number_clips_at_that_norm_and_off_at_none() -> None:
    updates = [update(seed) for seed in range(3)]
    assert reweigh(of(updates), Robust(clip=5.0)).limit == 5.0
    assert reweigh(of(updates), Robust(clip="5")).scales == reweigh(of(updates), Robust(clip=5.0)).scales
    assert not Robust(clip="off").weighs
    assert not Robust().weighs


@pytest.mark.parametrize("n", [[1.0] * 6, [1.0, 2.0, 3.0, 1.0, 2.0, 2.5]])
def test_the_geometric_median_is_that_of_the_dense_points(n: list[float]) -> None:
    updates = [update(seed) for seed in range(6)]
    points = deltas(updates).flatten(1)
    wanted = geometric_median(points, torch.tensor(n).double() / sum(n))
    found = result(updates, Robust(rule="geometric-median"), n).flatten()
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_no_point_near_the_geometric_median_is_nearer_to_the_clients() -> None:
    updates, n = [*honest(5), boosted(update(7), 20.0)], torch.tensor([1.0, 2, 1, 3, 1, 2]).double()
    points = deltas(updates).flatten(1)
    median = result(updates, Robust(rule="geometric-median"), n.tolist()).flatten()

    def cost(v: Tensor) -> float:
        return float(n @ (points - v).norm(dim=1))

    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            step = torch.randn(len(median), generator=generator, dtype=torch.float64)
            assert cost(median + size * step / step.norm()) >= cost(median) - 1e-9


@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_krum_takes_the_client_whose_nearest_others_are_nearest(byzantine: int) -> None:
    updates = [*honest(6), boosted(update(8), 9.0)]
    points = deltas(updates).flatten(1)
    scores = []
    for i in range(7):
        apart = sorted(float((points[i] - points[j]).square().sum()) for j in range(7) if j != i)
        scores.append(sum(apart[: 7 - byzantine - 2]))
    n = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    order = sorted(range(7), key=scores.__getitem__)
    one = reweigh(of(updates, n), Robust(rule="krum", byzantine=byzantine))
    assert one.weights == tuple(28.0 if i == order[0] else 0.0 for i in range(7))
    kept = order[: 7 - byzantine - 2]
    many = reweigh(of(updates, n), Robust(rule="multi-krum", byzantine=byzantine))
    wanted = [28.0 * n[i] / sum(n[k] for k in kept) if i in kept else 0.0 for i in range(7)]
    assert many.weights == pytest.approx(wanted)


@pytest.mark.parametrize(("m", "byzantine"), [(2, 0), (4, 1), (6, 2)])
def test_krum_of_too_few_clients_is_refused_in_numbers(m: int, byzantine: int) -> None:
    with pytest.raises(RobustError, match=f"among {2 * byzantine + 3} or more; here are {m}"):
        reweigh(of(honest(m)), Robust(rule="krum", byzantine=byzantine))


@each_rule
def test_rules_keep_the_total_but_for_what_is_clipped(rule: Robust) -> None:
    found = reweigh(of(honest(6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), rule)
    assert found.total == pytest.approx(21.0)
    assert sum(found.weights) == pytest.approx(21.0) if not rule.clips else sum(found.weights) < 21.0
    if not rule.clips:
        assert sum(found.weights) == found.total  # to the bit: tensors that were trained whole then need no base


@each_rule
def test_rotating_a_client_changes_nothing(rule: Robust) -> None:
    updates = [*honest(5), boosted(update(7), 3.0)]
    turned = [rotated(each, seed) for seed, each in enumerate(updates)]
    wanted = result(updates, rule)
    assert float((result(turned, rule) - wanted).norm()) < 1e-4 * float(wanted.norm())


@each_rule
def test_the_order_of_the_clients_changes_nothing(rule: Robust) -> None:
    updates, n = [*honest(5), boosted(update(7), 3.0)], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    wanted = result(updates, rule, n)
    assert float((result(updates[::-1], rule, n[::-1]) - wanted).norm()) < 1e-9 * float(wanted.norm())


@each_rule
def test_scaling_every_weight_changes_nothing(rule: Robust) -> None:
    updates, n = [*honest(5), boosted(update(7), 3.0)], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    wanted = result(updates, rule, n)
    scaled = result(updates, rule, [1e5 * weight / 7 for weight in n])
    assert float((scaled - wanted).norm()) < 1e-9 * float(wanted.norm())


@each_rule
def test_identical_clients_give_that_client(rule: Robust) -> None:
    if rule.rule and rule.clip:
        return  # clipped below its own norm it is another client
    found = result([update(1)] * 6, rule, [1.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    assert torch.allclose(found, delta(update(1)))


@pytest.mark.parametrize("times", [10.0, 1e6, 1e60, -1.0, -1e60])
@each_rule
def test_two_hostile_clients_of_any_size_move_every_rule_by_a_bounded_way_and_the_mean_without_bound(
    rule: Robust, times: float
) -> None:
    good = honest(6)
    if rule.byzantine is not None:
        rule = Robust(rule=rule.rule, byzantine=2)
    bad = boosted(update(50), abs(times))
    bad = Factors(bad.B * math.copysign(1.0, times), bad.A, bad.scaling)
    center = deltas(good).mean(dim=0)
    radius = max(float((each - center).norm()) for each in deltas(good))
    size = float(center.norm()) + radius
    moved = float((result([*good, bad, bad], rule) - center).norm())
    assert moved <= (2 * radius if rule.rule and not rule.clips else 2 * size)
    mean = torch.cat([deltas(good), deltas([bad, bad])]).mean(dim=0)
    if abs(times) > 1:
        assert float((mean - center).norm()) > 0.1 * abs(times) * float(delta(update(50)).norm())


def test_the_weighted_median_is_where_half_of_the_weight_lies_on_either_side() -> None:
    values = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 7.0], [10.0, 1.0]])
    n = torch.tensor([1.0, 1.0, 1.0, 1.0]).double()
    assert robust.weighted_median(values, n).tolist() == [2.5, 3.0]
    assert robust.weighted_median(values, torch.tensor([5.0, 1.0, 1.0, 1.0]).double()).tolist() == [3.0, 0.0]
    assert robust.weighted_median(values, torch.tensor([1.0, 1.0, 2.0, 4.0]).double()).tolist() == [6.5, 1.0]


def test_repeating_clients_is_weighing_them() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 50, generator=generator)
    n = torch.tensor([1, 3, 2, 1])
    repeated, ones = values.repeat_interleave(n, dim=0), torch.ones(7).double()
    assert torch.equal(robust.weighted_median(values, n.double()), repeated.median(dim=0).values)
    for trim in (0.1, 1 / 7, 0.3, 0.49):
        weighed, plain = robust.trimmed_mean(values, n.double(), trim), robust.trimmed_mean(repeated, ones, trim)
        assert torch.allclose(weighed, plain, atol=1e-6)


def test_the_trimmed_mean_of_equal_weights_is_the_mean_of_the_middle() -> None:
    values = torch.randn(10, 30, generator=torch.Generator().manual_seed(4))
    wanted = values.sort(dim=0).values[2:8].mean(dim=0)
    assert torch.allclose(robust.trimmed_mean(values, torch.full((10,), 7.0).double(), 0.2), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Robust(rule="mode"), "--robust must be one of"),
        (Robust(rule="krum"), "needs --byzantine"),
        (Robust(rule="krum", byzantine=-1), "from 0 up"),
        (Robust(rule="median", byzantine=1), "--byzantine is of"),
        (Robust(rule="median", trim=0.1), "--trim is of"),
        (Robust(rule="trimmed-mean", trim=0.5), "below 0.5"),
        (Robust(rule="trimmed-mean", trim=math.nan), "below 0.5"),
        (Robust(clip="x"), "--clip must be"),
        (Robust(clip="-1x"), "--clip must be"),
        (Robust(clip=math.inf), "--clip must be"),
        (Robust(clip=True), "--clip must be"),
    ],
)
def test_choices_that_make_no_sense_are_refused(wrong: Robust, said: str) -> None:
    with pytest.raises(RobustError, match=said):
        robust.check(wrong)


def test_the_record_of_a_choice_is_read_back() -> None:
    for rule in (*WEIGHING, Robust(rule="median"), Robust(rule="trimmed-mean", trim=0.25), Robust()):
        assert robust.robust_of(rule.to_json()) == rule
    assert Robust(rule="trimmed-mean").to_json() == {"robust": "trimmed-mean", "trim": 0.1}

"""How large values trained whole are: near the dense distances, and no honest federation has one that is far away."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lora_merge.adapter import Factors, FullTensor, TokenRows
from lora_merge.aggregation import apart
from lora_merge.aggregation.apart import Piece, pieces_of, sketch_of_value, wholes
from lora_merge.screening.stops import oversized

HEAD: Piece = ("head.weight", "")
NAMES = "abcdefghij"
drawn = SimpleNamespace(seed=0)  # of the signs that a test takes where it names none


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, params=[["one", "two"], ["one", "other"]])
def signs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold for the signs of whatever files."""
    monkeypatch.setattr(drawn, "seed", apart.seed_from(request.param))


def sketch(tensor: Tensor, seed: int | None = None) -> bytes:
    return sketch_of_value(tensor, drawn.seed if seed is None else seed)


def values(tensors: list[Tensor], seed: int | None = None) -> dict[str, dict[Piece, bytes]]:
    return {name: {HEAD: sketch(tensor, seed)} for name, tensor in zip(NAMES, tensors, strict=False)}


def named(
    tensors: list[Tensor], *, norms: float = 1.0, base: Tensor | None = None, seed: int | None = None
) -> list[str]:
    """The clients that the stop names, all of which have the same low-rank norm."""
    clients = values(tensors, seed)
    found = wholes(clients, {} if base is None else {HEAD: sketch(base, seed)}, len(clients))
    return [problem.client for problem in oversized(dict.fromkeys(clients, norms), found)]


@pytest.mark.parametrize("shape", [(300, 50), (4096,), (5000,), (40, 7, 3, 3), (9000, 2)])
def test_a_size_is_near_the_distance_from_the_base(shape: tuple[int, ...]) -> None:
    base = random(0, *shape)
    clients = values([base + 1e-3 * random(seed, *shape) for seed in (1, 2, 3)])
    for seed, found in enumerate(wholes(clients, {HEAD: sketch(base)}, 3).values(), start=1):
        assert found.size == pytest.approx(1e-3 * float(random(seed, *shape).norm()), rel=0.3)
        assert found.from_base


def test_a_change_of_rank_one_is_measured_too() -> None:
    base = random(0, 200, 300)
    change = torch.outer(random(1, 200), random(2, 300))
    (found,) = wholes(values([base + change]), {HEAD: sketch(base)}, 1).values()
    assert found.size == pytest.approx(float(change.norm()), rel=0.6)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("far", range(3))
def test_without_the_base_one_far_from_the_others_is_named_whoever_it_is(count: int, far: int) -> None:
    tensors = [random(0, 60, 40) + 0.01 * random(seed, 60, 40) for seed in range(1, count + 1)]
    assert named(tensors, norms=0.3) == []
    tensors[far] = tensors[far] + 1.0 * random(99, 60, 40)
    assert named(tensors, norms=0.3) == [NAMES[far]]
    tensors[far] = torch.full((60, 40), 3e38)
    assert named(tensors, norms=0.3) == [NAMES[far]]


def test_a_minority_that_hands_in_the_same_far_value_is_named() -> None:
    honest = [random(0, 60, 40) + 0.01 * random(seed, 60, 40) for seed in range(1, 4)]
    hostile = random(0, 60, 40) + random(9, 60, 40)
    assert named([*honest, hostile, hostile], norms=0.3) == ["d", "e"]


@pytest.mark.parametrize("count", range(3, 9))
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(50, 30), (512,), (2, 64)])
def test_honest_noise_of_sizes_up_to_three_times_each_others_stops_nobody(
    count: int, scale: float, shape: tuple[int, ...]
) -> None:
    sizes = [scale * (1 + 2 * (i % 3) / 2) for i in range(count)]
    for base, seed in ((random(0, *shape), 1), (torch.zeros(shape), 50)):
        tensors = [base + size * random(seed + i, *shape) for i, size in enumerate(sizes)]
        for norms in (scale, 10 * scale * math.sqrt(math.prod(shape))):
            assert named(tensors, norms=norms) == []
            assert named(tensors, norms=norms, base=base) == []


@pytest.mark.parametrize("count", range(3, 9))
@pytest.mark.parametrize("own", [0.2, 0.5, 2.0])
def test_who_trained_longer_than_others_that_moved_alike_is_not_stopped(count: int, own: float) -> None:
    """One client's low-rank norm and its share of what all have moved are 3.5 times the others'."""
    base, common = random(0, 60, 40), random(1, 60, 40)
    longer = [1.0] * (count - 1) + [3.5]
    tensors = [base + k * (common + own * random(2 + i, 60, 40)) for i, k in enumerate(longer)]
    clients = values(tensors)
    norms = dict(zip(clients, longer, strict=True))
    assert oversized(norms, wholes(clients, {}, count)) == []
    assert oversized(norms, wholes(clients, {HEAD: sketch(base)}, count)) == []


@pytest.mark.parametrize("base", [None, random(0, 30, 20)], ids=["from the others", "from the base"])
def test_copies_of_the_base_make_no_trained_one_far(base: Tensor | None) -> None:
    still, moved = random(0, 30, 20), random(0, 30, 20) + 0.1 * random(1, 30, 20)
    assert named([still, still, moved], base=base) == []
    assert named([still] * 7 + [moved, moved + 0.1 * random(2, 30, 20)], base=base) == []
    assert named([still, still, still], base=base) == []


def test_a_value_is_judged_as_a_part_of_the_whole_update() -> None:
    """A tensor that hardly counts beside the low-rank update may differ as it likes: so may an honest client's."""
    tensors = [random(0, 30, 20) + 1e-4 * random(seed, 30, 20) for seed in (1, 2)]
    tensors.append(random(0, 30, 20) + 1e-2 * random(3, 30, 20))
    assert named(tensors, norms=1.0) == []
    assert named(tensors, norms=0.01) == ["c"]


def test_what_most_have_is_held_against_those_that_have_it() -> None:
    """Four of seven trained a head whose change is far larger than any low-rank update here."""
    base = random(0, 60, 40)
    heads = values([base + 0.5 * random(seed, 60, 40) for seed in (1, 2, 3, 4)])
    norms = dict.fromkeys([*heads, "p", "q", "r"], 1.0)
    for known in ({}, {HEAD: sketch(base)}):
        assert oversized(norms, wholes(heads, known, len(norms))) == []
    heads["b"] = {HEAD: sketch(base + 50 * random(2, 60, 40))}
    for known in ({}, {HEAD: sketch(base)}):
        assert [each.client for each in oversized(norms, wholes(heads, known, len(norms)))] == ["b"]


@pytest.mark.parametrize("still", [0, 4, 7], ids=["others lack it", "some have it as it was", "all others do"])
@pytest.mark.parametrize("with_base", [False, True])
def test_few_that_alone_have_a_tensor_or_moved_it_do_not_say_what_is_usual(still: int, with_base: bool) -> None:
    base = random(0, 60, 40)
    tensors = [base + 50 * random(seed, 60, 40) for seed in (1, 2, 3)] + [base] * still
    norms = dict.fromkeys(NAMES, 1.0)
    found = oversized(norms, wholes(values(tensors), {HEAD: sketch(base)} if with_base else {}, len(norms)))
    assert [each.client for each in found] == ["a", "b", "c"]


def test_what_too_few_have_is_measured_from_the_base_only() -> None:
    base = random(0, 60, 40)
    pair = values([base + 0.01 * random(1, 60, 40), base + 50 * random(2, 60, 40)])
    known = {HEAD: sketch(base)}
    norms = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert wholes(pair, {}, 3) == {}
    assert [each.client for each in oversized(norms, wholes(pair, known, 3))] == ["b"]


def test_order_and_scale_do_not_matter() -> None:
    base = random(0, 30, 20)
    tensors = [base + size * random(seed, 30, 20) for seed, size in enumerate((0.1, 0.2, 9.0, 0.1), start=1)]
    clients = values(tensors)
    found = wholes(clients, {}, 4)
    for order in itertools.permutations(clients):
        assert wholes({client: clients[client] for client in order}, {}, 4) == found
    scaled = wholes(values([8 * tensor for tensor in tensors]), {}, 4)
    assert [each.size for each in scaled.values()] == [8 * each.size for each in found.values()]
    assert [each.usual_apart for each in scaled.values()] == [8 * each.usual_apart for each in found.values()]


def test_the_signs_go_by_all_files_in_any_order() -> None:
    assert apart.seed_from(["one", "two"]) == apart.seed_from(["two", "one"])
    assert len({apart.seed_from(files) for files in (["one", "two"], ["one", "other"], ["one"])}) == 3


def test_whoever_knew_the_signs_could_hide_and_what_he_hands_in_changes_them() -> None:
    base, change = random(0, 20, 30), 100 * random(1, 20, 30)
    U, V = apart._signs(20, 30, drawn.seed)
    rows = torch.einsum("jr,jkc->jkrc", U, V).reshape(apart.ROWS * apart.OF_EACH, -1).double()
    Q, whole = torch.linalg.qr(rows.mT).Q, change.double().flatten()
    hidden = (whole - Q @ (Q.mT @ whole)).float().reshape(20, 30)
    assert float(hidden.norm()) > 0.8 * float(change.norm())
    tensors = [base + 0.01 * random(seed, 20, 30) for seed in (2, 3)]
    tensors.append(base + hidden)
    assert named(tensors) == []
    assert named(tensors, seed=apart.seed_from(["one", "two, with this in it"])) == ["c"]


def test_the_pieces_of_each_kind_of_update() -> None:
    plain = Factors(random(1, 1, 6, 2), random(2, 1, 2, 5), 1.0)
    rows = TokenRows((7, 3), random(3, 2, 4))
    magnitude = torch.ones(6)
    assert dict(pieces_of("m", plain)) == {}
    assert [piece for piece, _ in pieces_of("m", Factors(plain.B, plain.A, 1.0, magnitude=magnitude))] == [
        ("m", "magnitude")
    ]
    assert [piece for piece, _ in pieces_of("m", rows)] == [("m", "7"), ("m", "3")]
    assert [piece for piece, _ in pieces_of("m.weight", FullTensor(magnitude))] == [("m.weight", "")]

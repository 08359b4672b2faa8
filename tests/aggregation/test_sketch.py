"""What is kept of an update while it is read: exact norms, and sketches that know a copy however it is factored."""

import math
from dataclasses import replace

import pytest
import torch

from lora_merge.adapter import Adapter, Factors, Spec, spec_of
from lora_merge.aggregation.sketch import Sketched, cosines, cosines_to_blocks, sketch_of, sketches_of_blocks


class Plain(dict[str, Factors]):
    """An adapter in memory."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: spec_of(update) for name, update in self.items()}


def update(seed: int, *, blocks: int = 1, d_out: int = 12, d_in: int = 9, r: int = 3) -> Factors:
    random = torch.Generator().manual_seed(seed)
    B = torch.randn(blocks, d_out, r, generator=random)
    return Factors(B, torch.randn(blocks, r, d_in, generator=random), 0.5)


def sketched(adapter: Adapter) -> Sketched:
    """`adapter`, all of which was read."""
    found = Sketched(adapter)
    for module in adapter.specs:
        found[module]
    return found


def dense(factors: Factors) -> torch.Tensor:
    return factors.scaling * factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_norm_is_that_of_the_dense_update(blocks: int) -> None:
    adapter = Plain(one=update(1, blocks=blocks), two=update(2, d_in=20))
    expected = math.hypot(*(float(dense(each).norm()) for each in adapter.values()))
    assert sketched(adapter).norm == pytest.approx(expected, rel=1e-6)


def test_the_bias_of_lora_b_counts_as_part_of_the_update() -> None:
    factors = replace(update(1), bias=torch.ones(12))
    expected = math.hypot(float(dense(factors).norm()), 0.5 * math.sqrt(12))
    assert sketched(Plain(one=factors)).norm == pytest.approx(expected, rel=1e-6)


def test_an_adapter_of_which_nothing_was_read_has_no_norm() -> None:
    assert Sketched(Plain(one=update(1))).norm is None


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_factors_beyond_the_range_of_fp32_products_still_have_their_norm(size: float) -> None:
    factors = replace(update(1), A=update(1).A * size)
    assert sketched(Plain(one=factors)).norm == pytest.approx(size * float(dense(update(1)).norm()), rel=1e-6)


def test_rotated_factors_have_the_same_sketch() -> None:
    factors = update(1)
    R = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3))).Q
    rotated = replace(factors, B=factors.B @ R, A=R.mT @ factors.A)
    torch.testing.assert_close(sketch_of(rotated)[1:], sketch_of(factors)[1:], rtol=1e-4, atol=1e-4)


def test_scaled_and_rotated_copies_are_found_and_others_are_not() -> None:
    names = [f"module.{index}" for index in range(20)]
    first = Plain({name: update(seed) for seed, name in enumerate(names)})
    copy = Plain({name: replace(each, B=each.B * 3) for name, each in first.items()})
    near = Plain({name: replace(each, B=each.B + 0.02 * torch.randn_like(each.B)) for name, each in first.items()})
    other = Plain({name: update(100 + seed) for seed, name in enumerate(names)})
    found = cosines({"a": sketched(first), "b": sketched(copy), "c": sketched(near), "d": sketched(other)}, above=0.99)
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "b"] == pytest.approx(1)
    assert 0.999 < found["a", "c"] < 1


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_bias_of_lora_b_is_a_column_of_the_sketch(blocks: int) -> None:
    names, size = [f"module.{index}" for index in range(20)], blocks * 12
    biases = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]

    def client(first: int, own: int, times: float) -> Sketched:
        each = {name: update(first + seed, blocks=blocks) for seed, name in enumerate(names)}
        return sketched(Plain({n: replace(u, bias=times * biases[own + i]) for i, (n, u) in enumerate(each.items())}))

    payload = {"a": client(0, 0, 1e3), "b": client(100, 0, 1e3)}  # all of what they do is one bias
    assert cosines(payload, above=0.99) == {("a", "b"): pytest.approx(1, abs=1e-3)}
    apart = {"a": client(0, 0, 1e3), "b": client(0, 20, 1e3)}  # nothing of it is
    assert cosines(apart, above=0.5) == {}
    assert cosines({"a": client(0, 0, 1e-3), "b": client(0, 20, 1e-3)}, above=0.99) == {("a", "b"): pytest.approx(1)}


def test_the_sketched_cosine_is_near_the_true_one() -> None:
    names = [f"module.{index}" for index in range(50)]
    first = Plain({name: update(seed) for seed, name in enumerate(names)})
    second = Plain({name: replace(each, B=each.B + 0.3 * update(500).B) for name, each in first.items()})
    one, two = (torch.stack([dense(each[name]) for name in names]) for each in (first, second))
    true = float((one * two).sum() / (one.norm() * two.norm()))
    (found,) = cosines({"a": sketched(first), "b": sketched(second)}, above=0.5).values()
    assert 1 - found == pytest.approx(1 - true, rel=0.4)


def test_what_is_read_twice_is_sketched_once() -> None:
    updates = Plain(one=update(1))
    adapter = sketched(updates)
    before = adapter.numbers.clone()
    updates["one"] = update(2)
    assert adapter["one"] is updates["one"]
    assert torch.equal(adapter.numbers, before)


def test_what_was_not_read_counts_as_nothing() -> None:
    whole, part = Plain(one=update(1), two=update(2)), Plain(one=update(1))
    half = Sketched(whole)
    half["one"]
    assert half.norm == sketched(part).norm
    assert cosines({"a": half, "b": sketched(part)}, above=0.99) == {("a", "b"): pytest.approx(1)}


@pytest.mark.parametrize("blocks", [1, 3])
def test_updates_that_lie_side_by_side_have_the_sketches_that_each_has_alone(blocks: int) -> None:
    parts = [replace(update(seed, blocks=blocks, r=r), scaling=1.0) for seed, r in enumerate((1, 3, 2))]
    B, A = torch.cat([each.B for each in parts], dim=2), torch.cat([each.A for each in parts], dim=1)
    found = sketches_of_blocks(Factors(B, A, 1.0), [0, 1, 4, 4, 6])  # the third client has nothing here
    alone = [sketch_of(each)[1:] for each in parts]
    nothing = torch.zeros_like(alone[0])
    torch.testing.assert_close(found, torch.stack([*alone[:2], nothing, alone[2]]), rtol=1e-4, atol=1e-4)


def test_an_update_is_held_against_each_of_those_that_are_stored() -> None:
    stored = [replace(update(seed), scaling=1.0) for seed in range(4)]
    rows = {"layer": torch.stack([sketch_of(each)[1:] for each in stored])}
    copy, other = sketched(Plain(layer=stored[2])), sketched(Plain(layer=update(9)))
    found = cosines_to_blocks({"copy": copy, "other": other}, ["a", "b", "c", "d"], rows, above=0.99)
    assert found == {("c", "copy"): pytest.approx(1)}

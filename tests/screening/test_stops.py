"""The stops and the warnings, as laws on plain numbers."""

from collections.abc import Sequence

import pytest

from lora_merge.errors import Problem, UsageError
from lora_merge.screening.stops import (
    Copy,
    cap_of,
    dominant,
    identical,
    nearly_identical,
    outliers,
    ways_past_dominance,
)

COUNTS = {"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0}


def names(problems: Sequence[Problem]) -> list[str]:
    return [problem.client for problem in problems]


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({**COUNTS, "e": 100.0}, []),
        ({**COUNTS, "e": 400.0}, []),  # half of all, and not above
        ({**COUNTS, "e": 401.0}, ["e"]),  # above half of all
        ({**COUNTS, "f": 100.0, "e": 500.0}, []),  # five times the median
        ({**COUNTS, "f": 100.0, "e": 501.0}, ["e"]),
        ({**COUNTS, "e": 1e18}, ["e"]),
        ({"a": 1.0, "b": 1.0, "c": 1e9}, []),  # of three, nobody is an outlier
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 7.0}, ["d"]),  # who has no examples says nothing of what is usual
    ],
)
def test_a_count_far_above_the_others_is_named(counts: dict[str, float], found: list[str]) -> None:
    assert names(dominant(counts)) == found


def test_the_cap_that_the_hint_names_lets_the_merge_go_on() -> None:
    for counts in ({**COUNTS, "e": 1e9}, {"a": 10.0, "b": 50.0, "c": 150.0, "d": 1000.0}):
        hint = ways_past_dominance(counts)
        assert "--allow-dominant" in hint
        assert "--weights" in hint
        cap = cap_of(hint.partition("--cap-examples ")[2].split()[0], list(counts.values()))
        assert cap is not None
        assert dominant({client: min(count, cap) for client, count in counts.items()}) == []


def test_a_cap_is_a_number_or_a_multiple_of_the_median() -> None:
    assert cap_of("250", [1, 2, 300]) == 250
    assert cap_of("2.5x", [10, 20, 300]) == 50
    assert cap_of(7, [1]) == 7
    assert cap_of(None, [1]) is None


@pytest.mark.parametrize("cap", ["0", "-3", "nan", "inf", "x", "many", "5xx", ""])
def test_a_cap_that_is_none_is_refused(cap: str) -> None:
    with pytest.raises(UsageError, match="--cap-examples must be"):
        cap_of(cap, [1, 2])


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ({"a": 1.0, "b": 1.0, "c": 5.0}, []),
        ({"a": 1.0, "b": 1.0, "c": 5.1}, ["c"]),
        ({"a": 1.0, "b": float("inf"), "c": 1.0}, ["b"]),
        ({"a": 1.0, "c": 100.0}, []),  # of two, neither is the outlier
        ({"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}, []),  # an update of nothing does not make the others large
    ],
)
def test_an_update_far_larger_than_the_others_is_named(norms: dict[str, float], found: list[str]) -> None:
    assert names(outliers(norms)) == found


def test_an_arrival_is_held_against_those_that_are_in() -> None:
    assert names(outliers({"late": 10.0}, {"a": 1.0, "b": 1.0})) == ["late"]
    assert names(dominant({"late": 1000.0}, COUNTS)) == ["late"]
    assert names(dominant({"late": 100.0}, {**COUNTS, "e": 1e9})) == ["e"]
    assert dominant({"late": 100.0}, {**COUNTS, "e": 1e9}, let_in={"e"}) == []
    assert names(outliers({"late": 1.0}, {"a": 100.0, "b": 1.0})) == ["a"]
    assert outliers({"late": 1.0}, {"a": 100.0, "b": 1.0}, let_in={"a"}) == []


def test_of_equal_files_the_first_by_id_is_kept() -> None:
    assert identical({"b": "1", "a": "1", "c": "2", "d": "1"}) == [Copy("b", "a"), Copy("d", "a")]


def test_each_is_held_against_those_that_are_kept() -> None:
    chain = {("a", "b"): 0.9995, ("b", "c"): 0.9995, ("a", "c"): 0.998}
    assert nearly_identical(["c", "b", "a"], chain) == [Copy("b", "a", 0.9995)]
    assert nearly_identical(["a", "b"], {("a", "b"): 0.999}) == []

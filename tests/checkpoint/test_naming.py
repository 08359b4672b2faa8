"""Names are looked up fast and as PEFT does it slowly: each against its plain twin."""

import time

from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lora_merge.checkpoint.naming import Endings, Pattern, Suffixes

NAMES = st.lists(st.sampled_from(["a", "b", "ab", "a_b", "q.proj", "q_proj"]), min_size=1, max_size=4).map(".".join)


KEYS = st.builds(str.__add__, st.sampled_from(["", "^"]), NAMES)


@given(st.dictionaries(KEYS, st.integers()), NAMES)
def test_a_pattern_takes_the_key_that_peft_takes(values: dict[str, int], name: str) -> None:
    key = get_pattern_key(list(values), name)
    assert Pattern(values).match(name, None) == values.get(key if key in values else "")


@given(st.dictionaries(NAMES, st.integers()), NAMES)
def test_a_suffix_takes_the_first_key_that_is_a_dotted_one(values: dict[str, int], name: str) -> None:
    slow = next((value for key, value in values.items() if name == key or name.endswith("." + key)), None)
    assert Suffixes(values).match(name, None) == slow


@given(st.lists(st.text("ab.", min_size=1, max_size=4)), st.text("ab.", max_size=6))
def test_an_ending_is_found_where_any_is_one(names: list[str], name: str) -> None:
    assert Endings(names).match(name) == name.endswith(tuple(names))


def test_ten_thousand_modules_are_looked_up_among_a_hundred_thousand_names_in_a_second() -> None:
    names = [f"layers.{number}.proj" for number in range(100_000)]
    pattern, endings = Pattern(dict.fromkeys(names, 1)), Endings(names)
    assert pattern.most_alike <= 100
    began = time.process_time()
    for number in range(10_000):
        assert pattern.match(f"model.layers.{number}.proj", 0) == 1
        assert endings.match(f"model.layers.{number}.proj")
    assert time.process_time() - began < 1

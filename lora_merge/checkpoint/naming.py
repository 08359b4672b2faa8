"""How an adapter_config.json names modules: by dotted suffix, or by any ending; looked up in a time without surprises.

A stranger's config may hold a hundred thousand names and his header ten thousand modules, so none is tried on each.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Generic, TypeVar

T = TypeVar("T")


def dotted_suffixes(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: the keys that mean `name`."""
    while name:
        yield name
        name = name.partition(".")[2]


class Pattern(Generic[T]):
    """A mapping by dotted suffix: rank_pattern, alpha_pattern, trainable_token_indices."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._found = {key: (place, value) for place, (key, value) in enumerate(values.items())}

    def match(self, name: str, default: T) -> T:
        """The value of the first key that is `name` (or that after a `^`) or a dotted suffix of it, as PEFT chooses."""
        found = [self._found[key] for key in (f"^{name}", *dotted_suffixes(name)) if key in self._found]
        return min(found, key=itemgetter(0))[1] if found else default


class Endings:
    """A list by any ending, dot or no dot: modules_to_save."""

    def __init__(self, names: Iterable[str]) -> None:
        # Backwards and sorted, without those that begin as another does: what a name can begin with is just before it.
        self._backwards: list[str] = []
        for name in sorted(name[::-1] for name in names):
            if not (self._backwards and name.startswith(self._backwards[-1])):
                self._backwards.append(name)

    def match(self, name: str) -> bool:
        """Whether `name` ends in one of the names."""
        backwards = name[::-1]
        at = bisect_right(self._backwards, backwards)
        return at > 0 and backwards.startswith(self._backwards[at - 1])

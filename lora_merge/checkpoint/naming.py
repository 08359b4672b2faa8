"""How an adapter_config.json names modules: by dotted suffix, or by any ending; looked up in a time without surprises.

A stranger's config may hold a hundred thousand names and his header ten thousand modules, so none is tried on each.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from operator import itemgetter
from typing import Generic, TypeVar

T = TypeVar("T")


def dotted_suffixes(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: the keys that mean `name`."""
    while name:
        yield name
        name = name.partition(".")[2]


class Suffixes(Generic[T]):
    """A mapping by dotted suffix: trainable_token_indices."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._found = {key: (place, value) for place, (key, value) in enumerate(values.items())}

    def match(self, name: str, default: T) -> T:
        """The value of the first key that means `name`, as PEFT chooses."""
        found = [self._found[key] for key in self._keys(name)]
        return min(found, key=itemgetter(0))[1] if found else default

    def _keys(self, name: str) -> Iterator[str]:
        return (suffix for suffix in dotted_suffixes(name) if suffix in self._found)


class Pattern(Suffixes[T]):
    """A mapping by regular expressions of names, dots, and a `^` before a whole name: rank_pattern, alpha_pattern.

    To PEFT a key means whatever `(.*\\.)?(KEY)$` does, so a dot of it is any character: `a.b` means `a_b` too.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        super().__init__(values)
        self._dots: dict[int, set[int]] = {}  # where keys of a length have one
        for key in values:
            if places := [place for place, letter in enumerate(key) if letter == "."]:
                self._dots.setdefault(len(key), set()).update(places)
        # A name has the letters of each key that means it, but for those places.
        self._alike: dict[tuple[int, str], list[str]] = {}
        for key in values:
            if "." in key:
                self._alike.setdefault(self._between_dots(key), []).append(key)

    @property
    def most_alike(self) -> int:
        """How many keys a name may have to be held against."""
        return max(map(len, self._alike.values()), default=0)

    def _keys(self, name: str) -> Iterator[str]:
        for text in (f"^{name}", *dotted_suffixes(name)):
            if text in self._found:
                yield text
            for key in self._alike.get(self._between_dots(text), ()) if len(text) in self._dots else ():
                if key != text and all(letter in (".", other) for letter, other in zip(key, text, strict=True)):
                    yield key

    def _between_dots(self, text: str) -> tuple[int, str]:
        places = [-1, *sorted(self._dots.get(len(text), ())), len(text)]
        return len(text), "".join(text[start + 1 : end] for start, end in pairwise(places))


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

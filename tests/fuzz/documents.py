"""Mutants of a JSON document: in its structure, and in its bytes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from tests.fuzz.values import INTERESTING, Raw, Twin, hostile, nested, text_of

Place = tuple[Any, Any]  # a dict or a list, and a key or an index in it


def mutant(random: Random, document: Mapping[str, Any], likely: Mapping[str, Sequence[Any]]) -> bytes:
    """A mutant of `document`, most often by one change.

    Args:
        likely: values that an entry of that name may honestly have, so that not every mutant is refused at once.
    """
    made = copy.deepcopy(dict(document))
    words = [str(key) for _, key in places(made)]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        change(random, made, likely, words)
    text = text_of(made).encode("utf-8", "surrogatepass")
    return bytes_mutant(random, text) if random.random() < 0.12 else text


def places(value: Any) -> Iterator[Place]:
    """Every place in a document, from the top down."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def change(random: Random, document: dict[str, Any], likely: Mapping[str, Sequence[Any]], words: list[str]) -> None:
    """One change, somewhere."""
    if likely and random.random() < 0.45:
        name = random.choice(list(likely))
        found = [(parent, key) for parent, key in places(document) if key == name]
        parent, key = random.choice(found or [(document, name)])
        parent[key] = copy.deepcopy(random.choice(likely[name]))
        return
    spots = list(places(document))
    if not spots:
        document["x"] = hostile(random, words)
        return
    # Half of the time at the top: a ledger of ten clients is mostly clients.
    top = [(parent, key) for parent, key in spots if parent is document]
    parent, key = random.choice(top if top and random.random() < 0.5 else spots)
    random.choice(CHANGES)(random, parent, key, words)


def _replace(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    parent[key] = hostile(random, words)


def _remove(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    del parent[key]


def _double(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[Twin(key)] = copy.deepcopy(parent[key])


def _add(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    value = hostile(random, words)
    if isinstance(parent, list):
        parent.append(value)
    else:
        text = hostile(random, words)
        parent[text if isinstance(text, str) and not isinstance(text, Raw) else random.choice(words)] = value


def _rename(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    if isinstance(parent, dict):
        parent[random.choice([*words, f"{key}_", str(key).upper(), f"\x1b[31m{key}", f"{key}\u202e"])] = parent.pop(key)


def _swap(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def _nest(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    value = parent[key]
    parent[key] = random.choice([[value], {"a": value}, {str(key): value}, nested(200, "list")])


def _nudge(random: Random, parent: Any, key: Any, words: list[str]) -> None:
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = random.choice([True, False, None, 0, 1])
    elif isinstance(value, (int, float)):
        options: list[Any] = [
            value + 1,
            value - 1,
            -value,
            value * 2,
            value / 2,
            float(value),
            str(value),
            value * 10**20,
        ]
        parent[key] = random.choice(options)
    elif isinstance(value, str):
        at = random.randrange(len(value) + 1)
        mark = random.choice(["\x1b", "\u202e", "\n", "\ud800", "\x85", "[/x]", "/", "..", "A", "", " "])
        parent[key] = random.choice([value[:at] + mark + value[at:], value[:at], value * 2, value.upper(), [value]])
    elif isinstance(value, list):
        parent[key] = random.choice(
            [value[::-1], value[:1], value * 2, value * 2000 if len(value) < 9 else [], dict.fromkeys(map(str, value))]
        )
    elif isinstance(value, dict):
        parent[key] = random.choice([list(value), list(value.values()), dict(reversed(value.items())), {}])


CHANGES = (_replace, _replace, _replace, _remove, _double, _add, _rename, _swap, _nest, _nudge, _nudge, _nudge)


def bytes_mutant(random: Random, data: bytes) -> bytes:
    """Bits flipped, bytes put in, taken out, moved, cut off."""
    out = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        if not out:
            break
        at, span = random.randrange(len(out)), random.choice([1, 1, 2, 8, 64])
        match random.randrange(6):
            case 0:
                out[at] ^= 1 << random.randrange(8)
            case 1:
                del out[at : at + span]
            case 2:
                out[at:at] = random.choice(INTERESTING)
            case 3:
                out[at:at] = out[at : at + span]
            case 4:
                out[at : at + 1] = random.randbytes(1)
            case 5:
                del out[at:]
    return bytes(out)

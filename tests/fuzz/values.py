"""What a hostile file may hold where something else is due, as JSON text."""

import json
from random import Random
from typing import Any


class Raw(str):
    """JSON text (or what somebody passes off as such) that stands in a document as it is."""


class Twin(str):
    """A key that stands in an object beside an equal one."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u202eevil\u2066",
    "\u200b\ufeff\U000e0041",
    "a\nb",
    "a\r\n---\n# b",
    "\u2028\x85",
    "\ud800",
    "\udcff\ud83d",
    "é漢🙂",
    "[/x][bold]",
    "<script>",
    "| a | b |",
    "![](http://x)",
    "../../etc/passwd",
    "/abs/path",
    "~/x",
    "C:\\x",
    "file:///etc/passwd",
    "hf://a/b@c",
    "{0}%s${x}",
    "(([a-z]+)+)+$",
    ".*",
    "org/*",
    "org/name",
    "NaN",
    "null",
    "0" * 40,
    "a" * 64,
    "x" * 300,
    "y" * 600,
    "a." * 250 + "a",
    "z" * 100_000,
)
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "8", "16", "1024", "1025", "131073", "2147483648", "9223372036854775808"),
    *("0.0", "-0.0", "0.5", "1.0", "4.0", "1e-3", "5e-324", "1e-400", "1e18", "1e30", "1.8e308", "1e999", "-1e999"),
    *("NaN", "Infinity", "-Infinity", "1" + "0" * 308, "1" + "0" * 400, "9" * 4000, "9" * 5000, "01", "1.", "0x10"),
)
OTHERS = ("null", "true", "false", "[]", "{}", "[[]]", '{"": {}}', "[null]", '[""]', "'a'", "", "undefined")
INTERESTING = (b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800", b"NaN", b"1e999", b"{", b"[", b",", b"\n")


def nested(depth: int, kind: str) -> Raw:
    """`depth` lists or objects in each other."""
    return Raw("[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth)


def many(random: Random, count: int, words: list[str]) -> Any:
    """A list or an object with more entries than anybody needs; made of `words`, so that some of them are looked at."""
    names = [f"{random.choice(words)}.{number}" if number % 2 else f"m{number}" for number in range(count)]
    form = random.randrange(4)
    if form == 0:
        return list(range(count))
    if form == 1:
        return names
    return dict.fromkeys(names, 4 if form == 2 else "a")


def hostile(random: Random, words: list[str]) -> Any:
    """Any value at all."""
    choice = random.random()
    if choice < 0.35:
        return random.choice(TEXTS)
    if choice < 0.7:
        return Raw(random.choice(NUMBERS))
    if choice < 0.85:
        return Raw(random.choice(OTHERS))
    if choice < 0.93:
        return nested(random.choice([3, 20, 60, 150, 400, 900, 3000, 50_000]), random.choice(["list", "object"]))
    return many(random, random.choice([3, 300, 20_000]), words)


def text_of(value: Any) -> str:
    """The JSON text of a document that holds `Raw` and `Twin`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {text_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)

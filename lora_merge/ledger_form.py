"""The form of a ledger's entries: one strict reading for each kind of value, which names the entry that is wrong."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeAlias, TypeVar

from lora_merge.errors import Malformed

T = TypeVar("T")
Form: TypeAlias = Callable[[str, Any], T]


class LedgerError(Malformed):
    """A ledger is malformed. ``field`` names the entry."""


def entries_of(kind: type[T], place: str, data: Any, forms: Mapping[str, Form[Any]]) -> T:
    """A dataclass from its entries, each by its form; `place` is where in the file, empty for the file itself.

    Raises:
        LedgerError: an entry is missing, unknown, or of a wrong form.
    """
    mapping(place or "ledger", data)
    known, required = _entries(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known):
        raise LedgerError(f"{place}{unknown[0][:100]}", "unknown entry")
    if missing := sorted(required - set(data)):
        raise LedgerError(f"{place}{missing[0]}", "is missing")
    return kind(**{name: forms[name](f"{place}{name}", value) for name, value in data.items()})


@cache
def _entries(kind: type[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of all entries of a dataclass, and of those that must be there."""
    known = fields(kind)
    required = [entry.name for entry in known if entry.default is entry.default_factory is MISSING]
    return frozenset(entry.name for entry in known), frozenset(required)


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise LedgerError(name, "must be an object")
    return value


def listed(name: str, value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise LedgerError(name, "must be a list")
    return value


def text(name: str, value: Any) -> str:
    """A text of one line, at most 512 characters."""
    if not (isinstance(value, str) and re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,512}", value)):
        raise LedgerError(name, "must be a short text")
    return value


def number(name: str, value: Any) -> float:
    """A finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise LedgerError(name, "must be a finite number from 0 up")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if (found := number(name, value)) == 0:
        raise LedgerError(name, "must be above 0")
    return found


def share(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    if (found := number(name, value)) > 1:
        raise LedgerError(name, "must be a share, from 0 to 1")
    return found


def measured(name: str, value: Any) -> dict[str, float]:
    """Numbers by name, `relative_error` among them."""
    if "relative_error" not in mapping(name, value):
        raise LedgerError(name, "has no relative_error")
    return values(number)(name, value)


def count(name: str, value: Any) -> int:
    """A whole number from 0 up."""
    if type(value) is not int or value < 0:
        raise LedgerError(name, "must be a whole number from 0 up")
    return value


def values(form: Form[T]) -> Form[dict[str, T]]:
    """An object whose values all have one form."""
    return lambda name, value: {key: form(f"{name}.{key[:100]}", item) for key, item in mapping(name, value).items()}


def items(form: Form[T]) -> Form[list[T]]:
    """A list whose items all have one form."""
    return lambda name, value: [form(f"{name}[{index}]", item) for index, item in enumerate(listed(name, value))]


def or_null(form: Form[T]) -> Form[T | None]:
    """A form, or null."""
    return lambda name, value: None if value is None else form(name, value)


def commit(name: str, value: Any) -> str:
    """A commit, whole."""
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value)):
        raise LedgerError(name, "must be a commit of 40 hex digits, or null")
    return value


def sha256(name: str, value: Any) -> str:
    """A sha256, in hex."""
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise LedgerError(name, "must be a sha256 in hex")
    return value

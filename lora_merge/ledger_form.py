"""The form of a ledger's and a lock's entries: one strict reading a kind of value. What is wrong is named by its place.

They may have thousands of contributions, so a place is put into words only where something is wrong there.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeAlias, TypeVar

from lora_merge.errors import Malformed

T = TypeVar("T")
Form: TypeAlias = Callable[[Any], T]

_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,512}")
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_SHOWN = 100  # letters of a name that a stranger chose


class LedgerError(Malformed):
    """A ledger is malformed. ``field`` names the entry."""

    def within(self, place: str) -> "LedgerError":
        """The same, of an entry of what is at `place`."""
        dot = "." if self.field and not self.field.startswith("[") else ""
        return LedgerError(f"{place}{dot}{self.field}", self.reason)


def entries_of(kind: type[T], data: Any, forms: Mapping[str, Form[Any]]) -> T:
    """A dataclass from its entries, each by its form.

    Raises:
        LedgerError: an entry is missing, unknown, or of a wrong form.
    """
    known, required = _entries(kind)  # type: ignore[arg-type]
    if not mapping(data).keys() <= known:
        raise LedgerError(min(data.keys() - known)[:_SHOWN], "unknown entry")
    if not required <= data.keys():
        raise LedgerError(min(required - data.keys()), "is missing")
    read, name = {}, ""
    try:
        for name, value in data.items():
            read[name] = forms[name](value)
    except LedgerError as error:
        raise error.within(name) from None
    return kind(**read)


@cache
def _entries(kind: type[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of all entries of a dataclass, and of those that must be there."""
    known = fields(kind)
    required = [entry.name for entry in known if entry.default is entry.default_factory is MISSING]
    return frozenset(entry.name for entry in known), frozenset(required)


def mapping(value: Any) -> Mapping[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise LedgerError("", "must be an object")
    return value


def listed(value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise LedgerError("", "must be a list")
    return value


def text(value: Any) -> str:
    """A text of one line, at most 512 characters."""
    if not (isinstance(value, str) and _TEXT.fullmatch(value)):
        raise LedgerError("", "must be a short text")
    return value


def number(value: Any) -> float:
    """A finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise LedgerError("", "must be a finite number from 0 up")
    return value


def positive(value: Any) -> float:
    """A finite number above 0."""
    if (found := number(value)) == 0:
        raise LedgerError("", "must be above 0")
    return found


def share(value: Any) -> float:
    """A number from 0 to 1."""
    if (found := number(value)) > 1:
        raise LedgerError("", "must be a share, from 0 to 1")
    return found


def measured(value: Any) -> dict[str, float]:
    """Numbers by name, `relative_error` among them."""
    if "relative_error" not in mapping(value):
        raise LedgerError("", "has no relative_error")
    return values(number)(value)


def count(value: Any) -> int:
    """A whole number from 0 up."""
    if type(value) is not int or value < 0:
        raise LedgerError("", "must be a whole number from 0 up")
    return value


def values(form: Form[T]) -> Form[dict[str, T]]:
    """An object whose values all have one form."""

    def read(value: Any) -> dict[str, T]:
        found, name = dict[str, T](), ""
        entries = mapping(value).items()
        try:
            for name, item in entries:
                found[name] = form(item)
        except LedgerError as error:
            raise error.within(name[:_SHOWN]) from None
        return found

    return read


def items(form: Form[T]) -> Form[list[T]]:
    """A list whose items all have one form."""

    def read(value: Any) -> list[T]:
        found, entries = list[T](), listed(value)
        try:
            for item in entries:
                found.append(form(item))
        except LedgerError as error:
            raise error.within(f"[{len(found)}]") from None
        return found

    return read


def or_null(form: Form[T]) -> Form[T | None]:
    """A form, or null."""
    return lambda value: None if value is None else form(value)


def commit(value: Any) -> str:
    """A commit, whole."""
    if not (isinstance(value, str) and _COMMIT.fullmatch(value)):
        raise LedgerError("", "must be a commit of 40 hex digits, or null")
    return value


def sha256(value: Any) -> str:
    """A sha256, in hex."""
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise LedgerError("", "must be a sha256 in hex")
    return value

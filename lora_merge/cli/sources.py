"""The sources that a command line names."""

import sys
from collections.abc import Iterator, Sequence

from lora_merge.errors import NotFoundError, UsageError


def sources_of(given: Sequence[str] | None) -> list[str]:
    """The sources, with the lines of standard input in the place of `-`, as they stand; `#` begins one that is none.

    Raises:
        NotFoundError: standard input names none.
        UsageError: a source is empty, which would be the folder that one is in.
    """
    return [source for each in given or [] for source in _named(each)]


def source_of(place: str, commit: str | None) -> str:
    """What names an adapter to the next command, also as a line of standard input: neither blank nor a comment."""
    if commit:
        return f"{place}@{commit}"
    return f"./{place}" if place.startswith("#") or not place.strip() else place


def require_no_standard_input(sources: Sequence[str]) -> None:
    """Raise `UsageError` for a `-`: what is looked at again and again cannot be read but once."""
    if "-" in sources:
        hint = "Name the sources, or a pattern of them: lora-merge watch 'org/client-*' --onto org/global"
        raise UsageError("watch looks for its sources again and again: it takes none from standard input.", hint=hint)


def _named(source: str) -> Iterator[str]:
    if not source.strip():
        raise UsageError("A source is empty.", hint="Is a variable of the shell not set?")
    if source != "-":
        yield source
        return
    if sys.stdin is None:
        raise UsageError("Standard input is closed, and - reads sources from it.")
    # A name never ends in a carriage return: `inspect -q` prints it escaped. A line that was written on Windows does.
    lines = [line.removesuffix("\r") for line in sys.stdin.read().split("\n")]
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise NotFoundError("Standard input names no adapter.", hint="One source a line.")
    yield from lines

"""The stored curve: how good the global adapter was after each arrival. JSON lines, one a measurement.

Each line has: schema_version, time (UTC), global, commit (of its repository, or null), inputs (a digest of who is in),
clients, client and source (that arrived; null for the base model alone and for an adapter as it was found), replaced,
examples (of all clients so far, or null), data, rows, answer_tokens, and loss and perplexity: each value, low and high
(95 %), or null where it is no number.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.errors import StorageError, UsageError
from lora_merge.ledger import Ledger

SCHEMA_VERSION = 1
_BEGINNING = json.dumps({"schema_version": SCHEMA_VERSION})[:-1]  # of each line


def curve_path(place: str) -> Path:
    """Where a curve lies by default: beside a global adapter's folder; for a repository, in the present folder."""
    path = Path(place)
    folder = path.parent if path.is_absolute() else Path()
    return folder / f"{path.name}.curve.jsonl"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line in one step: whoever reads sees all of it or nothing. What a killed run left of one is removed.

    Raises:
        StorageError: it cannot be written.
    """
    line = json.dumps({"schema_version": SCHEMA_VERSION, **record}, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # of several watchers, one at a time
            end = os.lseek(descriptor, 0, os.SEEK_END)
            whole = _end_of_lines(descriptor, end)
            if whole < end:
                os.ftruncate(descriptor, whole)
            os.pwrite(descriptor, line.encode(), whole)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from error


def _end_of_lines(descriptor: int, end: int) -> int:
    """The length of a file without an unfinished last line."""
    start = end
    while start:
        first = max(start - (1 << 16), 0)
        newline = os.pread(descriptor, start - first, first).rfind(b"\n")
        if newline >= 0:
            return first + newline + 1
        start = first
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The finished lines of a curve; none where there is no file.

    Raises:
        UsageError: it is something else than a curve, or does not end in what a killed run left: `append` would cut
            that off.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UsageError(f"{path} is no regular file.", hint="Name another file with --curve.")
    try:
        *finished, last = path.read_text(encoding="utf-8").split("\n")
        lines = [json.loads(line) for line in finished]
        if any(line["schema_version"] != SCHEMA_VERSION or "inputs" not in line for line in lines):
            raise ValueError
        if not (last.startswith(_BEGINNING) or _BEGINNING.startswith(last)):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} is no curve of this version.", hint="Name another file with --curve.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error
    return lines


def inputs_digest(ledger: Ledger | None) -> str | None:
    """What tells one state of a global adapter from another: a digest of who is in, with which files and weights."""
    if ledger is None:
        return None
    inputs = [
        [each.client_id, each.source, each.commit, each.weight, sorted(each.sha256.items())]
        for each in ledger.contributions
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def examples_of(ledger: Ledger) -> int | None:
    """The examples of all clients; None where one does not say."""
    counts = [each.num_examples for each in ledger.contributions]
    return None if None in counts else sum(count or 0 for count in counts)

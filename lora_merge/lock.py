"""`lora-merge.lock`: what a merge was made of, to the byte, so that anyone who can read the inputs can make it again.

Canonical JSON (sorted keys, no spaces, ASCII): the same merge gives the same lock, which can be signed with
`ssh-keygen -Y sign`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge import ledger_form as form
from lora_merge.errors import Malformed
from lora_merge.ledger_form import LedgerError

FILE_NAME = "lora-merge.lock"
SIGNATURE_NAME = f"{FILE_NAME}.sig"  # what ssh-keygen calls it
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 24

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class LockError(Malformed):
    """A lock file is malformed. ``field`` names the entry."""


@dataclass(frozen=True)
class LockedInput:
    """One client's adapter: where it came from, its commit (None for a folder), its files' hashes, its weight n."""

    client_id: str
    source: str
    commit: str | None
    files: Mapping[str, str]
    weight: float


@dataclass(frozen=True)
class Lock:
    """Inputs, how they were merged, and where; `environment` and `versions` are what the bytes may depend on.

    `folded` are the client ids of each merge, in order, where later ones were folded into what stood for the earlier.
    """

    inputs: Sequence[LockedInput]
    method: str
    options: Mapping[str, Any]
    global_lr: float
    weighting: str
    dtype: str
    base_model: str | None
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    folded: Sequence[Sequence[str]] = ()

    def to_json(self) -> str:
        """The file's text: canonical JSON, ending in a newline."""
        data = {"schema_version": SCHEMA_VERSION, **vars(self)}
        if not self.folded:
            del data["folded"]
        return json.dumps(data, default=vars, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Lock":
        """Read a parsed lock strictly.

        Raises:
            LockError: an entry is missing, unknown, or of a wrong form.
        """
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise LockError("schema_version", f"must be {SCHEMA_VERSION}, is {str(version)[:40]}")
        try:
            lock = form.entries_of(cls, {key: value for key, value in data.items() if key != "schema_version"}, _FORMS)
        except LedgerError as error:
            raise LockError(error.field, error.reason) from None
        clients = Counter(entry.client_id for entry in lock.inputs)
        if twice := [client for client, count in clients.items() if count > 1]:
            raise LockError("inputs", f"name {twice[0]} twice")
        if "folded" in data and Counter(client for group in lock.folded for client in group) != clients:
            raise LockError("folded", "must name every input once")
        return lock

    def differences(self, other: "Lock") -> list[str]:
        """What a merge by `other` would do otherwise: inputs and settings, not where it runs."""
        found = [
            f"{name} is {getattr(other, name)!r}, locked is {getattr(self, name)!r}"
            for name in ("method", "options", "global_lr", "weighting", "dtype", "base_model", "folded")
            if getattr(self, name) != getattr(other, name)
        ]
        mine = {entry.client_id: entry for entry in self.inputs}
        theirs = {entry.client_id: entry for entry in other.inputs}
        found += [f"{client} is not in the lock" for client in sorted(theirs.keys() - mine.keys())]
        found += [f"{client} is in the lock and not among the inputs" for client in sorted(mine.keys() - theirs.keys())]
        for client in sorted(mine.keys() & theirs.keys()):
            found += [
                f"{client}: {name} is {getattr(theirs[client], name)}, locked is {getattr(mine[client], name)}"
                for name in ("source", "commit", "files", "weight")
                if getattr(mine[client], name) != getattr(theirs[client], name)
            ]
        return found


def _inputs(value: Any) -> list[LockedInput]:
    if not form.listed(value):
        raise LedgerError("", "must be a list of one or more")
    return form.items(_input)(value)


def _input(value: Any) -> LockedInput:
    return form.entries_of(LockedInput, value, _OF_AN_INPUT)


def _files(value: Any) -> dict[str, str]:
    found = _hashes(value)
    if not found or not all(map(_FILE.fullmatch, found)):
        raise LedgerError("", "must be file names and their sha256")
    return found


def _texts(value: Any) -> dict[str, str]:
    return {form.text(name): entry for name, entry in form.values(form.text)(value).items()}


def _group(value: Any) -> list[str]:
    if not form.listed(value):
        raise LedgerError("", "must be a list of client ids")
    return form.items(form.text)(value)


_hashes = form.values(form.sha256)
_OF_AN_INPUT: dict[str, form.Form[Any]] = {
    "client_id": form.text,
    "source": form.text,
    "commit": form.or_null(form.commit),
    "files": _files,
    "weight": form.number,
}
_FORMS: dict[str, form.Form[Any]] = {
    "inputs": _inputs,
    "method": form.text,
    "options": form.mapping,
    "global_lr": form.number,
    "weighting": form.text,
    "dtype": form.text,
    "base_model": form.or_null(form.text),
    "environment": _texts,
    "versions": _texts,
    "folded": form.items(_group),
}

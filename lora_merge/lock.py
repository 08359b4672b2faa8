"""`lora-merge.lock`: what a merge was made of, to the byte, so that anyone who can read the inputs can make it again.

Canonical JSON (sorted keys, no spaces, ASCII): the same merge gives the same lock, which can be signed with
`ssh-keygen -Y sign`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lora_merge.errors import Malformed

FILE_NAME = "lora-merge.lock"
SIGNATURE_NAME = f"{FILE_NAME}.sig"  # what ssh-keygen calls it
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 24

_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,512}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
        _entries("lock", {"folded": [], **data}, {"schema_version"} | {field.name for field in fields(cls)})
        if data["schema_version"] != SCHEMA_VERSION:
            raise LockError("schema_version", f"must be {SCHEMA_VERSION}, is {str(data['schema_version'])[:40]}")
        inputs = data["inputs"]
        if not isinstance(inputs, list) or not inputs:
            raise LockError("inputs", "must be a list of one or more")
        read = [_input(f"inputs[{number}]", entry) for number, entry in enumerate(inputs)]
        clients = Counter(entry.client_id for entry in read)
        if twice := [client for client, count in clients.items() if count > 1]:
            raise LockError("inputs", f"name {twice[0]} twice")
        return cls(
            inputs=read,
            method=_text("method", data["method"]),
            options=_mapping("options", data["options"]),
            global_lr=_number("global_lr", data["global_lr"]),
            weighting=_text("weighting", data["weighting"]),
            dtype=_text("dtype", data["dtype"]),
            base_model=None if data["base_model"] is None else _text("base_model", data["base_model"]),
            environment=_texts("environment", data["environment"]),
            versions=_texts("versions", data["versions"]),
            folded=_groups(data["folded"], clients.keys()) if "folded" in data else (),
        )

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


_OF_AN_INPUT = {field.name for field in fields(LockedInput)}


def _input(name: str, data: Any) -> LockedInput:
    _entries(name, data, _OF_AN_INPUT)
    commit = data["commit"]
    if commit is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        raise LockError(f"{name}.commit", "must be 40 hexadecimal digits or null")
    files = _mapping(f"{name}.files", data["files"])
    if not files or not all(map(_FILE.fullmatch, files)) or not all(map(_is_sha256, files.values())):
        raise LockError(f"{name}.files", "must be file names and their sha256")
    return LockedInput(
        client_id=_text(f"{name}.client_id", data["client_id"]),
        source=_text(f"{name}.source", data["source"]),
        commit=commit,
        files=dict(files),
        weight=_number(f"{name}.weight", data["weight"]),
    )


def _groups(value: Any, clients: Collection[str]) -> list[list[str]]:
    """The groups of `folded`, which name each input once; a lock of one merge leaves the entry out."""
    if not isinstance(value, list) or not value or not all(isinstance(group, list) and group for group in value):
        raise LockError("folded", "must be a list of lists of client ids")
    found = [_text("folded", client) for group in value for client in group]
    if len(found) != len(clients) or set(found) != set(clients):
        raise LockError("folded", "must name every input once")
    return [list(group) for group in value]


def _entries(name: str, data: Any, expected: set[str]) -> None:
    if not isinstance(data, dict):
        raise LockError(name, "must be an object")
    if data.keys() != expected:
        wrong = sorted(set(data) ^ expected)[0]
        raise LockError(f"{name}.{wrong[:100]}", "unknown entry" if wrong in data else "is missing")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise LockError(name, "must be an object")
    return value


def _texts(name: str, value: Any) -> Mapping[str, str]:
    return {_text(name, key): _text(f"{name}.{key[:100]}", text) for key, text in _mapping(name, value).items()}


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and _TEXT.fullmatch(value)):
        raise LockError(name, "must be a short text")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise LockError(name, "must be a finite number from 0 up")
    return float(value)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None

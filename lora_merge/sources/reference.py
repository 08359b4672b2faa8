"""One adapter by the place it comes from, pinned; and what every kind of place can do."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from lora_merge.checkpoint.peft_folder import Description

Advance: TypeAlias = Callable[[int], None]
Tell: TypeAlias = Callable[[str], None]
# Called with a label, a total and a unit; yields a function that advances by steps.
Progress: TypeAlias = Callable[[str, int, str], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class AdapterRef:
    """One adapter before anything of it was read.

    Attributes:
        source: the ledger's key: `org/name` on the Hub, a folder's short name, a URL.
        given: what the user wrote, a pattern too.
        place: what its room finds it by: the repository, the folder's path, the URL.
        commit: 40 hex digits; None where the place has no commits.
        room: who can read it.
        url: of a URL, all of it, with what lets one in; it is neither told nor recorded.
    """

    source: str
    given: str
    place: str
    commit: str | None = None
    room: "Room" = field(repr=False, compare=False, kw_only=True)
    url: str = field(default="", repr=False, compare=False, kw_only=True)

    @property
    def itself(self) -> str | Path:
        """The source that names just this adapter, at this commit."""
        if self.commit:
            return f"hf://{self.place}@{self.commit}"
        return self.url or Path(self.place)


@dataclass(frozen=True)
class FileEntry:
    """A file as its place lists it; `sha256` or `git_sha1` (of git's blob) where the place states one."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be merged: its files, and what its config, statement and header say. No weights were read."""

    ref: AdapterRef
    files: Mapping[str, FileEntry]
    description: Description

    @property
    def size(self) -> int:
        """Bytes of all its files that a merge reads."""
        return sum(file.size for file in self.files.values())


class Room(Protocol):
    """A kind of place that adapters come from.

    Attributes:
        store: where fetched files are kept; None where they are read in place.
        notes: what patterns matched and did not take.
    """

    notes: list[str]

    @property
    def store(self) -> Path | None: ...

    def expand(self, source: str) -> Sequence[AdapterRef]:
        """The adapters that `source` names, pinned; raises `NotFoundError` where it names none."""
        ...

    def version(self, ref: AdapterRef) -> str:
        """A text that is another one whenever the files at `ref` are; they are not read for it."""
        ...

    def examine(self, ref: AdapterRef) -> Candidate:
        """List the files and read config, statement and header; raises `FolderRefused` with every reason."""
        ...

    def fetch(self, candidate: Candidate, advance: Advance) -> Path:
        """A folder on this machine with the files, checked against their hashes; `advance` counts bytes."""
        ...

    def missing_bytes(self, candidate: Candidate) -> int:
        """How many bytes `fetch` would download."""
        ...

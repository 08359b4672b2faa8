"""The files of a folder that may be published: by name, read once, hashed as the Hub hashes them."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lora_merge.errors import Problem, RefusedError

WEIGHTS = ("adapter_model.safetensors", "aggregation_core.safetensors")
CARD_NAME = "README.md"
RECORDS = (
    "adapter_config.json",
    "lora_merge.json",
    "aggregation.json",
    "lora-merge.lock",
    "lora-merge.lock.sig",
    CARD_NAME,
)
ALLOWED = (*RECORDS, *WEIGHTS)
MAX_RECORD_BYTES = 1 << 24

_CHUNK = 1 << 20


class PublishedFile(Protocol):
    """A file as it will lie in the repository; the Hub names it by one of two hashes."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str:
        """Of the content: what the Hub calls a large file by."""
        ...

    @property
    def git_oid(self) -> str:
        """sha1 of `blob SIZE`, a zero byte and the content: what git calls it by."""
        ...

    @property
    def upload(self) -> bytes | Path:
        """What to hand to the upload."""
        ...

    def unchanged(self) -> bool:
        """Whether what was hashed is still what would be read."""
        ...


@dataclass(frozen=True)
class RecordFile:
    """A small text file, held in memory: the bytes that were scanned are the bytes that are sent."""

    name: str
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.content, usedforsecurity=False).hexdigest()

    @property
    def upload(self) -> bytes | Path:
        return self.content

    def unchanged(self) -> bool:
        return True


@dataclass(frozen=True)
class WeightsFile:
    """A large file, which stays on the disk."""

    name: str
    path: Path
    size: int
    mtime_ns: int

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_oid(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def upload(self) -> bytes | Path:
        return self.path

    def unchanged(self) -> bool:
        now = self.path.stat()
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)


def read_records(folder: Path) -> dict[str, bytes]:
    """The allow-listed text files of `folder`, by name.

    Raises:
        RefusedError: one of them is a link, not a plain file, or far too large.
    """
    return {name: _content(folder, name) for name in RECORDS if os.path.lexists(folder / name)}


def weights_files(folder: Path) -> Iterator[WeightsFile]:
    """The allow-listed tensor files of `folder`."""
    for name in WEIGHTS:
        path = folder / name
        if os.path.lexists(path):
            found = _plain_file(folder, name)
            yield WeightsFile(name, path, found.st_size, found.st_mtime_ns)


def read_header(path: Path) -> bytes:
    """The header of a tensor file: text too, and its metadata may hold anything."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, MAX_RECORD_BYTES))


def left_out(folder: Path) -> list[str]:
    """What else lies in `folder`, and stays here."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ALLOWED)


def _content(folder: Path, name: str) -> bytes:
    if _plain_file(folder, name).st_size > MAX_RECORD_BYTES:
        raise RefusedError([Problem(str(folder), name, f"is larger than {MAX_RECORD_BYTES} bytes")])
    return (folder / name).read_bytes()


def _plain_file(folder: Path, name: str) -> os.stat_result:
    """A link in the folder could bring any file of this machine to the Hub under an allowed name."""
    found = (folder / name).lstat()
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError([Problem(str(folder), name, "is not a plain file; links are not followed")])
    return found

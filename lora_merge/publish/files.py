"""The files of a folder that may be published: by name, read once, hashed as the Hub hashes them."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
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
_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns")


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
    found: os.stat_result

    @property
    def size(self) -> int:
        return self.found.st_size

    @cached_property
    def sha256(self) -> str:
        with _open(self.path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_oid(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with _open(self.path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def upload(self) -> bytes | Path:
        return self.path

    def header(self) -> bytes:
        """The header: text too, and its metadata may hold anything."""
        with _open(self.path) as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(min(length, MAX_RECORD_BYTES))

    def unchanged(self) -> bool:
        now = self.path.lstat()
        return all(getattr(now, field) == getattr(self.found, field) for field in _IDENTITY)


def read_records(folder: Path) -> dict[str, bytes]:
    """The allow-listed text files of `folder`, by name.

    Raises:
        RefusedError: one of them is a link, not a plain file, or far too large.
    """
    return {name: _content(folder / name) for name in RECORDS if os.path.lexists(folder / name)}


def weights_files(folder: Path) -> Iterator[WeightsFile]:
    """The allow-listed tensor files of `folder`."""
    for path in (folder / name for name in WEIGHTS):
        if os.path.lexists(path):
            with _open(path) as file:
                yield WeightsFile(path.name, path, os.fstat(file.fileno()))


def left_out(folder: Path) -> list[str]:
    """What else lies in `folder`, and stays here."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ALLOWED)


def _open(path: Path) -> BufferedReader:
    """Open a file of an adapter's folder: a link there could bring any file of this machine to the Hub.

    What was opened is looked at, and not its name, behind which something else may lie a moment later.

    Raises:
        RefusedError: it is a link, or something else than a plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise _not_plain(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return os.fdopen(descriptor, "rb")


def _content(path: Path) -> bytes:
    with _open(path) as file:
        content = file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise RefusedError([Problem(str(path.parent), path.name, f"is larger than {MAX_RECORD_BYTES} bytes")])
    return content


def _not_plain(path: Path) -> RefusedError:
    return RefusedError([Problem(str(path.parent), path.name, "is not a plain file; links are not followed")])

"""Contents by sha256: small ones in memory, larger ones in a temporary folder, a caller's files where they lie."""

import hashlib
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.hub.wire import Bytes, Readable

IN_MEMORY = 256 * 1024
PIECE = 1 << 20


@dataclass(frozen=True)
class OnDisk:
    """A `Readable` over a file, which is opened for each read and never held open."""

    path: Path
    size: int

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def sha256_of(content: Readable) -> str:
    """The sha256 of contents, read piece by piece."""
    digest = hashlib.sha256()
    for start in range(0, content.size, PIECE):
        digest.update(content.read(start, start + PIECE))
    return digest.hexdigest()


def readable(content: bytes | str | Path) -> Readable:
    """Text, bytes or a file as a `Readable`."""
    if isinstance(content, Path):
        return OnDisk(content, content.stat().st_size)
    return Bytes(content.encode() if isinstance(content, str) else content)


class Objects:
    """Contents that are found by their sha256."""

    def __init__(self) -> None:
        self.by_sha256: dict[str, Readable] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, data: bytes) -> Readable:
        """`data` in memory, or in a file where it is large."""
        if len(data) <= IN_MEMORY:
            return Bytes(data)
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="local-hub-")
        path = Path(self.folder.name) / uuid.uuid4().hex
        path.write_bytes(data)
        return OnDisk(path, len(data))

    def put(self, content: bytes | Readable) -> str:
        """Stores contents; returns their sha256."""
        stored = self.keep(content) if isinstance(content, bytes) else content
        sha256 = sha256_of(stored)
        self.by_sha256.setdefault(sha256, stored)
        return sha256

    def close(self) -> None:
        """Forgets everything and removes the folder."""
        self.by_sha256.clear()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None

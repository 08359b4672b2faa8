"""Adapters behind any URL that fsspec knows: `memory://`, and what its plugins add (`s3://`, `gs://`, …).

Such places have no commits: what was listed must still be there when it is fetched, and the hashes are recorded.
"""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.peft_folder import PICKLE_NAME, READ_NAMES, WEIGHTS_NAME, FolderRefused, describe
from lora_merge.checkpoint.safetensors_file import FileRefused, TensorEntry, header_bytes, read_header
from lora_merge.errors import LoraMergeError, NetworkError, NotFoundError, StorageError, UsageError, one_line
from lora_merge.sources.patterns import clients_of
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, FileEntry

CHUNK = 1 << 20


class FilesystemRoom:
    """fsspec's file systems as places that adapters come from.

    Attributes:
        store: a `scratch_folder`.
        stopped: ends a copy at its next bytes when it is set.
        notes: what a pattern matched and did not take.
    """

    def __init__(self, store: Path, stopped: threading.Event) -> None:
        self.store: Path | None = store
        self.stopped = stopped
        self.notes: list[str] = []

    def expand(self, source: str) -> list[AdapterRef]:
        """The folders that a URL names, or that match its pattern.

        Raises:
            NotFoundError: there is none.
            UsageError: fsspec knows no such URL.
        """
        filesystem, path = _open(source)
        with _Translated(source):
            filesystem.invalidate_cache()  # of listings, which may be those of an earlier look
            found = [path] if filesystem.isdir(path) else sorted(filter(filesystem.isdir, filesystem.glob(path)))
            if not found:
                raise NotFoundError(f"No folder matches {one_line(source)}.")
            if path not in found:
                found = self._clients(source, filesystem, found)
        urls = [str(filesystem.unstrip_protocol(match)).rstrip("/") for match in found]
        return [AdapterRef(one_line(url), source, url, room=self) for url in urls]

    def _clients(self, source: str, filesystem: Any, found: Sequence[str]) -> list[str]:
        """The clients' among the folders that a pattern matches."""
        held = {str(match): [path.rpartition("/")[2] for path in filesystem.ls(match, detail=False)] for match in found}
        clients, note = clients_of(source, held)
        self.notes += [note] if note else []
        return list(clients)

    def version(self, ref: AdapterRef) -> str:
        filesystem, folder = _open(ref.place)
        with _Translated(ref.place):
            names = sorted(
                path for path in filesystem.ls(folder, detail=False) if path.rpartition("/")[2] in READ_NAMES
            )
            return repr([(name, filesystem.ukey(name)) for name in names])

    def examine(self, ref: AdapterRef) -> Candidate:
        filesystem, folder = _open(ref.place)
        with _Translated(ref.place):
            listed = {entry["name"].rpartition("/")[2]: entry for entry in filesystem.ls(folder, detail=True)}
        sizes = {name: _size(listed[name]) for name in (*READ_NAMES, PICKLE_NAME) if name in listed}

        def read(name: str, start: int, stop: int) -> bytes:
            if name not in sizes:
                raise FileRefused(name, "is not there")
            with _Translated(ref.place):
                return bytes(filesystem.cat_file(f"{folder}/{name}", start=start, end=min(stop, sizes[name])))

        def small(name: str, limit: int) -> bytes:
            if sizes.get(name, 0) > limit:
                raise FileRefused(name, f"is larger than {limit} bytes")
            return read(name, 0, limit)

        def header() -> Mapping[str, TensorEntry]:
            needed = header_bytes(read(WEIGHTS_NAME, 0, 8))
            return read_header(read(WEIGHTS_NAME, 0, needed), sizes[WEIGHTS_NAME])

        description = describe(list(sizes), small, header)
        files = {name: FileEntry(name, sizes[name]) for name in READ_NAMES if name in sizes}
        return Candidate(ref, files, description)

    def fetch(self, candidate: Candidate, advance: Advance) -> Path:
        """Copy the files into the store.

        Raises:
            FolderRefused: a file has another size than was listed.
            StorageError: the disk is full or not writable.
        """
        filesystem, folder = _open(candidate.ref.place)
        try:
            work = Path(tempfile.mkdtemp(dir=self.store))
            for file in candidate.files.values():
                with _Translated(candidate.ref.place):
                    source = filesystem.open(f"{folder}/{file.name}", "rb")
                with source, (work / file.name).open("wb") as target:
                    self._copy(source, target, candidate.ref.place, advance)
        except OSError as error:
            raise StorageError(f"{candidate.ref.place} cannot be copied here: {error.strerror or error}.") from error
        changed = [file for file in candidate.files.values() if (work / file.name).stat().st_size != file.size]
        if changed:
            raise FolderRefused([FileRefused(file.name, "changed while it was being read") for file in changed])
        return work

    def missing_bytes(self, candidate: Candidate) -> int:
        return candidate.size

    def _copy(self, source: Any, target: Any, place: str, advance: Advance) -> None:
        while not self.stopped.is_set():
            with _Translated(place):
                chunk = source.read(CHUNK)
            if not chunk:
                return
            target.write(chunk)
            advance(len(chunk))


def url_of(url: str) -> str:
    """`url` as it is written of the folders that it names; as it stands where nothing here can read it."""
    try:
        filesystem, path = _open(url)
    except LoraMergeError:
        return url
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    with _Translated(url):
        try:
            filesystem, path = url_to_fs(url)
        except (ValueError, ImportError) as error:
            scheme = one_line(url.partition("://")[0])
            raise UsageError(f"{scheme}:// cannot be read here: {one_line(error)}.") from error
    return filesystem, str(path).rstrip("/")


def _size(entry: Mapping[str, Any]) -> int:
    if entry.get("type") != "file" or not isinstance(entry.get("size"), int):
        raise FolderRefused([FileRefused(one_line(str(entry["name"]).rpartition("/")[2]), "is not a regular file")])
    return int(entry["size"])


class _Translated:
    """Around calls of a file system, each of which raises what it likes."""

    def __init__(self, place: str) -> None:
        self.place = one_line(place)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, LoraMergeError) or not isinstance(error, Exception):
            return
        said = one_line(str(error))[:300] or type(error).__name__
        if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
            raise NotFoundError(f"{self.place} is not there, or you may not read it: {said}.") from error
        raise NetworkError(f"{self.place} cannot be read: {said}.", hint="Run the same command again.") from error

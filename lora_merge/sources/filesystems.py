"""Adapters behind any URL that fsspec knows: `memory://`, and what its plugins add (`s3://`, `gs://`, …).

Such places have no commits: what was listed must still be there when it is fetched, and the hashes are recorded. Who
may read them is for the file system to know: neither a record nor an error repeats a password or a signature.
"""

import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.peft_folder import PICKLE_NAME, READ_NAMES, WEIGHTS_NAME, FolderRefused, describe
from lora_merge.checkpoint.safetensors_file import FileRefused, TensorEntry, header_bytes, read_header
from lora_merge.errors import LoraMergeError, NetworkError, NotFoundError, StorageError, UsageError, one_line
from lora_merge.sources.local import HERE
from lora_merge.sources.patterns import clients_of
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, FileEntry

CHUNK = 1 << 20
_STALLED = 60.0  # seconds in which a web server sends nothing
_PASSWORD = re.compile(r"(?<!github)(://)[^/@\s]*:[^/@\s]*@")  # github://org:repo@commit has none
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")  # it may sign the address


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
        self._opened: dict[str, tuple[Any, str]] = {}  # by the URL that is told: only this one knows who is let in

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
            found = [match.rstrip("/") for match in found]
            if not found:
                raise NotFoundError(f"No folder matches {one_line(told(source))}.")
            if path not in found:
                found = self._clients(source, filesystem, found)
        opened = {_url(source, filesystem, match): (filesystem, match) for match in found}
        self._opened |= opened
        return [AdapterRef(one_line(url), source, url, room=self) for url in opened]

    def _clients(self, source: str, filesystem: Any, found: Sequence[str]) -> list[str]:
        """The clients' among the folders that a pattern matches."""
        held = {str(match): [path.rpartition("/")[2] for path in filesystem.ls(match, detail=False)] for match in found}
        clients, note = clients_of(told(source), held)
        self.notes += [note] if note else []
        return list(clients)

    def version(self, ref: AdapterRef) -> str:
        filesystem, folder = self._opened[ref.place]
        with _Translated(ref.place):
            names = sorted(
                path for path in filesystem.ls(folder, detail=False) if path.rpartition("/")[2] in READ_NAMES
            )
            return repr([(name, filesystem.ukey(name)) for name in names])

    def examine(self, ref: AdapterRef) -> Candidate:
        filesystem, folder = self._opened[ref.place]
        with _Translated(ref.place):
            listed = {entry["name"].rpartition("/")[2]: entry for entry in filesystem.ls(folder, detail=True)}
            known = [name for name in (*READ_NAMES, PICKLE_NAME) if name in listed]
            sizes = {name: _size(listed[name], filesystem) for name in known}

        def read(name: str, stop: int) -> bytes:
            if name not in sizes:
                raise FileRefused(name, "is not there")
            with _Translated(ref.place):
                return _beginning(filesystem, f"{folder}/{name}", min(stop, sizes[name]))

        def small(name: str, limit: int) -> bytes:
            if sizes.get(name, 0) > limit:
                raise FileRefused(name, f"is larger than {limit} bytes")
            return read(name, limit)

        def header() -> Mapping[str, TensorEntry]:
            needed = header_bytes(read(WEIGHTS_NAME, 8))
            return read_header(read(WEIGHTS_NAME, needed), sizes[WEIGHTS_NAME])

        description = describe(list(sizes), small, header)
        files = {name: FileEntry(name, sizes[name]) for name in READ_NAMES if name in sizes}
        return Candidate(ref, files, description)

    def fetch(self, candidate: Candidate, advance: Advance) -> Path:
        """Copy the files into the store.

        Raises:
            FolderRefused: a file has another size than was listed.
            StorageError: the disk is full or not writable.
        """
        filesystem, folder = self._opened[candidate.ref.place]
        try:
            work = Path(tempfile.mkdtemp(dir=self.store))
            for file in candidate.files.values():
                with _Translated(candidate.ref.place):
                    source = _opened(filesystem, f"{folder}/{file.name}")
                with source, (work / file.name).open("wb") as target:
                    self._copy(source, target, file.size, candidate.ref.place, advance)
        except OSError as error:
            raise StorageError(f"{candidate.ref.place} cannot be copied here: {error.strerror or error}.") from error
        changed = [file for file in candidate.files.values() if (work / file.name).stat().st_size != file.size]
        if changed:
            raise FolderRefused([FileRefused(file.name, "changed while it was being read") for file in changed])
        return work

    def missing_bytes(self, candidate: Candidate) -> int:
        return candidate.size

    def _copy(self, source: Any, target: Any, size: int, place: str, advance: Advance) -> None:
        """Copy `size` bytes, and one more where there is one: a server may send without end."""
        left = size + 1
        while left and not self.stopped.is_set():
            with _Translated(place):
                chunk = source.read(min(left, CHUNK))
            if not chunk:
                return
            target.write(chunk)
            advance(len(chunk))
            left -= len(chunk)


def url_of(url: str) -> str:
    """`url` as it is told of the folders that it names; as it stands where nothing here can read it."""
    try:
        filesystem, path = _open(url)
    except LoraMergeError:
        return url
    return _url(url, filesystem, path)


def told(text: str) -> str:
    """`text` without the passwords and signatures of the URLs in it."""
    return _QUERY.sub(r"\1", _PASSWORD.sub(r"\1", text))


def _url(given: str, filesystem: Any, path: str) -> str:
    """How the folder `path` of the file system of `given` is told: as that is written, without what lets one in.

    Of files on this machine that it lies in, no more than their names.
    """
    first, *rest = given.split("::")
    if not rest and not filesystem._get_kwargs_from_urls(given):  # all of such a URL is in the path
        return told(str(filesystem.unstrip_protocol(path)).rstrip("/"))
    place = first.rstrip("/").removesuffix(str(filesystem._strip_protocol(first)).rstrip("/"))
    within = [link if "://" in link and not link.startswith(HERE) else link.rpartition("/")[2] for link in rest]
    return told("::".join([f"{place}{path}", *within]))


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    with _Translated(url):
        try:
            filesystem, path = url_to_fs(url, **_of_the_web(url))
        except (ValueError, ImportError) as error:
            scheme = one_line(url.partition("://")[0])
            raise UsageError(f"{scheme}:// cannot be read here: {one_line(told(str(error)))}.") from error
    return filesystem, str(path).rstrip("/")


def _of_the_web(url: str) -> dict[str, Any]:
    """What web servers in a URL are read with: however long a file takes, as long as something comes."""
    schemes = {link.partition("://")[0] for link in url.split("::")} & {"http", "https"}
    if not schemes:
        return {}
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=_STALLED, sock_read=_STALLED)
    return {scheme: {"client_kwargs": {"timeout": timeout}} for scheme in schemes}


def _is_of_the_web(filesystem: Any) -> bool:
    return "http" in filesystem.protocol  # ("http", "https"); of others one or more names


def _opened(filesystem: Any, path: str) -> Any:
    """A file, to be read from its beginning to its end: of web servers in one answer, since not all know ranges."""
    return filesystem.open(path, "rb", **({"block_size": 0} if _is_of_the_web(filesystem) else {}))


def _beginning(filesystem: Any, path: str, size: int) -> bytes:
    if not _is_of_the_web(filesystem):
        return bytes(filesystem.cat_file(path, start=0, end=size))
    with _opened(filesystem, path) as file:
        found = b""
        while len(found) < size and (chunk := file.read(size - len(found))):
            found += chunk
    return found


def _size(entry: Mapping[str, Any], filesystem: Any) -> int:
    """A file's bytes; what lists web pages does not tell them, and has to be asked."""
    size = entry.get("size")
    if size is None and entry.get("type") == "file":
        size = filesystem.info(entry["name"]).get("size")
    if entry.get("type") != "file" or not isinstance(size, int):
        raise FolderRefused([FileRefused(one_line(str(entry["name"]).rpartition("/")[2]), "is not a regular file")])
    return size


class _Translated:
    """Around calls of a file system, each of which raises what it likes."""

    def __init__(self, place: str) -> None:
        self.place = one_line(told(place))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, LoraMergeError) or not isinstance(error, Exception):
            return
        said = one_line(told(str(error)))[:300] or type(error).__name__
        if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
            raise NotFoundError(f"{self.place} is not there, or you may not read it: {said}.") from error
        raise NetworkError(f"{self.place} cannot be read: {said}.", hint="Run the same command again.") from error

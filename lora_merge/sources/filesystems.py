"""Adapters behind any URL that fsspec knows: `memory://`, and what its plugins add (`s3://`, `gs://`, …).

Such places have no commits: what was listed must still be there when it is fetched, and the hashes are recorded. Who
may read them is for the file system to know: neither a record nor an error repeats a password or a signature.
"""

import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from ftplib import error_perm
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.peft_folder import PICKLE_NAME, READ_NAMES, WEIGHTS_NAME, FolderRefused, describe
from lora_merge.checkpoint.safetensors_file import FileRefused, TensorEntry, header_bytes, read_header
from lora_merge.errors import LoraMergeError, NetworkError, NotFoundError, StorageError, UsageError, one_line
from lora_merge.sources.deadline import Deadline
from lora_merge.sources.local import HERE
from lora_merge.sources.patterns import clients_of
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, FileEntry

CHUNK = 1 << 20
# A password, and on the web whatever stands there; github://org:repo@commit has none.
_PASSWORD = re.compile(r"(?<!github://)(?<=://)[^/\s]*:[^/\s]*@|(?:(?<=http://)|(?<=https://))[^/\s]*@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")  # it may sign the address
_CACHES = ("simplecache", "filecache", "blockcache")
_GONE = (401, 403, 404, 410)  # what web servers answer where nothing is, or nothing may be read
_ABSENT = (FileNotFoundError, PermissionError, NotADirectoryError, error_perm)


@dataclass(frozen=True)
class _Folder:
    """A folder of a file system that is open.

    Attributes:
        alone: held while it is read; many file systems have one connection, or one place in a file, for all threads.
    """

    filesystem: Any
    path: str
    alone: AbstractContextManager[Any]


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
        self._folders: dict[str, _Folder] = {}  # by the URL that is told

    def expand(self, source: str) -> list[AdapterRef]:
        """The folders that a URL names, or that match its pattern.

        Raises:
            NotFoundError: there is none.
            UsageError: fsspec knows no such URL.
        """
        uncached = _uncached(source)
        filesystem, path = _open(uncached)
        with _Translated(source):
            filesystem.invalidate_cache()  # of listings, which may be those of an earlier look
            found = [path] if filesystem.isdir(path) else sorted(filter(filesystem.isdir, filesystem.glob(path)))
            found = [match.rstrip("/") for match in found]
            if not found:
                hint = (
                    "Folders on the web are found by pages that link to what is in them."
                    if _is_of_the_web(filesystem)
                    else ""
                )
                raise NotFoundError(f"No folder matches {one_line(told(source))}.", hint=hint)
            if path not in found:
                found = self._clients(source, filesystem, found)
        alone = nullcontext() if filesystem.async_impl else threading.Lock()
        urls = {match: _url(uncached, filesystem, match) for match in found}
        places = {match: _place(url) for match, url in urls.items()}
        self._folders |= {place: _Folder(filesystem, match, alone) for match, place in places.items()}
        return [
            AdapterRef(one_line(place), source, place, room=self, url=urls[match]) for match, place in places.items()
        ]

    def _clients(self, source: str, filesystem: Any, found: Sequence[str]) -> list[str]:
        """The clients' among the folders that a pattern matches."""
        held = {str(match): [path.rpartition("/")[2] for path in filesystem.ls(match, detail=False)] for match in found}
        clients, note = clients_of(told(source), held)
        self.notes += [note] if note else []
        return list(clients)

    def version(self, ref: AdapterRef) -> str:
        there = self._folders[ref.place]
        with there.alone, _Translated(ref.place):
            listed = there.filesystem.ls(there.path, detail=False)
            names = sorted(path for path in listed if path.rpartition("/")[2] in READ_NAMES)
            # What fsspec knows a web page by is its address alone.
            key = there.filesystem.info if _is_of_the_web(there.filesystem) else there.filesystem.ukey
            return repr([(name, key(name)) for name in names])

    def examine(self, ref: AdapterRef) -> Candidate:
        there = self._folders[ref.place]
        with there.alone:
            return self._examined(ref, there.filesystem, there.path)

    def _examined(self, ref: AdapterRef, filesystem: Any, folder: str) -> Candidate:
        with _Translated(ref.place):
            listed = {entry["name"].rpartition("/")[2]: entry for entry in filesystem.ls(folder, detail=True)}
            known = [name for name in (*READ_NAMES, PICKLE_NAME) if name in listed]
            entries = {name: _with_size(listed[name], filesystem) for name in known}
        sizes = {name: _size(entry) for name, entry in entries.items()}

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
        there = self._folders[candidate.ref.place]
        try:
            work = Path(tempfile.mkdtemp(dir=self.store))
            with there.alone:
                for file in candidate.files.values():
                    with _Translated(candidate.ref.place):
                        source = _opened(there.filesystem, f"{there.path}/{file.name}")
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
        left, deadline = size + 1, Deadline(place)
        while left and not self.stopped.is_set():
            with _Translated(place):
                chunk = source.read(min(left, CHUNK))
            if not chunk:
                return
            target.write(chunk)
            advance(len(chunk))
            left -= len(chunk)
            deadline.require(size + 1 - left)


def url_of(url: str) -> str:
    """`url` as it is told of the folders that it names, be they there or not."""
    try:
        uncached = _uncached(url)
        filesystem, path = _open(uncached)
    except LoraMergeError:
        return told(url)
    return _place(_url(uncached, filesystem, path))


def told(text: str) -> str:
    """`text` without the passwords and signatures of the URLs in it."""
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


def _uncached(url: str) -> str:
    """`url` without a cache of fsspec's in front: files are copied once in any case, and its notes hold passwords."""
    first, _, rest = url.partition("::")
    if first.removesuffix("://") not in _CACHES:
        return url
    if "://" not in rest or rest.startswith(HERE):
        raise UsageError(f"{told(url)} is on this machine, and needs no cache.", hint="Give the folder itself.")
    return _uncached(rest)


def _url(given: str, filesystem: Any, path: str) -> str:
    """What names the folder `path` of the file system of `given`, written as that is."""
    first, *rest = given.split("::")
    if not rest and not filesystem._get_kwargs_from_urls(given):  # all of such a URL is in the path
        return str(filesystem.unstrip_protocol(path)).rstrip("/")
    root = first.rstrip("/").removesuffix(str(filesystem._strip_protocol(first)).rstrip("/"))
    return "::".join([f"{root}{path}", *rest])


def _place(url: str) -> str:
    """How a URL is told: without what lets one in, and of files on this machine in its chain no more than the names."""
    first, *rest = url.split("::")
    within = [link if "://" in link and not link.startswith(HERE) else link.rpartition("/")[2] for link in rest]
    return told("::".join([first, *within]))


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
    """What web servers in a URL are read with."""
    schemes = {link.partition("://")[0] for link in url.split("::")} & {"http", "https"}
    if not schemes:
        return {}
    from lora_merge.sources.web import options  # it needs aiohttp, as fsspec's own does

    return {scheme: options() for scheme in schemes}


def _is_of_the_web(filesystem: Any) -> bool:
    return "http" in filesystem.protocol  # ("http", "https"); of others one or more names


def _opened(filesystem: Any, path: str) -> Any:
    """A file, to be read from its beginning to its end: of web servers in one answer, since not all know ranges."""
    return filesystem.open(path, "rb", **({"block_size": 0} if _is_of_the_web(filesystem) else {}))


def _beginning(filesystem: Any, path: str, size: int) -> bytes:
    if not _is_of_the_web(filesystem):
        return bytes(filesystem.cat_file(path, start=0, end=size))
    with _opened(filesystem, path) as file:
        found, deadline = b"", Deadline(told(path))
        while len(found) < size and (chunk := file.read(size - len(found))):
            found += chunk
            deadline.require(len(found))
    return found


def _with_size(entry: Mapping[str, Any], filesystem: Any) -> Mapping[str, Any]:
    """An entry of a listing; pages of the web do not tell sizes, which have to be asked for."""
    if entry.get("size") is None and entry.get("type") == "file":
        return {**entry, "size": filesystem.info(entry["name"]).get("size")}
    return entry


def _size(entry: Mapping[str, Any]) -> int:
    name = one_line(str(entry["name"]).rpartition("/")[2])
    if entry.get("type") != "file":
        raise FolderRefused([FileRefused(name, "is not a regular file")])
    if not isinstance(size := entry.get("size"), int):
        raise FolderRefused([FileRefused(name, "is of a size that is not told before it is read")])
    return size


class _Translated:
    """Around calls of a file system, each of which raises what it likes."""

    def __init__(self, place: str) -> None:
        self.place = one_line(told(place))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, LoraMergeError) or not isinstance(error, Exception):
            return
        cause = _cause(error)
        said = one_line(told(str(cause)))[:300].rstrip(".") or type(cause).__name__
        status = getattr(cause, "status", None)
        if isinstance(cause, _ABSENT) if status is None else status in _GONE:
            raise NotFoundError(f"{self.place} is not there, or you may not read it: {said}.") from error
        raise NetworkError(f"{self.place} cannot be read: {said}.", hint="Run the same command again.") from error


def _cause(error: Exception) -> Exception:
    """What a web server answered, or hindered it, which fsspec says to be a file that is not there; else `error`."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if hidden and isinstance(cause, Exception) else error

"""Adapters in folders and globs of folders on this machine."""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from lora_merge.checkpoint.peft_folder import CONFIG_NAME, READ_NAMES, Description, open_folder
from lora_merge.errors import NetworkError, NotFoundError, one_line
from lora_merge.sources.patterns import NO_CLIENTS, clients_of
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, FileEntry

MOST_NAMED = 5
HERE = ("file://", "local://")  # a folder may be written so; its records know it by its name like any other


class LocalRoom:
    """This machine's folders as a place that adapters come from. They have no commits: their hashes are recorded.

    Attributes:
        notes: what a glob matched and did not take.
    """

    store = None

    def __init__(self) -> None:
        self.notes: list[str] = []

    def expand(self, source: str) -> list[AdapterRef]:
        """The folders that `source` names: one, or those that a glob matches.

        Raises:
            NotFoundError: there is none; with near misses.
        """
        return [AdapterRef(one_line(folder.name), source, str(folder), room=self) for folder in self._folders(source)]

    def version(self, ref: AdapterRef) -> str:
        found = [(name, _stat(Path(ref.place, name))) for name in READ_NAMES]
        return repr([(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found if s])

    def examine(self, ref: AdapterRef) -> Candidate:
        folder = Path(ref.place)
        with closing(open_folder(folder)) as found:
            files = {name: FileEntry(name, (folder / name).stat().st_size) for name in READ_NAMES if _has(folder, name)}
            return Candidate(ref, files, Description(found.config, found.statement, found.stored))

    def fetch(self, candidate: Candidate, advance: Advance) -> Path:
        return Path(candidate.ref.place)

    def missing_bytes(self, candidate: Candidate) -> int:
        return 0

    def _folders(self, source: str) -> list[Path]:
        path = _path(source)
        if path.is_dir():
            if not (path / CONFIG_NAME).exists() and any(path.glob(f"*/{CONFIG_NAME}")):
                raise NotFoundError(f"{source} is a folder of adapters, not one.", hint=f"lora-merge … '{path}/*'")
            return [path]
        matches = [match for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_dir()]
        if matches:
            clients, note = clients_of(source, {match: _marks(Path(match)) for match in matches})
            self.notes += [note] if note else []
            return [Path(client) for client in clients]
        if path.exists():
            raise NotFoundError(f"{source} is a file; a source is the folder that holds adapter_config.json.")
        raise NotFoundError(f"No folder matches {source}.", hint=near_misses(path))


def is_folder(source: str) -> bool:
    """Whether `source` names a folder here, or a glob matches one."""
    path = _path(source)
    return path.is_dir() or any(Path(match).is_dir() for match in glob.iglob(str(path), recursive=True))


def folders_named(sources: Sequence[str | Path]) -> Iterator[Path]:
    """What `sources` name on this machine: folders, files, and what globs match and do not leave out."""
    for source in sources:
        path = _path(str(source))
        matches = map(Path, glob.iglob(str(path), recursive=True))
        yield from [path] if path.exists() else (match for match in matches if not _marks(match))


def is_pattern(source: str) -> bool:
    """Whether `source` is a glob: what is called so here is none."""
    return glob.has_magic(source) and not os.path.lexists(source)


def whole_paths(source: str) -> frozenset[str]:
    """The whole path of what `source` names, or of its glob: as it is spelled, and that without links."""
    return frozenset((whole_path(source), os.path.realpath(_path(source))))


def whole_path(source: str) -> str:
    """The whole path of what `source` names, or of its glob, with its links; beside a `..` they decide where it is."""
    path = _path(source)
    return os.path.realpath(path) if ".." in path.parts else os.path.abspath(path)


def without_scheme(source: str) -> str:
    """The path in a URL of this machine; anything else as it stands."""
    return source.partition("://")[2] if source.startswith(HERE) else source


def _path(source: str) -> Path:
    """What is called so here; else with `~` as the home that it means, which no shell puts into a quoted pattern."""
    source = without_scheme(source)
    return Path(source if os.path.exists(source) else os.path.expanduser(source))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # one that is not there, or is just being replaced
        return None


def _marks(folder: Path) -> list[str]:
    """The files in a folder that no client's adapter has."""
    return [name for name in NO_CLIENTS if _has(folder, name)]


def _has(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


def nor_a_folder(names: Sequence[str], error: NetworkError | NotFoundError) -> NetworkError | NotFoundError:
    """`error`, of the Hub, about `names` that might have been folders here: whoever mistyped one learns of both."""
    first, *more = error.message.split("\n")
    here = f"There is no folder {', '.join(names[:MOST_NAMED])} here"
    if isinstance(error, NetworkError):
        return NetworkError(f"{here}, and the Hub cannot be asked: {first}", hint=error.hint, more=more)
    return NotFoundError(f"{here}. {first}", hint=error.hint, more=more)


def near_misses(path: Path) -> str:
    """The adapters beside `path` whose names are like its own, or that are all there are beside a pattern."""
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder."
    folders = sorted(one_line(entry.name) for entry in path.parent.iterdir() if (entry / CONFIG_NAME).is_file())
    near = difflib.get_close_matches(path.name.strip("*"), folders, n=3, cutoff=0.4)
    if near:
        return f"Did you mean {', '.join(str(path.parent / name) for name in near)}?"
    shown = ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")
    return f"Adapters there: {shown}." if folders else f"No folder in {path.parent.resolve()} holds an adapter."


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name of one line for each folder: as many trailing parts of its path as tell all of them apart."""
    parts = [[one_line(part) for part in folder.resolve().parts] for folder in folders]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [ascii(str(folder)) for folder in folders]  # names that differ only in how they are escaped

"""Adapters in folders and globs of folders on this machine."""

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from lora_merge.errors import NotFoundError, UsageError, one_line


def find_folders(sources: Sequence[str | Path]) -> list[Path]:
    """The folders that `sources` name: folders, or globs of them.

    Raises:
        NotFoundError: a source names nothing; with near misses.
        UsageError: a folder is given twice, which would count it twice.
    """
    found: dict[Path, Path] = {}
    for folder in (folder for source in sources for folder in _expand(str(source))):
        if (first := found.setdefault(folder.resolve(), folder)) is not folder:
            also = f", as {first} too" if first != folder else ""
            raise UsageError(one_line(f"{folder} is given twice{also}."))
    return list(found.values())


def _expand(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_dir()]
    if matches:
        return matches
    if path.exists():
        raise NotFoundError(f"{source} is a file; a source is the folder that holds adapter_config.json.")
    raise NotFoundError(f"No folder matches {source}.", hint=_suggestion(path))


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder."
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name.strip("*"), folders, n=3, cutoff=0.4)
    return f"Did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else ""


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name of one line for each folder: as many trailing parts of its path as tell all of them apart."""
    parts = [[one_line(part) for part in folder.resolve().parts] for folder in folders]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [ascii(str(folder)) for folder in folders]  # names that differ only in how they are escaped

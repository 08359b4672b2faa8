"""Raw records out of a data file, each with the place it came from. JSON lines here; the rest through `datasets`."""

import gzip
import json
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_merge.errors import NetworkError, NotFoundError, Problem, RefusedError, UsageError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def records(path: str) -> Iterator[tuple[str, object]]:
    """Yield `line 7` (or `row 7`) and the parsed record; one that cannot be parsed comes as its `ValueError`.

    Args:
        path: a JSON lines file (also gzip, or one JSON array); else whatever `datasets` reads, where it is installed.

    Raises:
        NotFoundError: there is no such file or data set.
        NetworkError: the Hub cannot be reached for a data set.
        RefusedError: the file as a whole cannot be read.
        UsageError: `datasets` is needed and not installed, or the file is of no form that is read.
    """
    check_data(path)
    if not path.lower().endswith(JSON_SUFFIXES):
        return _places("row", list(_dataset(path)))
    content = _content(Path(path))
    if content.lstrip().startswith(b"["):
        whole = _parsed(content)
        return _places("row", whole if isinstance(whole, list) else [whole])
    return _places("line", [_parsed(line) if line.strip() else None for line in content.split(b"\n")])


def check_data(path: str) -> None:
    """Raise, as `records` does, what shows before anything is read or imported."""
    local, is_json = Path(path), path.lower().endswith(JSON_SUFFIXES)
    names_file = path.lower().endswith((*JSON_SUFFIXES, *_BUILDERS))  # a Hub data set's id does not
    if not is_json and find_spec("datasets") is None:
        raise UsageError(
            f"{path} is not JSON lines ({', '.join(JSON_SUFFIXES)}); other formats need the package `datasets`.",
            hint="pip install 'lora-merge[data]'",
        )
    if not (local.is_file() if is_json else local.exists() or (path.count("/") == 1 and not names_file)):
        raise NotFoundError(f"There is no data file {path}.")
    if local.is_file() and not names_file:
        raise UsageError(
            f"{path} is of no form that is read: its name ends in none of {', '.join((*JSON_SUFFIXES, *_BUILDERS))}."
        )


def _places(unit: str, found: list[Any]) -> Iterator[tuple[str, object]]:
    """Number the records from 1; blank lines are passed over."""
    for number, record in enumerate(found, start=1):
        if record is not None:
            yield f"{unit} {number}", record


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RefusedError([Problem(path.name, "the file", f"is not whole gzip: {error}")]) from error


def _parsed(line: bytes) -> object:
    try:
        parsed = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    return ValueError("must be a JSON object, is null") if parsed is None else parsed


def _dataset(path: str) -> Any:
    import datasets

    local = Path(path)
    datasets.disable_progress_bars()
    try:
        if local.is_dir() and (local / "dataset_info.json").is_file():
            return datasets.load_from_disk(path)
        if local.is_file() and local.suffix.lower() in _BUILDERS:
            return datasets.load_dataset(_BUILDERS[local.suffix.lower()], data_files=path, split="train")
        return datasets.load_dataset(path, split="train")
    except ConnectionError as error:
        raise NetworkError(f"The Hub cannot be reached for the data set {path}: {error}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise NotFoundError(f"`datasets` cannot read {path}: {error}") from error

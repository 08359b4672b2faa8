"""The Hub's cache on this machine, distrusted: every file is hashed here, because the library checks sizes only."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from lora_merge import __version__
from lora_merge.checkpoint.peft_folder import CONFIG_NAME, LEDGER_NAME, READ_NAMES, WEIGHTS_NAME, FolderRefused
from lora_merge.checkpoint.safetensors_file import FileRefused
from lora_merge.errors import NetworkError
from lora_merge.hub.failures import asking
from lora_merge.hub.session import is_offline
from lora_merge.hub.transfer import moved
from lora_merge.sources.reference import Advance, FileEntry
from lora_merge.statement import FILE_NAME as STATEMENT_NAME

CHUNK = 1 << 20


def cached_file(repo: str, commit: str, name: str) -> Path | None:
    """Where the cache has a file of a commit; None where it has not."""
    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) and os.path.isfile(found) else None


def cached_entries(repo: str, commit: str) -> dict[str, FileEntry]:
    """The files that a merge reads of a commit, as the cache knows them: it calls contents by the hashes once listed.

    Raises:
        NetworkError: one of them is not there, or the cache does not tell.
    """
    found = {name: path for name in READ_NAMES if (path := cached_file(repo, commit, name))}
    expected = (CONFIG_NAME, WEIGHTS_NAME) if LEDGER_NAME in found else (CONFIG_NAME, WEIGHTS_NAME, STATEMENT_NAME)
    absent = [name for name in expected if name not in found]
    unsure = [name for name in absent if try_to_load_from_cache(repo, name, revision=commit) is None]
    entries = {name: cached_entry(name, path) for name, path in found.items()}
    if unsure or None in entries.values():
        raise NetworkError(
            f"{repo} at {commit[:12]} is not wholly in the cache ({', '.join(unsure) or 'its hashes'}), "
            "and HF_HUB_OFFLINE is set.",
            hint="unset HF_HUB_OFFLINE",
        )
    return {name: entry for name, entry in entries.items() if entry is not None}


def cached_entry(name: str, path: Path) -> FileEntry | None:
    """A file by the hash that was listed for it, to which its name links; None where the cache is one without links."""
    # Where that is a link too, it leads on to what Xet calls the contents, which is another hash.
    stored, size = os.path.basename(os.readlink(path)) if path.is_symlink() else "", path.stat().st_size
    if re.fullmatch(r"[0-9a-f]{64}", stored):
        return FileEntry(name, size, sha256=stored)
    return FileEntry(name, size, git_sha1=stored) if re.fullmatch(r"[0-9a-f]{40}", stored) else None


def fetch_file(repo: str, commit: str, file: FileEntry, advance: Advance) -> Path:
    """A file of a commit in the cache, downloaded where it is not there; once more where its hash is wrong.

    Args:
        advance: counts the bytes that are downloaded.

    Raises:
        FolderRefused: the hash is wrong twice.
        NetworkError, NotFoundError, StorageError: as the Hub or the disk fails.
    """
    counter = _Counter(advance)
    try:
        path = _download(repo, commit, file, counter, anew=False)
        problem = hash_problem(path, file)
    except NetworkError as error:
        # Xet ends in a RuntimeError, and a file of a wrong size in an OSError, where an answer was damaged on its way.
        if isinstance(error.__cause__, HfHubHTTPError) or not isinstance(error.__cause__, (RuntimeError, OSError)):
            raise
        problem = error.message
    if problem is None:
        return path
    if is_offline():
        raise NetworkError(
            f"{repo}: {file.name} in the cache {problem}, and HF_HUB_OFFLINE is set.", hint="unset HF_HUB_OFFLINE"
        )
    path = _download(repo, commit, file, counter, anew=True)
    if problem := hash_problem(path, file):
        for each in [path.resolve(), *_links(path)]:  # nobody else shall find it there
            each.unlink(missing_ok=True)
        raise FolderRefused([FileRefused(file.name, f"{problem}; it was fetched twice")])
    return path


def _download(repo: str, commit: str, file: FileEntry, counter: "_Counter", *, anew: bool) -> Path:
    def download() -> str:
        counter.take_back()  # of a try before this one
        return hf_hub_download(
            repo,
            file.name,
            revision=commit,
            force_download=anew,
            tqdm_class=_bar_of(counter),
            library_name="lora-merge",
            library_version=__version__,
        )

    with asking(repo):
        return Path(moved(file.size, download))


def hash_problem(content: bytes | Path, file: FileEntry) -> str | None:
    """What is wrong with a file's bytes against its listing; None where they are the ones that are listed."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != file.size:
        return f"has {size} bytes where {file.size} are listed"
    if file.sha256 is not None:
        digest, listed = hashlib.sha256(), file.sha256
    else:
        digest, listed = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.git_sha1 or ""
    for chunk in _chunks(content):
        digest.update(chunk)
    return None if digest.hexdigest() == listed else "does not have the hash that is listed"


def _links(path: Path) -> Iterator[Path]:
    """`path` and each link on the way from it to a file."""
    while path.is_symlink():
        yield path
        path = path.parent / os.readlink(path)


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def remove_leftovers(repo: str) -> None:
    """Remove the partial files that a killed run left of `repo`; those of a live one are locked and stay."""
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    locks = Path(constants.HF_HUB_CACHE, ".locks", folder)
    blobs = Path(constants.HF_HUB_CACHE, folder, "blobs")
    for part in blobs.glob("*.incomplete"):
        _remove_unless_locked(part, locks / f"{part.name.partition('.')[0]}.lock")
    for probe in blobs.glob("tmp_*"):  # empty, and there for a moment only, unless its run was killed
        probe.unlink(missing_ok=True)


def _remove_unless_locked(part: Path, lock: Path) -> None:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        part.unlink(missing_ok=True)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what the library's own lock does
        part.unlink(missing_ok=True)
    except BlockingIOError:
        pass  # a live run's
    finally:
        os.close(descriptor)


class _Counter:
    """Bytes of one download, which may have to be taken back."""

    def __init__(self, advance: Advance) -> None:
        self.advance, self.count = advance, 0

    def add(self, count: int) -> None:
        self.count += count
        self.advance(count)

    def take_back(self) -> None:
        self.add(-self.count)


def _bar_of(counter: _Counter) -> Any:
    """What huggingface_hub takes for a tqdm class, without its printing."""

    class Bar:
        total: int | None = None

        def __init__(self, **options: Any) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            counter.add(int(count or 0))

        def update_transfer(self, count: int) -> None:
            """Xet's count of bytes on the wire; the file's own bytes are what is shown."""

        def set_postfix_str(self, *text: object, **options: object) -> None: ...

        set_transfer_postfix_str = refresh = close = set_postfix_str

    return Bar

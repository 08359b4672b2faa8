"""A folder, or a file, that appears whole or not at all: written beside, flushed, renamed."""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from lora_merge.checkpoint.overwriting import Kind, require_outside_adapters, require_replaceable
from lora_merge.errors import ConflictError, StorageError, UsageError
from lora_merge.interrupts import in_one_piece

_REPLACED = "replaced"
_LONGEST = 200  # bytes of a name: with what is added to it, no file system's 255 are passed
_SECONDS_OF_SILENCE, _SECONDS_BETWEEN_TRIES = 1.0, 0.02
T = TypeVar("T")


def _silent(_: str) -> None:
    return None


@contextmanager
def atomic_folder(
    output: Path,
    *,
    force: bool = False,
    kind: Kind = "merged",
    option: str = "--output",
    looked: bool = False,
    tell: Callable[[str], None] = _silent,
) -> Iterator[Path]:
    """Yield an empty folder beside `output`; when the block ends well, flush it and rename it to `output`.

    When the block raises, the folder is removed and `output` is as it was. What a killed run left beside `output`
    is removed first; a folder that another live run is writing is left alone.

    Args:
        output: the final path. Its parents are made, and removed where nothing comes of it; a link is followed, and
            stays.
        force: replace a result of this `kind` that is at `output` and holds nothing else; without it, anything there
            but an empty folder is an error.
        option: what the user gave `output` as.
        looked: whether the caller has done `check_free` already, so that what is there now was made meanwhile.
        tell: called with a line where another program's lock is waited for.

    Raises:
        UsageError: `output` exists, and `force` is false or it is of no such kind.
        ConflictError: so it is at the end, and was not at the beginning.
        StorageError: the disk is full or not writable.
    """
    output = Path(os.path.realpath(output))
    free = partial(check_free, output, force=force, kind=kind, option=option)
    still_free = partial(require_still, free, output)
    (still_free if looked else free)()
    with new_parents(output):
        try:
            work, lock = in_parents(output, partial(work_folder, output, tell))
        except OSError as error:
            raise StorageError(f"cannot write beside {output}: {error.strerror}") from error
        try:
            yield work
            _flush(work, _umask())
            still_free()
            _replace(output, work, force=force)
        except OSError as error:
            raise StorageError(f"writing {output} failed: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)


def require_still(free: Callable[[], None], output: Path) -> None:
    """Call `free`, which has found nothing in the way at `output` before: what is there now was made meanwhile."""
    try:
        free()
    except UsageError as error:
        raise made_meanwhile(output) from error


@contextmanager
def new_parents(path: Path) -> Iterator[None]:
    """Remove, at the end, those parents of `path` that are not there yet and stay empty."""
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # what is not empty stays
                parent.rmdir()


def in_parents(path: Path, make: Callable[[], T]) -> T:
    """What `make` makes beside `path`, whose parents are made; anew where they vanish, as a failing run's do."""
    for _ in range(2):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return make()
    path.parent.mkdir(parents=True, exist_ok=True)
    return make()


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path`, or leave what is there as it was; the folders that it lies in are made.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with file_beside(path) as work:
        with work.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        work.chmod(0o666 & ~_umask())  # mkstemp makes private ones
        os.replace(work, path)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of `path`, of a name that no other run has and nobody knows; gone at the end.

    Raises:
        StorageError: it cannot be made, or what is done with it fails.
    """
    work: Path | None = None
    with new_parents(path):
        try:
            make = partial(tempfile.mkstemp, prefix=_prefix(path), dir=path.parent)
            descriptor, name = in_parents(path, make)
            os.close(descriptor)
            work = Path(name)
            yield work
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror or error}.") from error
        finally:
            if work is not None:
                work.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what is needed only for now, removed at the end; what killed runs left is removed first.

    Raises:
        StorageError: there is no room for temporary files.
    """
    try:
        folder, lock = work_folder(Path(tempfile.gettempdir(), "lora-merge"))
    except OSError as error:
        raise StorageError(f"{tempfile.gettempdir()} cannot be written to: {error.strerror}.") from error
    try:
        inside = folder / "scratch"  # whoever writes beside something in it locks it, and `folder` is locked already
        inside.mkdir()
        yield inside
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_free(output: Path, *, force: bool = False, kind: Kind = "merged", option: str = "--output") -> None:
    """Raise `UsageError` where writing `output` would overwrite something that `force` does not cover.

    Nor is anything written into an adapter's folder.

    Raises:
        StorageError: the folder that `output` is to lie in cannot be written.
    """
    require_outside_adapters(output, option)
    if not os.path.exists(output) or (output.is_dir() and not any(output.iterdir())):
        require_writable(output)
    elif not force:
        raise UsageError(f"{output} exists already.", hint="Choose another --output, or replace it with --force.")
    else:
        require_replaceable(output, kind, option)
        require_writable(output)


def require_writable(output: Path) -> None:
    """Raise where nothing can be made at `output`: before the work rather than after it.

    Raises:
        UsageError: a name in it is too long for the file system.
        StorageError: the folder that it is to lie in cannot be written.
    """
    whole = Path(os.path.realpath(output))
    parent = next(folder for folder in whole.parents if os.path.lexists(folder))
    for path in (*(parent / name for name in whole.relative_to(parent).parts), whole):
        _require_short(path)
    if not parent.is_dir():
        raise StorageError(f"cannot write {output}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {output}: {parent} may not be written")


def _require_short(path: Path) -> None:
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            size = len(os.fsencode(path.name))
            hint = f"The name {path.name[:20]}… has {size} bytes; most file systems take 255."
            raise UsageError(f"A name is too long for the file system: {path}.", hint=hint) from error


def work_folder(output: Path, tell: Callable[[str], None] = _silent) -> tuple[Path, int]:
    """A new folder beside `output`, and the descriptor of the lock on it, to be held while this run lives."""
    while True:
        with alone_beside(output, tell):
            pass  # a wait that Ctrl-C ends, which it would not inside
        with suppress(BlockingIOError):  # somebody was quicker
            return _made(output)


@in_one_piece
def _made(output: Path) -> tuple[Path, int]:
    parent = os.open(output.parent, os.O_RDONLY)
    try:
        # Without the parent's lock another run could take the new folder for a leftover before it is locked.
        fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(output)
        work = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return work, lock
    finally:
        os.close(parent)


def remove_leftovers(output: Path) -> None:
    """Remove the work folders that killed runs left beside `output`."""
    for leftover in output.parent.glob(glob.escape(_prefix(output)) + "*"):
        try:
            lock = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (leftover / _REPLACED).exists() and not os.path.lexists(output):
                os.rename(leftover / _REPLACED, output)  # killed between two renames: the old one comes back
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass  # a live run's
        finally:
            os.close(lock)


@contextmanager
def alone_beside(output: Path, tell: Callable[[str], None] = _silent) -> Iterator[None]:
    """Hold what every run takes for a moment before it writes beside `output`: no other run begins or ends here."""
    folder = os.path.dirname(os.path.realpath(output))
    parent, since = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while not _is_taken(parent):
            if time.monotonic() - since > _SECONDS_OF_SILENCE:
                tell(f"Waiting for another program that has {folder} locked.")
                since = float("inf")
            time.sleep(_SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(parent)


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hidden_name(path: Path, ending: str) -> str:
    """The name of what lies beside `path` while it is made; of a long one, its beginning and its hash."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.{ending}"


def _prefix(output: Path) -> str:
    return hidden_name(output, "partial-")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path, umask: int) -> None:
    """Give every file and folder the mode of ordinary ones, and fsync it.

    mkdtemp and safetensors make private ones; and after the rename a power cut must not leave empty files.
    """
    for root, _, files in os.walk(folder):
        modes = {os.path.join(root, name): 0o666 for name in files} | {root: 0o777}
        for path, mode in modes.items():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fchmod(descriptor, mode & ~umask)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@in_one_piece
def _replace(output: Path, work: Path, *, force: bool) -> None:
    """Put `work` at `output`. What was there stays until it is replaced in one step; the caller removes it."""
    if not (force and output.is_dir() and any(output.iterdir())):
        try:
            os.rename(work, output)  # onto an empty folder, never onto anything else
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise made_meanwhile(output) from error
            raise
    elif not _exchange(work, output):
        aside = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        os.rename(output, aside / _REPLACED)
        os.rename(work, output)
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def made_meanwhile(output: Path) -> ConflictError:
    """The error where something is at `output` that was not there when the run began."""
    return ConflictError(f"Somebody else has made {output} in the meantime.", hint="It is left as it is.")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill leaves the old or the new; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    swap, here = 2, -100  # RENAME_EXCHANGE, also RENAME_SWAP; AT_FDCWD
    if hasattr(libc, "renameat2"):  # Linux
        return bool(libc.renameat2(here, names[0], here, names[1], swap) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        return bool(libc.renamex_np(*names, swap) == 0)
    return False

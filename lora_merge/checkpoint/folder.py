"""A folder that appears whole or not at all: written beside, flushed, renamed."""

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_merge.errors import StorageError, UsageError

_REPLACED = "replaced"


@contextmanager
def atomic_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `output`; when the block ends well, flush it and rename it to `output`.

    When the block raises, the folder is removed and `output` is as it was. What a killed run left beside `output`
    is removed first; a folder that another live run is writing is left alone.

    Args:
        output: the final path. Its parents are made.
        force: replace what is at `output`; without it, anything there but an empty folder is an error.

    Raises:
        UsageError: `output` exists and `force` is false.
        StorageError: the disk is full or not writable.
    """
    output = Path(os.path.abspath(output))
    check_free(output, force=force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work, lock = work_folder(output)
    except OSError as error:
        raise StorageError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        os.chmod(work, 0o777 & ~_umask())  # mkdtemp makes a private folder, the result is an ordinary one
        yield work
        _flush(work)
        _replace(output, work, force=force)
    except OSError as error:
        raise StorageError(f"writing {output} failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def check_free(output: Path, *, force: bool = False) -> None:
    """Raise `UsageError` where writing `output` would overwrite something and `force` is false."""
    if force or not os.path.lexists(output):
        return
    if not output.is_dir() or any(output.iterdir()):
        raise UsageError(f"{output} exists already.", hint="Choose another --output, or replace it with --force.")


def work_folder(output: Path) -> tuple[Path, int]:
    """A new folder beside `output`, and the descriptor of the lock on it, to be held while this run lives."""
    parent = os.open(output.parent, os.O_RDONLY)
    try:
        # Without the parent's lock another run could take the new folder for a leftover before it is locked.
        fcntl.flock(parent, fcntl.LOCK_EX)
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
def alone_beside(output: Path) -> Iterator[None]:
    """Hold what every run takes for a moment before it writes beside `output`: no other run begins or ends here."""
    parent = os.open(output.parent, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(parent)


def _prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    """fsync every file and folder under `folder`: after the rename a power cut must not leave empty files."""
    for root, _, files in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in files), root):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _replace(output: Path, work: Path, *, force: bool) -> None:
    """Put `work` at `output`. What was there stays until it is replaced in one step; the caller removes it."""
    check_free(output, force=force)  # again: it may have been taken while this run worked
    if output.is_symlink() or output.is_file():
        output.unlink()
    if not (output.is_dir() and any(output.iterdir())):
        os.rename(work, output)
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

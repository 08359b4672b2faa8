"""A folder, or a file, that appears whole or not at all: written beside, flushed, renamed."""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_merge.checkpoint.overwriting import Kind, require_outside_adapters, require_replaceable
from lora_merge.errors import ConflictError, StorageError, UsageError
from lora_merge.interrupts import in_one_piece

_REPLACED = "replaced"


@contextmanager
def atomic_folder(
    output: Path, *, force: bool = False, kind: Kind = "merged", option: str = "--output"
) -> Iterator[Path]:
    """Yield an empty folder beside `output`; when the block ends well, flush it and rename it to `output`.

    When the block raises, the folder is removed and `output` is as it was. What a killed run left beside `output`
    is removed first; a folder that another live run is writing is left alone.

    Args:
        output: the final path. Its parents are made; a link is followed, and stays.
        force: replace a result of this `kind` that is at `output` and holds nothing else; without it, anything there
            but an empty folder is an error.
        option: what the user gave `output` as.

    Raises:
        UsageError: `output` exists, and `force` is false or it is of no such kind.
        ConflictError: so it is at the end, and was not at the beginning.
        StorageError: the disk is full or not writable.
    """
    output = Path(os.path.realpath(output))
    check_free(output, force=force, kind=kind, option=option)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work, lock = work_folder(output)
    except OSError as error:
        raise StorageError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield work
        _flush(work, _umask())
        try:
            check_free(output, force=force, kind=kind, option=option)
        except UsageError as error:  # it was free when we began
            raise made_meanwhile(output) from error
        _replace(output, work, force=force)
    except OSError as error:
        raise StorageError(f"writing {output} failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
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
    """Raise `StorageError` where nothing can be made at `output`: before the work rather than after it."""
    parent = next(folder for folder in Path(os.path.realpath(output)).parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise StorageError(f"cannot write {output}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {output}: {parent} may not be written")


@in_one_piece
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
    parent = os.open(os.path.dirname(os.path.realpath(output)), os.O_RDONLY)
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

"""Merging under a lock: reading and writing `lora-merge.lock`, the commits it pins, and what it forbids."""

import os
from collections.abc import Mapping
from pathlib import Path

from lora_merge.aggregation.robust import WrongChoice, require_enough, robust_of
from lora_merge.aggregation.weights import IN_RANGE, is_in_range
from lora_merge.checkpoint.folder import file_beside, require_writable, write_file
from lora_merge.checkpoint.overwriting import adapter_around
from lora_merge.checkpoint.safetensors_file import FileRefused, parse_json
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError, VerificationError
from lora_merge.lock import FILE_NAME, MAX_BYTES, Lock, LockError
from lora_merge.options import OptionError, merge_settings, require_rule, require_sound


def read_lock(path: Path) -> Lock:
    """The lock at `path`.

    Raises:
        NotFoundError: there is none.
        RefusedError: it is malformed, or says what no merge can be made by.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no lock {path}.", hint="lora-merge aggregate writes one beside the adapter.")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    try:
        if len(text) > MAX_BYTES:
            raise FileRefused("file", f"is larger than {MAX_BYTES} bytes")
        lock = Lock.from_json(parse_json(text, "file"))
        _require_possible(lock)
        return lock
    except (FileRefused, LockError) as error:
        raise RefusedError([Problem(path.name, error.field, error.reason)]) from error


def _require_possible(lock: Lock) -> None:
    """Raise `LockError` for a setting or a weight that a merge would refuse: whoever reads a lock did not choose it."""
    of, robust = lock.options, robust_of(lock.options)
    energy = of.get("energy") if of.get("rank") == "auto" else None
    for at, entry in enumerate(lock.inputs):
        if entry.weight != 0 and not is_in_range(entry.weight):
            raise LockError(f"inputs[{at}].weight", f"must be 0, or {IN_RANGE}, is {entry.weight!r:.40}")
    if not any(entry.weight for entry in lock.inputs):
        raise LockError("inputs", "all have the weight 0")
    try:
        merge_settings(lock.method, of.get("rank"), energy, lock.dtype, None, of.get("density"), of.get("seed"))
        require_rule(robust, lock.method)
        require_sound(lock.global_lr, None)
        if robust.byzantine is not None:
            require_enough(sum(entry.weight > 0 for entry in lock.inputs), robust.byzantine)
    except (OptionError, WrongChoice) as error:
        name = error.option.replace("-", "_")
        raise LockError(name if name in vars(lock) else f"options.{name}", error.reason) from error


def is_to_be_written(path: Path, output: Path) -> bool:
    """Whether a merge into `output` writes the lock at `path`; one that an adapter's folder holds is only read.

    Raises:
        UsageError: it is not there, and would be the output or a new file in an adapter's folder; or its name is too
            long for the file system.
        StorageError: no file can be written there, which is said before the merge.
    """
    place, into = Path(os.path.realpath(path)), Path(os.path.realpath(output))
    if place == into / FILE_NAME:
        return False  # the merge brings it along
    folder = into if into in (place, *place.parents) else adapter_around(path)
    if folder and not path.exists():
        raise UsageError(
            f"There is no lock {path}, and none is written into {folder}, which is an adapter's folder.",
            hint="Name a lock that is there, or a place for a new one apart from adapters.",
        )
    if folder is None:
        require_writable(path)
        with file_beside(path):
            pass
    return folder is None


def write_lock(lock: Lock, path: Path) -> None:
    """Write the lock to `path`, whole or not at all."""
    write_file(path, lock.to_json())


def pins_of(lock: Lock | None) -> Mapping[str, str]:
    """The commit that the lock pins each repository to."""
    return {entry.source: entry.commit for entry in lock.inputs if entry.commit} if lock else {}


def require_unchanged(locked: Lock, lock: Lock) -> None:
    """Raise `VerificationError` where a merge would not be the one that is locked."""
    if found := locked.differences(lock):
        raise VerificationError(
            "The merge would change what is locked; nothing was written.",
            more=[f"  {line}" for line in found],
            hint="Leave out --locked to merge these inputs and write the lock anew.",
        )

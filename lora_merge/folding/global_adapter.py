"""A global adapter that others are to be folded into: its files, read as a stranger's, and agreeing."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_merge.aggregation.methods import METHODS
from lora_merge.checkpoint.core_file import StoredCore, open_core
from lora_merge.checkpoint.intact import OWN_NAMES, WAY_ON, alterations
from lora_merge.checkpoint.peft_folder import (
    CONFIG_NAME,
    CORE_NAME,
    WEIGHTS_NAME,
    Description,
    FolderRefused,
    PeftFolder,
    file_sha256,
    open_folder,
    read_ledger,
)
from lora_merge.checkpoint.planned import DTYPES
from lora_merge.checkpoint.safetensors_file import FileRefused
from lora_merge.checkpoint.stacks import Stacks
from lora_merge.errors import Problem, RefusedError
from lora_merge.kept import ClaimsError, descriptions_of, ranks_in, ranks_of
from lora_merge.ledger import FILE_NAME as LEDGER_NAME
from lora_merge.ledger import Contribution, Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock
from lora_merge.locking import read_lock

_EQUAL = 1e-9  # of sums of weights, which may be added up in another order


@dataclass(frozen=True)
class GlobalAdapter:
    """An open global adapter. `place` is what the user knows it by, `commit` its repository's."""

    place: str
    commit: str | None
    folder: PeftFolder
    ledger: Ledger
    lock: Lock
    core: StoredCore | None = None

    @cached_property
    def contributions(self) -> Mapping[str, Contribution]:
        """What is in, by client id, sorted."""
        return {each.client_id: each for each in self.ledger.contributions}

    @cached_property
    def descriptions(self) -> Mapping[str, Description]:
        """Each client as its claims describe it."""
        return descriptions_of(self.contributions.values())

    @cached_property
    def is_stacked(self) -> bool:
        """Whether it is nothing but stacks of its clients' blocks, whose widths are known."""
        known = all(each.block_ranks is not None and each.claims is not None for each in self.ledger.contributions)
        return (
            self.ledger.method == "exact" and self.ledger.forms.keys() == {"stack"} and self.folder.is_plain and known
        )

    @cached_property
    def stacks(self) -> Stacks:
        """The clients' blocks, in the order of `contributions`."""
        return Stacks(self.folder, ranks_in(self.contributions.values(), ranks_of(self.folder)))

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """The sha256 of its own files: of what was opened, whatever lies there now; and of a core that is not due."""
        found = {CONFIG_NAME: self.folder.small[CONFIG_NAME], WEIGHTS_NAME: self.folder.file.sha256()}
        if self.core:
            return found | {CORE_NAME: self.core.file.sha256()}
        path = self.folder.folder / CORE_NAME
        return found | {CORE_NAME: file_sha256(path)} if path.is_file() else found

    def name(self) -> str:
        """What a ledger calls it as its parent."""
        return f"{self.place}@{self.commit}" if self.commit else f"sha256:{self.hashes[WEIGHTS_NAME]}"


@contextmanager
def opened_global(folder: Path, place: str, commit: str | None = None) -> Iterator[GlobalAdapter]:
    """The global adapter in `folder`.

    Raises:
        RefusedError: it is no global adapter, its files contradict each other, or one is not what was written.
    """
    try:
        adapter = open_folder(folder)
    except FolderRefused as error:
        raise RefusedError(error.problems(place)) from error
    with ExitStack() as stack:
        stack.callback(adapter.close)
        ledger, lock = ledger_in(folder, place), _lock(folder, place)
        core = stack.enter_context(_core(adapter, ledger, place))
        found = GlobalAdapter(place, commit, adapter, ledger, lock, core)
        if problems := [Problem(place, field, reason) for field, reason in _contradictions(found)]:
            spoilt = any(problem.field in OWN_NAMES for problem in problems)
            raise RefusedError(problems, hint=WAY_ON if spoilt else "Merge its clients anew, without --onto.")
        yield found


@contextmanager
def _core(adapter: PeftFolder, ledger: Ledger, place: str) -> Iterator[StoredCore | None]:
    """The core beside a truncated mean, where there is one."""
    rank = ledger.options.get("rank")
    if ledger.method != "svd" or type(rank) is not int or not (adapter.folder / CORE_NAME).exists():
        yield None
        return
    try:
        core = open_core(adapter, rank)
    except (FileRefused, OSError) as error:
        field, reason = (error.field, error.reason) if isinstance(error, FileRefused) else ("file", "cannot be read")
        raise RefusedError([Problem(place, f"{CORE_NAME}, {field}", reason)]) from error
    try:
        yield core
    finally:
        core.file.close()


def ledger_in(folder: Path, place: str) -> Ledger:
    """The ledger in `folder`, strictly read.

    Raises:
        RefusedError: there is none, or it is malformed.
    """
    try:
        if not (folder / LEDGER_NAME).is_file():
            reason = "is not there, so this is no global adapter, but at best a client's own"
            hint = "`lora-merge aggregate SOURCES --output GLOBAL` makes one; clients' adapters are the SOURCES."
            raise RefusedError([Problem(place, LEDGER_NAME, reason)], hint=hint)
        return read_ledger(folder)
    except FileRefused as error:
        raise RefusedError([Problem(place, error.field, error.reason)]) from error


def clients_in(folder: Path, place: str) -> int | None:
    """How many clients the adapter in `folder` was merged of; None where it is a client's own.

    Raises:
        RefusedError: its ledger is malformed.
    """
    return len(ledger_in(folder, place).contributions) if (folder / LEDGER_NAME).exists() else None


def _lock(folder: Path, place: str) -> Lock:
    if not (folder / LOCK_NAME).is_file():
        raise RefusedError([Problem(place, LOCK_NAME, "is not there, so nobody can tell what it was made of")])
    return read_lock(folder / LOCK_NAME)


def _contradictions(found: GlobalAdapter) -> Iterator[tuple[str, str]]:
    """Every way in which a global adapter's files cannot all be true, as entry and reason."""
    yield from _of_the_ledger(found.ledger)
    yield from _of_the_lock(found.ledger, found.lock)
    if found.ledger.files is not None:
        yield from alterations(found.ledger, found.hashes)
    if found.folder.config.base_model != found.ledger.base_model:
        yield "adapter_config.json, base_model_name_or_path", "is not the ledger's base_model"
    try:
        assert found.descriptions
        if found.is_stacked:
            for name in found.stacks.misfits():
                yield WEIGHTS_NAME, f"{name} is not as wide as the blocks that the ledger lists"
    except ClaimsError as error:
        yield f"{LEDGER_NAME}, contributions.{error.field}", error.reason


def _of_the_ledger(ledger: Ledger) -> Iterator[tuple[str, str]]:
    weights = [each.weight for each in ledger.contributions]
    if not weights:
        yield f"{LEDGER_NAME}, contributions", "are none"
    for name in ("client_id", "source"):
        for value, count in Counter(getattr(each, name) for each in ledger.contributions).items():
            if count > 1:
                yield f"{LEDGER_NAME}, contributions", f"{count} of them have the {name} {value}"
    ids = [each.client_id for each in ledger.contributions]
    if ids != sorted(ids):
        yield f"{LEDGER_NAME}, contributions", "are not sorted by client_id"
    total = ledger.total_weight
    if not 0 < total < math.inf or not math.isclose(sum(weights), total, rel_tol=_EQUAL):
        yield f"{LEDGER_NAME}, total_weight", "is not the sum of the weights"
    elif any(not math.isclose(c.share, c.weight / total, rel_tol=_EQUAL) for c in ledger.contributions):
        yield f"{LEDGER_NAME}, contributions", "have shares that are not their weights over the total"
    if ledger.method not in METHODS or ledger.dtype not in DTYPES:
        yield f"{LEDGER_NAME}, method", f"{ledger.method} in {ledger.dtype} is nothing that we merge by"
    if not 0 < ledger.global_lr < math.inf:
        yield f"{LEDGER_NAME}, global_lr", "must be above 0"


def _of_the_lock(ledger: Ledger, lock: Lock) -> Iterator[tuple[str, str]]:
    for name in ("method", "options", "global_lr", "weighting", "dtype", "base_model"):
        if getattr(ledger, name) != getattr(lock, name):
            yield f"{LOCK_NAME}, {name}", "is not the ledger's"
    inputs = [(each.client_id, each.source, each.commit, each.files, each.weight) for each in lock.inputs]
    if inputs != [
        (each.client_id, each.source, each.commit, each.sha256, each.weight) for each in ledger.contributions
    ]:
        yield f"{LOCK_NAME}, inputs", "are not the ledger's contributions"

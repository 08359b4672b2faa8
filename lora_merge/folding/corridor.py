"""The corridor of folding: a global adapter's folder and what arrives, to the folder of the next one."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.schedule import pool
from lora_merge.agreement import claim_warnings
from lora_merge.checkpoint.core_file import write_core
from lora_merge.checkpoint.folder import alone_beside, atomic_folder
from lora_merge.checkpoint.intact import OWN_NAMES
from lora_merge.checkpoint.peft_folder import CORE_NAME, LEDGER_NAME, WEIGHTS_NAME
from lora_merge.checkpoint.planned import Measured, Settings
from lora_merge.environment import device_named
from lora_merge.errors import ConflictError, NotFoundError, UsageError
from lora_merge.folding.arrivals import (
    Arrivals,
    Contributions,
    arriving,
    refs_of,
    weights_of_arrivals,
    withdrawn,
)
from lora_merge.folding.by_mean import bound, worth_merging_again
from lora_merge.folding.change import Change, Parts, change_of, contributions_after, parts_of
from lora_merge.folding.global_adapter import GlobalAdapter, opened_global
from lora_merge.folding.how import How, Located, is_there, require_folds, settings_of
from lora_merge.folding.late import screened, wholly_screened, with_screening
from lora_merge.intake import UNSCREENED, Reading, other_names
from lora_merge.ledger import Ledger, LeftOut
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import SIGNATURE_NAME, Lock
from lora_merge.pipeline import aggregate, merge_modules, rank_warnings, require_same_files
from lora_merge.provenance import ledger_of, lock_of, write_records
from lora_merge.screening.measuring import Findings
from lora_merge.screening.selection import Selection
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import open_rooms

if TYPE_CHECKING:
    from lora_merge.publish.push import Pushed

_AGAIN = "The same command folds onto it as it is now."
UNSIGNED = (
    f"{SIGNATURE_NAME} was taken away, since it signs the lock as it was before: sign the new one with "
    f"ssh-keygen -Y sign -f KEY -n lora-merge {LOCK_NAME}"
)


@dataclass(frozen=True)
class Fold:
    """What came of folding.

    Attributes:
        output: the folder that holds the result; where nothing was new, the global adapter as it was, or its copy.
        added, replaced, withdrawn: client ids; all empty where nothing was new, and then nothing was merged, unless
            `again` says otherwise.
        left_out: who was named and is not in it for that, and why.
        again: why all clients had to be merged again from their files; None where the global adapter itself did.
        published: the commit that brought it to the repository that was folded onto.
    """

    output: Path
    ledger: Ledger
    added: Sequence[str] = ()
    replaced: Sequence[str] = ()
    withdrawn: Sequence[str] = ()
    again: str | None = None
    warnings: Sequence[str] = ()
    left_out: Sequence[LeftOut] = ()
    published: "Pushed | None" = None

    @property
    def changed(self) -> bool:
        return bool(self.added or self.replaced or self.withdrawn or self.again)


def fold_folder(
    sources: Sequence[str | Path],
    onto: Located,
    target: Path,
    withdraw: Sequence[str],
    how: How,
    reading: Reading,
) -> Fold:
    """Bring what is new in `sources` into the global adapter `onto`, written to `target`: see `fold`."""
    if onto.folder is None:
        return _first(sources, onto, target, withdraw, how, reading)
    with (
        open_rooms(reading.max_wait, reading.tell) as rooms,
        opened_global(onto.folder, onto.place, onto.commit) as before,
    ):
        settings = settings_of(before.ledger, how)
        gone = withdrawn(withdraw, before.contributions, onto.place)
        stay = {client: each for client, each in before.contributions.items() if client not in gone}
        selection = Selection(how.screening or UNSCREENED, others=len(stay))
        refs = refs_of(rooms, sources, onto.place, [before.contributions[client] for client in gone])
        with arriving(rooms, refs, stay, reading, selection) as arrived:
            arrivals, found = screened(arrived, before, stay, selection) if how.screening else (arrived, Findings())
            nothing_new = not arrivals.new and not gone
            afresh = worth_merging_again(before) if nothing_new and _are_named(stay, refs, arrivals) else None
            if nothing_new and not afresh:
                notes, left_out = [*rooms.notes, *selection.notes], sorted(selection.left_out)
                output = _as_it_was(before, onto, target, how, reading)
                return Fold(output, before.ledger, warnings=notes, left_out=left_out)
            weighed = weights_of_arrivals(arrivals, how.weights, before.ledger, stay, selection)
            change = replace(change_of(before, arrivals, weighed.n, gone), afresh=afresh)
            device = device_named(how.device)
            with parts_of(change, rooms, how.base, device, reading, pinned=how.pinned) as parts:
                if how.screening and parts.again and arrivals.new:
                    found = wholly_screened(found, parts.federation, before, arrivals, how.screening)
                record = partial(
                    with_screening,
                    selection=selection,
                    waved_through=weighed.waved_through,
                    found=found,
                    came=[candidate.ref for candidate in arrivals.candidates.values()],
                )
                signed = (target / SIGNATURE_NAME).exists()
                ledger = _write(target, change, parts, settings, how, reading, record)
            return Fold(
                output=target,
                ledger=ledger,
                added=[client for client in arrivals.new if client not in arrivals.replaces],
                replaced=sorted(arrivals.replaces),
                withdrawn=change.withdrawn,
                again=parts.again,
                warnings=[
                    *(*rooms.notes, *other_names(arrivals.candidates), *selection.notes),
                    *([parts.note] if parts.note else []),
                    *(*claim_warnings(parts.clients), *found.warnings, *rank_warnings(ledger)),
                    *([UNSIGNED] if signed else []),
                ],
                left_out=sorted(selection.left_out),
            )


def _as_it_was(before: GlobalAdapter, onto: Located, target: Path, how: How, reading: Reading) -> Path:
    """Where the global adapter lies in which nothing is new: where a result is asked for elsewhere, a copy of it."""
    folder = before.folder.folder
    if onto.given is None or os.path.realpath(target) == os.path.realpath(folder):
        return onto.given or folder
    with atomic_folder(target, force=how.force, looked=True, tell=reading.tell) as work:
        for name in (*OWN_NAMES, LEDGER_NAME, LOCK_NAME, SIGNATURE_NAME, "README.md"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, work / name)
        _require_as_read(before)
    return target


def _are_named(stay: Contributions, refs: Sequence[AdapterRef], arrivals: Arrivals) -> bool:
    """Whether the sources name all who are in, at what is in."""
    at_commit = {(ref.source, ref.commit) for ref in refs if ref.commit}
    return all(client in arrivals.known or (each.source, each.commit) in at_commit for client, each in stay.items())


def _first(
    sources: Sequence[str | Path], onto: Located, target: Path, withdraw: Sequence[str], how: How, reading: Reading
) -> Fold:
    """The first merge makes the global adapter."""
    if withdraw:
        raise NotFoundError(f"There is no global adapter {onto.place} to take anybody out of.")
    require_folds(how.chosen.get("method", "exact"), how.chosen.get("rank"))
    options: dict[str, Any] = {**how.chosen, **({} if how.weights is None else {"weights": how.weights})}
    try:
        made = aggregate(
            sources,
            target,
            **options,
            base=how.base,
            device=how.device,
            certificate=how.certificate,
            workers=how.workers,
            force=how.force,
            screening=how.screening,
            core=how.chosen.get("method") == "svd",
            max_wait=reading.max_wait,
            tell=reading.tell,
            progress=reading.progress,
        )
    except (ConflictError, UsageError) as error:
        if target == onto.given and is_there(target):
            raise ConflictError(f"Somebody else has made {onto.place} in the meantime.", hint=_AGAIN) from error
        raise
    added = [each.client_id for each in made.ledger.contributions]
    return Fold(target, made.ledger, added, warnings=made.warnings, left_out=made.ledger.left_out)


def _write(
    target: Path,
    change: Change,
    parts: Parts,
    settings: Settings,
    how: How,
    reading: Reading,
    record: Callable[[Ledger, Ledger], Ledger],
) -> Ledger:
    """Merge into `target` in one step; where that is the global adapter itself, only while it is what was read.

    `record` adds to the ledger what screening found, from what it was before.
    """
    before, federation = change.before, parts.federation
    by_mean = METHODS[settings.method].folds == "mean"
    if settings.certificate is None and parts.again is None:
        # Beside stored blocks probes, so that an arrival costs no more than the adapter is large; of a mean not, since
        # an estimate would make no bound.
        settings = replace(settings, certificate="exact" if by_mean else "probes")
    in_place = os.path.realpath(target) == os.path.realpath(before.folder.folder)
    force, option = in_place or how.force, "--onto" if in_place else "--output"
    with (
        ExitStack() as end,
        pool(how.workers) as threads,
        atomic_folder(target, force=force, option=option, looked=not in_place, tell=reading.tell) as work,
    ):
        merged = merge_modules(federation, settings, work / WEIGHTS_NAME, threads, reading.progress)
        contributions = contributions_after(change, parts)
        lock = lock_of(federation, parts.clients, settings, before.ledger.weighting, contributions)
        ledger = ledger_of(federation, lock, contributions, merged.measured, settings, before.name())
        ledger, of_core = record(ledger, before.ledger), None
        if by_mean:
            ledger, lock = _folded(ledger, lock, change, parts, merged.measured)
        if settings.method == "svd" and (parts.again or before.core):
            stored = None if parts.again else before.core
            of_core = write_core(federation, settings.options, work / CORE_NAME, stored, threads)
        ledger = write_records(work, ledger, lock, parts.clients, merged, of_core)
        require_same_files({**change.arrivals.new, before.place: before.folder})
        if target.exists() and before.folder.folder.exists() and target.samefile(before.folder.folder):
            end.enter_context(alone_beside(target, reading.tell))
            _require_as_read(before)
    return ledger


def _folded(
    ledger: Ledger, lock: Lock, change: Change, parts: Parts, measured: Sequence[Measured]
) -> tuple[Ledger, Lock]:
    """The records of a mean that was folded: in which order it was, and how far it can be from the mean of all."""
    if parts.again:
        return ledger, lock
    before = change.before
    lock = replace(lock, folded=[*(before.lock.folded or [list(before.contributions)]), list(change.arrivals.new)])
    if lock.method == "ffa":
        return ledger, lock  # a sum loses nothing
    return replace(ledger, certificate=bound(measured, before, parts.federation)), lock


def _require_as_read(before: GlobalAdapter) -> None:
    """Raise `ConflictError` where another folder has taken the place of the one that was read."""
    try:
        same = os.path.samestat(os.stat(before.folder.file.path), os.fstat(before.folder.file.descriptor))
    except FileNotFoundError:
        same = False
    if not same:
        raise ConflictError(f"{before.place} was changed by somebody else in the meantime.", hint=_AGAIN)

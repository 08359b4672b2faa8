"""`aggregate --onto`: late arrivals, replacements and withdrawals, brought into a global adapter that exists."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.weights import Weights
from lora_merge.agreement import claim_warnings
from lora_merge.arrivals import arriving, refs_of, weights_of_arrivals, withdrawn
from lora_merge.change import Change, Parts, change_of, contributions_after, parts_of
from lora_merge.checkpoint.folder import alone_beside, atomic_folder, check_free
from lora_merge.checkpoint.merge import CertificateMode, Settings
from lora_merge.checkpoint.peft_folder import WEIGHTS_NAME
from lora_merge.environment import device_named
from lora_merge.errors import ConflictError, NotFoundError, UsageError
from lora_merge.global_adapter import GlobalAdapter, opened_global
from lora_merge.intake import UNSCREENED, Reading
from lora_merge.ledger import Ledger
from lora_merge.options import merge_settings, require_sound
from lora_merge.pipeline import aggregate, merge_modules, rank_warnings, require_same_files
from lora_merge.provenance import ledger_of, lock_of, write_records
from lora_merge.screening import Screening
from lora_merge.selection import Selection
from lora_merge.sources.reference import Progress, Tell
from lora_merge.sources.rooms import MAX_WAIT, open_rooms


@dataclass(frozen=True)
class Fold:
    """What came of folding.

    Attributes:
        output: the folder that holds the result; where nothing was new, the global adapter as it was.
        added, replaced, withdrawn: client ids; all empty where nothing was new, and then nothing was written.
        again: why all clients had to be merged again from their files; None where the global adapter itself did.
    """

    output: Path
    ledger: Ledger
    added: Sequence[str] = ()
    replaced: Sequence[str] = ()
    withdrawn: Sequence[str] = ()
    again: str | None = None
    warnings: Sequence[str] = ()

    @property
    def changed(self) -> bool:
        return bool(self.added or self.replaced or self.withdrawn)


def fold(
    sources: Sequence[str | Path],
    onto: str | Path,
    *,
    withdraw: Sequence[str] = (),
    output: str | Path | None = None,
    method: str | None = None,
    rank: Rank | None = None,
    energy: float | None = None,
    weights: Weights | None = None,
    global_lr: float | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    certificate: CertificateMode | None = None,
    workers: int | None = None,
    force: bool = False,
    screening: Screening | None = None,
    max_wait: float = MAX_WAIT,
    tell: Tell = lambda line: None,
    progress: Progress = lambda what, total, unit: nullcontext(lambda steps: None),
) -> Fold:
    """Bring what is new in `sources` into the global adapter `onto`, which is made where there is none.

    An update that is in at the same commit (without commits: with the same files) is nothing new; at another commit it
    takes the old one's place. For `exact` the bytes are those of one merge of the same clients.

    Args:
        onto: the global adapter's folder. Options that are None are as it was made with; others must be so.
        withdraw: clients to take out, by id or source.
        output: where to write the result; without it, it takes the place of `onto` in one step.
        base: of a merge of all clients again, where that is needed.
        force: replace what is at `output`.
        screening: which arrivals to leave out, and what stops them.

    Raises:
        UsageError: an option is wrong or contradicts the global adapter, or nobody would be left in it.
        RefusedError: an arrival is refused, or the global adapter's own files contradict each other.
        NotFoundError: a source names nothing, or all must be merged again and some client's files are gone.
        ConflictError: somebody else has changed `onto` meanwhile.
        And what `lora_merge.pipeline.aggregate` raises. On every error `onto` is as it was.

    Example:
        >>> fold(["client-3"], "global", withdraw=["org/client-1"])  # doctest: +SKIP
    """
    given = {"method": method, "rank": rank, "energy": energy, "global_lr": global_lr, "dtype": dtype}
    chosen = {name: value for name, value in given.items() if value is not None}
    how: dict[str, Any] = {"base": base, "device": device, "certificate": certificate, "workers": workers}
    reading = {"max_wait": max_wait, "tell": tell, "progress": progress}
    target = Path(onto) if output is None else Path(output)
    require_sound(global_lr or 1.0, workers)
    if output is not None:
        check_free(target, force=force)
    if not is_there(Path(onto)):
        if withdraw:
            raise NotFoundError(f"There is no global adapter {onto} to take anybody out of.")
        require_folds(method or "exact")
        first = {**chosen, **how, **reading, "screening": screening, "force": force and output is not None}
        made = aggregate(sources, target, weights=weights or "examples", **first)
        return Fold(target, made.ledger, [c.client_id for c in made.ledger.contributions], warnings=made.warnings)
    with open_rooms(max_wait, tell) as rooms, opened_global(Path(onto), str(onto)) as before:
        settings = _settings(before.ledger, chosen, certificate)
        gone = withdrawn(withdraw, before.contributions, str(onto))
        stay = {client: each for client, each in before.contributions.items() if client not in gone}
        selection = Selection(screening or UNSCREENED)
        refs = refs_of(rooms, sources, str(Path(onto).resolve()), [before.contributions[client] for client in gone])
        with arriving(rooms, refs, stay, Reading(max_wait, tell, progress), selection) as arrivals:
            if not arrivals.new and not gone:
                return Fold(Path(onto), before.ledger, warnings=rooms.notes)
            n = weights_of_arrivals(arrivals, weights, before.ledger, stay, selection).n
            change = change_of(before, arrivals, n, gone)
            with parts_of(change, rooms, base, device_named(device), Reading(max_wait, tell, progress)) as parts:
                ledger = _write(target, change, parts, settings, workers, progress)
            warnings = [*rooms.notes, *selection.notes, *claim_warnings(parts.clients), *rank_warnings(ledger)]
            return Fold(
                output=target,
                ledger=ledger,
                added=[client for client in arrivals.new if client not in arrivals.replaces],
                replaced=sorted(arrivals.replaces),
                withdrawn=change.withdrawn,
                again=parts.again,
                warnings=warnings,
            )


def is_there(folder: Path) -> bool:
    """Whether something lies at `folder`: an empty folder is nothing."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def require_folds(method: str) -> None:
    """Raise `UsageError` where a method has no way to bring arrivals in."""
    if method in METHODS and METHODS[method].folds is None:
        folding = ", ".join(name for name, each in METHODS.items() if each.folds)
        raise UsageError(f"{method} cannot be folded: it needs all clients at once.", hint=f"--onto is for {folding}.")


def _write(
    target: Path, change: Change, parts: Parts, settings: Settings, workers: int | None, progress: Progress
) -> Ledger:
    """Merge into `target` in one step; where that is the global adapter itself, only while it is what was read."""
    before, federation = change.before, parts.federation
    if settings.certificate is None and parts.again is None:
        settings = replace(settings, certificate="probes")  # so that an arrival costs no more than the adapter is large
    with ExitStack() as end, pool(workers) as threads, atomic_folder(target, force=True) as work:
        merges, measured = merge_modules(federation, settings, work / WEIGHTS_NAME, threads, progress)
        contributions = contributions_after(change, parts)
        lock = lock_of(federation, parts.clients, settings, before.ledger.weighting, contributions)
        ledger = ledger_of(federation, lock, contributions, measured, settings, before.name())
        write_records(work, ledger, lock, parts.clients, merges)
        require_same_files({**change.arrivals.new, before.place: before.folder})
        if target.exists() and before.folder.folder.exists() and target.samefile(before.folder.folder):
            end.enter_context(alone_beside(target))
            _require_as_read(before)
    return ledger


def _require_as_read(before: GlobalAdapter) -> None:
    """Raise `ConflictError` where another folder has taken the place of the one that was read."""
    try:
        same = os.path.samestat(os.stat(before.folder.file.path), os.fstat(before.folder.file.descriptor))
    except FileNotFoundError:
        same = False
    if not same:
        raise ConflictError(
            f"{before.place} was changed by somebody else in the meantime.", hint="The same command folds onto it now."
        )


def _settings(ledger: Ledger, chosen: dict[str, Any], certificate: CertificateMode | None) -> Settings:
    """How the global adapter was made, which is how its arrivals are merged.

    Raises:
        UsageError: an option is another one, or it was made in a way that cannot be folded.
    """
    require_folds(ledger.method)
    known = {name: value for name, value in ledger.options.items() if name in asdict(Options())}
    if other := sorted(name for name, value in ledger.options.items() if value and name not in known):
        raise UsageError(f"It was merged with {', '.join(other)}, which needs all clients at once.")
    made = {"method": ledger.method, "dtype": ledger.dtype, "global_lr": ledger.global_lr, **known}
    for name, value in chosen.items():
        if value != made.get(name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is {value}, and the global adapter was made with {made.get(name, 'none')}.",
                hint=f"Leave {option} out, or merge all clients anew without --onto.",
            )
    by_rank = ledger.method == "svd"
    rank, energy = (known.get("rank"), known.get("energy")) if by_rank else (None, None)
    settings = merge_settings(ledger.method, rank, energy if rank == "auto" else None, ledger.dtype, certificate)
    return replace(settings, options=replace(settings.options, **known))

"""The corridor of `lora-merge aggregate`: sources, to adapters, to one folder."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_merge.aggregation.registry import Rank
from lora_merge.aggregation.robust import Robust
from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.weights import Weights
from lora_merge.agreement import claim_warnings
from lora_merge.assembly import federation_of
from lora_merge.checkpoint import merge
from lora_merge.checkpoint.core_file import write_core
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.folder import atomic_folder, check_free
from lora_merge.checkpoint.merge import Merged
from lora_merge.checkpoint.overwriting import require_apart
from lora_merge.checkpoint.peft_folder import CORE_NAME, WEIGHTS_NAME, PeftFolder
from lora_merge.checkpoint.planned import CertificateMode, Settings
from lora_merge.defence import Defended, defended, with_defence
from lora_merge.environment import device_named
from lora_merge.errors import StorageError
from lora_merge.hub.waiting import MAX_WAIT
from lora_merge.intake import Reading, accepted
from lora_merge.ledger import Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.locking import is_to_be_written, pins_of, read_lock, require_unchanged, write_lock
from lora_merge.options import merge_settings, require_rule, require_sound
from lora_merge.provenance import (
    contributions_of,
    ledger_of,
    lock_of,
    weights_hashes,
    with_findings,
    write_records,
)
from lora_merge.screening.measuring import Findings, findings
from lora_merge.screening.stops import SCREENED, Screening
from lora_merge.sources.local import folders_named
from lora_merge.sources.reference import Progress, Tell

RANK_THAT_SERVERS_TAKE = 512
PLAIN = Robust()


@dataclass(frozen=True)
class Aggregation:
    """A finished merge: where it lies, its record, and what the user should know of it."""

    output: Path
    ledger: Ledger
    warnings: Sequence[str]


def aggregate(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "exact",
    rank: Rank | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    robust: Robust = PLAIN,
    weights: Weights = "examples",
    global_lr: float = 1.0,
    base: str | Path | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    certificate: CertificateMode | None = None,
    workers: int | None = None,
    force: bool = False,
    lock: str | Path | None = None,
    locked: bool = False,
    core: bool = False,
    screening: Screening | None = SCREENED,
    max_wait: float = MAX_WAIT,
    tell: Tell = lambda line: None,
    progress: Progress = lambda what, total, unit: nullcontext(lambda steps: None),
) -> Aggregation:
    """Merge the adapters in `sources` into the PEFT folder `output`.

    Args:
        sources: folders and globs of them; `org/name` and `org/pattern-*` on the Hub, with `@revision` or without;
            `hf://…`, collections, and URLs that fsspec knows.
        method: a name in `lora_merge.aggregation.methods.METHODS`.
        rank: of `svd`, `ties` and `dare`: a number, `auto` (the default) or `lossless`.
        energy: of `auto`: the share of the squared norm to keep, 0.99 by default.
        density: of `ties` and `dare`: the share of each update's entries that they keep.
        seed: of all that is random; 0 by default.
        robust: what bounds the influence of hostile clients; nothing by default.
        weights: `examples`, `uniform`, or a number for every client by its id or source.
        global_lr: alpha, the factor on the mean update.
        base: the base model's folder or cached repository id; read only where the answer needs it.
        dtype: of the written tensors: fp32, bf16 or fp16. The arithmetic is fp32 at least.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where present.
        certificate: `exact`, `probes` or `off`; None chooses by size.
        workers: threads, one module each; by default one a CPU. The bytes do not depend on it.
        force: replace the merged adapter that is at `output`; never anything else, nor what is read.
        lock: a `lora-merge.lock`: repositories are read at the commits that it pins, and it is written anew after the
            merge (the folder holds one in any case), or made where there is none. One in an adapter's folder stays.
        locked: change nothing of the lock (by default the one in `output`): not its inputs, weights, nor settings.
        core: keep of a truncated mean of a fixed rank what later arrivals can be folded into.
        screening: whom to leave out, and what stops a merge of adapters of people whom one doesn't know; None where
            nothing is to.
        max_wait: seconds that all waits for a busy Hub may take together.
        tell: called with a line when such a wait begins, and when a new lock was written.
        progress: called with a label, a number of steps and their unit; yields a function that advances by steps.

    Raises:
        UsageError: an option is wrong, or `output` exists, or is one of the inputs.
        RefusedError: clients are refused; with every problem of all of them. Nothing is written.
        NotFoundError: a source names nothing, or may not be read.
        NetworkError: the Hub cannot be reached, or stays busy.
        VerificationError: under `locked`, the merge would be another one.
        MissingBaseError: the mean needs base tensors that are not at hand.
        StorageError: the disk is full or not writable.

    Example:
        >>> aggregate(["client-1", "client-2"], "global", weights="uniform")  # doctest: +SKIP
    """
    output = Path(output)
    settings = merge_settings(method, rank, energy, dtype, certificate, density, seed)
    require_rule(robust, method)
    require_sound(global_lr, workers)
    require_apart(output, folders_named([*sources, *([base] if base is not None else [])]))
    lock_path = Path(lock) if lock is not None else output / LOCK_NAME
    force = force or (locked and lock_path == output / LOCK_NAME)  # made again as its own lock says, or not at all
    check_free(output, force=force)
    writes = lock is not None and not locked and is_to_be_written(lock_path, output)
    known = read_lock(lock_path) if locked or (lock is not None and lock_path.exists()) else None
    with accepted(sources, weights, Reading(max_wait, tell, progress, pins_of(known)), screening) as inputs:
        measures, where = robust.weighs, device_named(device)
        federation = federation_of(inputs, global_lr, base, where, to_measure=measures, tell=tell)
        with pool(workers) as threads, atomic_folder(output, force=force, looked=True, tell=tell) as work:
            # Hashes are taken beside the merge, unless a lock decides by them whether there is to be one.
            hashes = threads.map(PeftFolder.sha256, inputs.clients.values())
            run = partial(merge_defended, federation, settings, robust, work / WEIGHTS_NAME, threads, progress)
            done = None if locked else run()
            contributions = contributions_of(inputs, federation, hashes)
            record = lock_of(federation, inputs.clients, settings, inputs.weighting, contributions, robust)
            if locked and known is not None:
                require_unchanged(known, record)
            defence, merged = done or run()
            sha256, judge = weights_hashes(contributions), not robust.defends
            found = (
                findings(inputs.sketched, sha256, screening, federation=federation, judge_norms=judge)
                if screening
                else Findings()
            )
            ledger = with_findings(
                ledger_of(federation, record, contributions, merged.measured, settings), inputs, found
            )
            ledger = with_defence(ledger, defence, merged.measured)
            of_core = write_core(federation, settings.options, work / CORE_NAME, None, threads) if core else None
            ledger = write_records(work, ledger, record, inputs.clients, merged, of_core)
            require_same_files(inputs.clients)
        if writes:
            write_lock(record, lock_path)
            if known is None:
                tell(f"Lock written: {lock_path}. There was none, so no commit was pinned by it.")
        warnings = [*inputs.notes, *claim_warnings(inputs.clients), *found.warnings, *rank_warnings(ledger)]
        return Aggregation(output, ledger, warnings)


def merge_defended(
    federation: Federation,
    settings: Settings,
    robust: Robust,
    path: Path,
    threads: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[Defended, Merged]:
    """Weigh the clients by the robust rule, if there is one, and merge every module into the file `path`."""
    defence = defended(federation, settings, robust, threads, progress)
    return defence, merge_modules(defence.federation, defence.settings, path, threads, progress)


def merge_modules(
    federation: Federation, settings: Settings, path: Path, threads: ThreadPoolExecutor, progress: Progress
) -> Merged:
    """Merge every module into the file `path`; raises `RefusedError` where the method, or a tensor, is refused."""
    merges = merge.plan(federation, settings, threads)
    with progress("Merging", len(merges), "modules") as advance:
        return merge.write(merges, settings, path, threads, advance)


def require_same_files(folders: Mapping[str, PeftFolder]) -> None:
    """Raise `StorageError` where a file is not what it was when it was opened."""
    changed = [client for client, folder in folders.items() if not folder.file.unchanged()]
    if changed:
        raise StorageError(f"Files changed while they were being read: {', '.join(changed)}.", hint="Run it again.")


def rank_warnings(ledger: Ledger) -> list[str]:
    """What to know of the rank of a merge that is done."""
    most, asked = max(ledger.ranks, default=0), ledger.options.get("rank")
    found = []
    if ledger.ranks and isinstance(asked, int) and asked > most:
        found.append(f"--rank {asked} is more than the merge of these clients can have; the rank is {most}.")
    if most > RANK_THAT_SERVERS_TAKE:
        found.append(
            f"the rank is {most}; servers refuse adapters above {RANK_THAT_SERVERS_TAKE}. "
            "For a smaller one, with its distance from the mean: --method svd --rank 64 (or --rank auto)."
        )
    return found

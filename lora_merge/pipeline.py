"""The corridor of `lora-merge aggregate`: sources, to adapters, to one folder."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.weights import Weights
from lora_merge.agreement import claim_warnings
from lora_merge.checkpoint import merge
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.folder import atomic_folder, check_free
from lora_merge.checkpoint.merge import CertificateMode, Measured, Merge, Settings
from lora_merge.checkpoint.peft_folder import WEIGHTS_NAME, PeftFolder
from lora_merge.errors import RefusedError, StorageError, UsageError
from lora_merge.intake import Reading, accepted, federation_of
from lora_merge.ledger import Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.locking import pins_of, read_lock, require_unchanged, write_lock
from lora_merge.provenance import contributions_of, ledger_of, lock_of, write_records
from lora_merge.sources.reference import Progress, Tell
from lora_merge.sources.rooms import MAX_WAIT

RANK_THAT_SERVERS_TAKE = 512


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
    weights: Weights = "examples",
    global_lr: float = 1.0,
    base: str | Path | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    certificate: CertificateMode | None = None,
    workers: int | None = None,
    force: bool = False,
    lock: str | Path | None = None,
    locked: bool = False,
    max_wait: float = MAX_WAIT,
    tell: Tell = lambda line: None,
    progress: Progress = lambda what, total, unit: nullcontext(lambda steps: None),
) -> Aggregation:
    """Merge the adapters in `sources` into the PEFT folder `output`.

    Args:
        sources: folders and globs of them; `org/name` and `org/pattern-*` on the Hub, with `@revision` or without;
            `hf://…`, collections, and URLs that fsspec knows.
        method: a name in `lora_merge.aggregation.methods.METHODS`.
        rank: of `svd`: a number, `auto` (the default) or `lossless`.
        energy: of `auto`: the share of the squared norm to keep, 0.99 by default.
        weights: `examples`, `uniform`, or a number for every client by its id or source.
        global_lr: alpha, the factor on the mean update.
        base: the base model's folder or cached repository id; read only where the answer needs it.
        dtype: of the written tensors: fp32, bf16 or fp16. The arithmetic is fp32 at least.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where present.
        certificate: `exact`, `probes` or `off`; None chooses by size.
        workers: threads, one module each; by default one a CPU. The bytes do not depend on it.
        force: replace what is at `output`.
        lock: a `lora-merge.lock`: repositories are read at the commits that it pins, and it is written anew after the
            merge (the folder holds one in any case).
        locked: change nothing of the lock (by default the one in `output`): not its inputs, weights, nor settings.
        max_wait: seconds that one call may wait for a busy Hub.
        tell: called with a line when such a wait begins.
        progress: called with a label, a number of steps and their unit; yields a function that advances by steps.

    Raises:
        UsageError: an option is wrong, or `output` exists.
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
    settings = _settings(method, rank, energy, dtype, certificate)
    if not _is_number(global_lr) or not 0 < global_lr < math.inf:
        raise UsageError(f"--global-lr must be a finite number above 0, is {global_lr!r}.")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more, is {workers}.")
    check_free(output, force=force)
    lock_path = Path(lock) if lock is not None else output / LOCK_NAME
    known = read_lock(lock_path) if locked or (lock is not None and lock_path.exists()) else None
    with accepted(sources, weights, Reading(max_wait, tell, progress, pins_of(known))) as inputs:
        federation = federation_of(inputs, global_lr, base, _device(device))
        with pool(workers) as threads, atomic_folder(output, force=force) as work:
            # Hashes are taken beside the merge, unless a lock decides by them whether there is to be one.
            hashes = threads.map(PeftFolder.sha256, inputs.clients.values())
            merged = None if locked else _merge(federation, settings, work / WEIGHTS_NAME, threads, progress)
            contributions = contributions_of(inputs, federation.total, hashes)
            record = lock_of(federation, inputs, settings, weights, contributions)
            if locked and known is not None:
                require_unchanged(known, record)
            merges, measured = merged or _merge(federation, settings, work / WEIGHTS_NAME, threads, progress)
            ledger = ledger_of(federation, record, contributions, measured, settings)
            write_records(work, ledger, record, inputs.clients, merges)
            _require_unchanged(inputs.clients)
        if lock is not None and not locked:
            write_lock(record, lock_path)
        return Aggregation(output, ledger, [*inputs.notes, *claim_warnings(inputs.clients), *_rank_warning(ledger)])


def _settings(
    method: str, rank: Rank | None, energy: float | None, dtype: str, certificate: CertificateMode | None
) -> Settings:
    for name, value, choices in (("method", method, METHODS), ("dtype", dtype, merge.DTYPES)):
        if value not in choices:
            raise UsageError(f"--{name} must be one of {', '.join(choices)}, is {value!r}.")
    if certificate not in (None, "exact", "probes", "off"):
        raise UsageError(f"--certificate must be exact, probes or off, is {certificate!r}.")
    if method != "svd" and (rank is not None or energy is not None):
        raise UsageError("--rank and --energy are of --method svd.", hint="Add --method svd.")
    if energy is not None and (rank not in (None, "auto") or not _is_number(energy) or not 0 < energy <= 1):
        raise UsageError("--energy is a share above 0 and up to 1, for --rank auto only.")
    if rank not in (None, "auto", "lossless") and not (type(rank) is int and rank >= 1):
        raise UsageError(f"--rank must be a number from 1 up, auto or lossless, is {rank!r}.")
    options = Options(rank=rank or "auto", energy=Options.energy if energy is None else energy)
    return Settings(method, options, dtype, certificate)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:INDEX, is {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:INDEX, is {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"There is no CUDA device {name} here.", hint="Use --device cpu.")
    return device


def _merge(
    federation: Federation, settings: Settings, path: Path, threads: ThreadPoolExecutor, progress: Progress
) -> tuple[list[Merge], list[Measured]]:
    try:
        merges = merge.plan(federation, settings, threads)
        with progress("Merging", len(merges), "modules") as advance:
            return merges, merge.write(merges, settings, path, threads, advance)
    except RefusedError as error:
        # One tensor was refused; before saying so, look at all the others too.
        raise RefusedError([*error.problems, *merge.value_problems(federation, threads)]) from None


def _require_unchanged(folders: Mapping[str, PeftFolder]) -> None:
    changed = [client for client, folder in folders.items() if not folder.file.unchanged()]
    if changed:
        raise StorageError(f"Files changed while they were being read: {', '.join(changed)}.", hint="Run it again.")


def _rank_warning(ledger: Ledger) -> list[str]:
    if max(ledger.ranks, default=0) <= RANK_THAT_SERVERS_TAKE:
        return []
    return [
        f"the rank is {max(ledger.ranks)}; servers refuse adapters above {RANK_THAT_SERVERS_TAKE}. "
        "For a smaller one, with its distance from the mean: --method svd --rank 64 (or --rank auto)."
    ]

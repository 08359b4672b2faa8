"""`lora-merge verify`: make a published merge again from its pinned inputs, and compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from lora_merge.checkpoint.compare import compare
from lora_merge.checkpoint.folder import scratch_folder
from lora_merge.checkpoint.intact import OWN_NAMES, WAY_ON, alterations, own_hashes
from lora_merge.checkpoint.peft_folder import (
    CONFIG_NAME,
    CORE_NAME,
    LEDGER_NAME,
    FolderRefused,
    open_folder,
)
from lora_merge.environment import device_called, environment
from lora_merge.errors import NotFoundError, Problem, RefusedError
from lora_merge.folding.global_adapter import ledger_in
from lora_merge.folding.replay import replay
from lora_merge.intake import Reading, accepted, examined
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock
from lora_merge.locking import read_lock
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import open_rooms

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]
EQUIVALENT = 1e-6  # relative error of the update, where another environment made it


@dataclass(frozen=True)
class Verification:
    """What came of making a merge again.

    Attributes:
        verdict: `identical` in bytes; `equivalent`: the update's relative error is at most 1e-6 and the environment is
            another one; else `different`.
        reasons: the inputs, settings or tensors that differ.
        relative_error: of the published update against the one made again; None where it was not made.
        environment: what differs between the lock's environment and this one: name to (locked, here).
        note: where it was merged on a device that is not here and the bytes differ, what that means.
        surplus: clients that were given and are not in the lock; nothing was asked of them.
    """

    target: str
    verdict: Verdict
    reasons: Sequence[str] = ()
    relative_error: float | None = None
    environment: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    inputs: int = 0
    note: str | None = None
    surplus: Sequence[str] = ()


def verify(
    target: str | Path,
    sources: Sequence[str | Path] = (),
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    reading: Reading | None = None,
) -> Verification:
    """Fetch the inputs that the lock of `target` pins, merge them again, and compare the adapters.

    Args:
        target: a merged adapter's folder or repository.
        sources: where inputs lie that came from folders: a lock holds their names and hashes, but no paths.
        base: the base model, where the merge needs it.

    Raises:
        NotFoundError: there is no lock, or an input cannot be found or read.
        RefusedError: the lock or an input is refused, or the target is not what its own ledger says was written.
    """
    reading = reading or Reading()
    with open_rooms(reading.max_wait, reading.tell) as rooms:
        candidates = rooms.examine(rooms.expand([target]))
        folder = rooms.fetch(candidates, reading.progress)[0]
        lock, published = read_lock(folder / LOCK_NAME), own_hashes(folder)
        recorded = _require_intact(folder, str(target), published)
        named = [*_named_inputs(lock, bool(sources)), *sources]
        found = {client: each.ref for client, each in examined(named, "uniform", reading).candidates.items()}
        refs = _locked_ones(lock, found)
        surplus = sorted(found.keys() - refs.keys())
        device = device_called(lock.environment.get("device", "cpu"))
        with scratch_folder() as scratch:
            again = scratch / "again"
            core = CORE_NAME in recorded  # it may be taken away, but the merge went through it
            try:
                on = str(device or "cpu")
                replay(lock, refs, again, core=core, base=base, device=on, workers=workers, reading=reading)
                hashes = {each.client_id: each.files for each in read_lock(again / LOCK_NAME).inputs}
            except RefusedError:
                if not (reasons := _other_inputs(lock, _hashes(named, reading))):
                    raise
            else:
                reasons = _other_inputs(lock, hashes)
            if reasons:
                return Verification(str(target), "different", reasons, inputs=len(lock.inputs), surplus=surplus)
            return replace(_compared(str(target), folder, published, again, lock, device), surplus=surplus)


def _require_intact(folder: Path, target: str, published: Mapping[str, str]) -> Mapping[str, str]:
    """The files that the merge wrote; raises `RefusedError` where its ledger says at once that others are here."""
    if not (folder / LEDGER_NAME).exists():
        return published
    ledger = ledger_in(folder, target)
    if problems := [Problem(target, *found) for found in alterations(ledger, published)]:
        raise RefusedError(problems, hint=WAY_ON)
    return published if ledger.files is None else ledger.files


def _hashes(named: Sequence[str | Path], reading: Reading) -> dict[str, Mapping[str, str]]:
    with accepted(named, "uniform", reading) as inputs:
        return {client: opened.sha256() for client, opened in inputs.clients.items()}


def _named_inputs(lock: Lock, others_are_given: bool) -> list[str]:
    """The inputs that can be found again by name: repositories at their commits, and URLs."""
    named = [f"hf://{entry.source}@{entry.commit}" if entry.commit else entry.source for entry in lock.inputs]
    found = [name for name in named if "://" in name]
    if len(found) < len(named) and not others_are_given:
        lost = [name for name in named if "://" not in name]
        raise NotFoundError(
            f"The lock names inputs that lay in folders, by hash and not by path: {', '.join(lost[:5])}.",
            hint="Name the folders too: lora-merge verify TARGET FOLDER…",
        )
    return found


def _locked_ones(lock: Lock, found: Mapping[str, AdapterRef]) -> dict[str, AdapterRef]:
    """Where the lock's inputs lie; raises `NotFoundError` where one was not found."""
    if lost := sorted({entry.client_id for entry in lock.inputs}.difference(found)):
        raise NotFoundError(f"These inputs of the lock were not found: {', '.join(lost)}.")
    return {entry.client_id: found[entry.client_id] for entry in lock.inputs}


def _other_inputs(lock: Lock, hashes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The inputs that are not what the lock says."""
    locked = {entry.client_id: entry.files for entry in lock.inputs}
    reasons = []
    for client in sorted(locked.keys() & hashes.keys()):
        for name in sorted(locked[client].keys() | hashes[client].keys()):
            here, then = hashes[client].get(name), locked[client].get(name)
            if here != then:
                reasons.append(f"input {client}: {name} has the sha256 {here}, locked is {then}")
    return reasons


def _compared(
    target: str, folder: Path, published: Mapping[str, str], again: Path, lock: Lock, device: torch.device | None
) -> Verification:
    """What differs; `published` has the hashes of `folder`, `device` is the lock's, None where it is not here."""
    here = environment(device or torch.device("cpu"))
    note = None if device else f"merged on {lock.environment['device']}, here on the CPU: equivalent at best"
    apart = {
        name: (lock.environment.get(name, ""), here.get(name, ""))
        for name in sorted(lock.environment.keys() | here.keys())
        if lock.environment.get(name) != here.get(name)
    }
    reasons, made = _other_settings(folder, again), own_hashes(again)
    other = [name for name in OWN_NAMES if published.get(name) != made.get(name)]
    if CORE_NAME not in published:
        other = [name for name in other if name != CORE_NAME]
    if not other:
        return Verification(target, "identical", (), 0.0, apart, len(lock.inputs))
    error, tensors = _distance(again, folder)
    verdict: Verdict = "equivalent" if error <= EQUIVALENT and apart and not reasons else "different"
    reasons += [f"{CORE_NAME} is another one"] if other == [CORE_NAME] else []
    return Verification(target, verdict, [*reasons, *tensors], error, apart, len(lock.inputs), note)


def _other_settings(published: Path, again: Path) -> list[str]:
    first, second = (json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) for folder in (published, again))
    return [
        f"{CONFIG_NAME}: {name} is {str(first.get(name))[:80]}, made again {str(second.get(name))[:80]}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _distance(reference: Path, other: Path) -> tuple[float, list[str]]:
    """The relative error of `other`'s update, and a line for each module that differs."""
    try:
        mine, theirs = open_folder(reference), open_folder(other)
    except FolderRefused as error:
        raise RefusedError(error.problems(str(other))) from error
    try:
        found = compare(mine, theirs)
    finally:
        mine.close()
        theirs.close()
    return found.relative_error, [f"{name}: relative error {error:.1e}" for name, error in found.modules.items()]

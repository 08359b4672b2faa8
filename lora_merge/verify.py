"""`lora-merge verify`: make a published merge again from its pinned inputs, and compare."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from lora_merge.checkpoint.compare import compare
from lora_merge.checkpoint.folder import scratch_folder
from lora_merge.checkpoint.intact import OWN_NAMES, WAY_ON, alterations, own_hashes
from lora_merge.checkpoint.peft_folder import CONFIG_NAME, CORE_NAME, LEDGER_NAME, FolderRefused, open_folder
from lora_merge.checkpoint.planned import CertificateMode
from lora_merge.environment import device_called, environment
from lora_merge.errors import NotFoundError, Problem, RefusedError
from lora_merge.folding.global_adapter import ledger_in
from lora_merge.folding.replay import replay
from lora_merge.intake import Reading
from lora_merge.ledger import Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock, LockedInput
from lora_merge.locking import read_lock
from lora_merge.recorded import ledger_untruths, lock_untruths
from lora_merge.screening.selection import client_id
from lora_merge.sources.reference import AdapterRef, Candidate
from lora_merge.sources.rooms import Rooms, open_rooms

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]
AS_LOCKED = "Its inputs are those of the lock, to the byte. The right base model, where it is that: --base FOLDER."
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
        surplus: what was given and is not in the lock, by client id or source; nothing was asked of it.
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
        ledger = ledger_in(folder, str(target)) if (folder / LEDGER_NAME).exists() else None
        _require_intact(ledger, str(target), published)
        given = _given(rooms, [*_named_inputs(lock, bool(sources)), *sources])
        inputs = _locked_ones(lock, given, partial(_hashes, rooms, reading))
        surplus = given.surplus(inputs.values())
        device = device_called(lock.environment.get("device", "cpu"))
        with scratch_folder() as scratch:
            again = scratch / "again"
            # The core may be taken away, but the merge went through it.
            core = CORE_NAME in (ledger.files if ledger and ledger.files is not None else published)
            try:
                on, how = str(device or "cpu"), _measured_as(ledger)
                refs = {client: each.ref for client, each in inputs.items()}
                replay(
                    lock,
                    refs,
                    again,
                    core=core,
                    certificate=how,
                    base=base,
                    device=on,
                    workers=workers,
                    reading=reading,
                )
                made = read_lock(again / LOCK_NAME)
            except RefusedError as error:
                hashes = {client: _hashes(rooms, reading, each) for client, each in inputs.items()}
                if not (reasons := _other_inputs(lock, hashes)):
                    raise RefusedError(error.problems, hint=AS_LOCKED) from error
            else:
                reasons = _other_inputs(lock, {each.client_id: each.files for each in made.inputs})
            if reasons:
                return Verification(str(target), "different", reasons, inputs=len(lock.inputs), surplus=surplus)
            record = ledger_in(again, str(again))
            found = _compared(str(target), folder, published, again, record.files or {}, lock, device)
            untrue = lock_untruths(lock, made) + (ledger_untruths(ledger, record, lock) if ledger else [])
            verdict: Verdict = "different" if untrue else found.verdict
            return replace(found, verdict=verdict, reasons=(*found.reasons, *untrue), surplus=surplus)


def _require_intact(ledger: Ledger | None, target: str, published: Mapping[str, str]) -> None:
    """Raise `RefusedError` where the ledger says at once that these are not the files that the merge wrote."""
    if ledger and (problems := [Problem(target, *found) for found in alterations(ledger, published)]):
        raise RefusedError(problems, hint=WAY_ON)


def _measured_as(ledger: Ledger | None) -> CertificateMode | None:
    """How the certificate was measured, so that it can be measured again."""
    if ledger is None or ledger.certificate.measured_by == "off":
        return "off"
    return "probes" if ledger.certificate.measured_by == "probes" else None


@dataclass(frozen=True)
class _Given:
    """What the sources hold: adapters, and folders and repositories that are refused, with their problems."""

    candidates: Sequence[Candidate]
    refused: Mapping[AdapterRef, Sequence[Problem]]

    def surplus(self, taken: Iterable[Candidate]) -> list[str]:
        """What is not taken."""
        refs = {each.ref for each in taken}
        left = [client_id(each) for each in self.candidates if each.ref not in refs]
        return sorted([*left, *(ref.source for ref in self.refused)])


def _given(rooms: Rooms, sources: Sequence[str | Path]) -> _Given:
    """Whatever else lies beside the inputs need not be sound, nor of their federation."""
    refused: dict[AdapterRef, Sequence[Problem]] = {}
    return _Given(rooms.examine(rooms.expand(sources), refused.__setitem__), refused)


def _hashes(rooms: Rooms, reading: Reading, candidate: Candidate) -> Mapping[str, str]:
    """The sha256 of each file that a merge reads of an adapter."""
    (folder,) = rooms.fetch([candidate], reading.progress)
    try:
        opened = open_folder(folder)
    except FolderRefused as error:
        raise RefusedError(error.problems(candidate.ref.source)) from error
    with closing(opened):
        return opened.sha256()


def _named_inputs(lock: Lock, others_are_given: bool) -> list[str]:
    """The inputs that are found again by name: repositories at their commits.

    A URL is opened only where the user names it too: it is a stranger's, who could send us to any host or file.
    """
    elsewhere = [entry.source for entry in lock.inputs if not entry.commit]
    if elsewhere and not others_are_given:
        named = ", ".join(elsewhere[:5])
        raise NotFoundError(
            f"The lock names inputs that lay in folders, by hash and not by path, or at URLs: {named}.",
            hint="Name them too: lora-merge verify TARGET FOLDER…",
        )
    return [f"hf://{entry.source}@{entry.commit}" for entry in lock.inputs if entry.commit]


def _locked_ones(lock: Lock, given: _Given, hashes: Callable[[Candidate], Mapping[str, str]]) -> dict[str, Candidate]:
    """The lock's inputs by client id. Of several that go by one id, it is the one with the bytes that the lock pins.

    Raises:
        NotFoundError: one was not found.
        RefusedError: the same, and something that was given is refused: that may be it.
    """
    found = {e.client_id: [each for each in given.candidates if _goes_by(e.client_id, each)] for e in lock.inputs}
    if lost := sorted(client for client, claims in found.items() if not claims):
        missing = f"These inputs of the lock were not found: {', '.join(lost)}."
        if given.refused:
            raise RefusedError([each for some in given.refused.values() for each in some], hint=missing)
        raise NotFoundError(missing)
    return {entry.client_id: _one_of(found[entry.client_id], entry, hashes) for entry in lock.inputs}


def _goes_by(client: str, candidate: Candidate) -> bool:
    """Whether it has that id; or states none, and is called so where nothing else that is given lies beside it."""
    if client_id(candidate) == client:
        return True
    return candidate.description.statement is None and f"/{candidate.ref.place}".endswith(f"/{client}")


def _one_of(
    claims: Sequence[Candidate], entry: LockedInput, hashes: Callable[[Candidate], Mapping[str, str]]
) -> Candidate:
    claims = [each for each in claims if (each.ref.source, each.ref.commit) == (entry.source, entry.commit)] or claims
    if len(claims) == 1:
        return claims[0]
    return next((each for each in claims if hashes(each) == entry.files), claims[0])


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
    target: str,
    folder: Path,
    published: Mapping[str, str],
    again: Path,
    made: Mapping[str, str],
    lock: Lock,
    device: torch.device | None,
) -> Verification:
    """What differs; `published` and `made` have the hashes of `folder` and `again`, `device` is the lock's or None."""
    here = environment(device or torch.device("cpu"))
    note = None if device else f"merged on {lock.environment['device']}, here on the CPU: equivalent at best"
    apart = {
        name: (lock.environment.get(name, ""), here.get(name, ""))
        for name in sorted(lock.environment.keys() | here.keys())
        if lock.environment.get(name) != here.get(name)
    }
    reasons = _other_settings(folder, again)
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

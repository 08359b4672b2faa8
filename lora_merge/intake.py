"""From sources to a federation: every client examined, fetched, weighted; or every reason why not, at once."""

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from lora_merge.adapter import Adapter, Client
from lora_merge.aggregation.compatibility import shape_problems
from lora_merge.aggregation.weights import Weights, resolve_weights
from lora_merge.agreement import agreed_base_model, claim_problems
from lora_merge.checkpoint.base_model import BaseModel, open_base
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import Description, FolderRefused, PeftFolder, open_folder
from lora_merge.errors import MissingBaseError, NotFoundError, Problem, RefusedError, UsageError
from lora_merge.sources.reference import AdapterRef, Candidate, Progress, Tell
from lora_merge.sources.rooms import MAX_WAIT, Rooms, open_rooms

FILES_BESIDE = 200  # sockets, caches, libraries


@dataclass(frozen=True)
class Reading:
    """How sources are read: how long a call may wait for a busy Hub, and whom to tell of waits and downloads.

    `pins` are the commits at which repositories are read whose source names no revision.
    """

    max_wait: float = MAX_WAIT
    tell: Tell = lambda line: None
    progress: Progress = lambda what, total, unit: nullcontext(lambda steps: None)
    pins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Accepted:
    """The clients of a merge, sorted by id; all mappings have the same keys.

    Attributes:
        clients: each one's open folder.
        refs: where each came from.
        weights: n of each.
        notes: what the user should know of how the sources were read.
    """

    clients: Mapping[str, PeftFolder]
    refs: Mapping[str, AdapterRef]
    weights: Mapping[str, float]
    notes: Sequence[str]


@dataclass(frozen=True)
class Examined:
    """The clients that a merge would have, of which no weights were read; sorted by id.

    Attributes:
        weights: n of each.
        to_download: bytes of each that are not on this machine.
        notes: what the user should know of how the sources were read.
    """

    candidates: Mapping[str, Candidate]
    weights: Mapping[str, float]
    to_download: Mapping[str, int]
    notes: Sequence[str]


@contextmanager
def accepted(sources: Sequence[str | Path], weights: Weights, reading: Reading) -> Iterator[Accepted]:
    """The clients' open folders, every file of which has the hash that its place lists.

    Raises:
        NotFoundError: a source names nothing, or may not be read.
        RefusedError: with every problem of every client; where possible before anything is downloaded.
        UsageError: a weight is missing or wrong.
        NetworkError: the Hub cannot be reached.
    """
    with open_rooms(reading.max_wait, reading.tell) as rooms:
        candidates = _examined(rooms, sources, reading.pins)
        n = weights_of(candidates, weights)
        folders = rooms.fetch(list(candidates.values()), reading.progress)
        refs = {client: candidate.ref for client, candidate in candidates.items()}
        opened: dict[str, PeftFolder] = {}
        try:
            open_clients(opened, dict(zip(refs, folders, strict=True)), refs)
            yield Accepted(opened, refs, n, [*rooms.notes, *_other_names(candidates)])
        finally:
            for client in opened.values():
                client.close()


def examined(sources: Sequence[str | Path], weights: Weights, reading: Reading) -> Examined:
    """What `accepted` would read, without reading any weights or writing anything; the same errors."""
    with open_rooms(reading.max_wait, reading.tell) as rooms:
        candidates = _examined(rooms, sources, reading.pins)
        missing = {name: each.ref.room.missing_bytes(each) for name, each in candidates.items()}
        notes = [*rooms.notes, *_other_names(candidates)]
        return Examined(candidates, weights_of(candidates, weights), missing, notes)


def _examined(rooms: Rooms, sources: Sequence[str | Path], pins: Mapping[str, str]) -> dict[str, Candidate]:
    """The adapters that the sources name, by client id, sorted; refused where they are no federation."""
    refs = [_pinned(ref, pins) for ref in rooms.expand(sources)]
    if not refs:
        raise UsageError("No adapter is given.", hint="lora-merge aggregate client-1 client-2 --output global")
    found: dict[str, Candidate] = {}
    problems: list[Problem] = []
    for candidate in rooms.examine(refs):
        client = _client_id(candidate)
        first = found.setdefault(client, candidate)
        if first is not candidate:
            problems.append(Problem(candidate.ref.source, "client_id", f"{client} is claimed by {first.ref.place} too"))
    problems += _federation_problems({client: candidate.description for client, candidate in found.items()})
    if problems:
        raise RefusedError(problems)
    return dict(sorted(found.items()))


def _pinned(ref: AdapterRef, pins: Mapping[str, str]) -> AdapterRef:
    if ref.commit is None or "@" in ref.given:
        return ref
    return replace(ref, commit=pins.get(ref.source, ref.commit))


def _federation_problems(clients: Mapping[str, Description]) -> list[Problem]:
    # Shapes are compared, tensors are not read: a description is all of an adapter that this needs.
    shapes = [Client(name, 1.0, cast(Adapter, description)) for name, description in clients.items()]
    return [*claim_problems(clients), *shape_problems(shapes)]


def _client_id(candidate: Candidate) -> str:
    statement = candidate.description.statement
    return statement.client_id if statement else candidate.ref.source


def _other_names(candidates: Mapping[str, Candidate]) -> list[str]:
    """A note for each repository whose statement gives another id than its own."""
    return [
        f"{candidate.ref.source} states the client id {client}; it is listed by that."
        for client, candidate in candidates.items()
        if candidate.ref.commit and client != candidate.ref.source
    ]


def _allow_open_files(count: int) -> None:
    """Every client's weights stay open through the merge: let this process have that many files.

    Raises:
        UsageError: the system does not.
    """
    needed = count + FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{count} clients need {needed} open files, and this system allows {hard}.",
            hint=f"Raise the limit (ulimit -Hn {needed}), or merge in parts.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_clients(opened: dict[str, PeftFolder], folders: Mapping[str, Path], refs: Mapping[str, AdapterRef]) -> None:
    """Open each folder into `opened`; what was examined is examined again, now on the bytes that will be merged."""
    _allow_open_files(len(folders))
    problems: list[Problem] = []
    for client, folder in folders.items():
        try:
            opened[client] = open_folder(folder)
        except FolderRefused as error:
            problems += error.problems(refs[client].source)
    problems += _federation_problems(opened)
    if problems:
        raise RefusedError(problems)


def weights_of(candidates: Mapping[str, Candidate], weights: Weights) -> dict[str, float]:
    """The weight of each client; a weight may be given by id, by source, or by the source as the user wrote it."""
    statements = [candidate.description.statement for candidate in candidates.values()]
    counts = [statement.num_examples if statement else None for statement in statements]
    given = [candidate.ref.given for candidate in candidates.values()]
    names: dict[str, str] = {}
    for client, candidate in candidates.items():
        ref = candidate.ref
        names |= {ref.given: client} if given.count(ref.given) == 1 else {}
        names |= {ref.source: client, ref.place: client}
    return dict(zip(candidates, resolve_weights(list(candidates), counts, weights, names=names), strict=True))


def federation_of(inputs: Accepted, alpha: float, base: str | Path | None, device: torch.device) -> Federation:
    """The accepted clients with their weights, and the base model's tensors where the mean needs them.

    Raises:
        MissingBaseError: the mean needs base tensors that are not at hand.
    """
    folders = inputs.clients
    clients = [Client(client, n, folders[client]) for client, n in inputs.weights.items() if n > 0]
    total = sum(inputs.weights.values())
    conv1d = any(folder.config.fan_in_fan_out for folder in folders.values())
    without = Federation(clients, total, alpha, None, conv1d, device)
    needed = without.needed_base_tensors()
    model = _base_model(folders, base, needed)
    if model is not None and (missing := [name for name in needed if not model.has(name)]):
        raise NotFoundError(
            f"The base model {base or agreed_base_model(folders)} has no tensor {', '.join(missing[:5])}."
        )
    return Federation(clients, total, alpha, model, conv1d, device)


def _base_model(folders: Mapping[str, PeftFolder], base: str | Path | None, needed: Sequence[str]) -> BaseModel | None:
    """The base as given; else, only where it is needed, what the clients name, from the local cache."""
    if base is not None:
        return open_base(base)
    if not needed:
        return None
    commits = {f.statement.base_model.commit for f in folders.values() if f.statement}
    try:
        name = agreed_base_model(folders)
        return open_base(name or "", commit=commits.pop() if len(commits) == 1 else None)
    except NotFoundError as error:
        why = "A client lacks a tensor, trained DoRA, or --global-lr is not 1, so the mean depends on the base"
        raise MissingBaseError(needed, why=why) from error

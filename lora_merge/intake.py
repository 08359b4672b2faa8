"""From sources to the clients of a merge: each one examined, fetched, weighted; or every reason why not, at once."""

import resource
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.sketch import Sketched
from lora_merge.aggregation.weights import Weights
from lora_merge.agreement import federation_problems
from lora_merge.checkpoint.peft_folder import FolderRefused, PeftFolder, open_folder
from lora_merge.errors import Problem, RefusedError, UsageError
from lora_merge.hub.waiting import MAX_WAIT
from lora_merge.ledger import LeftOut
from lora_merge.screening.measuring import copies, read_all
from lora_merge.screening.report import whole_report
from lora_merge.screening.selection import Selection, by_client_id, clients_among, listed, require_exclusions_used
from lora_merge.screening.stops import Screening
from lora_merge.screening.weighing import weighed
from lora_merge.sources.reference import AdapterRef, Candidate, Progress, Tell
from lora_merge.sources.rooms import Rooms, open_rooms, require_once

FILES_BESIDE = 200  # sockets, caches, libraries
UNSCREENED = Screening(allow_dominant=True, allow_outliers=True, allow_merged=True)


@dataclass(frozen=True)
class Reading:
    """How sources are read: how long all waits for a busy Hub may take, and whom to tell of waits and downloads.

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
        passed_over: those of them that say what a pattern matched and did not take.
        weighting: how the weights were come by, in a word.
        left_out: who was named and is not here, and why.
        waved_through: what would have stopped the merge, had the user not allowed it.
        sketched: each one's updates, which are sketched as they are read; empty where nothing is screened.
        refused: why those were that the merge goes on without.
    """

    clients: Mapping[str, PeftFolder]
    refs: Mapping[str, AdapterRef]
    weights: Mapping[str, float]
    notes: Sequence[str]
    passed_over: Sequence[str] = ()
    weighting: str = "given"
    left_out: Sequence[LeftOut] = ()
    waved_through: Sequence[str] = ()
    sketched: Mapping[str, Sketched] = field(default_factory=dict)
    refused: Sequence[Problem] = ()


@dataclass(frozen=True)
class Examined:
    """The clients that a merge would have, of which no weights were read; sorted by id.

    Attributes:
        weights: n of each.
        to_download: bytes of each that are not on this machine.
        notes: what the user should know of how the sources were read.
        left_out: who was named and is not here, and why.
        waved_through: what would have stopped the merge, had the user not allowed it.
    """

    candidates: Mapping[str, Candidate]
    weights: Mapping[str, float]
    to_download: Mapping[str, int]
    notes: Sequence[str]
    left_out: Sequence[LeftOut] = ()
    waved_through: Sequence[str] = ()


@contextmanager
def accepted(
    sources: Sequence[str | Path],
    weights: Weights,
    reading: Reading,
    screening: Screening | None = None,
    selection: Selection | None = None,
) -> Iterator[Accepted]:
    """The clients' open folders, every file of which has the hash that its place lists.

    Args:
        screening: what stops the merge of adapters of people whom one doesn't know; None where nothing is to.
        selection: by `screening`, empty: of somebody who asks it who was refused where nobody is accepted.

    Raises:
        NotFoundError: a source names nothing, or may not be read.
        RefusedError: with every problem of every client; where possible before anything is downloaded.
        UsageError: a weight is missing or wrong.
        NetworkError: the Hub cannot be reached.
    """
    selection = selection or Selection(screening or UNSCREENED)
    with (
        open_rooms(reading.max_wait, reading.tell, reading.pins) as rooms,
        opening() as opened,
        whole_report(selection, opened, reading.progress),
    ):
        candidates = _examined(rooms, sources, reading.pins, selection)
        weighed(candidates, weights, selection)  # may stop, before anything is downloaded
        open_clients(opened, fetched(rooms, candidates, reading, selection), candidates, selection)
        sketched = {client: Sketched(folder) for client, folder in opened.items()} if screening else {}
        clients = _without_what_reading_finds(opened, sketched, candidates, selection)
        yield _accepted(
            {client: candidates[client] for client in clients}, clients, sketched, weights, selection, rooms.notes
        )


@contextmanager
def opening() -> Iterator[dict[str, PeftFolder]]:
    """Open folders by client id, none at first; all are closed at the end."""
    opened: dict[str, PeftFolder] = {}
    try:
        yield opened
    finally:
        for folder in opened.values():
            folder.close()


def _accepted(
    candidates: Mapping[str, Candidate],
    clients: Mapping[str, PeftFolder],
    sketched: Mapping[str, Sketched],
    weights: Weights,
    selection: Selection,
    notes: Sequence[str],
) -> Accepted:
    found = weighed(candidates, weights, selection)
    return Accepted(
        clients=clients,
        refs={client: candidate.ref for client, candidate in candidates.items()},
        weights=found.n,
        notes=[*notes, *other_names(candidates), *selection.notes],
        passed_over=notes,
        weighting=found.weighting,
        left_out=sorted(selection.left_out),
        waved_through=found.waved_through,
        sketched={client: sketched[client] for client in clients if client in sketched},
        refused=sorted(set(selection.problems)),
    )


def examined(
    sources: Sequence[str | Path], weights: Weights, reading: Reading, screening: Screening | None = None
) -> Examined:
    """What `accepted` would read, without reading any weights or writing anything; the same errors."""
    selection = Selection(screening or UNSCREENED)
    with open_rooms(reading.max_wait, reading.tell, reading.pins) as rooms:
        candidates = _examined(rooms, sources, reading.pins, selection)
        missing = {name: each.ref.room.missing_bytes(each) for name, each in candidates.items()}
        found = weighed(candidates, weights, selection)
        notes = [*rooms.notes, *other_names(candidates), *selection.notes]
        return Examined(candidates, found.n, missing, notes, sorted(selection.left_out), found.waved_through)


def _examined(
    rooms: Rooms, sources: Sequence[str | Path], pins: Mapping[str, str], selection: Selection
) -> dict[str, Candidate]:
    """The adapters that the sources name, by client id, sorted; refused where they are no federation."""
    refs = [_pinned(ref, pins) for ref in rooms.expand(sources, once=False)]
    if not refs:
        raise UsageError("No adapter is given.", hint="lora-merge aggregate client-1 client-2 --output global")
    found = candidates_of(rooms, refs, selection)
    if not found:
        raise UsageError("Every adapter is excluded.")
    return found


def candidates_of(
    rooms: Rooms, refs: Sequence[AdapterRef], selection: Selection, known: Collection[str] = ()
) -> dict[str, Candidate]:
    """The adapters at `refs` that may take part, by client id, sorted; refused where they are no federation.

    Args:
        known: names of clients that are in already, who may be excluded without being looked at.
    """
    taking_part = listed(refs, selection)
    require_once(taking_part)
    candidates = rooms.examine(taking_part, selection.refuse)
    require_exclusions_used(refs, candidates, selection.screening.exclude, known)
    claimed = by_client_id(clients_among(candidates, selection), selection)
    nobodys = {problem.client for problem in selection.problems}  # of those, only the source is known
    selection.taking_part |= {ref.source: ref for ref in taking_part if ref.source in nobodys}
    selection.taking_part |= {client: candidate.ref for client, candidate in claimed.items()}
    found = _agreeing(claimed, selection)
    selection.require(len(found))
    return found


def _pinned(ref: AdapterRef, pins: Mapping[str, str]) -> AdapterRef:
    if ref.commit is None or "@" in ref.given:
        return ref
    return replace(ref, commit=pins.get(ref.source, ref.commit))


def _agreeing(candidates: Mapping[str, Candidate], selection: Selection) -> dict[str, Candidate]:
    """Those that make one federation: without whoever differs from the most, until nobody does."""
    found = dict(candidates)
    while problems := federation_problems({client: candidate.description for client, candidate in found.items()}):
        for client in sorted({problem.client for problem in problems}):
            selection.refuse(found.pop(client).ref, [each for each in problems if each.client == client], client)
        if not selection.screening.skip_rejected:
            break  # the first look names all that differ; what their absence would change is not asked for
    return found


def other_names(candidates: Mapping[str, Candidate]) -> list[str]:
    """A note for each repository whose statement gives another id than its own."""
    return [
        f"{candidate.ref.source} states the client id {client}; it is listed by that."
        for client, candidate in candidates.items()
        if candidate.ref.commit and client != candidate.ref.source
    ]


def fetched(
    rooms: Rooms, candidates: Mapping[str, Candidate], reading: Reading, selection: Selection
) -> dict[str, Path]:
    """The clients' folders on this machine."""
    refused: list[AdapterRef] = []

    def refuse(candidate: Candidate, problems: Sequence[Problem]) -> None:
        refused.append(candidate.ref)
        selection.refuse(candidate.ref, problems)

    folders = rooms.fetch(list(candidates.values()), reading.progress, refuse)
    here = [client for client, candidate in candidates.items() if candidate.ref not in refused]
    selection.require(len(here))
    return dict(zip(here, folders, strict=True))


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
            hint=f"Raise the limit (ulimit -Hn {needed}), or merge in parts, and these with --allow-merged.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_clients(
    opened: dict[str, PeftFolder],
    folders: Mapping[str, Path],
    candidates: Mapping[str, Candidate],
    selection: Selection,
) -> None:
    """Open each folder into `opened`; what was examined is examined again, now on the bytes that will be merged."""
    _allow_open_files(len(folders))
    for client, folder in folders.items():
        try:
            opened[client] = open_folder(folder)
        except FolderRefused as error:
            ref = candidates[client].ref
            selection.refuse(ref, error.problems(ref.source), client)
    selection.require(len(opened))
    if problems := federation_problems(opened):  # they agreed when they were examined: somebody writes to them
        raise RefusedError(problems)


def _without_what_reading_finds(
    opened: Mapping[str, PeftFolder],
    sketched: Mapping[str, Sketched],
    candidates: Mapping[str, Candidate],
    selection: Selection,
) -> dict[str, PeftFolder]:
    """The clients to merge: where the user asks for it without those whose values are no numbers, and without copies.

    Who takes part has to be known before the merge begins, so this reads everything once more.
    """
    clients = dict(opened)
    skips, drops = selection.screening.skip_rejected, selection.screening.drop_duplicates
    if not sketched or not (skips or drops):
        return clients
    with pool() as threads:
        for client, problems in read_all(sketched, opened, threads).items():
            selection.refuse(candidates[client].ref, problems, client)
            del clients[client]
        selection.require(len(clients))
        hashes = threads.map(lambda folder: folder.file.sha256(), clients.values()) if drops else ()
        here = {client: sketched[client] for client in clients}
        for copy in copies(here, dict(zip(clients, hashes, strict=True))) if drops else ():
            selection.leave_out(candidates[copy.client].ref, str(copy), copy.client)
            del clients[copy.client]
    return clients

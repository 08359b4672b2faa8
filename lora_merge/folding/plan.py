"""`aggregate --onto --dry-run`: what a fold would bring in, and what it would read; nothing is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from lora_merge.adapter import Client, Factors
from lora_merge.aggregation.methods import METHODS
from lora_merge.agreement import federation_problems
from lora_merge.checkpoint.peft_folder import Description, PeftFolder
from lora_merge.errors import LoraMergeError, RefusedError
from lora_merge.folding import by_blocks, by_mean
from lora_merge.folding.arrivals import Arrivals, listed_arrivals, refs_of, weights_of_arrivals, withdrawn
from lora_merge.folding.change import Change, change_of
from lora_merge.folding.global_adapter import opened_global
from lora_merge.folding.how import How, Located, settings_of
from lora_merge.folding.pinned import candidates_again
from lora_merge.intake import UNSCREENED, Reading, other_names
from lora_merge.screening.selection import Selection
from lora_merge.sources.reference import Candidate
from lora_merge.sources.rooms import Rooms, open_rooms


@dataclass(frozen=True)
class FoldPlan:
    """A fold that has not begun.

    Attributes:
        known: who is in already, at the commit or with the files that the sources name.
        again: why all clients' files would be read again; None where the global adapter does.
        gone: which of those are not there: then the fold would be refused, or cost accuracy.
        to_download: bytes that are not on this machine.
    """

    onto: str
    known: Sequence[str]
    added: Sequence[str]
    replaced: Sequence[str]
    withdrawn: Sequence[str]
    weights: Mapping[str, float]
    again: str | None = None
    gone: str | None = None
    to_download: int = 0
    warnings: Sequence[str] = ()


class _UnreadError(Exception):
    """The values of an arrival would be needed, and are not read for a plan."""


class _Listed(Description):
    def __getitem__(self, module: str) -> Factors:
        raise _UnreadError


def plan_of(
    sources: Sequence[str | Path], onto: Located, withdraw: Sequence[str], how: How, reading: Reading
) -> FoldPlan:
    """What the fold of the same arguments would do. Norms and copies show only when it is done.

    Raises:
        What `lora_merge.folding.onto.fold` raises before it reads weights.
    """
    assert onto.folder
    selection = Selection(how.screening or UNSCREENED)
    with (
        open_rooms(reading.max_wait, reading.tell) as rooms,
        opened_global(onto.folder, onto.place, onto.commit) as before,
    ):
        settings_of(before.ledger, how)
        gone = withdrawn(withdraw, before.contributions, onto.place)
        stay = {client: each for client, each in before.contributions.items() if client not in gone}
        selection.others = len(stay)
        refs = refs_of(rooms, sources, onto.place, [before.contributions[client] for client in gone])
        found = listed_arrivals(rooms, refs, stay, selection)
        new, replaces = found.new, {client: old for client, old in found.replaces.items() if client in found.new}
        listed = {client: cast(PeftFolder, _listed(candidate)) for client, candidate in new.items()}
        arrivals = Arrivals(listed, new, replaces, {}, {})
        known = sorted({client for client in stay if client in found.known})
        nothing_new = not new and not gone
        afresh = by_mean.worth_merging_again(before) if nothing_new and len(known) == len(stay) else None
        if nothing_new and not afresh:
            return FoldPlan(onto.place, known, (), (), (), {}, warnings=[*rooms.notes, *selection.notes])
        n = weights_of_arrivals(arrivals, how.weights, before.ledger, stay, selection).n
        change = replace(change_of(before, arrivals, n, gone), afresh=afresh)
        _refuse_misfits(change)
        again = _again(change)
        others, lost = _others(rooms, change) if again else ([], None)
        missing = [candidate.ref.room.missing_bytes(candidate) for candidate in (*new.values(), *others)]
        return FoldPlan(
            onto=onto.place,
            known=known,
            added=[client for client in new if client not in replaces],
            replaced=sorted(replaces),
            withdrawn=change.withdrawn,
            weights={client: n[client] for client in new},
            again=again,
            gone=lost,
            to_download=sum(missing),
            warnings=[*rooms.notes, *other_names(new), *selection.notes],
        )


def _listed(candidate: Candidate) -> _Listed:
    described = candidate.description
    return _Listed(described.config, described.statement, described.stored)


def _refuse_misfits(change: Change) -> None:
    new, before = change.arrivals.new, change.before
    clients: dict[str, Description] = {
        client: new.get(client) or before.descriptions[client] for client in change.weights
    }
    shapes = [Client(client, 1.0, folder) for client, folder in new.items()]
    whole = [Client(before.place, 1.0, before.folder)] if len(change.stay) == len(before.contributions) else []
    if problems := federation_problems(clients, [*whole, *shapes]):
        raise RefusedError(problems)


def _again(change: Change) -> str | None:
    before = change.before
    obstacle = by_blocks.obstacle if METHODS[before.ledger.method].folds == "blocks" else by_mean.obstacle
    try:
        return change.afresh or obstacle(before, change.arrivals.new, change.weights)
    except _UnreadError:
        return None  # a factor that all share is seen only in the values


def _others(rooms: Rooms, change: Change) -> tuple[Sequence[Candidate], str | None]:
    """The files of those who stay, as far as they can be found again; and why not."""
    try:
        return candidates_again(rooms, list(change.stay.values())), None
    except LoraMergeError as error:
        return (), error.message

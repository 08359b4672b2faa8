"""What a fold changes in a global adapter, and the merge that makes it: of stored blocks, or of all files again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from lora_merge.adapter import Client
from lora_merge.aggregation.methods import METHODS
from lora_merge.agreement import federation_problems
from lora_merge.assembly import federation_of
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import Description, PeftFolder
from lora_merge.errors import NotFoundError, RefusedError, UsageError
from lora_merge.folding import by_blocks, by_mean
from lora_merge.folding.arrivals import Arrivals
from lora_merge.folding.global_adapter import GlobalAdapter
from lora_merge.folding.pinned import reopened
from lora_merge.intake import Accepted, Reading
from lora_merge.kept import claims_of, packed, ranks_in, ranks_of
from lora_merge.ledger import Contribution
from lora_merge.provenance import contributions_of
from lora_merge.sources.rooms import Rooms

_Merge: TypeAlias = Callable[[GlobalAdapter, Mapping[str, PeftFolder], Mapping[str, float], torch.device], Federation]


@dataclass(frozen=True)
class Change:
    """A global adapter, and who is in it afterwards.

    Attributes:
        stay: the contributions that stay as they are, by client id.
        weights: n of all afterwards, by client id, sorted.
        withdrawn: who is taken out.
        afresh: why all files are to be read again, though the global adapter might do; None where it may.
    """

    before: GlobalAdapter
    stay: Mapping[str, Contribution]
    arrivals: Arrivals
    weights: Mapping[str, float]
    withdrawn: Sequence[str]
    afresh: str | None = None


@dataclass(frozen=True)
class Parts:
    """What is merged.

    Attributes:
        clients: everybody's claims, by id, sorted.
        stay: the contributions that stay, by what is known of them now.
        again: why all files were read again; None where the global adapter itself did.
        note: what the user should know of how it was done.
    """

    federation: Federation
    clients: Mapping[str, Description]
    stay: Mapping[str, Contribution]
    again: str | None = None
    note: str | None = None


def change_of(before: GlobalAdapter, arrivals: Arrivals, weights: Mapping[str, float], withdrawn: set[str]) -> Change:
    """The change that arrivals and withdrawals make.

    Raises:
        UsageError: it leaves nobody.
    """
    gone = withdrawn | set(arrivals.replaces.values())
    stay = {client: each for client, each in before.contributions.items() if client not in gone}
    n = {**{client: each.weight for client, each in stay.items()}, **weights}
    if not any(n.values()):
        raise UsageError(
            f"That would leave nobody in {before.place}.", hint="Delete it instead, or bring somebody in at once."
        )
    return Change(before, stay, arrivals, dict(sorted(n.items())), sorted(withdrawn))


@contextmanager
def parts_of(
    change: Change,
    rooms: Rooms,
    base: str | Path | None,
    device: torch.device,
    reading: Reading,
    *,
    pinned: bool = True,
) -> Iterator[Parts]:
    """What to merge for a change: stored blocks beside arrivals, or all clients' files, read again.

    Args:
        pinned: read the clients' files again where a truncated mean has no core; else, and where they are gone, it
            stands for them itself.

    Raises:
        NotFoundError: some client's files are needed, and are gone.
        RefusedError: an arrival does not fit the others.
    """
    before, new = change.before, change.arrivals.new
    clients = {client: new.get(client) or before.descriptions[client] for client in change.weights}
    _refuse(clients, [*_stored(change, device), *(Client(client, 1.0, folder) for client, folder in new.items())])
    in_blocks = METHODS[before.ledger.method].folds == "blocks"
    why = change.afresh or (by_blocks if in_blocks else by_mean).obstacle(before, new, change.weights)
    if why is None or (why == by_mean.NO_CORE and not pinned):
        yield _by_itself(change, clients, by_blocks.stacked if in_blocks else by_mean.with_stand_in, device)
        return
    with ExitStack() as stack:
        at_hand = change.arrivals.known
        try:
            files = stack.enter_context(reopened(rooms, list(change.stay.values()), at_hand, reading, why))
        except NotFoundError as error:
            if why != by_mean.NO_CORE:
                raise
            note = by_mean.lost_without_core(before, str(error.__cause__))
            yield replace(_by_itself(change, clients, by_mean.with_stand_in, device), note=note)
            return
        folders: dict[str, PeftFolder] = {client: new.get(client) or files[client] for client in change.weights}
        _refuse(folders, [Client(client, 1.0, folder) for client, folder in folders.items()])
        federation = federation_of(Accepted(folders, {}, change.weights, ()), before.ledger.global_lr, base, device)
        ranks = {client: ranks_of(folders[client]) if each.weight else {} for client, each in change.stay.items()}
        stay = {client: replace(each, claims=claims_of(folders[client])) for client, each in change.stay.items()}
        yield Parts(federation, folders, _known(stay, ranks, federation), why)


def _by_itself(change: Change, clients: Mapping[str, Description], merge: _Merge, device: torch.device) -> Parts:
    """What is merged where the global adapter stands for those who stay."""
    before = change.before
    federation = merge(before, change.arrivals.new, change.weights, device)
    modules = ranks_of(before.folder)
    if modules.keys() == federation.factor_specs.keys():  # then what is recorded of the blocks holds as it is
        return Parts(federation, clients, _with_shares(change.stay, federation))
    ranks = dict(zip(change.stay, ranks_in(change.stay.values(), modules), strict=True))
    return Parts(federation, clients, _known(change.stay, ranks, federation))


def contributions_after(change: Change, parts: Parts) -> list[Contribution]:
    """What everybody put in, sorted by client id."""
    arrivals, new = change.arrivals, list(change.arrivals.new)
    refs = {client: candidate.ref for client, candidate in arrivals.candidates.items()}
    inputs = Accepted(arrivals.new, refs, {client: change.weights[client] for client in new}, ())
    added = contributions_of(inputs, parts.federation, [arrivals.hashes[client] for client in new])
    found = {**parts.stay, **{each.client_id: each for each in added}}
    return [found[client] for client in change.weights]


def _known(
    stay: Mapping[str, Contribution], ranks: Mapping[str, Mapping[str, int]], federation: Federation
) -> dict[str, Contribution]:
    """The contributions that stay, with their shares and ranks in the new whole."""
    modules = federation.factor_specs
    ranked = {client: replace(each, block_ranks=packed(ranks[client], modules)) for client, each in stay.items()}
    return _with_shares(ranked, federation)


def _with_shares(stay: Mapping[str, Contribution], federation: Federation) -> dict[str, Contribution]:
    return {client: replace(each, share=each.weight / federation.total) for client, each in stay.items()}


def _stored(change: Change, device: torch.device) -> Sequence[Client]:
    """What is stored of those who stay, where that is known apart from those who go."""
    before = change.before
    if before.is_stacked:
        return [c for c in by_blocks.stacked(before, change.arrivals.new, change.weights, device).clients if c.stored]
    return [Client(before.place, 1.0, before.folder)] if len(change.stay) == len(before.contributions) else []


def _refuse(clients: Mapping[str, Description], shapes: Sequence[Client]) -> None:
    """Raise `RefusedError` where these do not make one federation."""
    if problems := federation_problems(clients, shapes):
        raise RefusedError(problems)

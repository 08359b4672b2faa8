"""The stops at late arrivals. They judge all who would be in, so that who comes first is judged like who comes last.

A withdrawal alone stops at nothing: it is the way on. What it leaves is judged when the next one arrives.
"""

import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from torch import Tensor

from lora_merge.adapter import Client
from lora_merge.aggregation.schedule import over, pool
from lora_merge.aggregation.sketch import Sketched, sketches_of_blocks
from lora_merge.agreement import federation_problems
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import WEIGHTS_NAME
from lora_merge.folding.arrivals import Arrivals, Contributions, may_lie_at
from lora_merge.folding.global_adapter import GlobalAdapter
from lora_merge.ledger import Ledger
from lora_merge.screening.measuring import Findings, Held, copies, findings, let_past, read_all
from lora_merge.screening.selection import Selection, is_folder
from lora_merge.screening.stops import WAY_BY_BASE, Screening, late_ways, let_in
from lora_merge.screening.whole import judged
from lora_merge.sources.reference import AdapterRef


def screened(
    arrivals: Arrivals, before: GlobalAdapter, stay: Contributions, selection: Selection
) -> tuple[Arrivals, Findings]:
    """The arrivals that come in, and what reading them found. Nothing is changed before that.

    Copies are found among the arrivals, and of stored blocks, which are read for that. What went into a mean is no
    update of its own any more: of that, only equal files are known.

    Raises:
        RefusedError: an arrival is refused, or with it somebody, in already or not, is far larger than the others.
    """
    stay = {client: each for client, each in stay.items() if client not in arrivals.replaces.values()}
    if selection.screening.skip_rejected:
        arrivals = _without_misfits(arrivals, before, stay, selection)
    sketched = {client: Sketched(folder) for client, folder in arrivals.new.items()}
    with pool() as threads:
        problems = read_all(sketched, arrivals.new, threads)
        for client, reasons in problems.items():
            selection.refuse(arrivals.candidates[client].ref, reasons, client)
        if problems and not selection.screening.skip_rejected:
            _without_misfits(arrivals, before, stay, selection)  # what stops the fold comes in one report
        selection.require(len(sketched) - len(problems))
        arrivals = _without(arrivals, problems)
        if not arrivals.new:
            return arrivals, Findings()
        held = _held(before, stay, threads)
    sketched = {client: sketched[client] for client in arrivals.new}
    hashes = {client: arrivals.hashes[client][WEIGHTS_NAME] for client in arrivals.new}
    if selection.screening.drop_duplicates:
        dropped = copies(sketched, hashes, held)
        for copy in dropped:
            selection.leave_out(arrivals.candidates[copy.client].ref, str(copy), copy.client)
            del sketched[copy.client], hashes[copy.client]
        arrivals = _without(arrivals, [copy.client for copy in dropped])
    return arrivals, findings(sketched, hashes, selection.screening, held=held)


def _without(arrivals: Arrivals, clients: Collection[str]) -> Arrivals:
    new = {client: each for client, each in arrivals.new.items() if client not in clients}
    candidates = {client: arrivals.candidates[client] for client in new}
    return replace(
        arrivals, new=new, candidates=candidates, replaces={c: o for c, o in arrivals.replaces.items() if c in new}
    )


def _without_misfits(arrivals: Arrivals, before: GlobalAdapter, stay: Contributions, selection: Selection) -> Arrivals:
    """The arrivals each of which makes one federation with those that stay."""
    misfits = []
    for client, folder in arrivals.new.items():
        claims = {**{name: before.descriptions[name] for name in stay}, client: folder}
        shapes = [Client(before.place, 1.0, before.folder), Client(client, 1.0, folder)] if stay else []
        if problems := federation_problems(claims, shapes):
            selection.refuse(arrivals.candidates[client].ref, problems, client)
            misfits.append(client)
    return _without(arrivals, misfits)


def _held(before: GlobalAdapter, stay: Contributions, threads: ThreadPoolExecutor) -> Held:
    norms = {client: each.norm for client, each in stay.items() if each.norm is not None}
    hashes = {client: sha256 for client, each in stay.items() if (sha256 := each.sha256.get(WEIGHTS_NAME))}
    waved = let_in(before.ledger.waved_through, "update", stay)
    if not before.is_stacked:
        return Held(norms, hashes, let_in=waved)
    at = {client: index for index, client in enumerate(before.contributions) if client in stay}
    modules = list(before.stacks.specs)
    found = over(threads, partial(_sketches, before, list(at.values())), modules)
    updates = {client: before.stacks.run(index, index + 1) for client, index in at.items()}
    return Held(norms, hashes, updates, dict(zip(modules, found, strict=True)), waved)


def _sketches(before: GlobalAdapter, rows: list[int], module: str) -> Tensor:
    whole = before.stacks.cut(module, 0, len(before.contributions))
    return sketches_of_blocks(whole, before.stacks.bounds[module])[rows]


def wholly_screened(
    found: Findings, federation: Federation, before: GlobalAdapter, arrivals: Arrivals, screening: Screening
) -> Findings:
    """The findings, with what the sizes say of what clients trained whole: of all whose files are read again for that.

    Raises:
        RefusedError: somebody, in already or not, is far larger than the others with it.
    """
    here = {client.id for client in federation.clients}
    stay = here - arrivals.new.keys()
    were = {client: each for client, each in before.contributions.items() if client in stay}
    norms = {**{client: each.norm for client, each in were.items() if each.norm is not None}, **found.norms}
    files = {client: each.sha256 for client, each in were.items()} | {c: arrivals.hashes[c] for c in arrivals.new}
    hashes = {client: each[WEIGHTS_NAME] for client, each in files.items()}
    waved = let_in(before.ledger.waved_through, "update", stay)
    whole = judged(federation, hashes, norms, stay, waved)
    ways = late_ways(whole.problems, stay) if whole.problems else ""
    past = let_past(whole.problems, screening, f"{ways} {WAY_BY_BASE}" if whole.guessed else ways)
    return replace(found, waved_through=[*found.waved_through, *past])


def with_screening(
    ledger: Ledger,
    before: Ledger,
    selection: Selection,
    waved_through: Collection[str],
    found: Findings,
    came: Collection[AdapterRef],
) -> Ledger:
    """The record, with what screening left out, let in and measured; and what `before` says of those who stay.

    Args:
        came: the arrivals that are in now: whoever was left out, by whichever short name, is so no longer.
    """
    norms = {client: float(f"{norm:.6g}") for client, norm in found.norms.items() if math.isfinite(norm)}
    contributions = [
        replace(each, norm=norms[each.client_id]) if each.client_id in norms else each for each in ledger.contributions
    ]
    sources = {each.source for each in contributions}
    paths = [ref.place for ref in came if is_folder(ref)]
    still_out = [each for each in before.left_out if not any(may_lie_at(each.source, path) for path in paths)]
    left_out = {each.source: each for each in (*still_out, *selection.left_out) if each.source not in sources}
    were = {each.client_id: each.sha256 for each in before.contributions}
    stay = [each.client_id for each in contributions if were.get(each.client_id) == each.sha256]
    waved = [line for line in before.waved_through if any(line.startswith(f"{client}: ") for client in stay)]
    return replace(
        ledger,
        contributions=contributions,
        left_out=sorted(left_out.values()),
        waved_through=[*waved, *waved_through, *found.waved_through],
    )

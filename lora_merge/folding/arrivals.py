"""What sources bring to a global adapter: what it has already, what is new, what takes an old one's place."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lora_merge.aggregation.weights import Weights
from lora_merge.checkpoint.peft_folder import PeftFolder, open_folder
from lora_merge.errors import NotFoundError, Problem, UsageError, one_line
from lora_merge.intake import Reading, candidates_of, fetched, open_clients, opening
from lora_merge.ledger import Contribution, Ledger
from lora_merge.screening.report import whole_report
from lora_merge.screening.selection import Selection, is_folder
from lora_merge.screening.stops import cap_of, let_in
from lora_merge.screening.weighing import Weighed, cap_in, weighed
from lora_merge.sources.local import whole_paths
from lora_merge.sources.reference import AdapterRef, Candidate
from lora_merge.sources.rooms import Rooms
from lora_merge.statement import FILE_NAME as STATEMENT_NAME

Contributions = Mapping[str, Contribution]
MANY = 20  # clients that an error lists
RULES = ("examples", "uniform", "given")  # the first one with a cap or without


@dataclass(frozen=True)
class Arrivals:
    """What the sources bring; all but `known` and `hashes` have the same keys.

    Attributes:
        new: the open folder of each update that is to come in, by client id, sorted.
        candidates: where each came from, and what it says.
        replaces: the client whose contribution each takes the place of, if any.
        known: open folders of what is in already and lies at hand.
        hashes: of each open folder's files.
    """

    new: Mapping[str, PeftFolder]
    candidates: Mapping[str, Candidate]
    replaces: Mapping[str, str]
    known: Mapping[str, PeftFolder]
    hashes: Mapping[str, Mapping[str, str]]


@contextmanager
def arriving(
    rooms: Rooms, refs: Sequence[AdapterRef], kept: Contributions, reading: Reading, selection: Selection
) -> Iterator[Arrivals]:
    """Compare the adapters at `refs` with what a global adapter keeps; only what may be new is downloaded.

    A repository at the commit that is in is not even looked at; without commits, the files' hashes decide.

    Raises:
        RefusedError: with every problem of every adapter, such as an id that is in from somewhere else.
    """
    with opening() as opened, whole_report(selection, opened, reading.progress):
        candidates, before = _candidates(rooms, refs, kept, selection)
        open_clients(opened, fetched(rooms, candidates, reading, selection), candidates, selection)
        hashes = {client: folder.sha256() for client, folder in opened.items()}
        known = {client for client in opened if (old := before[client]) and _is_same(client, old, hashes[client])}
        yield Arrivals(
            {client: folder for client, folder in opened.items() if client not in known},
            {client: candidates[client] for client in opened if client not in known},
            {client: old.client_id for client in opened if client not in known and (old := before[client])},
            {client: folder for client, folder in opened.items() if client in known},
            hashes,
        )


@dataclass(frozen=True)
class Listed:
    """What the sources bring, as far as that shows without reading what is not on this machine."""

    new: Mapping[str, Candidate]
    replaces: Mapping[str, str]
    known: frozenset[str]


def listed_arrivals(rooms: Rooms, refs: Sequence[AdapterRef], kept: Contributions, selection: Selection) -> Listed:
    """What `arriving` would find; of URLs, which have no commits, that they may be new."""
    candidates, before = _candidates(rooms, refs, kept, selection)
    known = {client for client, old in before.items() if old and _lies_here_as(client, old, candidates[client].ref)}
    sources = {(ref.source, ref.commit) for ref in refs}
    known |= {client for client, each in kept.items() if each.commit and (each.source, each.commit) in sources}
    new = {client: candidate for client, candidate in candidates.items() if client not in known}
    return Listed(new, {client: old.client_id for client in new if (old := before[client])}, frozenset(known))


def _lies_here_as(client: str, old: Contribution, ref: AdapterRef) -> bool:
    if not is_folder(ref):
        return False
    folder = open_folder(Path(ref.place))
    try:
        return _is_same(client, old, folder.sha256())
    finally:
        folder.close()


def _candidates(
    rooms: Rooms, refs: Sequence[AdapterRef], kept: Contributions, selection: Selection
) -> tuple[dict[str, Candidate], dict[str, Contribution | None]]:
    """The adapters that may be new, by client id, and the contribution that came from where each is."""
    at_commit = {(each.source, each.commit) for each in kept.values() if each.commit}
    others = [ref for ref in refs if (ref.source, ref.commit) not in at_commit]
    names = [name for each in kept.values() for name in (each.client_id, each.source)]
    candidates = candidates_of(rooms, others, selection, names)
    before = {client: _same_source(client, candidate.ref, kept) for client, candidate in candidates.items()}
    for client, candidate in list(candidates.items()):
        if problems := list(_claims(client, candidate.ref, before[client], kept)):
            selection.refuse(candidate.ref, problems, client)
            del candidates[client]
    selection.require(len(candidates))
    return candidates, {client: before[client] for client in candidates}


def withdrawn(names: Sequence[str], contributions: Contributions, place: str) -> set[str]:
    """The clients that `names` name, by id or source.

    A folder may be named by its path, as far as the short name that a ledger keeps of it tells it from the others.

    Raises:
        NotFoundError: a name is nobody's.
        UsageError: a path may be that of several.
    """
    found = set()
    for name in names:
        clients = {client for client, each in contributions.items() if name == each.source}
        clients = {name} if name in contributions else clients or _of_path(name, contributions)
        if not clients:
            shown = ", ".join(f"{client} (from {each.source})" for client, each in [*contributions.items()][:MANY])
            more = f" and {len(contributions) - MANY} more" if len(contributions) > MANY else ""
            raise NotFoundError(f"{name} is not in {place}, which holds {shown}{more}.")
        if len(clients) > 1:
            raise UsageError(
                f"--withdraw {name} may be any of {', '.join(sorted(clients))}.", hint="Name its client id."
            )
        found |= clients
    return found


def _of_path(path: str, contributions: Contributions) -> set[str]:
    """Those that came from a folder at `path`, as far as their short names say."""
    if "://" in path:
        return set()
    folders = {client: each.source for client, each in contributions.items() if not each.commit}
    return {client for client, source in folders.items() if may_lie_at(source, path)}


def may_lie_at(source: str, path: str) -> bool:
    """Whether the folder at `path` may be the one that a ledger has the short name `source` of."""
    return any(one_line(whole).endswith(f"/{source}") for whole in whole_paths(path))


def weights_of_arrivals(
    arrivals: Arrivals, weights: Weights | None, ledger: Ledger, kept: Contributions, selection: Selection
) -> Weighed:
    """The weight of each new client, by the rule that weighted those before; `weights` may name these too, as they are.

    Raises:
        UsageError: another rule, another weight for one that stays, or none for a new one.
    """
    require_rule(ledger, weights, selection.screening.cap_examples)
    cap, made_by = cap_in(ledger.weighting), _rule_of(ledger)
    if made_by not in RULES:
        raise UsageError(
            f"The global adapter is weighted by {ledger.weighting}; its arrivals cannot be by that.",
            hint="Merge all clients anew without --onto.",
        )
    if not arrivals.new:
        return Weighed({}, ledger.weighting)
    before = {client: each.weight for client, each in kept.items() if client not in arrivals.replaces.values()}
    if weights is None or isinstance(weights, str):
        if made_by == "given":
            hint = " ".join(f"--weight {candidate.ref.source}=NUMBER" for candidate in arrivals.candidates.values())
            raise UsageError("The global adapter's weights were given by hand; so must be its arrivals'.", hint=hint)
        if made_by == "examples":
            _require_counts(arrivals.candidates)
        capped = replace(selection, screening=replace(selection.screening, cap_examples=cap))
        waved = let_in(ledger.waved_through, "num_examples", before)
        return weighed(arrivals.candidates, "uniform" if made_by == "uniform" else "examples", capped, before, waved)
    names = {name: each for each in kept.values() for name in (each.client_id, each.source)}
    for name in weights.keys() & names.keys():
        if weights[name] != names[name].weight:
            raise UsageError(f"{name} is in with the weight {names[name].weight:g}, which stays as it is.")
    given = {name: n for name, n in weights.items() if name not in names}
    return weighed(arrivals.candidates, given, selection, before)


def require_rule(ledger: Ledger, weights: Weights | None, cap_examples: str | float | None) -> None:
    """Raise `UsageError` where weights or a cap are chosen that the global adapter was not made with."""
    rule = weights if weights is None or isinstance(weights, str) else "given"
    if rule not in (None, _rule_of(ledger)):
        raise UsageError(
            f"The global adapter is weighted by {ledger.weighting}; its arrivals cannot be by {rule}.",
            hint="Leave --weights out, or merge all clients anew without --onto.",
        )
    require_cap(cap_examples, cap_in(ledger.weighting))


def _rule_of(ledger: Ledger) -> str:
    return ledger.weighting if cap_in(ledger.weighting) is None else "examples"


def _require_counts(candidates: Mapping[str, Candidate]) -> None:
    """Raise `UsageError` where an arrival states no num_examples, by which all those before were weighted."""
    for client, candidate in candidates.items():
        statement = candidate.description.statement
        if statement is not None and statement.num_examples is not None:
            continue
        raise UsageError(
            f"{client} states no num_examples, by which those who are in are weighted.",
            hint=f"Let its {STATEMENT_NAME} state it, or merge all clients anew without --onto, with --weights.",
        )


def require_cap(chosen: str | float | None, cap: float | None) -> None:
    """Raise `UsageError` where a cap is chosen that is not the one that the global adapter was made with."""
    if chosen is not None and (cap is None or cap_of(chosen, []) != cap):
        made = "without one" if cap is None else f"with {cap:g}"
        raise UsageError(
            f"--cap-examples is {chosen}, and the global adapter was made {made}.",
            hint="Leave --cap-examples out, or merge all clients anew without --onto.",
        )


def _same_source(client: str, ref: AdapterRef, kept: Contributions) -> Contribution | None:
    """The contribution that came from where `ref` is.

    A folder is known by a short name, which is as long as tells it from the others that it was given with.
    """
    same = [
        each for each in kept.values() if (each.commit is None) == (ref.commit is None) and came_from(each.source, ref)
    ]
    return next((each for each in same if each.client_id == client), next(iter(same), None))


def came_from(source: str, ref: AdapterRef) -> bool:
    """Whether `source`, of a ledger, is where `ref` is; of folders, as far as their short names say."""
    if source == ref.source or ref.commit or "://" in source or "://" in ref.source:
        return source == ref.source
    return source.endswith(f"/{ref.source}") or ref.source.endswith(f"/{source}")


def _claims(client: str, ref: AdapterRef, before: Contribution | None, kept: Contributions) -> Iterator[Problem]:
    holder = kept.get(client)
    if holder and (before is None or before.client_id != client):
        yield Problem(ref.source, "client_id", f"{client} is in already, from {holder.source}: nobody else replaces it")
    elif before and before.client_id != client and ref.commit is None and "://" not in ref.source:
        reason = f"{client}, where a folder of this name is in as {before.client_id}: rename the folder"
        yield Problem(ref.source, "client_id", reason)


def _is_same(client: str, old: Contribution, hashes: Mapping[str, str]) -> bool:
    return client == old.client_id and old.commit is None and dict(old.sha256) == dict(hashes)


def refs_of(
    rooms: Rooms, sources: Sequence[str | Path], place: str, leave_out: Sequence[Contribution]
) -> list[AdapterRef]:
    """The adapters that the sources name, but the global adapter at `place` itself and what `leave_out` came from."""
    return [
        ref
        for ref in (rooms.expand(sources, once=False) if sources else [])
        if place not in (ref.place, str(Path(ref.place).resolve()))
        and not any((each.commit is None) == (ref.commit is None) and came_from(each.source, ref) for each in leave_out)
    ]

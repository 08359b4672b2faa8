"""What reading the clients' updates finds out: values that are no numbers, updates far too large, copies."""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

from torch import Tensor

from lora_merge.adapter import Adapter, Client, Factors, FactorsSpec, Spec, Update
from lora_merge.aggregation import gram, inner_products
from lora_merge.aggregation.apart import distance, fingerprint, trained_whole
from lora_merge.aggregation.schedule import over
from lora_merge.aggregation.sketch import Sketched, cosines, cosines_to_blocks
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.checkpoint.safetensors_file import FileRefused, SafetensorsFile
from lora_merge.errors import Problem, RefusedError, one_line
from lora_merge.screening.stops import (
    WAY_BY_BASE,
    WAYS_PAST_OUTLIERS,
    Copy,
    Screening,
    identical,
    late_ways,
    nearly_identical,
    outliers,
)
from lora_merge.screening.whole import Judged, judged

PERHAPS_A_COPY = 0.99  # a sketched cosine; whether it is above the bound is then measured
LONGEST_LINE = 500  # characters; a ledger takes short texts


@dataclass(frozen=True)
class Held:
    """What late arrivals are held against: clients that are in a global adapter already.

    Attributes:
        norms: of each whose norm is known.
        hashes: the sha256 of each one's weights file.
        updates: each one's update, where it is stored apart from the others'.
        sketches: of each module, a row for each of `updates`, in that order.
        let_in: whose norm the user let in knowingly.
    """

    norms: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    updates: Mapping[str, Adapter] = field(default_factory=dict)
    sketches: Mapping[str, Tensor] = field(default_factory=dict)
    let_in: Collection[str] = ()


@dataclass(frozen=True)
class Findings:
    """What was found of the updates that were merged: norms by client id, what to warn of, what was let in."""

    norms: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    waved_through: Sequence[str] = ()


def findings(
    clients: Mapping[str, Sketched],
    hashes: Mapping[str, str],
    screening: Screening,
    *,
    federation: Federation | None = None,
    held: Held | None = None,
    judge_norms: bool = True,
) -> Findings:
    """What reading the updates found out. Call it once they are read, before anything is put in its place.

    Args:
        clients: those that were screened; none where nothing is to be.
        hashes: the sha256 of each weights file.
        federation: of the clients, with the base's tensors where they are at hand; None where they come late, and what
            they trained whole is for later, when all files are read again.
        held: what late ones are held against.
        judge_norms: whether a norm may stop the merge: not where the user has large ones scaled down.

    Raises:
        RefusedError: an update is far larger than the others, be it one that is in already.
    """
    before, own = held.norms if held else {}, norms(clients)
    problems = outliers(own, before, held.let_in if held else ()) if judge_norms else []
    whole = judged(federation, hashes, own) if judge_norms and federation else Judged()
    problems = [*problems, *whole.problems]
    hint = late_ways(problems, before) if held and problems else WAYS_PAST_OUTLIERS
    waved = let_past(problems, screening, f"{hint} {WAY_BY_BASE}" if whole.guessed else hint)
    warnings = [f"{copy.client} {copy}. --drop-duplicates keeps the first." for copy in copies(clients, hashes, held)]
    return Findings(own, warnings, waved)


def let_past(problems: Sequence[Problem], screening: Screening, hint: str) -> list[str]:
    """What a ledger says of large updates that the user lets in; raises `RefusedError` unless the user does."""
    if problems and not screening.allow_outliers:
        raise RefusedError(problems, hint=hint)
    return [one_line(f"{each} (--allow-outliers)")[:LONGEST_LINE] for each in problems]


def read_all(
    clients: Mapping[str, Sketched], folders: Mapping[str, PeftFolder], threads: ThreadPoolExecutor
) -> dict[str, list[Problem]]:
    """Read, and so sketch, every update; the problems of each client that has any.

    Args:
        folders: the open folder of each client.
    """
    tasks = [(client, module) for client, adapter in clients.items() for module in adapter.specs]
    found: dict[str, list[Problem]] = {}
    for problem in over(threads, partial(_problem, clients), tasks):
        if problem is not None:
            found.setdefault(problem.client, []).append(problem)
    # Of a module, only the first tensor was named: who has one such is looked at whole.
    whole = {client: value_problems(client, folders[client].file, threads) for client in found}
    return {client: sorted({*first, *whole[client]}) for client, first in found.items()}


def _problem(clients: Mapping[str, Sketched], task: tuple[str, str]) -> Problem | None:
    client, module = task
    try:
        clients[client][module]
    except FileRefused as error:
        return Problem(client, error.field, error.reason)
    return None


def value_problems(client: str, file: SafetensorsFile, threads: ThreadPoolExecutor) -> list[Problem]:
    """Read a whole weights file: a problem of `client` for each tensor that holds NaN or infinity, or is cut short."""

    def problem_of(piece: tuple[str, int]) -> Problem | None:
        try:
            file.require_finite(*piece)
        except FileRefused as error:
            return Problem(client, error.field, error.reason)
        return None

    found = (problem for problem in over(threads, problem_of, file.pieces()) if problem is not None)
    return list(dict.fromkeys(found))


def copies(clients: Mapping[str, Sketched], hashes: Mapping[str, str], held: Held | None = None) -> list[Copy]:
    """Those whose weights file another one has too, or whose whole update has a cosine above 0.999 with another's.

    Args:
        clients: whose updates were read already; only where sketches are alike is anything read again.
        hashes: the sha256 of each weights file.
        held: clients that are in already, which come first.
    """
    held = held or Held()
    same = identical(hashes, held.hashes)
    rest = {client: clients[client] for client in clients if client not in {copy.client for copy in same}}
    perhaps = cosines(rest, above=PERHAPS_A_COPY)
    perhaps |= cosines_to_blocks(rest, list(held.updates), held.sketches, above=PERHAPS_A_COPY)
    alike = {client: rest.get(client) or held.updates[client] for pair in perhaps for client in pair}
    found = {**_without_factors(rest), **(_measured(alike, perhaps) if perhaps else {})}
    near = nearly_identical(list(rest), found, list(held.updates))
    return sorted([*same, *near], key=lambda copy: copy.client)


def _without_factors(clients: Mapping[str, Sketched]) -> dict[tuple[str, str], float]:
    """The cosine, 1, of those whose s B A is zero and whose values trained whole are equal: so whatever the base is."""
    still = sorted(client for client, each in clients.items() if not each.norm and trained_whole(each))
    values = {client: fingerprint(clients[client]) for client in still} if len(still) > 1 else {}
    return {(one, two): 1.0 for one, two in combinations(values, 2) if values[one] == values[two]}


def _measured(clients: Mapping[str, Adapter], perhaps: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], float]:
    """The cosine of each pair's updates, exactly; where they trained something whole, what it is at least.

    A value that was trained whole is no update without the base model, but how far it lies from another's is known:
    vectors of norms |a| and |b| that lie D apart have a cosine of at least 1 - D^2 / 2|a||b|, and |a| is at least the
    norm of its s B A. So who has another head is never called a copy for want of the base.
    """
    names = sorted(clients)
    federation = Federation([Client(name, 1.0, _LowRank(clients[name])) for name in names], float(len(names)))
    parts = {name: inner_products.of_module(federation.module(name), names) for name in federation.names}
    found, at = gram.total(names, [1.0] * len(names), parts), {name: index for index, name in enumerate(names)}
    cosines = {}
    for one, two in perhaps:
        pair = at[one], at[two]
        cosines[one, two] = float(found.cosines[pair])
        if any(trained_whole(clients[client]) for client in (one, two)):
            apart = float(found.distances[pair]) ** 2 + distance(clients[one], clients[two]) ** 2
            cosines[one, two] = 1 - apart / (2 * float(found.norms[[*pair]].prod()))
    return cosines


@dataclass(frozen=True)
class _LowRank:
    """The s B A of an adapter, without what it trained whole."""

    adapter: Adapter

    @property
    def specs(self) -> Mapping[str, Spec]:
        specs = self.adapter.specs.items()
        return {name: replace(spec, magnitude=False) for name, spec in specs if isinstance(spec, FactorsSpec)}

    def __getitem__(self, module: str) -> Update:
        update = self.adapter[module]
        assert isinstance(update, Factors)
        return replace(update, magnitude=None)


def norms(clients: Mapping[str, Sketched]) -> dict[str, float]:
    """The norm of each update that was read, as far as it can be measured."""
    return {client: norm for client, adapter in clients.items() if (norm := adapter.norm) is not None}

"""What stops a merge of strangers' adapters, and what only warns: counts, norms, copies. Facts in, problems out.

Counts and norms are never changed unasked: a stop names the ways on.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge.aggregation.apart import Whole
from lora_merge.aggregation.weights import IN_RANGE, is_in_range
from lora_merge.errors import Problem, UsageError, one_line

FEW_COUNTS, FEW_NORMS = 4, 3  # with fewer clients, none of them is an outlier
TIMES_MEDIAN = 5.0
COPY_COSINE = 0.999


@dataclass(frozen=True)
class Screening:
    """What the user said about adapters of people whom they don't know.

    Attributes:
        cap_examples: the most examples that a client counts for: a number, or `5x` for five times the median.
        allow_dominant: go on where one self-stated count is far above the others'.
        allow_outliers: go on where one update is far larger than the others.
        allow_list: a file of the sources that may take part (see `lora_merge.screening.selection.read_list`).
        exclude: sources or client ids, or patterns of them, that do not take part.
        drop_duplicates: of equal or nearly equal updates, keep who is in already, else the first by client id.
        skip_rejected: go on without the clients that are refused.
        allow_merged: take a merged adapter as one more client, its own clients being none.
    """

    cap_examples: str | float | None = None
    allow_dominant: bool = False
    allow_outliers: bool = False
    allow_list: str | Path | None = None
    exclude: Sequence[str] = ()
    drop_duplicates: bool = False
    skip_rejected: bool = False
    allow_merged: bool = False


SCREENED = Screening()


def cap_of(choice: str | float | None, counts: Sequence[float]) -> float | None:
    """The most examples that a client counts for; `5x` is five times the median of `counts`.

    Raises:
        UsageError: it is neither a number in range nor a multiple of the median.
    """
    if choice is None:
        return None
    text = str(choice)
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = 0.0
    if not is_in_range(number):
        forms = f"a number {IN_RANGE}, or a multiple of the median as in 5x"
        raise UsageError(f"--cap-examples must be {forms}; is {text!r:.40}.")
    return number * median_of(counts) if text.endswith("x") else number


def median_of(numbers: Sequence[float]) -> float:
    """The median of those above 0: a client of no examples, or of no update, says nothing of what is usual."""
    return statistics.median([number for number in numbers if number > 0] or [0.0])


def dominant(
    counts: Mapping[str, float],
    before: Mapping[str, float] | None = None,
    let_in: Collection[str] = (),
    *,
    stated: Mapping[str, float] | None = None,
) -> list[Problem]:
    """The clients whose count is above five times the median, or above half of the total; from four clients on.

    Args:
        before: counts of clients that are in already, which are judged anew: who came first had nobody beside him.
        let_in: those of them that the user let in knowingly.
        stated: what they state, where `counts` are what that is capped to.
    """
    usual = {**(before or {}), **counts}
    if len(usual) < FEW_COUNTS:
        return []
    median, total = median_of(list(usual.values())), sum(usual.values())
    found = []
    for client, count in usual.items():
        if client not in let_in and (count > TIMES_MEDIAN * median or count > total / 2):
            own = (stated or {}).get(client, count)
            said = f"states {own:g}{f' and counts as {count:g}' if own != count else ''}: "
            said += f"{count / median:.3g} times the median of {median:g}, {count / total:.0%} of all"
            found.append(Problem(client, "num_examples", said + _where(client, counts)))
    return found


def _where(client: str, arrivals: Collection[str]) -> str:
    return "" if client in arrivals else ", and is in already"


def let_in(waved_through: Sequence[str], stop: str, clients: Collection[str]) -> set[str]:
    """Those of `clients` who were let past the stop at `stop`, a problem's field, by what a ledger says."""
    return {c for c in clients if any(line.startswith(one_line(f"{c}: {stop}: ")) for line in waved_through)}


def ways_past_dominance(counts: Mapping[str, float]) -> str:
    """What to say after `dominant`: the largest cap that would do, and the other ways on."""
    cap = next((f"{k}x" for k in (5, 4, 3, 2, 1) if not dominant(_capped(counts, f"{k}x"))), "NUMBER")
    return (
        f"Count them for less: --cap-examples {cap} (of the median). Believe them: --allow-dominant. "
        "Or weigh the clients yourself: --weights uniform, or a file."
    )


def _capped(counts: Mapping[str, float], choice: str) -> dict[str, float]:
    cap = cap_of(choice, list(counts.values()))
    return {client: count if cap is None else min(count, cap) for client, count in counts.items()}


def outliers(
    norms: Mapping[str, float], before: Mapping[str, float] | None = None, let_in: Collection[str] = ()
) -> list[Problem]:
    """The clients whose update has a norm above five times the median; from three clients on.

    Args:
        before, let_in: as of `dominant`.
    """
    usual = {**(before or {}), **norms}
    median = median_of(list(usual.values()))
    if len(usual) < FEW_NORMS or not median:
        return []
    found = []
    for client, norm in usual.items():
        if client not in let_in and norm > TIMES_MEDIAN * median:
            said = f"has the norm {norm:.3g}: {norm / median:.3g} times the median of {median:.3g}"
            found.append(Problem(client, "update", said + _where(client, norms)))
    return found


def oversized(
    norms: Mapping[str, float], wholes: Mapping[str, Whole], before: Collection[str] = (), let_in: Collection[str] = ()
) -> list[Problem]:
    """The clients whose update is above five times the usual size only with what they trained whole.

    What is usual of a tensor is what the median client has moved it by, so nothing where most have not. From three
    clients on.

    Distances from the other clients leave out what all have moved alike, so whoever trained longer is farther from them
    than its size would say: by how much it did, its low-rank norm tells. (Five clients of 20 steps and one of 100: 3.7
    times their low-rank norm, and 6.5 times their distance.) So a hostile one that stays within five times the low-rank
    norm can be that many times farther away; beside the base it cannot.

    Args:
        norms: the low-rank norms of all clients.
        wholes: of each client that trained something whole, how much that is.
        before: those of them who are in already; let_in: as of `dominant`.
    """
    median = median_of(list(norms.values()))
    if len(norms) < FEW_NORMS:
        return []
    found = []
    for client, whole in wholes.items():
        norm = norms.get(client, 0.0)
        longer = max(1.0, norm / median) if median else 1.0
        usual = math.hypot(median, whole.usual, longer * whole.usual_apart)
        times = math.hypot(norm, whole.size) / usual if usual else 0.0
        if client not in let_in and times > TIMES_MEDIAN and norm <= TIMES_MEDIAN * median:  # else its norm stops
            said = f"is more than {_at_least(times):g} times as large as usual with what it trained whole, "
            said += f"most of all {' '.join(filter(None, whole.largest))}, which lies that far from {_others(whole)}"
            found.append(Problem(client, "update", said + _where(client, norms.keys() - before)))
    return found


def _others(whole: Whole) -> str:
    return "the base model's" if whole.from_base else "the nearer half of the other clients'"


def _at_least(times: float) -> float:
    """A round number below: an estimate's other digits say nothing."""
    return max(TIMES_MEDIAN, 10.0 ** math.floor(math.log10(min(times, 1e30))))


WAYS_PAST_OUTLIERS = (
    "Scale them down: --clip 3x (of the median norm). Leave them out: --exclude SOURCE. Let them in: --allow-outliers."
)
WAY_BY_BASE = "Or measure what was trained whole beside the base model: --base FOLDER."
_LATE_WAYS = {  # by the field of the problem
    "update": ("Let them in: --allow-outliers.", "--clip 3x scales large ones down."),
    "num_examples": (
        "Believe them: --allow-dominant.",
        "--cap-examples 4x (of the median) counts them for less.",
    ),
}


def late_ways(problems: Sequence[Problem], before: Collection[str]) -> str:
    """What to say of late arrivals after `outliers` or `dominant`: also how those who are in are taken out."""
    allow, anew = _LATE_WAYS[problems[0].field]
    named = {problem.client for problem in problems}
    inside = " ".join(f"--withdraw {one_line(client)}" for client in sorted(named & {*before}))
    ways = [allow, "Leave them out: --exclude SOURCE." if named - {*before} else ""]
    ways += [f"Take out who is in: {inside}." if inside else "", f"Or merge all clients anew without --onto: {anew}"]
    return " ".join(way for way in ways if way)


@dataclass(frozen=True)
class Copy:
    """`client` has the update of `of`, which comes first by id: the same file, or a cosine above 0.999."""

    client: str
    of: str
    cosine: float | None = None

    def __str__(self) -> str:
        if self.cosine is None:
            return one_line(f"has the same weights as {self.of}")
        return one_line(f"has nearly the update of {self.of} (cosine {self.cosine:.5f})")


def identical(hashes: Mapping[str, str], before: Mapping[str, str] | None = None) -> list[Copy]:
    """The clients whose weights file another one, first by id, has too.

    Args:
        before: the hashes of clients that are in already: they come first.
    """
    first = {sha256: client for client, sha256 in sorted((before or {}).items(), reverse=True)}
    kept = {client: first.setdefault(sha256, client) for client, sha256 in sorted(hashes.items())}
    return [Copy(client, other) for client, other in kept.items() if other != client]


def nearly_identical(
    clients: Sequence[str], cosines: Mapping[tuple[str, str], float], before: Sequence[str] = ()
) -> list[Copy]:
    """The clients whose update is nearly that of one that is kept: each is held against those before it by id.

    Args:
        cosines: of the pairs (earlier, later) that may be alike; of all others it is taken as small.
        before: clients that are in already: they come first.
    """
    kept = list(before)
    found: list[Copy] = []
    for client in sorted(clients):
        near = [(cosines.get((other, client), 0.0), other) for other in kept]
        cosine, other = max(near, default=(0.0, ""))
        if cosine > COPY_COSINE:
            found.append(Copy(client, other, cosine))
        else:
            kept.append(client)
    return found

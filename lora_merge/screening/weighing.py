"""The weight of each client of a federation, and the stop where one that states its own outweighs the others."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lora_merge.aggregation.weights import Weights, resolve_weights
from lora_merge.errors import RefusedError, UsageError, one_line
from lora_merge.screening.selection import Selection
from lora_merge.screening.stops import cap_of, dominant, late_ways, ways_past_dominance
from lora_merge.sources.reference import Candidate

_CAPPED = "examples, at most "


@dataclass(frozen=True)
class Weighed:
    """The weights n by client id, how they were come by in a word, and what would have stopped the merge."""

    n: Mapping[str, float]
    weighting: str
    waved_through: tuple[str, ...] = ()


def weighed(
    candidates: Mapping[str, Candidate],
    weights: Weights,
    selection: Selection,
    before: Mapping[str, float] | None = None,
    let_in: Collection[str] = (),
) -> Weighed:
    """The weight of each client; a weight may be given by id, by source, or by the source as the user wrote it.

    Whoever `selection` left out may have a weight too, which then counts for nothing.

    Args:
        before: what clients that are in already count for; they are judged with these.
        let_in: those of them that the user let in knowingly.

    Raises:
        UsageError: a weight is missing or wrong.
        RefusedError: a self-stated count is far above the others'. Weights that the user gives are never judged.
    """
    screening, gone = selection.screening, selection.gone
    stated = [each.description.statement for each in candidates.values()]
    counts = [statement.num_examples if statement else None for statement in stated]
    names = _names(candidates)
    here = {*candidates, *names}
    choice = weights if isinstance(weights, str) else {k: n for k, n in weights.items() if k in here or k not in gone}
    found = resolve_weights(list(candidates), counts, choice, names=names, before=(before or {}).values())
    n = dict(zip(candidates, found, strict=True))
    if weights != "examples":
        if screening.cap_examples is not None:
            raise UsageError("--cap-examples is of the clients' own counts; weights that you give are not touched.")
        return Weighed(n, weights if isinstance(weights, str) else "given")
    cap = cap_of(screening.cap_examples, [*(before or {}).values(), *n.values()])
    capped = {client: count if cap is None else min(count, cap) for client, count in n.items()}
    problems = dominant(capped, before, let_in, stated=n)
    if problems and not screening.allow_dominant:
        raise RefusedError(problems, hint=ways_past_dominance(n) if before is None else late_ways(problems, before))
    waved = tuple(one_line(f"{problem} (--allow-dominant)") for problem in problems)
    return Weighed(capped, "examples" if cap is None else capped_by(cap), waved)


def capped_by(cap: float) -> str:
    """What a ledger calls a weighting by examples that are capped."""
    return f"{_CAPPED}{int(cap) if cap.is_integer() else repr(cap)} each"


def cap_in(weighting: str) -> float | None:
    """The cap that a weighting names; None where it names none."""
    text = weighting.removeprefix(_CAPPED).removesuffix(" each")
    try:
        cap = float(text)
    except ValueError:
        return None
    return cap if 0 < cap < math.inf and weighting == capped_by(cap) else None


def _names(candidates: Mapping[str, Candidate]) -> dict[str, str]:
    given = [candidate.ref.given for candidate in candidates.values()]
    names: dict[str, str] = {}
    for client, candidate in candidates.items():
        ref = candidate.ref
        names |= {ref.given: client} if given.count(ref.given) == 1 else {}
        names |= {ref.source: client, ref.place: client}
    return names

"""Whether the records of a merge say what it was: each held against those of the same merge made again.

What only whoever merged can know is not judged: whom it left out and waved through, what its parent was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_merge.ledger import FILE_NAME as LEDGER_NAME
from lora_merge.ledger import Certificate, Contribution, Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock
from lora_merge.screening.weighing import cap_in

CLOSE = 1e-6  # relative, of shares and norms: another CPU may round them otherwise
ERRORS_APART = 0.05  # relative, of a certificate's errors; and so many standard errors of estimates:
SPREADS, ROUNDING = 6, 1e-6

_OF_A_LOCK = ("method", "options", "global_lr", "dtype", "base_model")
_OF_A_LEDGER = (*_OF_A_LOCK, "total_weight", "ranks", "forms", "clip_norm")
_OF_A_CLIENT = ("commit", "weight", "share", "num_examples", "sha256", "merged_share", "clipped_to")


def lock_untruths(published: Lock, again: Lock) -> list[str]:
    """What a lock says that the merge by it did not come to."""
    return list(_untruths(LOCK_NAME, vars(published), vars(again), _OF_A_LOCK))


def ledger_untruths(published: Ledger, again: Ledger, lock: Lock) -> list[str]:
    """What a ledger says that the merge made again, or its lock, says otherwise."""
    mine = {each.client_id: vars(each) for each in published.contributions}
    theirs = {each.client_id: vars(each) for each in again.contributions}
    found = [*_untruths(LEDGER_NAME, vars(published), vars(again), _OF_A_LEDGER)]
    found += [f"{LEDGER_NAME}: {client} is not in the merge" for client in sorted(mine.keys() - theirs.keys())]
    found += [f"{LEDGER_NAME}: {client} is missing" for client in sorted(theirs.keys() - mine.keys())]
    for client in sorted(mine.keys() & theirs.keys()):
        found += _untruths(f"{LEDGER_NAME}: {client}", mine[client], theirs[client], _OF_A_CLIENT)
    if published.weighting != lock.weighting or not _is_by(published.weighting, again.contributions):
        shown = {each.client_id: each.weight for each in again.contributions[:5]}
        found.append(f"{LEDGER_NAME}: weighting is {published.weighting}, in {LOCK_NAME} {lock.weighting}: {shown}")
    return found + list(_certificate(published.certificate, again.certificate))


def _is_by(weighting: str, contributions: Sequence[Contribution]) -> bool:
    """Whether the weights are what a weighting gives; of weights that somebody gave there is nothing to be known."""
    if weighting == "uniform":
        return len({each.weight for each in contributions}) == 1
    cap = math.inf if weighting == "examples" else cap_in(weighting)
    counts = [each.num_examples for each in contributions]
    return cap is None or [each.weight for each in contributions] == [n and min(n, cap) for n in counts]


def _untruths(where: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if not _same(mine[name], theirs[name]):
            yield f"{where}: {name} is {_shown(mine[name])}, made again {_shown(theirs[name])}"


def _certificate(mine: Certificate, theirs: Certificate) -> Iterator[str]:
    for name in ("whole", "fedavg_would_miss"):
        one, two = getattr(mine, name), getattr(theirs, name)
        if one is None or two is None:  # not measured, then or now
            continue
        spread = max(one.get("standard_error", 0.0), two.get("standard_error", 0.0))
        apart = abs(one["relative_error"] - two["relative_error"])
        if not apart <= ERRORS_APART * two["relative_error"] + SPREADS * spread + ROUNDING:
            yield f"{LEDGER_NAME}: certificate.{name} is {_shown(one)}, made again {_shown(two)}"


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) or isinstance(theirs, float):
        return isinstance(mine, (int, float)) and isinstance(theirs, (int, float)) and _close(mine, theirs)
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return bool(mine == theirs)


def _close(mine: float, theirs: float) -> bool:
    return math.isclose(mine, theirs, rel_tol=CLOSE)


def _shown(value: Any) -> str:
    return str(value)[:80]

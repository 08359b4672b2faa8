"""The robust rule of a merge: from the clients' Gram matrix to a federation of other weights, and into the record."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from lora_merge.aggregation.certificate import relative_error
from lora_merge.aggregation.coordinates import Coordinates
from lora_merge.aggregation.robust import TRIM, Reweighed, Robust, RobustError, reweigh
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.planned import Measured, Settings
from lora_merge.checkpoint.similarity import gram_of
from lora_merge.errors import UsageError
from lora_merge.ledger import Contribution, Ledger
from lora_merge.sources.reference import Progress


@dataclass(frozen=True)
class Defended:
    """A federation as a rule weighs it, the settings with the rule, and what the rule did where it weighs."""

    federation: Federation
    settings: Settings
    reweighed: Reweighed | None = None


def defended(
    federation: Federation, settings: Settings, robust: Robust, threads: ThreadPoolExecutor, progress: Progress
) -> Defended:
    """The federation by the rule's weights. The weight that clipping takes away is nobody's.

    Raises:
        UsageError: the clients are too few for the rule.
        RefusedError: a tensor is refused.
    """
    reweighed = None
    if robust.weighs:
        with progress("Comparing", len(federation.names), "modules") as advance:
            found = gram_of(federation, threads, advance)
        assert not found.not_measured, found.not_measured  # the base was asked for
        try:
            reweighed = reweigh(found, robust)
        except RobustError as error:
            raise UsageError(str(error), hint="Use --robust geometric-median, or fewer --byzantine.") from error
    if robust.by_coordinate:
        scales = dict(zip(reweighed.clients, reweighed.scales, strict=True)) if reweighed else {}
        trim = None if robust.rule == "median" else TRIM if robust.trim is None else robust.trim
        return Defended(federation, replace(settings, rule=Coordinates(trim, scales)), reweighed)
    if reweighed is None:
        return Defended(federation, settings)
    weighed = zip(federation.clients, reweighed.weights, strict=True)
    clients = [replace(client, n=n) for client, n in weighed if n > 0]
    return Defended(replace(federation, clients=clients, total=reweighed.total), settings, reweighed)


def with_defence(ledger: Ledger, result: Defended, measured: Sequence[Measured]) -> Ledger:
    """The record, with what the rule did to each client, and how far that is from the weighted mean."""
    reweighed = result.reweighed
    moved = _from_mean(measured)
    if reweighed is None:
        return replace(ledger, from_mean=moved)
    clipped = dict(zip(reweighed.clients, reweighed.scales, strict=True))
    shares = {client.id: client.n / result.federation.total for client in result.federation.clients}
    rules = result.settings.rule is None
    contributions = [
        _told(each, clipped.get(each.client_id), shares.get(each.client_id, 0.0) if rules else None)
        for each in ledger.contributions
    ]
    if result.settings.aims_at_mean:
        moved = {"relative_error": _rounded(reweighed.moved)}
    elif result.settings.rule is None:
        moved = None  # ties and dare were held against the mean by the rule's weights; whom it dropped is read no more
    limit = None if reweighed.limit is None else _rounded(reweighed.limit)
    return replace(ledger, contributions=contributions, clip_norm=limit, from_mean=moved)


def _told(each: Contribution, scale: float | None, share: float | None) -> Contribution:
    return replace(
        each,
        clipped_to=None if scale is None or scale == 1 else _rounded(scale),
        merged_share=None if share is None else _rounded(share),
    )


def _from_mean(measured: Iterable[Measured]) -> dict[str, float] | None:
    relative = relative_error(each.from_mean for each in measured if each.from_mean is not None)
    return None if relative is None else relative.to_json()


def _rounded(value: float) -> float:
    """Six digits: the last bits of a Gram matrix differ between machines."""
    return float(f"{value:.6g}")

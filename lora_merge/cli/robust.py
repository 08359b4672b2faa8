"""The options that bound what hostile clients can do to a merge, or leave entries out; and what they did, shown."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.errors import UsageError

if TYPE_CHECKING:
    from lora_merge.ledger import Ledger

ClipOption = Annotated[
    str | None,
    typer.Option(
        metavar="3x|NUMBER|off", help="Scale larger updates down to this norm, or multiple of the median one."
    ),
]
RobustOption = Annotated[
    str | None, typer.Option(help="geometric-median, krum, multi-krum, median or trimmed-mean, in place of the mean.")
]
ByzantineOption = Annotated[
    int | None, typer.Option(metavar="F", help="Of krum and multi-krum: the hostile clients to withstand.")
]
TrimOption = Annotated[
    float | None, typer.Option(help="Of trimmed-mean: the share of the weight to take off each end.  [default: 0.1]")
]
DensityOption = Annotated[
    float | None, typer.Option(help="Of ties and dare: the share of entries kept.  [default: 0.2 and 0.5]")
]
SeedOption = Annotated[int | None, typer.Option(help="Of all that is random.  [default: 0]")]


def rules_of(
    clip: str | None,
    robust: str | None,
    byzantine: int | None,
    trim: float | None,
    density: float | None,
    seed: int | None,
    *,
    onto: str | None,
) -> dict[str, Any]:
    """The options together, as `lora_merge.pipeline.aggregate` takes them.

    Raises:
        UsageError: one of them is given for a fold, which is the mean of all that came before.
    """
    rules = {"clip": clip if clip != "off" else None, "robust": robust, "byzantine": byzantine, "trim": trim}
    others = {"density": density, "seed": seed}
    if onto is not None:
        _require_none(rules | others)
        return {}
    from lora_merge.aggregation.robust import robust_of

    return {"robust": robust_of(rules), **{name: value for name, value in others.items() if value is not None}}


def robust_rows(ledger: "Ledger") -> Iterator[tuple[str, str]]:
    """What a rule did, for people: whom it clipped, whose weight it changed, how far from the mean that is."""
    contributions = ledger.contributions
    rule = ledger.options.get("robust")
    if ledger.clip_norm is not None:
        clipped = [f"{c.client_id} (to {c.clipped_to:.3g} of it)" for c in contributions if c.clipped_to is not None]
        yield "clipped", f"above the norm {ledger.clip_norm:.3g}: {', '.join(clipped) or 'nobody'}"
    weighed = [(c.client_id, c.merged_share) for c in contributions if c.merged_share is not None]
    if rule and weighed:
        kept = ", ".join(f"{client} ({share:.1%})" for client, share in weighed if share > 0)
        gone = ", ".join(client for client, share in weighed if share == 0)
        yield "robust", f"{rule}: {kept}" + (f"; dropped: {gone}" if gone else "")
    elif rule:
        yield "robust", f"{rule}, entry by entry"
    if ledger.from_mean is not None:
        yield "aimed at", ledger.aim
        yield "from the mean", f"{ledger.from_mean['relative_error']:.2%} of its norm away"


def _require_none(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"--{name} does not go with --onto: it needs all clients at once.",
                hint="Leave --onto out and name all sources.",
            )

"""`lora-merge aggregate --dry-run`: what would be read, and how it would be weighted."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_merge.cli.output import Output, plain
from lora_merge.cli.sizes import size_text
from lora_merge.cli.sources import source_of

if TYPE_CHECKING:
    from rich.console import Group

    from lora_merge.forecast import Forecast
    from lora_merge.screening.stops import Screening

UNJUDGED = (
    "No tensor was read: updates that are far too large, copies and NaN show when it merges, or in lora-merge inspect."
)


def show_forecast(
    out: Output, sources: list[str], weights: Any, workers: int | None, max_wait: float, screening: "Screening"
) -> None:
    """Print the forecast of a merge; nothing is written."""
    from lora_merge.forecast import forecast
    from lora_merge.intake import Reading

    reading = Reading(max_wait, out.say)
    found = forecast(sources, weights=weights, workers=workers, reading=reading, screening=screening)
    for warning in found.warnings:
        out.warn(warning)
    out.say(UNJUDGED)
    made = [source_of(client.place, client.commit) for client in found.clients]
    out.result(asdict(found), made=made, show=lambda: _forecast_table(found))


def _forecast_table(found: "Forecast") -> "Group":
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("client", "source", "commit", "examples", "weight", "share", "size", "to download"):
        table.add_column(name)
    for each in found.clients:
        examples = "" if each.num_examples is None else str(each.num_examples)
        row = (each.client_id, each.place, (each.commit or "")[:12], examples, f"{each.weight:g}", f"{each.share:.1%}")
        table.add_row(*map(plain, row), size_text(each.size), size_text(each.to_download))
    size, missing = (sum(numbers) for numbers in zip(*((c.size, c.to_download) for c in found.clients), strict=True))
    table.add_row(f"{len(found.clients)} clients", *[""] * 5, size_text(size), size_text(missing))
    return Group(table, plain(f"memory: about {size_text(found.memory)}"))

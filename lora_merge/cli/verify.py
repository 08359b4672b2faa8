"""`lora-merge verify`: is a published merge what its lock says?"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.verify import Verification

SHOWN = 10


def verify(
    target: Annotated[str, typer.Argument(help="A merged adapter: a folder or a repository.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="Where inputs lie that came from folders; repositories are found.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Only identical bytes will do.")] = False,
    base: Annotated[str | None, typer.Option(help="The base model, where the merge needs it.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Modules merged at a time.  [default: CPUs]")] = None,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a published merge again from its pinned inputs, and compare: identical, equivalent or different.

    Example: lora-merge verify org/global
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(), waiting_at_most(max_wait):
        from lora_merge.intake import Reading
        from lora_merge.verify import verify as run

        found = run(
            target,
            cast("list[str | Path]", sources or []),
            base=base,
            workers=workers,
            reading=Reading(max_wait, out.say, out.progress),
        )
        if found.surplus:
            count = len(found.surplus)
            out.say(f"{count} of the adapters given {'are' if count > 1 else 'is'} not in the merge, and left aside.")
        out.result(asdict(found), made=found.verdict, show=lambda: _table(found))
        if found.verdict == "different" or (strict and found.verdict != "identical"):
            raise typer.Exit(8)


def _table(found: "Verification") -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(found):
        table.add_row(name, plain(value))
    return table


def _rows(found: "Verification") -> Iterator[tuple[str, Any]]:
    yield "verdict", found.verdict
    yield "merge", f"{found.target}, of {found.inputs} inputs"
    if found.relative_error:
        yield "relative error", f"{found.relative_error:.1e}"
    if found.note:
        yield "device", found.note
    for name, (then, here) in found.environment.items():
        yield "environment", f"{name} was {then}, here {here}"
    for reason in found.reasons[:SHOWN]:
        yield "differs", reason
    if len(found.reasons) > SHOWN:
        yield "differs", f"and {len(found.reasons) - SHOWN} more (--json lists all of them)"

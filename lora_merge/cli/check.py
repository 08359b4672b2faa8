"""`lora-merge check`: what push and aggregate would say of one adapter."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.inspection.check import Checked


def check(
    source: Annotated[str, typer.Argument(metavar="DIR|REPO", help="An adapter: a folder, ORG/NAME or a URL.")],
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what push and aggregate would say of one adapter: all that they would refuse or warn of, at once.

    Exit code 3 where either would refuse it.

    Example: lora-merge check my-adapter
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(), waiting_at_most(max_wait):
        from lora_merge.inspection.check import check as run
        from lora_merge.intake import Reading

        found = run(source, Reading(max_wait, out.say, out.progress))
        for warning in found.warnings:
            out.warn(warning)
        verdict = "refused" if found.refusals else "accepted"
        out.result({"verdict": verdict, **asdict(found)}, made=verdict, show=lambda: _table(found, verdict))
        if found.refusals:
            raise typer.Exit(3)


def _table(found: "Checked", verdict: str) -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(found, verdict):
        table.add_row(name, plain(value))
    return table


def _rows(found: "Checked", verdict: str) -> Iterator[tuple[str, str]]:
    yield "verdict", verdict
    yield "adapter", f"{found.place}@{found.commit}" if found.commit else found.place
    merged = f"of {found.merged_of} client{'s' * (found.merged_of != 1)}; others come in by --onto"
    facts = {
        "client": found.client_id,
        "merged adapter": None if found.merged_of is None else merged,
        "examples": found.num_examples,
        "base model": found.base_model,
        "modules": found.modules,
        "norm": found.norm,
    }
    yield from ((name, str(value)) for name, value in facts.items() if value is not None)
    for refusal in found.refusals:
        yield f"refused by {' and '.join(refusal.by)}", f"{refusal.field}: {refusal.reason}"
    if found.hint:
        yield "hint", found.hint
    if found.left_out:
        yield "push leaves out", ", ".join(found.left_out)

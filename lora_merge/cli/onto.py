"""The options `--onto` and `--withdraw` of `lora-merge aggregate`, and how a fold is shown."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.forecast import UNJUDGED
from lora_merge.cli.output import Output, plain
from lora_merge.cli.push import may_publish, publish_result, push_record, push_summary
from lora_merge.cli.sizes import size_text
from lora_merge.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.folding.onto import Fold, FoldPlan
    from lora_merge.ledger import Ledger

OntoOption = Annotated[
    str | None,
    typer.Option(
        "--onto",
        metavar="GLOBAL",
        help="Bring what is new into this global adapter, made where there is none: a folder, or a repository, which "
        "gets a commit. How it was made holds, in place of the defaults here.",
    ),
]
WithdrawOption = Annotated[
    list[str] | None,
    typer.Option("--withdraw", metavar="CLIENT", help="Of --onto: take this one out; may be repeated."),
]


def run_fold(
    out: Output,
    sources: list[str],
    onto: str,
    output: Path | None,
    options: Mapping[str, Any],
    *,
    publish_to: tuple[str | None, bool | None, bool],
    rows: "Callable[[Ledger], Iterator[tuple[str, str]]]",
) -> None:
    """Fold, publish, and show it. `options` are those of `lora_merge.folding.onto.fold`; `publish_to` is of --push."""
    push, private, create_pr = publish_to
    max_wait = options["max_wait"]
    if push and output is None:
        raise UsageError("--push with --onto needs --output: a repository that is folded onto is published to anyhow.")
    own = private if push is None and not create_pr else None  # of the repository that --onto names
    target = may_publish(out, push, None if own is not None else private, create_pr, max_wait)
    started = time.monotonic()
    from lora_merge.folding.onto import fold

    result = fold(sources, onto, output=output, private=own, tell=out.say, progress=out.progress, **options)
    for warning in result.warnings:
        out.warn(warning)
    if result.again:
        out.say(f"All clients were merged again: {result.again}.")
    seconds = time.monotonic() - started
    pushed = publish_result(out, output, target, max_wait) if output else None
    pushed = pushed or result.published
    record = _as_json(result, seconds) | push_record(pushed)
    made = pushed.published.commit if pushed and not output else str(result.output)
    is_copy = not result.changed and result.output == output and output != Path(onto)
    unchanged = f"{output} is a copy of {onto}." if is_copy else f"{result.output} is as it was."
    out.result(record, made=made, show=lambda: _table(result, unchanged, seconds, rows, push_summary(pushed)))


def show_plan(out: Output, sources: list[str], onto: str, options: Mapping[str, Any]) -> None:
    """Print what a fold would do; nothing is written. `options` are those of `lora_merge.folding.onto.fold`."""
    from dataclasses import asdict

    from lora_merge.folding.onto import plan

    unread = ("base", "device", "certificate", "workers", "force")  # of the merge itself
    found = plan(sources, onto, tell=out.say, **{name: value for name, value in options.items() if name not in unread})
    for warning in found.warnings:
        out.warn(warning)
    out.say(UNJUDGED)
    out.result(asdict(found), made=[*found.added, *found.replaced], show=lambda: _plan_table(found))


def _plan_table(found: "FoldPlan") -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("onto", plain(found.onto))
    for title, clients in (
        ("in already", found.known),
        ("to withdraw", found.withdrawn),
        ("to replace", found.replaced),
    ):
        if clients:
            table.add_row(title, plain(", ".join(clients)))
    if found.weights:
        new = (f"{client} (weight {n:g})" for client, n in found.weights.items() if client not in found.replaced)
        table.add_row("to add", plain(", ".join(new) or "nobody"))
    if not (found.weights or found.withdrawn or found.again):
        table.add_row("nothing new", "nothing would be written")
    else:
        table.add_row("how", plain(f"all files again: {found.again}" if found.again else "by what is stored"))
    if found.gone:
        table.add_row("not there", plain(found.gone))
    table.add_row("to download", size_text(found.to_download))
    return table


def _as_json(result: "Fold", seconds: float) -> dict[str, Any]:
    import json

    ledger = json.loads(result.ledger.to_json())
    del ledger["schema_version"]
    fields = ("added", "replaced", "withdrawn", "again", "warnings", "changed")
    folded = {name: getattr(result, name) for name in fields}
    return {"output": str(result.output), "seconds": round(seconds, 3), **folded, **ledger}


def _table(
    result: "Fold",
    unchanged: str,
    seconds: float,
    rows: "Callable[[Ledger], Iterator[tuple[str, str]]]",
    published: str,
) -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    if not result.changed:
        table.add_row("nothing new", plain(unchanged))
        if published:
            table.add_row("published", plain(published.strip()))
        return table
    title = "global adapter" if result.ledger.parent else "new global adapter"  # a slip in a name makes one too
    table.add_row(title, plain(f"{result.output}  ({seconds:.1f} s)"))
    for name in ("added", "replaced", "withdrawn"):
        if clients := getattr(result, name):
            table.add_row(name, plain(", ".join(clients)))
    for name, value in rows(result.ledger):
        if name == "fedavg would miss" and result.ledger.certificate.fedavg_would_miss is None:
            continue  # a fold has only one side of that comparison at hand
        table.add_row(name, plain(value))
    if published:
        table.add_row("published", plain(published.strip()))
    return table

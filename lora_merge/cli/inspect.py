"""`lora-merge inspect`: what is there, before it is merged."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lora_merge.cli.heat_map import heat_map, shades
from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain, printable
from lora_merge.cli.screening import AllowListOption, ExcludeOption
from lora_merge.cli.sizes import size_text
from lora_merge.cli.sources import source_of, sources_of
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from lora_merge.inspection.inspected import Inspected, Inspection

LONGEST_NAME = 20


def inspect(
    sources: Annotated[
        list[str], typer.Argument(help="Folders, ORG/NAME, 'ORG/PATTERN-*', URLs, or - for ids on standard input.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or cached id, where sizes depend on it.")
    ] = None,
    allow_list: AllowListOption = None,
    exclude: ExcludeOption = None,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Look at adapters before merging them: facts, norms, cosines, influence, copies.

    What was trained whole, or with DoRA, has a size only beside the base model: --base, or where aggregate reads it.
    Exit code 3 where `aggregate` would refuse one of them or stop at it; the table is printed all the same.

    Example: lora-merge inspect 'org/client-*'
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(), waiting_at_most(max_wait):
        from lora_merge.inspection.inspect import inspect as run
        from lora_merge.intake import Reading
        from lora_merge.screening.stops import Screening

        screening = Screening(allow_list=allow_list, exclude=tuple(exclude or ()))
        reading = Reading(max_wait, out.say, out.progress)
        named = cast("list[str | Path]", sources_of(sources))
        found = run(named, screening=screening, reading=reading, base=base)
        for warning in found.warnings:
            out.warn(warning)
        made = [source_of(client.place, client.commit) for client in found.clients if not client.stops]
        out.result({**asdict(found), "would_stop": found.would_stop}, made=made, show=lambda: _shown(found))
        if found.would_stop:
            raise typer.Exit(3)


def _shown(found: "Inspection") -> "Group":
    from rich.console import Group

    if not found.clients:
        return Group(_facts(found), plain("\n".join(["", *_left_out(found)])))
    names = _short([client.client_id for client in found.clients])
    lines = ["", *heat_map(names, found.cosines, shades(sys.stdout.encoding)), *_findings(found)]
    return Group(_facts(found), plain(""), _table(found, names), plain("\n".join(lines)))


def _facts(found: "Inspection") -> "Table":
    """What all clients have in common, or how many of them have what."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, values in _common(found.clients):
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        one = len(counts) == 1
        said = ", ".join(value if one else f"{value} ({count})" for value, count in list(counts.items())[:4])
        table.add_row(name, plain(said + (", ..." if len(counts) > 4 else "")))
    return table


def _common(clients: Sequence["Inspected"]) -> Iterator[tuple[str, list[str]]]:
    yield "clients", [str(len(clients))]
    if not clients:
        return
    yield (
        "base model",
        [f"{c.base_model or 'not named'}{f'@{c.base_commit[:12]}' if c.base_commit else ''}" for c in clients],
    )
    yield "its weights", [c.base_sha256[:12] if c.base_sha256 else "no hash stated" for c in clients]
    yield "recipe", [c.recipe[:12] if c.recipe else "none stated" for c in clients]
    yield "rank", [_range(c.ranks) for c in clients]
    yield "scaling", [_range(c.scalings) for c in clients]
    yield "modules", [_modules(c) for c in clients]


def _modules(client: "Inspected") -> str:
    whole = f" and {client.full_tensors} trained whole" if client.full_tensors else ""
    return f"{len(client.modules)}{whole}"


def _range(numbers: Sequence[float]) -> str:
    if not numbers:
        return "none"
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def _table(found: "Inspection", names: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("client")
    for name in ("examples", "size", "norm", "to mean", "leaving out", "top", "rank"):
        table.add_column(name, justify="right")
    for name, client in zip(names, found.clients, strict=True):
        examples = "" if client.num_examples is None else str(client.num_examples)
        numbers = (_percent(client.influence), _percent(client.top_share), _number(client.effective_rank, ".1f"))
        row = (_number(client.norm, ".3g"), _number(client.cosine_to_mean, ".2f"), *numbers)
        table.add_row(plain(name), plain(examples), size_text(client.size), *row)
    return table


def _findings(found: "Inspection") -> Iterator[str]:
    yield ""
    yield "to mean: cosine to the weighted mean; leaving out: how far it then moves"
    yield "top: the largest singular values' share of norm^2; rank: effective, by module"
    if found.not_measured:
        yield f"not measured, for want of the base model: {_few(found.not_measured)}"
    for client in found.clients:
        yield from (f"stops the merge: {printable(client.client_id)}: {reason}" for reason in client.stops)
    yield from _left_out(found)
    flags: dict[str, list[str]] = {}
    for client in found.clients:
        for flag in client.flags:
            flags.setdefault(flag, []).append(client.client_id)
    yield from (f"{_few(clients)}: {flag}" for flag, clients in flags.items())


def _left_out(found: "Inspection") -> Iterator[str]:
    yield from (f"left out: {each.source}: {each.reason}" for each in found.left_out)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(names: Sequence[str]) -> list[str]:
    """Names of one line and few columns: their ends, which tell clients of one owner apart."""
    plain_names = [printable(name).replace("\n", " ") for name in names]
    return [name if len(name) <= LONGEST_NAME else f"..{name[2 - LONGEST_NAME :]}" for name in plain_names]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

"""`lora-merge aggregate`: the merge."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.push import (
    CreatePrOption,
    PrivateOption,
    PushOption,
    may_publish,
    publish_result,
    push_record,
    push_summary,
)
from lora_merge.cli.screening import (
    AllowDominantOption,
    AllowListOption,
    AllowOutliersOption,
    CapExamplesOption,
    DropDuplicatesOption,
    ExcludeOption,
    SkipRejectedOption,
    screening_of,
)
from lora_merge.cli.sizes import size_text
from lora_merge.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.forecast import Forecast, ForecastClient
    from lora_merge.pipeline import Aggregation
    from lora_merge.screening import Screening


def aggregate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders, ORG/NAME, 'ORG/PATTERN-*' (also @REVISION), URLs, or - for ids on standard input."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write the global adapter to.")
    ] = None,
    method: Annotated[str, typer.Option(help="exact, svd, fedavg or ffa.")] = "exact",
    rank: Annotated[str | None, typer.Option(help="Of svd: a number, auto or lossless.  [default: auto]")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Of --rank auto: the share of the squared norm to keep.  [default: 0.99]")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="examples, uniform, or a JSON or YAML file: client or source to number.")
    ] = "examples",
    weight: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE=NUMBER", help="One client's weight; give one for each.")
    ] = None,
    global_lr: Annotated[float, typer.Option(help="The global learning rate: a factor on the mean update.")] = 1.0,
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or cached id, where the mean depends on it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the written tensors: fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    certificate: Annotated[
        str | None, typer.Option(help="exact, probes or off.  [default: exact where the ranks sum to 1024 or less]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Modules merged at a time; the bytes stay the same.  [default: CPUs]")
    ] = None,
    cap_examples: CapExamplesOption = None,
    allow_dominant: AllowDominantOption = False,
    allow_outliers: AllowOutliersOption = False,
    allow_list: AllowListOption = None,
    drop_duplicates: DropDuplicatesOption = False,
    exclude: ExcludeOption = None,
    skip_rejected: SkipRejectedOption = False,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds that a call may wait for a busy Hub.")] = 300,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be read and how it would be weighted; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --output.")] = False,
    push: PushOption = None,
    private: PrivateOption = None,
    create_pr: CreatePrOption = False,
    lock: Annotated[
        Path | None, typer.Option(help="Read repositories at the commits that this lock pins, and write it anew.")
    ] = None,
    locked: Annotated[
        bool, typer.Option("--locked", help="Change nothing of the lock (of --lock, or --output's): else exit 8.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge adapters that were fine-tuned apart into one global adapter.

    Example: lora-merge aggregate 'org/client-*' --output global
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(resume="Run the same command again: what is whole is not downloaded again."):
        chosen = _weights(weights, weight or [])
        named = list(_named(sources))
        screening = screening_of(
            cap_examples, allow_dominant, allow_outliers, allow_list, drop_duplicates, exclude, skip_rejected
        )
        if dry_run:
            _dry_run(out, named, chosen, workers, max_wait, screening)
            return
        if output is None:
            raise UsageError("Missing option '--output' / '-o' (or --dry-run).", hint="lora-merge --help")
        target = may_publish(out, push, private, create_pr, max_wait)
        started = time.monotonic()
        from lora_merge.checkpoint.merge import CertificateMode
        from lora_merge.pipeline import aggregate as run

        result = run(
            named,
            output,
            method=method,
            rank=_rank(rank),
            energy=energy,
            weights=chosen,
            global_lr=global_lr,
            base=base,
            dtype=dtype,
            device=device,
            certificate=cast("CertificateMode | None", certificate),
            workers=workers,
            force=force,
            lock=lock,
            locked=locked,
            screening=screening,
            max_wait=max_wait,
            tell=out.say,
            progress=out.progress,
        )
        for warning in result.warnings:
            out.warn(warning)
        seconds = time.monotonic() - started
        pushed = publish_result(out, output, target, max_wait)
        record = _as_json(result, seconds) | push_record(pushed)
        out.result(record, made=str(output), show=lambda: _table(result, seconds, push_summary(pushed)))


def _named(sources: list[str]) -> Iterator[str]:
    """The sources, with the lines of standard input in the place of `-`."""
    for source in sources:
        if source != "-":
            yield source
            continue
        lines = [line for text in sys.stdin.read().splitlines() if (line := text.strip()) and not line.startswith("#")]
        if not lines:
            raise NotFoundError("Standard input names no adapter.", hint="One source a line.")
        yield from lines


def _dry_run(
    out: Output, sources: list[str], weights: Any, workers: int | None, max_wait: float, screening: "Screening"
) -> None:
    from lora_merge.forecast import forecast
    from lora_merge.intake import Reading

    reading = Reading(max_wait, out.say)
    found = forecast(sources, weights=weights, workers=workers, reading=reading, screening=screening)
    for warning in found.warnings:
        out.warn(warning)
    out.result(asdict(found), made="\n".join(_pin(c) for c in found.clients), show=lambda: _forecast_table(found))


def _pin(client: "ForecastClient") -> str:
    return f"{client.source}@{client.commit}" if client.commit else client.source


def _forecast_table(found: "Forecast") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("client", "source", "commit", "examples", "weight", "share", "size", "to download"):
        table.add_column(name)
    for each in found.clients:
        examples = "" if each.num_examples is None else str(each.num_examples)
        row = (each.client_id, each.source, each.commit or "", examples, f"{each.weight:g}", f"{each.share:.1%}")
        table.add_row(*map(plain, row), size_text(each.size), size_text(each.to_download))
    size, missing = (sum(numbers) for numbers in zip(*((c.size, c.to_download) for c in found.clients), strict=True))
    table.add_row(f"{len(found.clients)} clients", *[""] * 5, size_text(size), size_text(missing))
    table.add_row("memory", f"about {size_text(found.memory)}")
    return table


def _rank(rank: str | None) -> Any:
    return int(rank) if rank is not None and re.fullmatch("[0-9]{1,9}", rank) else rank


def _weights(choice: str, single: list[str]) -> Any:
    """`examples`, `uniform`, or a mapping from a file and from single weights."""
    given: dict[str, float] = {}
    if choice not in ("examples", "uniform"):
        given |= _weights_file(Path(choice))
    for entry in single:
        source, equals, number = entry.rpartition("=")
        try:
            given[source] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--weight must be SOURCE=NUMBER, is {entry!r}.")
    if single and choice == "uniform":
        raise UsageError("--weights uniform and --weight exclude each other.")
    return given or choice


def _weights_file(path: Path) -> dict[str, float]:
    if not path.is_file():
        hint = "--weights takes examples, uniform, or the path of a JSON or YAML file."
        raise NotFoundError(f"No such weights file: {path}.", hint=hint)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            import yaml

            data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # each parser has its own errors
        raise UsageError(f"{path} cannot be read as weights: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not data:
        raise UsageError(f"{path} must be a mapping from client or source to number.")
    return {str(name): number for name, number in data.items()}


def _as_json(result: "Aggregation", seconds: float) -> dict[str, Any]:
    ledger = json.loads(result.ledger.to_json())
    del ledger["schema_version"]
    return {"output": str(result.output), "seconds": round(seconds, 3), "warnings": list(result.warnings), **ledger}


def _table(result: "Aggregation", seconds: float, published: str = "") -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(result, seconds):
        table.add_row(name, plain(value))
    if published:
        table.add_row("published", plain(published.strip()))
    return table


def _rows(result: "Aggregation", seconds: float) -> Iterator[tuple[str, str]]:
    ledger = result.ledger
    yield "global adapter", f"{result.output}  ({seconds:.1f} s)"
    yield "clients", ", ".join(f"{c.client_id} ({c.share:.1%})" for c in ledger.contributions)
    if ledger.left_out:
        yield "left out", ", ".join(each.source for each in ledger.left_out)
    for line in ledger.waved_through:
        yield "let in", line
    yield "method", f"{ledger.method}, weights by {ledger.weighting}"
    yield "rank", ", ".join(map(str, ledger.ranks)) or "none"
    yield "certificate", ledger.certificate.sentence()
    if ledger.certificate.not_measured:
        yield "not measured", ", ".join(ledger.certificate.not_measured)
    if ledger.method == "exact" and ledger.certificate.measured_by != "off":
        yield "fedavg would miss", ledger.certificate.gap_sentence()

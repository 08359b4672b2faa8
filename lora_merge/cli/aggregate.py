"""`lora-merge aggregate`: the merge."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.forecast import show_forecast
from lora_merge.cli.onto import OntoOption, WithdrawOption, run_fold, show_plan
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
from lora_merge.cli.robust import (
    ByzantineOption,
    ClipOption,
    DensityOption,
    RobustOption,
    SeedOption,
    TrimOption,
    robust_rows,
    rules_of,
)
from lora_merge.cli.screening import (
    AllowDominantOption,
    AllowListOption,
    AllowMergedOption,
    AllowOutliersOption,
    CapExamplesOption,
    DropDuplicatesOption,
    ExcludeOption,
    SkipRejectedOption,
    screening_of,
)
from lora_merge.cli.settings_file import without_those_typed_over
from lora_merge.cli.sources import sources_of
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.cli.weights import weights_given
from lora_merge.errors import UsageError
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.ledger import Ledger
    from lora_merge.pipeline import Aggregation


MANY_RANKS = 4
# What a shell completes, written out: the registries that hold them load torch.
METHODS = ("exact", "svd", "fedavg", "ffa", "ties", "dare")
DTYPES = ("fp32", "bf16", "fp16")


def aggregate(
    context: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, ORG/NAME, 'ORG/PATTERN-*' (also @REVISION), URLs, or - for ids on standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The folder to write the global adapter to.  [required, but for --dry-run and --onto]",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="exact, svd, fedavg, ffa, ties or dare.  [default: exact]", autocompletion=lambda: METHODS),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Of svd, ties, dare: a number, auto or lossless.  [default: auto]")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Of --rank auto: the share of the squared norm to keep.  [default: 0.99]")
    ] = None,
    density: DensityOption = None,
    seed: SeedOption = None,
    clip: ClipOption = None,
    robust: RobustOption = None,
    byzantine: ByzantineOption = None,
    trim: TrimOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="examples, uniform, or a JSON or YAML file: client or source to number.  [default: examples]"
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE=NUMBER", help="One client's, over --weights FILE; may be repeated."),
    ] = None,
    global_lr: Annotated[
        float | None, typer.Option(help="The global learning rate: a factor on the mean update.  [default: 1]")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or cached id, where the mean depends on it.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the written tensors: fp32, bf16 or fp16.  [default: fp32]", autocompletion=lambda: DTYPES
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    certificate: Annotated[
        str | None,
        typer.Option(
            help="exact, probes or off.  [default: exact where the ranks sum to 1024 or less, probes for --onto stacks]"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Modules merged at a time; the bytes stay the same.  [default: CPUs]")
    ] = None,
    onto: OntoOption = None,
    withdraw: WithdrawOption = None,
    cap_examples: CapExamplesOption = None,
    allow_dominant: AllowDominantOption = False,
    allow_outliers: AllowOutliersOption = False,
    allow_list: AllowListOption = None,
    drop_duplicates: DropDuplicatesOption = False,
    exclude: ExcludeOption = None,
    skip_rejected: SkipRejectedOption = False,
    allow_merged: AllowMergedOption = False,
    max_wait: MaxWaitOption = MAX_WAIT,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be read and how it would be weighted; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the merged adapter that is at --output.")] = False,
    push: PushOption = None,
    private: PrivateOption = None,
    create_pr: CreatePrOption = False,
    lock: Annotated[
        Path | None,
        typer.Option(
            help="Read repositories at the commits that this lock pins, and write it anew, or for the first time."
        ),
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
    with (
        out.reporting(resume="Run the same command again: what is whole is not downloaded again."),
        waiting_at_most(max_wait),
    ):
        parts = {"weights": weights, "weight": weight, "rank": rank, "energy": energy, "density": density}
        of = without_those_typed_over(context, parts | {"byzantine": byzantine, "trim": trim})
        chosen = weights_given(of["weights"], of["weight"] or [])
        named = sources_of(sources)
        screening = screening_of(
            cap_examples,
            allow_dominant,
            allow_outliers,
            allow_list,
            drop_duplicates,
            exclude,
            skip_rejected,
            allow_merged,
        )
        options: dict[str, Any] = {
            "method": method,
            "rank": _rank(of["rank"]),
            "energy": of["energy"],
            "weights": chosen,
            "global_lr": global_lr,
            "dtype": dtype,
        }
        options = {name: value for name, value in options.items() if value is not None} | {
            "base": base,
            "device": device,
            "certificate": certificate,
            "workers": workers,
            "force": force,
            "screening": screening,
            "max_wait": max_wait,
            **rules_of(clip, robust, of["byzantine"], of["trim"], of["density"], seed, onto=onto),
        }
        if onto is not None:
            _require_no_lock(lock, locked)
            options["withdraw"] = withdraw or []
            if dry_run:
                show_plan(out, named, onto, options)
                return
            run_fold(out, named, onto, output, options, publish_to=(push, private, create_pr), rows=_record_rows)
            return
        if withdraw:
            raise UsageError("--withdraw takes a client out of a global adapter.", hint="Name it with --onto GLOBAL.")
        if not named:
            raise UsageError("Missing argument 'SOURCES...'.", hint="lora-merge aggregate --help")
        if dry_run:
            show_forecast(out, named, chosen or "examples", workers, max_wait, screening)
            return
        if output is None:
            raise UsageError("Missing option '--output' / '-o' (or --dry-run).", hint="lora-merge aggregate --help")
        target = may_publish(out, push, private, create_pr, max_wait)
        started = time.monotonic()
        from lora_merge.pipeline import aggregate as run

        result = run(named, output, lock=lock, locked=locked, tell=out.say, progress=out.progress, **options)
        for warning in result.warnings:
            out.warn(warning)
        seconds = time.monotonic() - started
        pushed = publish_result(out, output, target, max_wait)
        record = _as_json(result, seconds) | push_record(pushed)
        out.result(record, made=str(output), show=lambda: _table(result, seconds, push_summary(pushed)))


def _require_no_lock(lock: Path | None, locked: bool) -> None:
    for name, given in (("--lock", lock), ("--locked", locked)):
        if given:
            hint = "The global adapter's own lock pins who is in it; arrivals are pinned as they come in."
            raise UsageError(f"{name} does not go with --onto.", hint=hint)


def _rank(rank: str | None) -> Any:
    return int(rank) if rank is not None and re.fullmatch("[0-9]{1,9}", rank) else rank


def ranks_shown(ranks: Sequence[int]) -> str:
    """Those of all modules: a few by name, many as a range."""
    if len(ranks) > MANY_RANKS:
        return f"{min(ranks)} to {max(ranks)}, by module"
    return ", ".join(map(str, ranks)) or "none"


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
    yield "global adapter", f"{result.output}  ({seconds:.1f} s)"
    yield from _record_rows(result.ledger)


def _record_rows(ledger: "Ledger") -> Iterator[tuple[str, str]]:
    yield "clients", ", ".join(f"{c.client_id} ({c.share:.1%})" for c in ledger.contributions)
    if ledger.left_out:
        yield "left out", ", ".join(each.source for each in ledger.left_out)
    for line in ledger.waved_through:
        yield "let in", line
    weighting = "as given" if ledger.weighting == "given" else f"by {ledger.weighting}"
    slower = f", global learning rate {ledger.global_lr:g}" if ledger.global_lr != 1 else ""
    yield "method", f"{ledger.method}, weights {weighting}{slower}"
    yield "rank", ranks_shown(ledger.ranks)
    yield from robust_rows(ledger)
    yield "certificate", ledger.certificate.sentence()
    if ledger.certificate.not_measured:
        yield "not measured", ", ".join(ledger.certificate.not_measured)
    if ledger.method == "exact" and ledger.certificate.measured_by != "off":
        yield "fedavg would miss", ledger.certificate.gap_sentence()

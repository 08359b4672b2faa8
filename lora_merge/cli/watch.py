"""`lora-merge watch`: fold each arrival as it appears."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.aggregate import DTYPES
from lora_merge.cli.evaluate import PromptForm
from lora_merge.cli.output import DebugOption, Output, QuietOption
from lora_merge.cli.push import PrivateOption
from lora_merge.cli.screening import (
    AllowDominantOption,
    AllowListOption,
    AllowOutliersOption,
    DropDuplicatesOption,
    ExcludeOption,
)
from lora_merge.cli.settings_file import without_those_typed_over
from lora_merge.cli.sources import require_no_standard_input, sources_of
from lora_merge.cli.tally import Tally, columns_of, end, show
from lora_merge.errors import RefusedError, UsageError
from lora_merge.hub.waiting import MAX_WAIT

if TYPE_CHECKING:
    from lora_merge.intake import Reading
    from lora_merge.watching.scores import Scores

FOLDED = ("exact", "svd", "fedavg", "ffa")  # the methods that arrivals can be folded by
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def watch(
    context: typer.Context,
    sources: Annotated[list[str], typer.Argument(help="ORG/NAME, 'ORG/PATTERN-*', folders and globs of them, URLs.")],
    onto: Annotated[
        str, typer.Option("--onto", metavar="GLOBAL", help="The global adapter: a folder, or a repository.")
    ],
    until: Annotated[int | None, typer.Option(min=1, metavar="N", help="End when N clients are in.")] = None,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="End after this time: 90s, 30m, 8h or 2d.")
    ] = None,
    interval: Annotated[
        float, typer.Option(help="Seconds between two looks; doubled while nothing comes, up to ten minutes.")
    ] = 15.0,
    data: Annotated[
        str | None, typer.Option(help="Held-out rows: measure the global adapter after each arrival.")
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(help="The file of the measurements.  [default: GLOBAL.curve.jsonl beside it, or here]"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder, or a repository id.  [default: the one it names]")
    ] = None,
    prompt_form: Annotated[
        PromptForm | None, typer.Option(help="Of --data; default: the one that the clients state, else plain.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Of --data: tokens of a row, prompt and answer.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Of --data: measure on so many of its rows.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="exact, svd, fedavg or ffa.  [default: as it was made, or exact]", autocompletion=lambda: FOLDED
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of svd.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="RULE", help="examples or uniform.  [default: as it was made, or examples]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the written tensors: fp32, bf16 or fp16.  [default: as it was made, or fp32]",
            autocompletion=lambda: DTYPES,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Modules merged at a time.  [default: CPUs]")] = None,
    cap_examples: Annotated[
        float | None, typer.Option(metavar="N", help="Count no client for more examples.  [default: as it was made]")
    ] = None,
    allow_dominant: AllowDominantOption = False,
    allow_outliers: AllowOutliersOption = False,
    allow_list: AllowListOption = None,
    drop_duplicates: DropDuplicatesOption = False,
    exclude: ExcludeOption = None,
    private: PrivateOption = None,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a busy Hub, at each look.")] = MAX_WAIT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line; also on failure.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Bring each client's update into the global adapter as it appears, one at a time, and publish it.

    It remembers nothing but what the global adapter's own ledger says: stop it at any moment, and start it again.
    Several may watch for one global adapter. --json prints one object a line: started, arrival, refused, end.
    Exit code 3 where there is no global adapter at the end, since whatever arrived was refused.

    Example: lora-merge watch 'org/client-*' --onto org/global --until 20
    """
    out = Output(as_json, quiet, debug, lines=True)
    with out.reporting(resume="The same command goes on: what is in is in."):
        require_no_standard_input(sources)
        seconds = None if duration is None else seconds_of(duration)
        from lora_merge.intake import Reading
        from lora_merge.screening.stops import Screening
        from lora_merge.watching.sight import place_of
        from lora_merge.watching.watch import watch as run

        reading = Reading(max_wait, out.say, out.progress)
        place = place_of(onto)
        chosen = {"base": base, "prompt_form": prompt_form, "max_length": max_length, "limit": limit, "device": device}
        if curve and not data:
            raise UsageError("--curve holds what is measured on --data FILE.", hint="Add --data.")
        if curve and data:
            _require_apart(curve, sources, [data, *([base] if base else [])])
        scores = _scores(data, curve, place.name, chosen, reading) if data else None
        rank = without_those_typed_over(context, {"rank": rank})["rank"]
        options = {"method": method, "rank": rank, "weights": weights, "base": base, "dtype": dtype, "device": device}
        events = run(
            sources_of(sources),
            onto,
            until=until,
            seconds=seconds,
            interval=interval,
            screening=Screening(
                cap_examples=cap_examples,
                allow_dominant=allow_dominant,
                allow_outliers=allow_outliers,
                allow_list=allow_list,
                drop_duplicates=drop_duplicates,
                exclude=tuple(exclude or ()),
            ),
            private=private,
            options={**options, "workers": workers},
            reading=reading,
            wait=lambda pause: _wait(out, pause),
        )
        columns = columns_of(out.columns, measured=scores is not None, on_hub=place.on_hub)
        tally = Tally(place.name, time.monotonic(), str(scores.path) if scores else None, columns)
        try:
            for event in events:
                show(out, event, tally, scores)
        except KeyboardInterrupt:
            end(out, tally, "interrupted")
            raise
        end(out, tally, tally.stopped)
        if tally.refused and not tally.clients:
            raise typer.Exit(RefusedError.exit_code)


def seconds_of(duration: str) -> float:
    """The seconds of `90s`, `30m`, `8h` or `2d`.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", duration)
    if not found or not float(found[1]):
        raise UsageError(f"--for must be a time such as 90s, 30m, 8h or 2d, is {duration!r}.")
    return float(found[1]) * _UNITS[found[2]]


def _require_apart(curve: Path, sources: list[str], read: list[str]) -> None:
    """Raise `UsageError` where the curve would be written into what is read."""
    from lora_merge.checkpoint.overwriting import require_apart
    from lora_merge.sources.local import folders_named

    # Of the sources, folders: `clients/*` also matches a curve that lies in clients/, which is nobody's adapter.
    clients = [path for path in folders_named(sources) if path.is_dir()]
    require_apart(curve, [*clients, *folders_named(read)], "--curve")


def _scores(data: str, curve: Path | None, place: str, chosen: Mapping[str, Any], reading: "Reading") -> "Scores":
    from lora_merge.evaluation.comparison import Question
    from lora_merge.watching.curve import curve_path
    from lora_merge.watching.scores import Scores

    form = chosen["prompt_form"].value if chosen["prompt_form"] else None
    rest = {**chosen, "base": chosen["base"] or "", "prompt_form": form}
    question = Question(adapters=(), data=data, max_wait=reading.max_wait, **rest)
    return Scores(question, curve or curve_path(place), reading)


def _wait(out: Output, pause: float) -> None:
    """Sleep; on a terminal, say until when."""
    with out.progress("Waiting for arrivals", None):
        time.sleep(pause)

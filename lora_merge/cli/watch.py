"""`lora-merge watch`: fold each arrival as it appears."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.aggregate import DTYPES
from lora_merge.cli.evaluate import PromptForm
from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.push import MAX_WAIT, MaxWaitOption, PrivateOption
from lora_merge.cli.screening import (
    AllowDominantOption,
    AllowListOption,
    AllowOutliersOption,
    DropDuplicatesOption,
    ExcludeOption,
)
from lora_merge.cli.settings_file import without_those_typed_over
from lora_merge.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.intake import Reading
    from lora_merge.watching.events import Arrival, Event, Refusal, Started, Stopped
    from lora_merge.watching.scores import Scores

FOLDED = ("exact", "svd", "fedavg", "ffa")  # the methods that arrivals can be folded by
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COLUMNS = "{:>7}  {:<24}  {:<8}  {:>9}  {:<23}  {:<19}  {}"
_TITLES = ("clients", "arrived", "", "examples", "loss, nats a token", "perplexity", "global adapter")


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
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Bring each client's update into the global adapter as it appears, one at a time, and publish it.

    It remembers nothing but what the global adapter's own ledger says: stop it at any moment, and start it again.
    Several may watch for one global adapter. --json prints one object a line: started, arrival, refused, end.

    Example: lora-merge watch 'org/client-*' --onto org/global --until 20
    """
    out = Output(as_json, quiet, debug, lines=True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the library's own, across our table
    with out.reporting(resume="The same command goes on: what is in is in."):
        seconds = None if duration is None else seconds_of(duration)
        from lora_merge.intake import Reading
        from lora_merge.screening.stops import Screening
        from lora_merge.watching.sight import place_of
        from lora_merge.watching.watch import watch as run

        reading = Reading(max_wait, out.say, out.progress)
        place = place_of(onto).name
        chosen = {"base": base, "prompt_form": prompt_form, "max_length": max_length, "limit": limit, "device": device}
        scores = _scores(data, curve, place, chosen, reading) if data else None
        if curve and not data:
            raise UsageError("--curve holds what is measured on --data FILE.", hint="Add --data.")
        rank = without_those_typed_over(context, {"rank": rank})["rank"]
        options = {"method": method, "rank": rank, "weights": weights, "base": base, "dtype": dtype, "device": device}
        events = run(
            sources,
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
        tally = _Tally(place, time.monotonic(), str(scores.path) if scores else None)
        try:
            for event in events:
                _show(out, event, tally, scores)
        except KeyboardInterrupt:
            _end(out, tally, "interrupted")
            raise
        _end(out, tally, tally.stopped)


def seconds_of(duration: str) -> float:
    """The seconds of `90s`, `30m`, `8h` or `2d`.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", duration)
    if not found or not float(found[1]):
        raise UsageError(f"--for must be a time such as 90s, 30m, 8h or 2d, is {duration!r}.")
    return float(found[1]) * _UNITS[found[2]]


@dataclass
class _Tally:
    """What has happened so far, for the end."""

    place: str
    began: float
    curve: str | None
    stopped: str = "interrupted"
    commit: str | None = None
    clients: int = 0
    added: int = 0
    replaced: int = 0
    conflicts: int = 0
    refused: dict[str, "Refusal"] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def record(self, stopped: str) -> dict[str, Any]:
        """What ``--json`` prints at the end."""
        return {
            "event": "end",
            "stopped": stopped,
            "global": self.place,
            "commit": self.commit,
            "clients": self.clients,
            "added": self.added,
            "replaced": self.replaced,
            "conflicts": self.conflicts,
            "refused": [_refused(each) for each in self.refused.values()],
            "curve": self.curve,
            "seconds": round(time.monotonic() - self.began, 3),
        }


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


def _show(out: Output, event: "Event", tally: _Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.events import Arrival, Conflict, Refusal, Started, Stopped

    if isinstance(event, Started):
        _started(out, event, tally, scores)
    elif isinstance(event, Arrival):
        _arrived(out, event, tally, scores)
    elif isinstance(event, Refusal):
        tally.refused[event.source] = event
        out.event(_refused(event), _COLUMNS.format(tally.clients, event.source, "refused", "", event.reason, "", ""))
    elif isinstance(event, Conflict):
        tally.conflicts += 1
        out.say(f"{event.reason} Looking again.")
    elif isinstance(event, Stopped):
        tally.stopped = event.why
        _seen(tally, event)


def _started(out: Output, event: "Started", tally: _Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.curve import examples_of

    _seen(tally, event)
    if out.is_seen:
        out.event({}, _COLUMNS.format(*_TITLES))
    examples = examples_of(event.ledger) if event.ledger else 0
    record = {"event": "started", "global": event.place, "commit": event.commit, "clients": tally.clients}
    measured = list(scores.of(tally.place, event)) if scores else []
    score = _score(measured)
    out.event({**record, "examples": examples, **score}, _line(tally.clients, "", "", examples, score, event.commit))


def _arrived(out: Output, event: "Arrival", tally: _Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.curve import examples_of

    _seen(tally, event)
    tally.refused.pop(event.source, None)
    tally.added, tally.replaced = tally.added + (not event.replaced), tally.replaced + event.replaced
    for warning in event.warnings:
        if (kind := _kind(warning, event)) not in tally.warned:
            tally.warned.add(kind)
            out.warn(warning)
    if event.again:
        out.say(f"All clients were merged again: {event.again}.")
    examples = examples_of(event.ledger)
    record = {
        "event": "arrival",
        "client": event.client,
        "source": event.source,
        "source_commit": event.commit,
        "replaced": event.replaced,
        "global": tally.place,
        "commit": event.made,
        "clients": tally.clients,
        "examples": examples,
        "merged_again": event.again,
        "seconds": round(event.seconds, 3),
    }
    score = _score(list(scores.of(tally.place, event)) if scores else [])
    what = "replaced" if event.replaced else "added"
    out.event({**record, **score}, _line(tally.clients, event.client, what, examples, score, event.made))


def _kind(warning: str, event: "Arrival") -> str:
    """A warning without the clients that it names: of many clients the same is said after every arrival."""
    for each in event.ledger.contributions:
        warning = warning.replace(each.client_id, "")
    return re.sub("[^a-z]", "", warning)


def _seen(tally: _Tally, event: "Started | Arrival | Stopped") -> None:
    commit: str | None = getattr(event, "made", None) or getattr(event, "commit", None)
    tally.clients = len(event.ledger.contributions) if event.ledger else 0
    tally.commit = commit


def _refused(event: "Refusal") -> dict[str, Any]:
    about = {"event": "refused", "source": event.source, "source_commit": event.commit}
    return {**about, "reason": event.reason, "hint": event.hint}


def _score(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The measurement of the global adapter, without those before it."""
    return {name: measured[-1][name] for name in ("loss", "perplexity")} if measured else {}


def _line(clients: int, client: str, what: str, examples: int | None, score: Mapping[str, Any], at: str | None) -> str:
    loss, perplexity = (_cell(score.get(name), digits) for name, digits in (("loss", 3), ("perplexity", 2)))
    count = "" if examples is None else f"{examples:,}"
    return _COLUMNS.format(clients, client, what, count, loss, perplexity, (at or "")[:12])


def _cell(numbers: Mapping[str, float] | None, digits: int) -> str:
    if not numbers:
        return ""
    return f"{numbers['value']:.{digits}f} [{numbers['low']:.{digits}f}, {numbers['high']:.{digits}f}]"


def _end(out: Output, tally: _Tally, stopped: str) -> None:
    out.result(tally.record(stopped), made=tally.commit or tally.place, show=lambda: _table(tally, stopped))


def _table(tally: _Tally, stopped: str) -> "Table":
    from rich.table import Table

    why = {"clients": "as many clients are in as were asked for", "time": "the time is over"}.get(stopped, stopped)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("global adapter", plain(f"{tally.place}{f'@{tally.commit}' if tally.commit else ''}"))
    table.add_row(
        "clients", plain(f"{tally.clients} ({tally.added} added and {tally.replaced} replaced by this watch)")
    )
    table.add_row("conflicts", plain(tally.conflicts))
    for each in tally.refused.values():
        table.add_row("refused", plain(f"{each.source}: {each.reason}"))
    if tally.curve:
        table.add_row("curve", plain(tally.curve))
    table.add_row("ended", plain(why))
    return table

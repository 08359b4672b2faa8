"""How a watch is shown: a line for each event as it happens, and what has happened in all at the end."""

import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.cli.evaluate import with_interval
from lora_merge.cli.output import Output, plain
from lora_merge.errors import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.watching.events import Arrival, Event, Refusal, Started, Stopped
    from lora_merge.watching.scores import Scores

_WIDTHS = {"clients": 7, "arrived": 24, "": 8, "examples": 9, "loss, nats a token": 21, "perplexity": 20, "commit": 12}
_TO_THE_RIGHT = ("clients", "examples")
_GIVEN_UP = ("perplexity", "commit", "examples")  # on a narrow terminal, in this order
_SHORTEST = 12  # letters of a client's name, while there is a column to give up


@dataclass(frozen=True)
class Columns:
    """What is shown of each event: the columns by title, each with its width; and how long a name and a line may be."""

    widths: Mapping[str, int]
    longest_name: int
    room: int

    def line(self, cells: Mapping[str, object]) -> str:
        """One line of `cells` by title; without those of the last columns, it ends earlier."""
        named = {**cells, "arrived": _shortened(str(cells["arrived"]), self.longest_name)}
        return "  ".join(
            f"{named[title]!s:{'>' if title in _TO_THE_RIGHT else '<'}{width}}"
            for title, width in self.widths.items()
            if title in named
        )


def columns_of(room: int, *, measured: bool, on_hub: bool) -> Columns:
    """The columns of a watch that hold anything, and fit into a line of `room`."""
    empty = [*(() if measured else ("loss, nats a token", "perplexity")), *(() if on_hub else ("commit",))]
    widths = {title: width for title, width in _WIDTHS.items() if title not in empty}

    def left() -> int:
        return room - sum(2 + width for title, width in widths.items() if title != "arrived")

    for title in _GIVEN_UP:
        if left() < _SHORTEST:
            widths.pop(title, None)
    longest = max(left(), len("arrived"))
    return Columns({**widths, "arrived": min(widths["arrived"], longest)}, longest, room)


def _shortened(name: str, longest: int) -> str:
    """The end of a name that is too long: it tells clients of one owner apart."""
    return name if len(name) <= longest else f"..{name[2 - longest :]}"


@dataclass
class Tally:
    """What has happened so far, for the end."""

    place: str
    began: float
    curve: str | None
    columns: Columns
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


def show(out: Output, event: "Event", tally: Tally, scores: "Scores | None") -> None:
    """One event as it happens: a line of the table, and an object of ``--json``."""
    from lora_merge.watching.events import Arrival, Conflict, Refusal, Started, Stopped

    if isinstance(event, Started):
        _started(out, event, tally, scores)
    elif isinstance(event, Arrival):
        _arrived(out, event, tally, scores)
    elif isinstance(event, Refusal):
        tally.refused[event.source] = event
        out.event(_refused(event), *_refusal(event, tally))
    elif isinstance(event, Conflict):
        tally.conflicts += 1
        out.say(f"{event.reason} Looking again.")
    elif isinstance(event, Stopped):
        tally.stopped = event.why
        _seen(tally, event)


def _started(out: Output, event: "Started", tally: Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.curve import examples_of

    _seen(tally, event)
    examples = examples_of(event.ledger) if event.ledger else 0
    record = {"event": "started", "global": event.place, "commit": event.commit, "clients": tally.clients}
    score = _score(list(scores.of(tally.place, event)) if scores else [])
    titles = tally.columns.line({title: title for title in _WIDTHS})
    out.event({**record, "examples": examples, **score}, titles, _line(tally, "", "", examples, score))


def _arrived(out: Output, event: "Arrival", tally: Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.curve import examples_of

    _seen(tally, event)
    tally.refused.pop(event.source, None)
    tally.added, tally.replaced = tally.added + (not event.replaced), tally.replaced + event.replaced
    for warning in event.warnings:
        # What is said of the arrival itself is news; what is said of all is said after every arrival.
        kind = warning if warning.startswith((f"{event.client} ", f"{event.source} ")) else _kind(warning, event)
        if kind not in tally.warned:
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
        "warnings": list(event.warnings),
        "seconds": round(event.seconds, 3),
    }
    score = _score(list(scores.of(tally.place, event)) if scores else [])
    what = "replaced" if event.replaced else "added"
    out.event({**record, **score}, _line(tally, event.client, what, examples, score))


def _kind(warning: str, event: "Arrival") -> str:
    """A warning without the clients that it names."""
    for each in event.ledger.contributions:
        warning = warning.replace(each.client_id, "")
    return re.sub("[^a-z]", "", warning)


def _seen(tally: Tally, event: "Started | Arrival | Stopped") -> None:
    commit: str | None = getattr(event, "made", None) or getattr(event, "commit", None)
    tally.clients = len(event.ledger.contributions) if event.ledger else 0
    tally.commit = commit


def _refused(event: "Refusal") -> dict[str, Any]:
    about = {"event": "refused", "source": event.source, "source_commit": event.commit}
    return {**about, "reason": event.reason, "hint": event.hint}


def _score(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The measurement of the global adapter, without those before it."""
    return {name: measured[-1][name] for name in ("loss", "perplexity")} if measured else {}


def _line(tally: Tally, client: str, what: str, examples: int | None, score: Mapping[str, Any]) -> str:
    return tally.columns.line(
        {
            "clients": tally.clients,
            "arrived": one_line(client),
            "": what,
            "examples": "" if examples is None else f"{examples:,}",
            "loss, nats a token": _cell(score.get("loss"), 3),
            "perplexity": _cell(score.get("perplexity"), 2),
            "commit": (tally.commit or "")[:12],
        }
    )


def _refusal(event: "Refusal", tally: Tally) -> list[str]:
    """A line that goes on below where it is too long for a terminal: what to do is not to be cut."""
    head = tally.columns.line({"clients": tally.clients, "arrived": one_line(event.source), "": "refused"})
    said = one_line(f"{event.reason.removesuffix('.')}. {event.hint}" if event.hint else event.reason)
    indent = " " * (_WIDTHS["clients"] + 2)
    return textwrap.wrap(f"{head}  {said}", tally.columns.room, subsequent_indent=indent, break_on_hyphens=False)


def _cell(numbers: Mapping[str, float] | None, digits: int) -> str:
    return with_interval(numbers, digits, 2) if numbers else ""


def end(out: Output, tally: Tally, stopped: str) -> None:
    """The end of the watch: all that has happened, counted."""
    made = (tally.commit or tally.place) if tally.clients else []
    out.result(tally.record(stopped), made=made, show=lambda: _table(tally, stopped))


def _table(tally: Tally, stopped: str) -> "Table":
    from rich.table import Table

    why = {"clients": "as many clients are in as were asked for", "time": "the time is over"}.get(stopped, stopped)
    table = Table(show_header=False, box=None, pad_edge=False)
    made = f"{tally.place}{f'@{tally.commit}' if tally.commit else ''}" if tally.clients else "none"
    table.add_row("global adapter", plain(made))
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

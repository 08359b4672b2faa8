"""How a watch is shown: a line for each event as it happens, and what has happened in all at the end."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.cli.output import Output, plain

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.watching.events import Arrival, Event, Refusal, Started, Stopped
    from lora_merge.watching.scores import Scores

_COLUMNS = "{:>7}  {:<24}  {:<8}  {:>9}  {:<23}  {:<19}  {}"
_TITLES = ("clients", "arrived", "", "examples", "loss, nats a token", "perplexity", "global adapter")


@dataclass
class Tally:
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


def show(out: Output, event: "Event", tally: Tally, scores: "Scores | None") -> None:
    """One event as it happens: a line of the table, and an object of ``--json``."""
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


def _started(out: Output, event: "Started", tally: Tally, scores: "Scores | None") -> None:
    from lora_merge.watching.curve import examples_of

    _seen(tally, event)
    if out.is_seen:
        out.event({}, _COLUMNS.format(*_TITLES))
    examples = examples_of(event.ledger) if event.ledger else 0
    record = {"event": "started", "global": event.place, "commit": event.commit, "clients": tally.clients}
    measured = list(scores.of(tally.place, event)) if scores else []
    score = _score(measured)
    out.event({**record, "examples": examples, **score}, _line(tally.clients, "", "", examples, score, event.commit))


def _arrived(out: Output, event: "Arrival", tally: Tally, scores: "Scores | None") -> None:
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


def _line(clients: int, client: str, what: str, examples: int | None, score: Mapping[str, Any], at: str | None) -> str:
    loss, perplexity = (_cell(score.get(name), digits) for name, digits in (("loss", 3), ("perplexity", 2)))
    count = "" if examples is None else f"{examples:,}"
    return _COLUMNS.format(clients, client, what, count, loss, perplexity, (at or "")[:12])


def _cell(numbers: Mapping[str, float] | None, digits: int) -> str:
    if not numbers:
        return ""
    return f"{numbers['value']:.{digits}f} [{numbers['low']:.{digits}f}, {numbers['high']:.{digits}f}]"


def end(out: Output, tally: Tally, stopped: str) -> None:
    """The end of the watch: all that has happened, counted."""
    out.result(tally.record(stopped), made=tally.commit or tally.place, show=lambda: _table(tally, stopped))


def _table(tally: Tally, stopped: str) -> "Table":
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

"""Watching: whoever arrives comes in, one at a time and once, whatever fails, stops or is killed in between."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_merge import aggregate, fold
from lora_merge.errors import ConflictError, NetworkError, NotFoundError, RefusedError, UsageError
from lora_merge.evaluation.comparison import Question, compare
from lora_merge.evaluation.models import silent
from lora_merge.intake import Reading
from lora_merge.screening.stops import Screening
from lora_merge.watching import curve
from lora_merge.watching import watcher as watching
from lora_merge.watching.events import Arrival, Conflict, Event, Refusal, Started, Stopped
from lora_merge.watching.pace import Pace
from lora_merge.watching.scores import Scores
from lora_merge.watching.watch import watch
from tests.adapters import edited
from tests.cli.running import Run, lora_merge
from tests.conftest import digests
from tests.evaluation.conftest import client_on, held_out
from tests.hub.client import Client
from tests.hub.fixture import hub, running_hub
from tests.hub.server import LocalHub
from tests.publish.conftest import COMMAND
from tests.sources.federation import adapter, write
from tests.test_crash import environment
from tests.training.conftest import base
from tests.watchers import bench

__all__ = ["base", "held_out", "hub", "lora_merge", "running_hub"]  # fixtures

SAME = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")


def client(folder: Path, number: int, **changes: Any) -> Path:
    """The folder of client `number`, written whole."""
    return write(folder / f"client-{number}", adapter(f"org/client-{number}", seed=number, **changes))


@dataclass
class Clock:
    """Time that passes only while somebody waits; `then` says what happens meanwhile, by the number of the wait."""

    then: dict[int, Callable[[], object]] = field(default_factory=dict)
    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.then.get(len(self.waits), lambda: None)()


@dataclass
class Watcher:
    """A watch of `clients/*` onto `global`, in a folder of its own, under a clock of its own."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def __call__(self, clock: Clock | None = None, **options: Any) -> list[Event]:
        return list(self.events(clock, **options))

    def events(self, clock: Clock | None = None, **options: Any) -> Iterator[Event]:
        clock = clock or Clock()
        given: dict[str, Any] = {"seconds": 100.0, "interval": 10.0, "reading": Reading(tell=self.told.append)}
        sources = [str(self.clients / "*")]
        return watch(sources, self.onto, wait=clock.wait, clock=lambda: clock.now, **{**given, **options})

    @property
    def clients(self) -> Path:
        return self.folder / "clients"

    @property
    def onto(self) -> Path:
        return self.folder / "global"

    @property
    def members(self) -> list[str]:
        return [each["client_id"] for each in json.loads((self.onto / "aggregation.json").read_text())["contributions"]]

    def is_one_merge(self) -> bool:
        """Whether the global adapter has the bytes of one merge of the clients."""
        one = self.folder / "one"
        aggregate(sorted(self.clients.iterdir()), one, screening=None, force=True)
        return all(digests(one)[name] == digests(self.onto)[name] for name in SAME)


@pytest.fixture
def watcher(tmp_path: Path) -> Watcher:
    (tmp_path / "clients").mkdir()
    return Watcher(tmp_path)


def arrivals(events: list[Event]) -> list[tuple[str, int]]:
    """Who came in, and how many were in then."""
    return [(each.client, len(each.ledger.contributions)) for each in events if isinstance(each, Arrival)]


def test_each_arrival_is_folded_by_itself_and_there_is_a_global_adapter_after_each(watcher: Watcher) -> None:
    for number in range(3):
        client(watcher.clients, number)
    seen = []
    for event in watcher.events(until=3):
        seen.append((type(event).__name__, len(watcher.members) if watcher.onto.exists() else 0))
    assert seen == [("Started", 0), ("Arrival", 1), ("Arrival", 2), ("Arrival", 3), ("Stopped", 3)]
    assert watcher.is_one_merge()


def test_the_wait_doubles_while_nothing_comes_and_begins_anew_after_an_arrival(watcher: Watcher) -> None:
    clock = Clock({3: lambda: client(watcher.clients, 0)})
    watcher(clock, seconds=150.0)
    assert clock.waits == [10, 20, 40, 10, 20, 40, 10]


def test_the_wait_has_a_limit() -> None:
    pace = Pace(400)
    assert [pace.after_nothing() for _ in range(3)] == [400, 600, 600]
    assert Pace(900).after_nothing() == 900


def test_it_ends_when_as_many_are_in_as_were_asked_for_or_when_the_time_is_over(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    clock = Clock()
    *_, last = watcher(clock, seconds=35.0)
    assert isinstance(last, Stopped)
    assert (last.why, clock.now) == ("time", 35.0)
    *_, last = watcher(until=1)
    assert isinstance(last, Stopped)
    assert last.why == "clients"


def test_started_again_it_brings_in_only_what_is_missing(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    watcher(until=1)
    client(watcher.clients, 1)
    started, *rest = watcher(until=2)
    assert isinstance(started, Started)
    assert started.ledger
    assert len(started.ledger.contributions) == 1
    assert arrivals(rest) == [("org/client-1", 2)]
    assert arrivals(watcher(until=2)) == []


def test_a_newer_version_takes_the_place_of_the_old_one(watcher: Watcher) -> None:
    def newer() -> None:
        shutil.rmtree(watcher.clients / "client-0")
        write(watcher.clients / "client-0", adapter("org/client-0", seed=7))

    client(watcher.clients, 0)
    client(watcher.clients, 1)
    events = watcher(Clock({1: newer}))
    assert [each.replaced for each in events if isinstance(each, Arrival)] == [False, False, True]
    assert watcher.is_one_merge()


def test_a_refused_arrival_is_listed_once_and_comes_in_when_it_is_mended(watcher: Watcher) -> None:
    def mend() -> None:
        shutil.rmtree(watcher.clients / "client-1")
        client(watcher.clients, 1)

    client(watcher.clients, 0)
    client(watcher.clients, 2)
    (client(watcher.clients, 1) / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    events = watcher(Clock({3: mend}))
    assert [each.source for each in events if isinstance(each, Refusal)] == ["client-1"]
    assert arrivals(events) == [("org/client-0", 1), ("org/client-2", 2), ("org/client-1", 3)]
    assert watcher.is_one_merge()


def test_an_arrival_that_stops_a_merge_is_listed_and_the_watch_goes_on(watcher: Watcher) -> None:
    for number in range(4):
        client(watcher.clients, number)
    write(watcher.clients / "thief", adapter("org/client-3", seed=9))
    write(watcher.clients / "wide", adapter("org/wide", width=32))
    write(watcher.clients / "a-silent", adapter("org/a-silent", num_examples=0))  # the first, and weighs nothing
    events = watcher()
    assert [client for client, _ in arrivals(events)] == [f"org/client-{number}" for number in range(4)]
    reasons = {each.source: each.reason for each in events if isinstance(each, Refusal)}
    assert reasons.keys() == {"thief", "wide", "a-silent"}
    assert "org/client-3 is in already" in reasons["thief"]


def test_where_all_must_be_merged_again_the_files_of_those_that_are_in_are_read(watcher: Watcher) -> None:
    for number in range(4):
        client(watcher.clients, number, width=4)  # of rank 2: two of them are no stack any more
    assert [bool(each.again) for each in watcher(until=4) if isinstance(each, Arrival)] == [False, True, True, True]
    assert watcher.is_one_merge()


def test_who_is_taken_out_stays_out_until_it_changes(watcher: Watcher) -> None:
    def change() -> None:
        shutil.rmtree(watcher.clients / "client-0")
        write(watcher.clients / "client-0", adapter("org/client-0", seed=7))

    for number in range(2):
        client(watcher.clients, number)
    clock = Clock({1: lambda: fold([], watcher.onto, withdraw=["org/client-0"]), 4: change})
    events = watcher(clock, seconds=1000.0)
    assert arrivals(events) == [("org/client-0", 1), ("org/client-1", 2), ("org/client-0", 2)]
    assert [line for line in watcher.told if "taken out" in line and "--exclude client-0" in line]


def test_exclusions_by_source_and_by_id_and_an_allow_list_are_heeded(watcher: Watcher) -> None:
    for number in range(4):
        client(watcher.clients, number)
    allowed = watcher.folder / "allowed"
    allowed.write_text("".join(f"{watcher.clients}/client-{number}\n" for number in (0, 1, 3)))
    screening = Screening(exclude=("client-0", "org/client-3", "org/nobody-yet"), allow_list=allowed)
    events = watcher(screening=screening)
    assert watcher.members == ["org/client-1"]
    reasons = {each.source: each.reason for each in events if isinstance(each, Refusal)}
    assert reasons.keys() == {"client-0", "client-2", "client-3"}
    assert "allow-list" in reasons["client-2"]
    assert [line for line in watcher.told if "--exclude" in line] == [
        "--exclude org/nobody-yet is nobody who is here yet. Whoever comes by it stays out."
    ]


def test_an_exclusion_holds_however_a_place_is_spelled(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(watcher.folder)
    (watcher.folder / "linked").symlink_to("clients")
    for number in range(7):
        client(watcher.clients, number)
    whole = f"{watcher.clients}/client-0"
    spelled = ("clients/client-1", "./clients/client-2/", "linked/client-3", "clients/../linked/client-4", "~/*-5")
    monkeypatch.setenv("HOME", str(watcher.clients))
    watcher(screening=Screening(exclude=(whole, *spelled)))
    assert watcher.members == ["org/client-6"]
    assert [line for line in watcher.told if "--exclude" in line] == []
    watcher(screening=Screening(exclude=(whole, *spelled, "clients/client-6", "clients/client-7")))
    assert [line.split()[1] for line in watcher.told if "--exclude" in line] == ["clients/client-7"]


def test_an_exclusion_that_is_empty_or_an_allow_list_that_is_not_there_ends_the_watch(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    with pytest.raises(UsageError, match="'' is no source"):
        watcher(screening=Screening(exclude=("",)))
    with pytest.raises(NotFoundError, match="No such allow-list"):
        watcher(screening=Screening(allow_list=watcher.folder / "none"))


def test_after_a_conflict_it_looks_again_and_folds_what_is_still_missing(
    watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(sources: list[Path], onto: Path, **options: Any) -> Any:
        if sources and not watcher.onto.exists():
            fold([clients[0]], onto)  # somebody else's
            raise ConflictError("Somebody else has made it.")
        return fold(sources, onto, **options)

    clients = [client(watcher.clients, number) for number in range(2)]
    monkeypatch.setattr(watching, "fold", overtaken)
    events = watcher(until=2)
    assert [type(each) for each in events] == [Started, Conflict, Arrival, Stopped]
    assert arrivals(events) == [("org/client-1", 2)]
    assert watcher.is_one_merge()


def test_a_network_that_fails_is_waited_out(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([NetworkError("no network"), NetworkError("no network")])

    def failing(sources: list[Path], onto: Path, **options: Any) -> Any:
        if sources and (error := next(failures, None)):
            raise error
        return fold(sources, onto, **options)

    client(watcher.clients, 0)
    monkeypatch.setattr(watching, "fold", failing)
    clock = Clock()
    assert arrivals(watcher(clock, until=1)) == [("org/client-0", 1)]
    assert clock.waits == [10, 20]


def test_a_source_that_names_nobody_yet_is_waited_for(watcher: Watcher) -> None:
    clock = Clock({2: lambda: client(watcher.clients, 0)})
    assert arrivals(watcher(clock, until=1)) == [("org/client-0", 1)]
    assert [line for line in watcher.told if line.endswith("Waiting for it.")] == [
        f"No folder matches {watcher.clients / '*'}. Waiting for it."
    ]


def test_what_is_wrong_with_the_global_adapter_ends_the_watch(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    watcher(until=1)
    (watcher.onto / "aggregation.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"aggregation\.json"):
        watcher()


def test_an_option_that_is_not_what_the_global_adapter_was_made_with_ends_the_watch(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    watcher(until=1)
    for options in ({"method": "fedavg"}, {"weights": "uniform"}):
        with pytest.raises(UsageError):
            watcher(options=options)


@pytest.mark.parametrize(
    "options", [{"interval": 0.0}, {"seconds": -1.0}, {"options": {"method": "ties"}}, {"options": {"weights": {}}}]
)
def test_options_that_cannot_be_are_refused_before_anything_arrives(options: dict[str, Any], watcher: Watcher) -> None:
    with pytest.raises(UsageError):
        watcher(**options)


def test_a_global_adapter_that_is_deleted_is_not_made_anew_in_silence(watcher: Watcher) -> None:
    client(watcher.clients, 0)
    clock = Clock({1: lambda: shutil.rmtree(watcher.onto)})
    with pytest.raises(NotFoundError, match="is gone"):
        watcher(clock)


def test_a_curve_never_holds_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a" / "curve.jsonl"
    assert curve.read(path) == []
    curve.append(path, {"inputs": "a"})
    with path.open("a") as file:
        file.write('{"schema_version": 1, "inp')  # of a watcher that was killed
    assert [line["inputs"] for line in curve.read(path)] == ["a"]
    curve.append(path, {"inputs": "b"})
    assert [json.loads(line)["inputs"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_text("clients,loss\n1,2\n")
    with pytest.raises(UsageError, match="is no curve"):
        curve.read(path)


@pytest.mark.parametrize(
    "text", ['{"prompt": "a b ", "completion": "c d"}', "a note", '{"r": 8}', '{"schema_version": 2']
)
@pytest.mark.parametrize("before", ["", '{"schema_version": 1, "inputs": "a"}\n'])
def test_what_no_watch_has_left_is_no_curve_and_stays(before: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(before + text)  # its last line is not ended
    with pytest.raises(UsageError, match="is no curve"):
        curve.read(path)
    assert path.read_text() == before + text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_curve_is_a_regular_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "curve.jsonl")
    with pytest.raises(UsageError, match="no regular file"):
        curve.read(tmp_path / "curve.jsonl")


def test_a_killed_run_may_leave_any_beginning_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    curve.append(path, {"inputs": "a"})
    line = path.read_text().rstrip("\n")
    for end in range(len(line)):
        path.write_text(line[:end])
        assert curve.read(path) == []


@pytest.mark.parametrize("place", ["held-out.jsonl", "clients/client-0/curve.jsonl", "base/curve.jsonl"])
def test_the_command_measures_into_nothing_that_it_reads(place: str, lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "clients", 0)
    (tmp_path / "base").mkdir()
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "a b ", "completion": "c d"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    watch = ("watch", "clients/*", "--onto", "global", "--data", "held-out.jsonl", "--base", "base", "--until", "1")
    code, _, err = lora_merge(*watch, "--curve", place)
    assert (code, "the input" in err) == (2, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_curve_has_the_losses_that_evaluate_finds_and_goes_on_where_it_ended(
    watcher: Watcher, base: Path, held_out: Path
) -> None:
    def measured(until: int) -> list[dict[str, Any]]:
        scores = Scores(question, path, Reading())
        events = (each for each in watcher.events(until=until) if isinstance(each, Started | Arrival))
        return [record for event in events for record in scores.of(str(watcher.onto), event)]

    question = Question(base=str(base), adapters=(), data=str(held_out), device="cpu")
    path = watcher.folder / "global.curve.jsonl"
    for number in range(2):
        client_on(base, watcher.clients / f"client-{number}", number)
    records = measured(2)
    assert [record["clients"] for record in records] == [0, 1, 2]
    asked = Question(base=str(base), adapters=(watcher.onto,), data=str(held_out), device="cpu")
    found = compare(asked, progress=lambda name, rows: silent(name, rows, "rows"), tell=print, warn=print)
    ends = (records[0], records[2])
    assert [each["loss"]["value"] for each in ends] == pytest.approx([each.loss.value for each in found.scores])
    assert [each["loss"]["low"] for each in ends] == pytest.approx([each.loss.interval.low for each in found.scores])
    assert measured(2) == []  # nothing has changed
    client_on(base, watcher.clients / "client-2", 2)
    fold([str(watcher.clients / "*")], watcher.onto)  # by a watcher that was killed before it could measure
    assert [(each["clients"], each["client"]) for each in measured(3)] == [(3, None)]
    assert [each["clients"] for each in curve.read(path)] == [0, 1, 2, 3]


def test_the_command_prints_a_line_for_each_arrival_and_the_end(lora_merge: Run, tmp_path: Path) -> None:
    for number in range(2):
        client(tmp_path / "clients", number, num_examples=10 * number + 10)
    code, out, _ = lora_merge("watch", "clients/*", "--onto", "global", "--until", "2")
    assert code == 0
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["clients", "arrived", "examples"],
        ["0", "0"],
        ["1", "org/client-0", "added", "10"],
        ["2", "org/client-1", "added", "30"],
    ]
    code, out, _ = lora_merge("watch", "clients/*", "--onto", "global", "--until", "2", "--json")
    started, end = (json.loads(line) for line in out.splitlines())
    assert (started["event"], started["clients"], started["examples"]) == ("started", 2, 30)
    assert (end["event"], end["stopped"], end["clients"], end["schema_version"]) == ("end", "clients", 2, 1)
    code, out, _ = lora_merge("watch", "clients/*", "--onto", "global", "--until", "1", "-q")
    assert (code, out) == (0, f"{tmp_path / 'global'}\n")
    for wrong in (("--onto", "global", "--for", "soon"), ("--onto", "global", "--until", "0"), ()):
        code, out, err = lora_merge("watch", "clients/*", *wrong, "--json")
        (line,) = out.splitlines()
        assert (code, json.loads(line)["error"]["code"], err) == (2, 2, "")


def test_every_copy_is_named_and_what_is_said_of_all_is_said_once(lora_merge: Run, tmp_path: Path) -> None:
    for number in range(4):
        own = client(tmp_path / "clients", number)
        if number < 3:
            edited(own, tmp_path / "clients" / f"copy-{number}", client_id=f"org/copy-{number}")
    code, out, err = lora_merge("watch", "clients/*", "--onto", "global", "--until", "7", "--json")
    assert code == 0
    arrived = [each for each in map(json.loads, out.splitlines()) if each["event"] == "arrival"]
    for number in range(3):
        said = f"org/copy-{number} has the same weights as org/client-{number}"
        assert sum(said in line for line in err.splitlines()) == 1
        assert sum(said in line for each in arrived for line in each["warnings"]) == 1
    assert err.count("taken on trust") == 3  # of one, of a few, of many: not of each of seven


def test_where_all_were_refused_nothing_is_named_as_made_and_the_way_on_is_said(
    lora_merge: Run, tmp_path: Path
) -> None:
    (client(tmp_path / "clients", 0) / "lora_merge.json").unlink()
    watch = ("watch", "clients/*", "--onto", "global", "--for", "0.5s")
    assert lora_merge(*watch, "-q")[:2] == (3, "")
    code, out, _ = lora_merge(*watch, "--json")
    _, refused, end = map(json.loads, out.splitlines())
    assert (code, end["clients"]) == (3, 0)
    assert refused["hint"] == "To let it in, watch with --weights uniform."
    assert refused["hint"] in lora_merge(*watch)[1]
    assert lora_merge("watch", "./nobody/*", "--onto", "global", "--for", "0.5s", "-q")[:2] == (0, "")
    code, out, _ = lora_merge(*watch, "-q", "--until", "1", "--weights", "uniform")
    assert (code, out) == (0, f"{tmp_path / 'global'}\n")


def test_what_is_read_from_here_is_said_once_and_not_at_every_look(watcher: Watcher) -> None:
    sources = [str(client(watcher.folder / "org", number).relative_to(watcher.folder)) for number in range(2)]
    clock, told = Clock(), Reading(tell=watcher.told.append)
    with contextlib.chdir(watcher.folder):
        list(watch(sources, "global", seconds=100.0, reading=told, wait=clock.wait, clock=lambda: clock.now))
    assert len(watcher.told) == len(set(watcher.told))


def test_the_command_measures_after_each_arrival(lora_merge: Run, tmp_path: Path, base: Path, held_out: Path) -> None:
    client_on(base, tmp_path / "clients" / "client-0", 0)
    watch = ["watch", "clients/*", "--onto", "global", "--until", "1", "--device", "cpu", "--base", str(base)]
    code, _, _ = lora_merge(*watch, "--data", "nowhere.jsonl")
    assert (code, (tmp_path / "global").exists()) == (4, False)
    code, out, _ = lora_merge(*watch, "--data", str(held_out), "--json")
    _, came, end = (json.loads(line) for line in out.splitlines())
    alone, measured = curve.read(tmp_path / "global.curve.jsonl")
    assert code == 0
    assert came["loss"] == measured["loss"] != alone["loss"]
    assert came["perplexity"]["low"] < came["perplexity"]["value"] < came["perplexity"]["high"]
    assert end["curve"] == str(tmp_path / "global.curve.jsonl")


def test_ctrl_c_ends_it_with_130_and_what_is_in_so_far(tmp_path: Path) -> None:
    client(tmp_path / "clients", 0)
    command = [sys.executable, "-m", "lora_merge", "watch", "clients/*", "--onto", "global", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert [json.loads(process.stdout.readline())["event"] for _ in range(2)] == ["started", "arrival"]
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    end = json.loads(out)
    assert (end["stopped"], end["clients"], end["added"]) == ("interrupted", 1, 1)
    assert "Traceback" not in talk
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients", "global"]


def test_a_watch_over_the_hub_publishes_each_arrival(hub: LocalHub, tmp_path: Path) -> None:
    token = hub.user("alice", orgs={"org": "write"})
    for number in range(2):
        hub.create(f"org/client-{number}", adapter(f"org/client-{number}", seed=number))
    arguments = ["watch", "org/client-*", "--onto", "org/global", "--until", "2", "--for", "60s", "--json"]
    with Client(hub.env(cache=tmp_path / "home")) as process:
        code, out, talk = process.run(COMMAND, folder=str(tmp_path), arguments=arguments, token=token)
    assert code == 0, talk
    _, *came, end = (json.loads(line) for line in out.splitlines())
    history = [commit.oid for commit in hub.history("org/global")]
    assert [each["commit"] for each in came] == history[:2][::-1]
    assert [each["source_commit"] for each in came] == [hub.head("org/client-0"), hub.head("org/client-1")]
    assert (end["commit"], end["clients"]) == (history[0], 2)


def test_watchers_that_are_killed_lose_and_double_nobody(hub: LocalHub, tmp_path: Path) -> None:
    with bench(hub, tmp_path) as made:
        made.round(5, clients=3, newer=1, kills=2, watchers=2, faults=1)
    assert made.counts["kills"] == 2

"""Watch sources, and bring each arrival into the global adapter: one at a time, so that there is one after each.

All that a watcher has to remember is the global adapter's own ledger. So it may be killed at any moment, and others may
watch for the same one: whoever publishes second is told of a conflict, looks again, and folds what is still missing.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lora_merge.errors import (
    ConflictError,
    LoraMergeError,
    NetworkError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from lora_merge.folding.corridor import require_folds
from lora_merge.folding.onto import Fold, fold
from lora_merge.intake import Reading
from lora_merge.ledger import Ledger
from lora_merge.options import merge_settings, require_sound
from lora_merge.screening.selection import Selection, by_client_id, listed
from lora_merge.screening.stops import SCREENED, Screening
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import Rooms, open_rooms
from lora_merge.watching.pace import Pace
from lora_merge.watching.sight import (
    Hashes,
    Now,
    Place,
    global_now,
    is_in,
    name_for_fold,
    of_same_source,
    place_of,
    sighted,
)

INTERVAL = 15.0  # seconds: two calls of the Hub a look, of 500 in five minutes that it grants to anybody
SECOND_LOOK = 1.0  # seconds


@dataclass(frozen=True)
class Started:
    """The first look: the global adapter as it is; `ledger` is None where there is none yet."""

    place: str
    ledger: Ledger | None
    commit: str | None


@dataclass(frozen=True)
class Arrival:
    """A client's update came in.

    Attributes:
        commit: the client's; None where its source has none.
        replaced: whether it took the place of an earlier one of the same source.
        ledger, made: the global adapter with it; `made` is its repository's commit, None for a folder.
        again: why all clients had to be merged again; None where folding did.
        seconds: that it took, publishing included.
    """

    client: str
    source: str
    commit: str | None
    replaced: bool
    ledger: Ledger
    made: str | None
    again: str | None
    warnings: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """An arrival that stays out until there is another version of it, and why."""

    source: str
    commit: str | None
    reason: str
    hint: str


@dataclass(frozen=True)
class Conflict:
    """Somebody else was quicker; nothing was changed, and what is still missing is folded onto theirs."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """The end: as many clients are in as were asked for, or the time is over; and the global adapter then."""

    why: Literal["clients", "time"]
    ledger: Ledger | None
    commit: str | None


Event: TypeAlias = Started | Arrival | Refusal | Conflict | Stopped


def watch(
    sources: Sequence[str | Path],
    onto: str | Path,
    *,
    until: int | None = None,
    seconds: float | None = None,
    interval: float = INTERVAL,
    screening: Screening = SCREENED,
    private: bool | None = None,
    options: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Fold each arrival of `sources` into `onto`, as it appears, and yield what happens.

    A network that fails is waited out; an arrival that is refused stays out until its commit (or its files) change.

    Args:
        onto: a folder, or a repository of the Hub; it is made by the first arrival where there is none.
        until: end when so many clients are in.
        seconds: end after that time.
        interval: seconds between two looks; doubled while nothing happens, up to ten minutes.
        screening: whom to leave out, and what to allow. Exclusions that are nobody yet are no error.
        private: of a repository that is made now; None is private.
        options: of `lora_merge.fold`, such as method, rank, weights (a rule), base, device.
        wait, clock: how to sleep, and what time it is, in seconds.

    Raises:
        UsageError: an option is wrong, or is not what the global adapter was made with.
        RefusedError: the global adapter itself is refused.
        NotFoundError: it may not be read or written, or is gone.
        StorageError: the disk failed.

    Example:
        >>> for event in watch(["org/client-*"], "org/global", until=10): ...  # doctest: +SKIP
    """
    watcher = _Watcher(
        sources, onto, place_of(onto), until, screening, private, dict(options or {}), reading or Reading(), wait, clock
    )
    watcher.require_options(interval, seconds)
    deadline = None if seconds is None else clock() + seconds
    pace = Pace(interval)
    while True:
        found = "nothing"
        try:
            found = yield from watcher.turn()
            pause = pace.after_nothing() if found == "nothing" else 0.0
        except NetworkError as error:
            pause = pace.after_nothing()
            watcher.reading.tell(f"{error.message} The next try is in {pause:.0f} s.")
        except ConflictError as error:
            pause = pace.after_conflict()
            yield Conflict(error.message)
        if found == "enough":
            yield watcher.stopped("clients")
            return
        if found == "arrival":
            pace.arrived()
        if deadline is not None and (left := deadline - clock()) <= pause:
            if left <= 0:
                yield watcher.stopped("time")
                return
            pause = left
        if pause:
            wait(pause)


@dataclass
class _Watcher:
    """What one watcher is asked for, and what it has seen.

    Attributes:
        refused: the version of each place that was refused.
        been_in: the version of each place that was seen in the global adapter.
        said: what was told, so that it is told once.
    """

    sources: Sequence[str | Path]
    onto: str | Path
    place: Place
    until: int | None
    screening: Screening
    private: bool | None
    options: dict[str, Any]
    reading: Reading
    wait: Callable[[float], object]
    clock: Callable[[], float]
    now: Now | None = None
    hashes: Hashes = field(default_factory=Hashes)
    refused: dict[str, str] = field(default_factory=dict)
    been_in: dict[str, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def turn(self) -> Generator[Event, None, Literal["enough", "arrival", "nothing"]]:
        """One look, and one arrival at most: the next is judged by what is there then."""
        first, now = self.now is None, self._look()
        if first:
            yield Started(self.place.name, now.ledger, now.commit)
        if self.until is not None and len(now.contributions) >= self.until:
            return "enough"
        with open_rooms(self.reading.max_wait, self.reading.tell) as rooms:
            pending, refusals = self._pending(rooms, now)
            self._tell_once(*rooms.notes)
        yield from refusals
        for ref, version in pending:
            if (event := self._fold(ref, version)) is not None:
                yield event
                if isinstance(event, Arrival):
                    return "arrival"
        return "nothing"

    def stopped(self, why: Literal["clients", "time"]) -> Stopped:
        """The end, with what was seen last."""
        now = self.now or Now()
        return Stopped(why, now.ledger, now.commit)

    def require_options(self, interval: float, seconds: float | None) -> None:
        """Raise `UsageError` where an option is wrong, whatever the global adapter is."""
        if not self.sources:
            raise UsageError("No source is given.", hint="lora-merge watch 'org/client-*' --onto org/global")
        for name, value in (("--interval", interval), ("--for", seconds), ("--until", self.until)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be above 0, is {value}.")
        chosen = self.options
        method, rank = chosen.get("method") or "exact", chosen.get("rank")
        merge_settings(method, rank, chosen.get("energy"), chosen.get("dtype") or "fp32", None)
        if method != "svd" or rank is not None:  # else as the global adapter was made with
            require_folds(method, rank)
        require_sound(chosen.get("global_lr") or 1.0, chosen.get("workers"))
        if chosen.get("weights") not in (None, "examples", "uniform"):
            raise UsageError("A watcher weighs arrivals by a rule: examples or uniform.")
        with open_rooms(0) as rooms:
            if "repository" in {rooms.kind(each) for each in (*self.sources, self.onto)}:
                _require_online()

    def _look(self) -> Now:
        """The global adapter now; at the first look, whether this watcher can and may bring anything into it."""
        now = global_now(self.place, self.now or Now(), self.reading)
        if self.now is None:
            self._require_sound(now)
        elif self.now.ledger and not now.ledger:
            self.wait(SECOND_LOOK)  # some file systems replace a folder in two steps
            if not (now := global_now(self.place, Now(), self.reading)).ledger:
                hint = "The same command makes it anew, of all that the sources hold."
                raise NotFoundError(f"{self.place.name} was there, and is gone.", hint=hint)
        before = {each.source for each in self.now.contributions} if self.now else set()
        for source in sorted(before - {each.source for each in now.contributions}):
            self.reading.tell(
                f"{source} was taken out of {self.place.name}. It stays out while this watch runs, unless it changes; "
                f"with --exclude {source}, for good."
            )
        self.now = now
        return now

    def _require_sound(self, now: Now) -> None:
        """Raise where nobody could be brought in: the fault is the global adapter's, an option's or a token's."""
        if self.place.on_hub:
            from lora_merge.publish.push import require_access
            from lora_merge.publish.repository import Target

            target = Target(self.place.name, private=self.private)
            require_access(target, max_wait=self.reading.max_wait, tell=self.reading.tell)
        if now.ledger is None:
            require_folds(self.options.get("method") or "exact", self.options.get("rank"))
            return
        rule, given = now.ledger.weighting, self.options.get("weights")
        if rule not in ("examples", "uniform") or given not in (None, rule):
            raise UsageError(
                f"{self.place.name} is weighted by {rule}; its arrivals cannot be by {given or 'a rule'}.",
                hint="Fold each with its weight: lora-merge aggregate SOURCE --onto GLOBAL --weight SOURCE=NUMBER",
            )
        self._folded([])

    def _folded(self, sources: Sequence[str | Path]) -> Fold:
        return fold(
            sources,
            self.onto,
            private=self.private,
            screening=replace(self.screening, exclude=()),  # judged here: who is excluded need not be there yet
            max_wait=self.reading.max_wait,
            tell=self.reading.tell,
            progress=self.reading.progress,
            **self.options,
        )

    def _pending(self, rooms: Rooms, now: Now) -> tuple[list[tuple[AdapterRef, str]], list[Refusal]]:
        """What is to come in, new clients before new versions; and who is refused before anything of them is read."""
        refs, absent = sighted(rooms, self.sources, self.place)
        self._tell_once(*(f"{reason} Waiting for it." for reason in absent))
        new: list[tuple[AdapterRef, str]] = []
        newer: list[tuple[AdapterRef, str]] = []
        refusals: list[Refusal] = []
        for ref in sorted(refs, key=lambda ref: ref.source):
            with suppress(NotFoundError):  # it has gone since it was listed
                version = ref.room.version(ref)
                same = of_same_source(ref, now.contributions)
                if is_in(
                    ref, same, self.hashes.of(ref, version, rooms, self.reading) if same and not ref.commit else None
                ):
                    self.been_in[ref.place] = version
                elif version in (self.refused.get(ref.place), None if same else self.been_in.get(ref.place)):
                    continue
                elif refusal := self._left_out(rooms, ref, version):
                    refusals += refusal
                else:
                    (newer if same else new).append((ref, version))
        return [*new, *newer], refusals

    def _left_out(self, rooms: Rooms, ref: AdapterRef, version: str) -> list[Refusal]:
        """A refusal where the user's lists leave it out, by its source or by the id that it states."""
        selection = Selection(self.screening)
        taking_part = listed([ref], selection)
        if taking_part and self.screening.exclude:
            with suppress(RefusedError):  # folding it will say why
                by_client_id(rooms.examine(taking_part), selection)
        if not selection.left_out:
            return []
        self.refused[ref.place] = version
        return [Refusal(ref.source, ref.commit, selection.left_out[0].reason, "")]

    def _fold(self, ref: AdapterRef, version: str) -> Arrival | Refusal | None:
        """Bring one in; None where somebody else has, or it is changing at this moment."""
        began = self.clock()
        try:
            made = self._folded([name_for_fold(ref)])
        except (RefusedError, NotFoundError, UsageError) as error:
            self._require_sound(global_now(self.place, Now(), self.reading))
            return self._refusal(ref, version, error)
        except StorageError:
            if ref.commit is None and ref.room.version(ref) != version:
                return None
            raise
        if not made.changed:
            return None
        [client] = (*made.added, *made.replaced)
        published = made.published.published.commit if made.published else None
        return Arrival(
            client=client,
            source=ref.source,
            commit=ref.commit,
            replaced=bool(made.replaced),
            ledger=made.ledger,
            made=published,
            again=made.again,
            warnings=made.warnings,
            seconds=self.clock() - began,
        )

    def _refusal(self, ref: AdapterRef, version: str, error: LoraMergeError) -> Refusal:
        self.refused[ref.place] = version
        if isinstance(error, RefusedError):
            reason = "; ".join(f"{problem.field}: {problem.reason}" for problem in error.problems)
        else:
            reason = error.message
        return Refusal(ref.source, ref.commit, reason, error.hint)

    def _tell_once(self, *lines: str) -> None:
        for line in lines:
            if line not in self.said:
                self.said.add(line)
                self.reading.tell(line)


def _require_online() -> None:
    from lora_merge.hub.client import is_offline

    if is_offline():
        raise NetworkError("A watch looks at the Hub, and HF_HUB_OFFLINE is set.", hint="unset HF_HUB_OFFLINE")

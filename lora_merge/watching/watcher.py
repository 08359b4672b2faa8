"""One watcher: what it is asked for, what it has seen, and what it does at each look."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_merge.errors import (
    ConflictError,
    LoraMergeError,
    NetworkError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
    one_line,
)
from lora_merge.folding.arrivals import require_cap
from lora_merge.folding.how import require_folds
from lora_merge.folding.onto import Fold, fold
from lora_merge.intake import Reading
from lora_merge.options import merge_settings, require_sound
from lora_merge.screening.selection import Lists, Selection, by_client_id, listed, lists_of, unused_exclusions
from lora_merge.screening.stops import Screening
from lora_merge.screening.weighing import cap_in
from lora_merge.sources.filesystems import told
from lora_merge.sources.reference import AdapterRef, Candidate
from lora_merge.sources.rooms import Rooms, open_rooms
from lora_merge.watching.events import Arrival, Event, Refusal, Started, Stopped
from lora_merge.watching.refusing import blamed, refusal_of
from lora_merge.watching.sight import (
    Hashes,
    Now,
    Place,
    global_now,
    is_in,
    of_same_source,
    sighted,
)

SECOND_LOOK = 0.5  # seconds
LOOKS = 3  # at what is wrong with a folder


@dataclass
class Watcher:
    """What one watcher is asked for, and what it has seen.

    Attributes:
        at_hand: clients of folders and URLs that are in, and lie there as they went in.
        doubted: how often a version was refused for what is wrong with the global adapter, which others may replace.
        with_files: whether folding needs their files: a ledger does not say where a folder lay.
        refused: the version of each place that was refused.
        blocked: places refused since somebody who is in stands against them: tried again when those who are in change.
        been_in: the version of each place that was seen in the global adapter.
        said: what was told, so that it is told once.
        looked: whether it has seen what the sources hold.
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
    blocked: set[str] = field(default_factory=set)
    been_in: dict[str, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    looked: bool = False
    at_hand: list[AdapterRef] = field(default_factory=list)
    with_files: bool = False
    doubted: Counter[str] = field(default_factory=Counter)

    def turn(self) -> Generator[Event, None, Literal["enough", "arrival", "nothing"]]:
        """One look, and one arrival at most: the next is judged by what is there then."""
        first, now = self.now is None, self._look()
        if first:
            yield Started(self.place.name, now.ledger, now.commit)
        if self.until is not None and len(now.contributions) >= self.until:
            return "enough"
        with open_rooms(self.reading.max_wait, self._tell_once) as rooms:
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
        if str(self.screening.cap_examples).endswith("x"):
            raise UsageError("--cap-examples of a watch is a number: there is no median before anybody arrives.")
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
        if self.now and self.now.contributions != now.contributions:
            for place in self.blocked:
                self.refused.pop(place, None)
            self.blocked.clear()
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
        cap = cap_in(rule)
        made_by = rule if cap is None else "examples"  # a cap holds for arrivals too
        if made_by not in ("examples", "uniform") or given not in (None, made_by):
            raise UsageError(
                f"{self.place.name} is weighted by {rule}; its arrivals cannot be by {given or 'a rule'}.",
                hint="Fold each with its weight: lora-merge aggregate SOURCE --onto GLOBAL --weight SOURCE=NUMBER",
            )
        require_cap(self.screening.cap_examples, cap)
        for look in range(1, LOOKS + 1):
            try:
                self._folded([])
                return
            except RefusedError:
                if self.place.on_hub or look == LOOKS:
                    raise
                self.wait(SECOND_LOOK)  # it may have been replaced while it was read, file by file

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
        lists, seen = lists_of(self.screening), list[Candidate]()
        new: list[tuple[AdapterRef, str]] = []
        newer: list[tuple[AdapterRef, str]] = []
        refusals: list[Refusal] = []
        self.at_hand = []
        for ref in sorted(refs, key=lambda ref: ref.source):
            with suppress(NotFoundError):  # it has gone since it was listed
                version = ref.room.version(ref)
                same = of_same_source(ref, now.contributions)
                if is_in(ref, same, self._hashes(ref, version, rooms) if same else None):
                    self.been_in[ref.place] = version
                    self.at_hand += [] if ref.commit else [ref]
                elif version in (self.refused.get(ref.place), None if same else self.been_in.get(ref.place)):
                    continue
                elif refusal := self._left_out(rooms, ref, version, lists, seen):
                    refusals += refusal
                else:
                    (newer if same else new).append((ref, version))
        if not self.looked:
            self._say_who_was_not_seen(refs, seen, now)
        self.looked = True
        return [*new, *newer], refusals

    def _say_who_was_not_seen(self, refs: Sequence[AdapterRef], seen: Sequence[Candidate], now: Now) -> None:
        """Of exclusions: one that is misspelled keeps nobody out, and one of somebody who comes later is right."""
        known = [name for each in now.contributions for name in (each.client_id, each.source)]
        for entry in unused_exclusions(refs, seen, self.screening.exclude, known):
            self.reading.tell(
                f"--exclude {one_line(told(entry))} is nobody who is here yet. Whoever comes by it stays out."
            )

    def _hashes(self, ref: AdapterRef, version: str, rooms: Rooms) -> Mapping[str, str] | None:
        return None if ref.commit else self.hashes.of(ref, version, rooms, self.reading)

    def _left_out(
        self, rooms: Rooms, ref: AdapterRef, version: str, lists: Lists, seen: list[Candidate]
    ) -> list[Refusal]:
        """A refusal where the user's lists leave it out, by its source or by the id that it states; `seen` gets it."""
        selection = Selection(self.screening)
        taking_part = listed([ref], selection, lists)
        if taking_part and self.screening.exclude:
            with suppress(RefusedError):  # folding it will say why
                seen += (found := rooms.examine(taking_part))
                by_client_id(found, selection)
        if not selection.left_out:
            return []
        return [self._left(ref, version, selection.left_out[0].reason)]

    def _fold(self, ref: AdapterRef, version: str) -> Arrival | Refusal | None:
        """Bring one in; None where somebody else has, or it is changing at this moment."""
        began, before = self.clock(), self.now
        try:
            made = self._folded_alone_or_with_files(ref)
        except (RefusedError, NotFoundError, UsageError) as error:
            self._require_sound(global_now(self.place, Now(), self.reading))
            return None if self._read_in_between(error, version) else self._refusal(ref, version, error)
        except StorageError as error:
            if ref.commit is None and ref.room.version(ref) != version:
                return None
            if before == Now() and global_now(self.place, Now(), self.reading).ledger:
                raise ConflictError(f"Somebody else has made {self.place.name}.") from error
            raise
        came = {each.client_id for each in of_same_source(ref, made.ledger.contributions)}
        client = next((client for client in (*made.added, *made.replaced) if client in came), None)
        if client is None:
            reason = next((each.reason for each in made.left_out if each.source == ref.source), None)
            return self._left(ref, version, reason) if reason else None
        return Arrival(
            client=client,
            source=ref.source,
            commit=ref.commit,
            replaced=client in made.replaced,
            ledger=made.ledger,
            made=made.published.published.commit if made.published else None,
            again=made.again,
            warnings=made.warnings,
            seconds=self.clock() - began,
        )

    def _read_in_between(self, error: LoraMergeError, version: str) -> bool:
        """Whether what is wrong may only be that a folder's files were read while somebody else replaced it."""
        if self.place.on_hub or not isinstance(error, RefusedError):
            return False
        self.doubted[version] += 1
        return self.doubted[version] < LOOKS and {each.client for each in error.problems} == {self.place.name}

    def _folded_alone_or_with_files(self, ref: AdapterRef) -> Fold:
        """Fold one; where that needs the files of those that are in, with those of them that lie at hand."""
        name, files = ref.itself, [each.itself for each in self.at_hand]
        if not self.with_files:
            try:
                return self._folded([name])
            except NotFoundError:
                if not files:
                    raise
        made = self._folded([name, *files])
        self.with_files = True
        return made

    def _left(self, ref: AdapterRef, version: str, reason: str) -> Refusal:
        self.refused[ref.place] = version
        return Refusal(ref.source, ref.commit, reason, "")

    def _refusal(self, ref: AdapterRef, version: str, error: LoraMergeError) -> Refusal:
        contributions = self.now.contributions if self.now else ()
        own = {each.client_id for each in of_same_source(ref, contributions)}
        others = {each.client_id for each in contributions} - own
        self.refused[ref.place] = version
        if blamed(error, others):
            self.blocked.add(ref.place)
        return refusal_of(ref, error, others, self.place.name)

    def _tell_once(self, *lines: str) -> None:
        for line in lines:
            if line not in self.said:
                self.said.add(line)
                self.reading.tell(line)


def _require_online() -> None:
    from lora_merge.hub.session import is_offline

    if is_offline():
        raise NetworkError("A watch looks at the Hub, and HF_HUB_OFFLINE is set.", hint="unset HF_HUB_OFFLINE")

"""Which place a source names, by its form: a folder here, the Hub, or a URL."""

import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.checkpoint.folder import scratch_folder
from lora_merge.errors import NetworkError, NotFoundError, StorageError, UsageError, one_line
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most
from lora_merge.sources.filesystems import FilesystemRoom
from lora_merge.sources.local import HERE, MOST_NAMED, LocalRoom, is_folder, names_of, near_misses, nor_a_folder
from lora_merge.sources.parallel import Refused, for_each
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, Progress, Room, Tell

if TYPE_CHECKING:
    from lora_merge.sources.hub import HubRoom

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.\-*?\[\]!]+(@\S+)?")
_WILD = re.compile(r"[*?\[]")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@contextmanager
def open_rooms(
    max_wait: float = MAX_WAIT, tell: Tell = lambda line: None, pins: Mapping[str, str] | None = None
) -> Iterator["Rooms"]:
    """All places that adapters come from; each is opened when the first source names it.

    Args:
        max_wait: the seconds that all waits for a busy Hub may take together.
        tell: called with a line when such a wait begins.
        pins: commits by repository, which stand for the Hub's listing under HF_HUB_OFFLINE.
    """
    with waiting_at_most(max_wait), ExitStack() as stack:
        yield Rooms(stack, max_wait, tell, pins or {})


class Rooms:
    """The open places."""

    def __init__(self, stack: ExitStack, max_wait: float, tell: Tell, pins: Mapping[str, str]) -> None:
        self._stack, self._max_wait, self._tell, self._pins = stack, max_wait, tell, pins
        self._stopped = threading.Event()

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the sources were read."""
        rooms = [vars(self)[name] for name in ("_local", "_filesystem", "_hub") if name in vars(self)]
        return sorted({note for room in rooms for note in room.notes})

    def expand(self, sources: Sequence[str | Path], *, once: bool = True) -> list[AdapterRef]:
        """Every adapter that the sources name, pinned, in their order.

        Args:
            once: see to it that none is named twice; whoever leaves some out first calls `require_once` thereafter.

        Raises:
            NotFoundError: a source names nothing.
            UsageError: an adapter is named twice, which would count it twice.
        """
        named = [(self._room(source), str(source)) for source in sources]
        self._say_what_is_here(sources)
        try:
            found = for_each(lambda pair: pair[0].expand(pair[1]), named, lambda pair: pair[1], self.interrupt)
        except (NetworkError, NotFoundError) as error:  # whoever mistyped a folder should not look for it on the Hub
            raise self._other_reading(named, error) from error
        refs = [ref for each in found for ref in each]
        if once:
            require_once(refs)
        return _with_short_names(refs)

    def examine(self, refs: Sequence[AdapterRef], refused: Refused[AdapterRef] | None = None) -> list[Candidate]:
        """Each adapter's files, and what its config, statement and header say; no weights are read.

        Args:
            refused: takes each adapter that is refused with its problems, and the others are gone on with.

        Raises:
            RefusedError: with every problem of every adapter.
        """
        return for_each(lambda ref: ref.room.examine(ref), refs, lambda ref: ref.source, self.interrupt, refused)

    def fetch(
        self, candidates: Sequence[Candidate], progress: Progress, refused: Refused[Candidate] | None = None
    ) -> list[Path]:
        """Each adapter's folder on this machine, every file checked against its hash; what is there is not fetched.

        Args:
            refused: takes each adapter that is refused with its problems; it then has no folder in the list.

        Raises:
            RefusedError: with every file that is not what its place lists.
            StorageError: there is no room for it.
        """
        missing = {candidate.ref: candidate.ref.room.missing_bytes(candidate) for candidate in candidates}
        _require_space(missing)
        lock = threading.Lock()
        with progress("Downloading", sum(missing.values()), "bytes") if any(missing.values()) else _silent() as advance:

            def count(size: int) -> None:
                with lock:
                    advance(size)

            def fetch(candidate: Candidate) -> Path:
                return candidate.ref.room.fetch(candidate, count)

            with warnings.catch_warnings():  # the library's, of a disk that is nearly full: a full one is an error
                warnings.filterwarnings("ignore", "Not enough free disk space")
                return for_each(fetch, candidates, lambda candidate: candidate.ref.source, self.interrupt, refused)

    def interrupt(self) -> None:
        """Make everything that waits or downloads end soon."""
        self._stopped.set()
        if "_hub" in vars(self):
            from lora_merge.hub.session import interrupt

            interrupt()

    def kind(self, source: str | Path) -> Literal["folder", "repository", "url"]:
        """What `source` names by its form; a folder may still have to be made."""
        room = self._room(source)
        if room is vars(self).get("_local"):
            return "url" if str(source).startswith(HERE) else "folder"
        return "repository" if room is vars(self).get("_hub") else "url"

    def _say_what_is_here(self, sources: Sequence[str | Path]) -> None:
        """A folder wins over a repository of its name, and says so."""
        here = [each for each in sources if isinstance(each, str) and _REPOSITORY.fullmatch(each) and is_folder(each)]
        if here:
            names = ", ".join(dict.fromkeys(here))
            self._tell(f"Folders here, read from this machine: {names}. Of the Hub: hf://{here[0]}")

    def _other_reading(
        self, named: Sequence[tuple[Room, str]], error: NetworkError | NotFoundError
    ) -> NetworkError | NotFoundError:
        """`error`, with what is to be said of those sources that could have meant the other place."""
        either = [(room, text) for room, text in named if ON_THE_HUB.fullmatch(text) and not is_folder(text)]
        hub, offline = vars(self).get("_hub"), isinstance(error, NetworkError)
        asked = [text for room, text in either if room is hub and (offline or _owner_is_here(text))]
        sought = [f"hf://{text}" for room, text in either if room is not hub]
        near = near_misses(Path(asked[0])) if asked and _owner_is_here(asked[0]) else ""
        of_hub = f"Of the Hub: {', '.join(sought[:MOST_NAMED])}" if sought else ""
        error.hint = " ".join(part for part in (near, of_hub, error.hint) if part)
        return nor_a_folder(asked, error) if asked else error

    def _room(self, source: str | Path) -> Room:
        text = str(source)
        if isinstance(source, Path):
            return self._local
        if not text.strip():
            raise UsageError("A source is empty.", hint="Is a variable of the shell not set?")
        if text.startswith(HERE):
            return self._local
        if "://" in text:
            return self._hub if is_on_the_hub(text) else self._filesystem
        if not ON_THE_HUB.fullmatch(text) or text.startswith("."):
            return self._local
        if is_folder(text) or Path(text).exists() or (_WILD.search(text) and _owner_is_here(text)):
            return self._local  # of a file, or where arrivals are waited for, it says what is missing
        return self._hub

    @cached_property
    def _local(self) -> Room:
        return LocalRoom()

    @cached_property
    def _filesystem(self) -> Room:
        return FilesystemRoom(self._stack.enter_context(scratch_folder()), self._stopped)

    @cached_property
    def _hub(self) -> "HubRoom":
        from lora_merge.hub.session import hub_session  # half a second that a merge of folders need not wait
        from lora_merge.sources.hub import HubRoom

        return HubRoom(self._stack.enter_context(hub_session(self._max_wait, self._tell)), self._pins)


def _owner_is_here(text: str) -> bool:
    """Whether the part before the slash is a folder here."""
    return Path(text.partition("/")[0]).is_dir()


def _silent() -> AbstractContextManager[Advance]:
    return nullcontext(lambda steps: None)


def _require_space(missing: Mapping[AdapterRef, int]) -> None:
    """Raise `StorageError` where what is to be downloaded does not fit."""
    for room in {ref.room for ref in missing}:
        needed = sum(size for ref, size in missing.items() if ref.room is room)
        if not needed or room.store is None:
            continue
        folder = next(path for path in (room.store, *room.store.parents) if path.exists())
        if needed > (free := shutil.disk_usage(folder).free):
            raise StorageError(f"{room.store} has {free:,} bytes free, and {needed:,} are to be downloaded.")


def is_on_the_hub(text: str) -> bool:
    """Whether `text` names a repository and can be nothing else: `hf://…`, or its address in a browser."""
    if not text.startswith(("http://", "https://")):
        return text.startswith("hf://")
    from lora_merge.sources.hub import is_web_address

    return is_web_address(text)


def require_once(refs: Sequence[AdapterRef]) -> None:
    """Raise `UsageError` where two are one adapter, be it by another path: it would count twice."""
    found: dict[tuple[type, str], AdapterRef] = {}
    for ref in refs:
        if (first := found.setdefault((type(ref.room), _real_place(ref)), ref)) is not ref:
            also = f", as {first.place} too" if first.place != ref.place else ""
            raise UsageError(one_line(f"{ref.place} is given twice{also}."))


def _real_place(ref: AdapterRef) -> str:
    return str(Path(ref.place).resolve()) if isinstance(ref.room, LocalRoom) else ref.place


def _with_short_names(refs: Sequence[AdapterRef]) -> list[AdapterRef]:
    """Folders by as much of their paths as tells them apart; one that has its name already, by its other path."""
    first: dict[str, AdapterRef] = {}
    for ref in refs:
        if isinstance(ref.room, LocalRoom):
            first.setdefault(_real_place(ref), ref)
    places = [ref.place for ref in first.values()]
    names = dict(zip(places, names_of([Path(place) for place in places]), strict=True))
    return [
        replace(ref, source=names.get(ref.place, one_line(ref.place))) if isinstance(ref.room, LocalRoom) else ref
        for ref in refs
    ]

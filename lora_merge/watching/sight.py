"""What a watcher sees at one look: who is in the global adapter, and what the sources hold."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from lora_merge.checkpoint.peft_folder import LEDGER_NAME, FolderRefused, open_folder
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError
from lora_merge.folding.arrivals import came_from
from lora_merge.folding.global_adapter import ledger_in
from lora_merge.folding.how import is_there
from lora_merge.intake import Reading
from lora_merge.ledger import Contribution, Ledger
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import Rooms, open_rooms


@dataclass(frozen=True)
class Place:
    """Where the global adapter lies, or is to lie: a folder's whole path, or a repository."""

    name: str
    on_hub: bool


@dataclass(frozen=True)
class Now:
    """The global adapter at one moment; without a ledger there is none yet. `commit` is of its repository."""

    ledger: Ledger | None = None
    commit: str | None = None

    @property
    def contributions(self) -> Sequence[Contribution]:
        return self.ledger.contributions if self.ledger else ()


@dataclass
class Hashes:
    """The hashes of what has no commits, by place and version: a folder that stays as it is is read once."""

    _known: dict[str, tuple[str, Mapping[str, str] | None]] = field(default_factory=dict)

    def of(self, ref: AdapterRef, version: str, rooms: Rooms, reading: Reading) -> Mapping[str, str] | None:
        """The sha256 of each file at `ref`; None where it is no adapter."""
        known = self._known.get(ref.place)
        if known is None or known[0] != version:
            self._known[ref.place] = known = (version, _hashes(ref, rooms, reading))
        return known[1]


def place_of(onto: str | Path) -> Place:
    """The place that `onto` names.

    Raises:
        UsageError: it is neither a folder nor a repository without a revision.
    """
    with open_rooms() as rooms:
        kind = rooms.kind(onto)
        if kind == "folder":
            return Place(str(Path(onto).resolve()), on_hub=False)
    repo = str(onto).removeprefix("hf://").removeprefix("models/")
    if kind != "repository" or "@" in repo:
        raise UsageError(f"--onto takes a folder or a repository, as it is now; {onto} is neither.")
    return Place(repo, on_hub=True)


def global_now(place: Place, before: Now, reading: Reading) -> Now:
    """The global adapter as it is now; of a repository that has not moved since `before`, that.

    Raises:
        RefusedError: what is there is no global adapter.
        NetworkError: the Hub cannot be reached.
    """
    if place.on_hub:
        return _on_the_hub(place.name, before, reading)
    folder = Path(place.name)
    return Now(ledger_in(folder, place.name)) if is_there(folder) else Now()


def _on_the_hub(repo: str, before: Now, reading: Reading) -> Now:
    from lora_merge.checkpoint.peft_folder import WEIGHTS_NAME
    from lora_merge.hub.session import hub_session  # half a second that folders need not wait
    from lora_merge.publish.repository import Target, head_of
    from lora_merge.sources.hub_cache import fetch_file
    from lora_merge.sources.listing import listing

    with hub_session(reading.max_wait, reading.tell) as api:
        head = head_of(api, Target(repo))
        if head is None or head.commit == before.commit:
            return Now() if head is None else before
        commit, files = listing(api, repo, head.commit)
        if LEDGER_NAME not in files:
            if WEIGHTS_NAME in files:
                raise RefusedError([Problem(repo, LEDGER_NAME, "is not there, so this is no global adapter")])
            return Now(None, commit)
        try:
            path = fetch_file(repo, commit, files[LEDGER_NAME], lambda count: None)
        except FolderRefused as error:
            raise RefusedError(error.problems(repo)) from error
        return Now(ledger_in(path.parent, repo), commit)


def sighted(rooms: Rooms, sources: Iterable[str | Path], place: Place) -> tuple[list[AdapterRef], list[str]]:
    """The adapters that the sources name now, but the global one itself; and why some name none."""
    refs: dict[str, AdapterRef] = {}
    absent = []
    for source in sources:
        try:
            refs |= {_path(ref): ref for ref in rooms.expand([source])}
        except NotFoundError as error:
            absent.append(error.message)
    refs.pop(place.name, None)
    return list(refs.values()), absent


def _path(ref: AdapterRef) -> str:
    """What a place is known by, whichever source names it."""
    return ref.place if ref.commit or "://" in ref.place else str(Path(ref.place).resolve())


def of_same_source(ref: AdapterRef, contributions: Iterable[Contribution]) -> list[Contribution]:
    """What came from where `ref` is."""
    return [
        each for each in contributions if (each.commit is None) == (ref.commit is None) and came_from(each.source, ref)
    ]


def is_in(ref: AdapterRef, same: Sequence[Contribution], hashes: Mapping[str, str] | None) -> bool:
    """Whether what is at `ref` is what went in from there: at the same commit, or without commits by its hashes."""
    if ref.commit:
        return any(each.commit == ref.commit for each in same)
    return any(dict(each.sha256) == dict(hashes or {}) for each in same)


def _hashes(ref: AdapterRef, rooms: Rooms, reading: Reading) -> Mapping[str, str] | None:
    try:
        [folder] = rooms.fetch(rooms.examine([ref]), reading.progress)
        with closing(open_folder(folder)) as adapter:
            return adapter.sha256()
    except (FolderRefused, RefusedError, NotFoundError):
        return None  # folding it will say why

"""Who takes part in a merge: exclusions, allow-lists, claimed ids. Everybody left out is named with the reason."""

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from lora_merge.checkpoint.peft_folder import LEDGER_NAME
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError, one_line
from lora_merge.ledger import LeftOut
from lora_merge.screening.stops import Screening
from lora_merge.sources.addresses import Entry, addresses_of
from lora_merge.sources.filesystems import told
from lora_merge.sources.reference import AdapterRef, Candidate

LONGEST_REASON = 400  # characters; a ledger takes short texts
FEW = 3  # refused ones that a hint names


@dataclass
class Selection:
    """Collects who is left out of a merge; the refused stop it, unless the user said to go on without them.

    Attributes:
        others: how many take part in any case, since they are in already.
        gone: every name that those who are left out go by.
        problems: why the refused are.
        hints: what the user may do about that, each once.
        taking_part: who is neither excluded nor unlisted, be it refused, by the name that its problems have.
    """

    screening: Screening
    others: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)
    taking_part: dict[str, AdapterRef] = field(default_factory=dict)

    def leave_out(self, ref: AdapterRef, reason: str, client: str | None = None) -> None:
        """Name an adapter that is not merged, by the user's own choice."""
        self.gone |= {ref.source, ref.place, ref.given, client or ref.source}
        self.left_out.append(LeftOut(one_line(ref.source)[:LONGEST_REASON], one_line(reason)[:LONGEST_REASON]))

    def refuse(
        self, ref: AdapterRef, problems: Sequence[Problem], client: str | None = None, *, hint: str = ""
    ) -> None:
        """Name an adapter that is not merged, since something is wrong with it."""
        self.problems += problems
        self.hints |= {hint: None} if hint else {}
        reasons = "; ".join(f"{problem.field}: {problem.reason}" for problem in sorted(set(problems)))
        self.leave_out(ref, reasons, client)

    @property
    def notes(self) -> list[str]:
        """A line for each that was left out."""
        return [f"{each.source} is left out: {each.reason}." for each in sorted(self.left_out)]

    def require(self, remaining: int) -> None:
        """Raise `RefusedError` with all that was refused so far, unless others remain and may go on without them."""
        goes_on = remaining + self.others > 0
        if self.problems and not (self.screening.skip_rejected and goes_on):
            gone = sorted({problem.client for problem in self.problems})
            who = ", ".join(gone) if len(gone) <= FEW else f"these {len(gone)}"
            skip = [f"To merge the others without {who}: --skip-rejected."] if goes_on else []
            raise RefusedError(self.problems, hint=" ".join([*self.hints, *skip]))


@dataclass(frozen=True)
class Lists:
    """The user's lists: of who is excluded, and of who is allowed; None where everybody is."""

    exclude: Sequence[Entry]
    allowed: Sequence[Entry] | None

    def excluded(self, refs: Iterable[AdapterRef]) -> dict[AdapterRef, str]:
        """What excludes each adapter that an entry does, by its place or its source's name; for the record."""
        at = {ref: addresses_of(ref) for ref in refs}
        found: dict[AdapterRef, str] = {}
        for entry in self.exclude:
            called_so = [ref for ref in at if _matching([entry.text], _names(ref))]
            found = dict.fromkeys((*entry.named(at), *called_so), entry.recorded) | found
        return found

    def allow(self, ref: AdapterRef) -> bool:
        """Whether an adapter may take part: by its place alone, since folders of one name are many."""
        at = addresses_of(ref)
        return self.allowed is None or any(entry.means(at) for entry in self.allowed)


def lists_of(screening: Screening) -> Lists:
    """The lists, read; the errors of `read_list`."""
    allowed = read_list(screening.allow_list)
    return Lists([*map(Entry, screening.exclude)], None if allowed is None else [*map(Entry, allowed)])


def listed(refs: Sequence[AdapterRef], selection: Selection, lists: Lists | None = None) -> list[AdapterRef]:
    """Those that are not excluded and are on the allow-list, as far as their source says; nothing of them is read.

    Args:
        lists: those of the selection, where they were read already.
    """
    lists = lists or lists_of(selection.screening)
    excluded = lists.excluded(refs)
    taking_part = []
    for ref in refs:
        if entry := excluded.get(ref):
            selection.leave_out(ref, f"excluded by {entry}")
        elif not lists.allow(ref):
            selection.refuse(ref, [Problem(ref.source, "allow-list", "is not on it")])
        else:
            taking_part.append(ref)
    return taking_part


def clients_among(candidates: Sequence[Candidate], selection: Selection) -> list[Candidate]:
    """Those that are clients' adapters: a merged one may hold the very clients that it would be merged with."""
    if selection.screening.allow_merged:
        return list(candidates)
    clients = []
    for candidate in candidates:
        if LEDGER_NAME not in candidate.files:
            clients.append(candidate)
            continue
        ref, reason = candidate.ref, "is that of a merged adapter, and only clients' adapters are merged"
        hint = (
            f"Name the clients of {ref.source} themselves, or bring others into it: --onto {shlex.quote(ref.place)}. "
            "Where none of them is here too, it may be one more client: --allow-merged."
        )
        selection.refuse(ref, [Problem(ref.source, LEDGER_NAME, reason)], hint=hint)
    return clients


def by_client_id(candidates: Sequence[Candidate], selection: Selection) -> dict[str, Candidate]:
    """Those that take part by their client ids, sorted by them; an id that two sources claim is refused."""
    claims: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        ref, client = candidate.ref, client_id(candidate)
        if entry := _matching(selection.screening.exclude, [client]):
            selection.leave_out(ref, f"{client} is excluded by {entry}", client)
        else:
            claims.setdefault(client, []).append(candidate)
    return {client: owner for client in sorted(claims) if (owner := _owner(client, claims[client], selection))}


def unused_exclusions(
    refs: Sequence[AdapterRef], candidates: Sequence[Candidate], exclude: Sequence[str], known: Collection[str] = ()
) -> list[str]:
    """The exclusions that are nobody's source or client id.

    Args:
        known: names of clients that are in already.
    """
    at = {ref: addresses_of(ref) for ref in refs}
    names = [*(name for ref in refs for name in _names(ref)), *map(client_id, candidates), *known]
    repositories = frozenset(f"hf://{name}" for name in known)
    return [
        entry.text
        for entry in map(Entry, exclude)
        if not (_matching([entry.text], names) or entry.named(at) or entry.means(repositories))
    ]


def require_exclusions_used(
    refs: Sequence[AdapterRef], candidates: Sequence[Candidate], exclude: Sequence[str], known: Collection[str] = ()
) -> None:
    """Raise `UsageError` for an exclusion that excludes nobody: a slip there would let somebody in."""
    for entry in unused_exclusions(refs, candidates, exclude, known):
        raise UsageError(f"--exclude {told(entry)} is none of the sources or client ids.")


def client_id(candidate: Candidate) -> str:
    """The id that an adapter states, or the name of where it came from."""
    statement = candidate.description.statement
    return statement.client_id if statement else candidate.ref.source


def is_folder(ref: AdapterRef) -> bool:
    """Whether an adapter lies on this machine."""
    return ref.commit is None and "://" not in ref.place


def read_list(path: str | Path | None) -> list[str] | None:
    """The entries of an allow-list: one a line, `#` begins a comment; None where no list is given.

    An entry is what names a source on the command line (a path goes on from the present folder), `SOURCE@COMMIT`, or a
    pattern of them (`org/hospital-*`); it is no client id, since anybody can state any id.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it lists nobody, or is no text.
    """
    if path is None:
        return None
    if Path(path).is_dir():
        raise UsageError(f"The allow-list {path} is a folder.", hint="--allow-list takes a file: one source a line.")
    if not Path(path).is_file():
        raise NotFoundError(f"No such allow-list: {path}.", hint="--allow-list takes a file: one source a line.")
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"The allow-list {path} is not UTF-8 text.") from error
    if not any(lines):
        raise UsageError(f"The allow-list {path} lists nobody.", hint="One source a line, as in org/hospital-*.")
    return [line for line in lines if line]


def _names(ref: AdapterRef) -> list[str]:
    """What an exclusion may call an adapter by, beside where it lies."""
    names = [ref.source, ref.place]
    return [*names, f"{ref.source}@{ref.commit}"] if ref.commit else names


def _matching(entries: Iterable[str], names: Iterable[str]) -> str | None:
    """The first entry that is, or matches, one of the names; `./b` and `../b` are paths, and nobody is called so."""
    names = list(names)
    called = [entry for entry in entries if not entry.startswith(("./", "../"))]
    forms = {entry: entry.rstrip("/") for entry in called}  # a shell completes folders with a slash
    fits = (e for e, form in forms.items() if any(form == name or fnmatchcase(name, form) for name in names))
    return next(fits, None)


def _owner(client: str, claims: Sequence[Candidate], selection: Selection) -> Candidate | None:
    """Whose the id is: of several, the repository of that name; with none of that name, nobody's."""
    if len(claims) == 1:
        return claims[0]
    owner = next((each for each in claims if each.ref.commit and each.ref.source == client), None)
    hint = _way_past(client, [each.ref.source for each in claims if each is not owner], is_owned=owner is not None)
    for each in claims:
        if each is not owner:
            others = ", ".join(other.ref.source for other in claims if other is not each)
            problem = Problem(each.ref.source, "client_id", f"{client} is claimed by {others} too")
            selection.refuse(each.ref, [problem], hint=hint)
    return owner


def _way_past(client: str, sources: Sequence[str], *, is_owned: bool) -> str:
    """How to exclude `sources` that claim an id: those that an exclusion would not take for the id itself."""
    exclude = ", ".join(f"--exclude {shlex.quote(each)}" for each in sources if not _matching([each], [client]))
    if not exclude:
        return ""
    aim = "leave out who else claims it" if is_owned else "keep one that claims it, leave out the others"
    return f"{client}: to {aim}: {exclude}."

"""What push and aggregate would say of one adapter: all that they would refuse, at once, before anything is sent."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.sketch import Sketched
from lora_merge.agreement import claim_warnings
from lora_merge.checkpoint.peft_folder import FolderRefused, PeftFolder, open_folder
from lora_merge.errors import Problem, Refusals, RefusedError, UsageError, one_line
from lora_merge.folding.global_adapter import clients_in
from lora_merge.intake import Reading
from lora_merge.publish.files import left_out
from lora_merge.publish.prepare import Prepared, prepare
from lora_merge.publish.push import own_secrets
from lora_merge.screening.measuring import read_all
from lora_merge.screening.report import problems_in
from lora_merge.screening.selection import is_folder
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import Rooms, open_rooms

UNNAMED = "org/adapter"  # the repository that is not known yet; only the card, which is thrown away, would name it


@dataclass(frozen=True)
class Refusal:
    """One thing that is wrong: where, why, and which commands would refuse the adapter for it."""

    field: str
    reason: str
    by: Sequence[str]


@dataclass(frozen=True)
class Checked:
    """One adapter as others would see it; None where it could not be read so far.

    Attributes:
        source: what a merge's record would call it; `place`: the folder's path, the repository or the URL.
        merged_of: how many clients it was merged of; None of a client's own adapter.
        norm: of its update, as far as it has a size without the base model.
        left_out: files beside it that push would not publish.
        hint: what to do about the refusals.
    """

    source: str
    place: str
    commit: str | None
    client_id: str | None = None
    merged_of: int | None = None
    num_examples: int | None = None
    base_model: str | None = None
    modules: int | None = None
    norm: float | None = None
    refusals: Sequence[Refusal] = ()
    warnings: Sequence[str] = ()
    left_out: Sequence[str] = ()
    hint: str = ""


def check(source: str, reading: Reading) -> Checked:
    """Read one adapter as `aggregate` would, and prepare it as `push` would; nothing is written or sent.

    Of an adapter on the Hub, only the files that a merge reads are looked at.

    Raises:
        NotFoundError: there is no such adapter, or it may not be read.
        UsageError: the source names more than one.
        NetworkError: the Hub cannot be reached.
    """
    with open_rooms(reading.max_wait, reading.tell, reading.pins) as rooms:
        refs = rooms.expand([source])
        if len(refs) != 1:
            hint = "To look at several: lora-merge inspect SOURCES."
            raise UsageError(f"{one_line(source)} names {len(refs)} adapters.", hint=hint)
        merging, pushing = Refusals(), Refusals()
        with _folder(rooms, refs[0], reading, merging) as folder:
            found = Checked(refs[0].source, refs[0].place, refs[0].commit)
            if folder is None:
                warning = "it was not downloaded, so neither its values were read nor was it searched for secrets."
                return replace(found, refusals=_together(merging, pushing), warnings=[warning])
            with merging.noted(), _opened(folder, refs[0]) as adapter:
                found = _with_facts(found, adapter, _norm(adapter, refs[0].source, merging))
            if found.modules is None:  # it did not open: its values are looked at all the same
                with pool() as threads:
                    merging.problems += problems_in(folder, refs[0].source, threads)
            prepared = None
            with pushing.noted():
                prepared = prepare(folder, UNNAMED, own=own_secrets())
            found = replace(found, left_out=left_out(folder) if folder.is_dir() else [])
        return _concluded(found, prepared, merging, pushing)


@contextmanager
def _folder(rooms: Rooms, ref: AdapterRef, reading: Reading, refusals: Refusals) -> Iterator[Path | None]:
    """The adapter as plain files in a folder; None where it is refused before it is downloaded."""
    if is_folder(ref):
        yield Path(ref.place)
        return

    def refuse(item: object, problems: Sequence[Problem]) -> None:
        refusals.problems += problems

    candidates = rooms.examine([ref], refuse)
    folders = rooms.fetch(candidates, reading.progress, refuse) if candidates else []
    if not folders:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="lora-merge-check-") as name:
        for file in candidates[0].files:
            _plain_copy(folders[0] / file, Path(name) / file)
        yield Path(name)


def _plain_copy(source: Path, target: Path) -> None:
    """The cache holds links, which push does not follow: the file itself, by another name where that can be."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:  # another file system
        shutil.copyfile(real, target)


@contextmanager
def _opened(folder: Path, ref: AdapterRef) -> Iterator[PeftFolder]:
    try:
        adapter = open_folder(folder)
    except FolderRefused as error:
        raise RefusedError(error.problems(ref.source)) from error
    with closing(adapter):
        yield adapter


def _norm(adapter: PeftFolder, source: str, refusals: Refusals) -> float | None:
    """The norm of an update whose values are all numbers; those that are none are refused."""
    sketched = Sketched(adapter)
    with pool() as threads:
        problems = read_all({source: sketched}, {source: adapter}, threads).get(source, [])
    refusals.problems += problems
    norm = None if problems else sketched.norm
    return float(f"{norm:.6g}") if norm is not None and math.isfinite(norm) else None


def _with_facts(found: Checked, adapter: PeftFolder, norm: float | None) -> Checked:
    stated = adapter.statement
    found = replace(
        found,
        client_id=stated.client_id if stated else None,
        merged_of=clients_in(adapter.folder, found.source),
        num_examples=stated.num_examples if stated else None,
        base_model=adapter.config.base_model,
        modules=len(adapter.specs),
        norm=norm,
    )
    return replace(found, warnings=[*_claims(found), *claim_warnings({found.client_id or found.source: adapter})])


def _claims(found: Checked) -> Iterator[str]:
    if found.client_id is None and found.merged_of is None:
        yield "it has no lora_merge.json: in a merge it goes by where it lies."
    elif found.commit and found.client_id not in (None, found.source):
        yield f"it states the client id {found.client_id}, and lies in {found.source}."
    if found.num_examples is None and found.merged_of is None:
        yield "it states no num_examples: aggregate needs --weights for it."
    if found.num_examples == 0:
        yield "it states num_examples 0: weighed by examples, it counts for nothing in a merge."
    if found.base_model is None:
        yield "adapter_config.json names no base model, so nobody will know what this adapter belongs to."


def _concluded(found: Checked, prepared: Prepared | None, merging: Refusals, pushing: Refusals) -> Checked:
    said = [*found.warnings, *(prepared.warnings if prepared else [])]
    return replace(
        found,
        refusals=_together(merging, pushing),
        warnings=list(dict.fromkeys(said)),
        hint=pushing.hint or merging.hint,
    )


def _together(merging: Refusals, pushing: Refusals) -> list[Refusal]:
    """Each reason once, with who would give it."""
    by: dict[tuple[str, str], list[str]] = {}
    for name, refusals in (("aggregate", merging), ("push", pushing)):
        for problem in sorted(set(refusals.problems)):
            names = by.setdefault((problem.field, problem.reason), [])
            names += [name] if name not in names else []
    return [Refusal(field, reason, names) for (field, reason), names in by.items()]

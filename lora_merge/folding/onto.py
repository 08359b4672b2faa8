"""`aggregate --onto`: late arrivals, replacements and withdrawals, brought into a global adapter that exists."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_merge.aggregation.registry import Rank
from lora_merge.aggregation.weights import Weights
from lora_merge.checkpoint.folder import alone_beside, check_free, remove_leftovers, scratch_folder
from lora_merge.checkpoint.overwriting import require_apart, require_outside_adapters
from lora_merge.checkpoint.planned import CertificateMode
from lora_merge.errors import NetworkError, NotFoundError, UsageError, one_line
from lora_merge.folding.corridor import UNSIGNED, Fold, fold_folder
from lora_merge.folding.how import How, Located, is_there
from lora_merge.folding.plan import FoldPlan, plan_of
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most
from lora_merge.intake import Reading
from lora_merge.lock import SIGNATURE_NAME
from lora_merge.options import require_sound
from lora_merge.screening.stops import SCREENED, Screening
from lora_merge.sources.local import folders_named, nor_a_folder
from lora_merge.sources.reference import Progress, Tell
from lora_merge.sources.rooms import open_rooms

__all__ = ["Fold", "FoldPlan", "fold", "plan"]


def fold(
    sources: Sequence[str | Path],
    onto: str | Path,
    *,
    withdraw: Sequence[str] = (),
    output: str | Path | None = None,
    private: bool | None = None,
    method: str | None = None,
    rank: Rank | None = None,
    energy: float | None = None,
    weights: Weights | None = None,
    global_lr: float | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    certificate: CertificateMode | None = None,
    workers: int | None = None,
    force: bool = False,
    screening: Screening | None = SCREENED,
    max_wait: float = MAX_WAIT,
    tell: Tell = lambda line: None,
    progress: Progress = lambda what, total, unit: nullcontext(lambda steps: None),
) -> Fold:
    """Bring what is new in `sources` into the global adapter `onto`, which is made where there is none.

    An update that is in at the same commit (without commits: with the same files) is nothing new; at another commit it
    takes the old one's place. For `exact` the bytes are those of one merge of the same clients. A truncated mean
    without a core is merged again where the sources name all who are in it.

    Args:
        onto: a folder, or a repository of the Hub. Options that are None are as it was made with; others must be so.
        withdraw: clients to take out, by id or source.
        output: the folder to write the result to, or a copy of `onto` where nothing is new. Without it, the result
            takes the place of the folder `onto` in one step, or is published to the repository on top of the commit
            that was read.
        private: of a repository that is made now; None is private.
        base: of a merge of all clients again, where that is needed.
        force: replace the merged adapter that is at `output`.
        screening: which arrivals to leave out, and what stops them, held against those that are in; None where nothing
            is to.

    Raises:
        UsageError: an option is wrong or contradicts the global adapter, or nobody would be left in it.
        RefusedError: an arrival is refused, or the global adapter's own files contradict each other.
        NotFoundError: a source names nothing, or all must be merged again and some client's files are gone.
        ConflictError: somebody else has changed `onto` meanwhile.
        And what `lora_merge.pipeline.aggregate` raises. On every error `onto` is as it was.

    Example:
        >>> fold(["client-3"], "global", withdraw=["org/client-1"])  # doctest: +SKIP
    """
    given = {"method": method, "rank": rank, "energy": energy, "global_lr": global_lr, "dtype": dtype}
    chosen = {name: value for name, value in given.items() if value is not None}
    how = How(chosen, weights, base, device, certificate, workers, screening, force and output is not None)
    require_sound(1.0 if global_lr is None else global_lr, workers)
    option = "--onto" if output is None else "--output"
    require_apart(Path(onto if output is None else output), folders_named(sources), option)
    if output is not None:
        check_free(Path(output), force=force)
    reading = Reading(max_wait, tell, progress)
    with waiting_at_most(max_wait):
        located = _located(onto, reading)
        if output is not None or not _is_repository(located):
            target = Path(onto) if output is None else Path(output)
            require_outside_adapters(target, option)
            return fold_folder(sources, replace(located, given=Path(onto)), target, withdraw, how, reading)
        with scratch_folder() as scratch:
            made = fold_folder(sources, located, scratch / "global", withdraw, how, reading)
            if not made.changed:
                return replace(made, output=Path(located.place))
            return _published(made, located, private, reading)


def plan(
    sources: Sequence[str | Path],
    onto: str | Path,
    *,
    withdraw: Sequence[str] = (),
    weights: Weights | None = None,
    screening: Screening | None = SCREENED,
    max_wait: float = MAX_WAIT,
    tell: Tell = lambda line: None,
    **chosen: Any,
) -> FoldPlan:
    """What `fold` of the same arguments would do; nothing is written.

    Args:
        chosen: method, rank, energy, global_lr, dtype, as of `fold`.

    Raises:
        NotFoundError: there is no global adapter yet; and what `fold` raises before it reads weights.
    """
    reading = Reading(max_wait, tell)
    with waiting_at_most(max_wait):
        located = _located(onto, reading)
        if located.folder is None:
            hint = "For what its first merge would read: the same command without --onto."
            raise NotFoundError(f"There is no global adapter {located.place} yet.", hint=hint)
        return plan_of(sources, located, withdraw, How(chosen, weights, screening=screening), reading)


def _is_repository(located: Located) -> bool:
    return located.commit is not None


def _located(onto: str | Path, reading: Reading) -> Located:
    """Where the global adapter lies; a repository's files are fetched at its head."""
    with open_rooms(reading.max_wait, reading.tell) as rooms:
        kind = rooms.kind(onto)
        if kind == "folder":
            folder = Path(onto).absolute()
            if folder.parent.is_dir():
                with alone_beside(folder, reading.tell):
                    remove_leftovers(folder)  # of a killed fold: the next one may find nothing new, and write nothing
            return Located(folder if is_there(folder) else None, str(folder.resolve()))
        repo = str(onto).removeprefix("hf://").removeprefix("models/")
        if kind != "repository" or "@" in repo:
            raise UsageError(f"--onto takes a folder or a repository, as it is now; {onto} is neither.")
        from lora_merge.publish.onto import head_with_adapter  # half a second that folders need not wait

        try:
            commit, has_adapter = head_with_adapter(repo, max_wait=reading.max_wait, tell=reading.tell)
        except NetworkError as error:
            if repo != str(onto):
                raise
            error.hint = f"A folder that is to be made: --onto ./{onto}. Of the Hub: {error.hint}"
            raise nor_a_folder([repo], error) from error
        if not has_adapter:
            return Located(None, repo, commit)
        candidates = rooms.examine(rooms.expand([f"hf://{repo}@{commit}"]))
        return Located(rooms.fetch(candidates, reading.progress)[0], repo, commit)


def _published(made: Fold, located: Located, private: bool | None, reading: Reading) -> Fold:
    """Publish what was made on top of the commit that was read, or not at all."""
    from lora_merge.publish.push import push
    from lora_merge.publish.repository import Target

    target = Target(located.place, private=private, parent=located.commit)
    names = [f"{what} {', '.join(who)}" for what, who in _changes(made) if who] or ["merge all again"]
    message = one_line(f"Fold: {'; '.join(names)}")[:200]  # a ledger may be a stranger's
    pushed = push(made.output, target, message=message, max_wait=reading.max_wait, tell=reading.tell)
    unsigned = [UNSIGNED] if SIGNATURE_NAME in pushed.published.removed else []
    return replace(made, output=Path(located.place), published=pushed, warnings=[*made.warnings, *unsigned])


def _changes(made: Fold) -> list[tuple[str, Sequence[str]]]:
    return [("add", made.added), ("replace", made.replaced), ("withdraw", made.withdrawn)]

"""The files of clients that are in a global adapter already, read again where blocks or means do not do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from lora_merge.checkpoint.peft_folder import FolderRefused, PeftFolder, open_folder
from lora_merge.errors import NotFoundError, RefusedError
from lora_merge.intake import Reading
from lora_merge.ledger import Contribution
from lora_merge.sources.reference import Candidate
from lora_merge.sources.rooms import Rooms


@contextmanager
def reopened(
    rooms: Rooms, contributions: Sequence[Contribution], at_hand: Mapping[str, PeftFolder], reading: Reading, why: str
) -> Iterator[dict[str, PeftFolder]]:
    """The open folder of each contribution, by client id: of those at hand, else from its source at its commit.

    Raises:
        NotFoundError: one is gone, or is not what went in.
    """
    missing = [each for each in contributions if each.client_id not in at_hand]
    with ExitStack() as stack:
        try:
            found = dict(at_hand) | {
                each.client_id: folder for each, folder in _fetched(rooms, missing, reading, stack)
            }
        except (NotFoundError, RefusedError) as error:
            raise _gone(why, str(error.message)) from error
        yield {each.client_id: found[each.client_id] for each in contributions}


def _fetched(
    rooms: Rooms, missing: Sequence[Contribution], reading: Reading, stack: ExitStack
) -> Iterator[tuple[Contribution, PeftFolder]]:
    candidates = candidates_again(rooms, missing)
    folders = rooms.fetch(candidates, reading.progress)
    for each, path in zip(missing, folders, strict=True):
        try:
            folder = open_folder(path)
        except FolderRefused as error:
            raise RefusedError(error.problems(each.source)) from error
        stack.callback(folder.close)
        if folder.sha256() != dict(each.sha256):
            raise NotFoundError(f"{each.source} is not what went in: its files' hashes are others.")
        yield each, folder


def candidates_again(rooms: Rooms, missing: Sequence[Contribution]) -> list[Candidate]:
    """The adapters that went in, at their commits; raises `NotFoundError` where one cannot be found by its source."""
    # A URL is opened only where the user names it: a stranger's record could send us to any host or file.
    if lost := [each.source for each in missing if not each.commit]:
        named = ", ".join(lost[:5])
        raise NotFoundError(
            f"Folders are known by their hashes and not by their paths, and URLs are not opened: {named}."
        )
    return rooms.examine(rooms.expand([f"hf://{each.source}@{each.commit}" for each in missing])) if missing else []


def _gone(why: str, reason: str) -> NotFoundError:
    return NotFoundError(
        f"Nothing was changed. All clients must be merged again, since {why}; but not all are there: {reason}",
        hint="Name the clients' folders among the sources too, or merge what is left of them anew.",
    )

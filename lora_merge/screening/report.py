"""One report of all that is wrong: where anybody is refused, the values of all who take part are read too."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint.peft_folder import WEIGHTS_NAME, PeftFolder
from lora_merge.checkpoint.safetensors_file import FileRefused, open_safetensors
from lora_merge.errors import Problem, RefusedError
from lora_merge.screening.measuring import value_problems
from lora_merge.screening.selection import Selection, is_folder
from lora_merge.sources.reference import AdapterRef, Progress

MOST_READ = 1 << 33  # bytes of a file that was refused: 8 GB, or some ten seconds


@contextmanager
def whole_report(selection: Selection, opened: Mapping[str, PeftFolder], progress: Progress) -> Iterator[None]:
    """Where what is inside refuses somebody, look for NaN and infinity in all files at hand, before that is said.

    Nothing is downloaded for it, and where nobody is refused nothing more is read.

    Args:
        selection: knows who takes part.
        opened: those whose files are open already; of the others, what lies in folders on this machine is read.

    Raises:
        RefusedError: with what was refused inside, and every tensor of everybody's that holds NaN or infinity.
    """
    try:
        yield
    except RefusedError as error:
        clients = selection.taking_part
        with pool() as threads, progress("Reading values", len(clients), "clients") as advance:
            for client, ref in clients.items():
                found = _value_problems(client, ref, opened.get(client), threads)
                if new := [problem for problem in found if problem not in selection.problems]:
                    selection.refuse(ref, new, client)
                advance(1)
        raise _with_all_refused(error, selection) from error


def _value_problems(
    client: str, ref: AdapterRef, folder: PeftFolder | None, threads: ThreadPoolExecutor
) -> list[Problem]:
    if folder is not None:
        return value_problems(client, folder.file, threads)
    return problems_in(Path(ref.place), client, threads) if is_folder(ref) else []


def problems_in(folder: Path, client: str, threads: ThreadPoolExecutor) -> list[Problem]:
    """What the values in an adapter's folder are refused for, whatever else is wrong with it.

    None where its weights do not open, since that is a problem of its own; nor of a file so large that reading it only
    to say more of what is refused anyway would take long.
    """
    try:
        with closing(open_safetensors(folder / WEIGHTS_NAME)) as file:
            return value_problems(client, file, threads) if file.size <= MOST_READ else []
    except (FileRefused, OSError):
        return []


def _with_all_refused(error: RefusedError, selection: Selection) -> RefusedError:
    """`error` together with all that `selection` has refused, and the ways on from both."""
    remaining = [ref for ref in selection.taking_part.values() if ref.place not in selection.gone]
    try:
        selection.require(len(remaining))
    except RefusedError as whole:
        its_own = "" if {*error.problems} <= {*whole.problems} else error.hint
        hint = " ".join(hint for hint in (its_own, whole.hint) if hint)
        return RefusedError([*error.problems, *whole.problems], hint=hint)
    return RefusedError(error.problems, hint=error.hint)

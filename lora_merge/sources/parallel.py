"""The same work for many adapters, eight at a time, with every client's trouble told at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeAlias, TypeVar

from lora_merge.checkpoint.peft_folder import FolderRefused
from lora_merge.errors import MAX_SHOWN, NotFoundError, Problem, RefusedError
from lora_merge.interrupts import leave_to_main

THREADS = 8
T = TypeVar("T")
R = TypeVar("R")
Refused: TypeAlias = Callable[[T, Sequence[Problem]], None]


def for_each(
    work: Callable[[T], R],
    items: Sequence[T],
    name: Callable[[T], str],
    interrupt: Callable[[], None],
    refused: Refused[T] | None = None,
) -> list[R]:
    """`work` of every item, in their order.

    Args:
        name: whose item it is, for problems.
        interrupt: makes the work under way end soon; called where going on is useless, and on Ctrl-C.
        refused: takes each item that was refused with its problems, and the others are gone on with.

    Raises:
        RefusedError: with the problems of all items that were refused.
        NotFoundError: naming all items that are not there.
        NetworkError, StorageError: of the first item that failed so; what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="lora-merge-source", initializer=leave_to_main)
    try:
        futures = [pool.submit(_settled, work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        interrupt()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return _whole(futures, items, name, refused)


def _settled(work: Callable[[T], R], item: T) -> R | FolderRefused | NotFoundError:
    """The result, or what only concerns this item."""
    try:
        return work(item)
    except (FolderRefused, NotFoundError) as error:
        return error


def _whole(
    futures: Sequence[Future[R | FolderRefused | NotFoundError]],
    items: Sequence[T],
    name: Callable[[T], str],
    refused: Refused[T] | None,
) -> list[R]:
    results: list[R] = []
    missing: list[NotFoundError] = []
    problems: list[Problem] = []
    for future, item in zip(futures, items, strict=True):
        result = future.result()
        if isinstance(result, FolderRefused) and refused is not None:
            refused(item, result.problems(name(item)))
        elif isinstance(result, FolderRefused):
            problems += result.problems(name(item))
        elif isinstance(result, NotFoundError):
            missing.append(result)
        else:
            results.append(result)
    if missing:
        raise _all_missing(missing)
    if problems:
        raise RefusedError(problems)
    return results


def _all_missing(errors: Sequence[NotFoundError]) -> NotFoundError:
    lines = [error.message for error in errors]
    shown = lines[:MAX_SHOWN] + ([f"and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else [])
    return NotFoundError(shown[0], more=shown[1:], hint=next((error.hint for error in errors if error.hint), ""))

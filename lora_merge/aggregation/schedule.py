"""Running one function over all modules: a pool that never changes the bytes.

Work is split by module (or by file), never inside a factorisation and never by client: torch on two threads gives other
bytes for a QR than on one, and partial sums over clients other bytes for a mean.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance: TypeAlias = Callable[[int], None]


def default_workers() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute single-threaded. On an error, or Ctrl-C, what has not begun is dropped."""
    threads = ThreadPoolExecutor(workers or default_workers(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=True, cancel_futures=True)
        raise
    threads.shutdown()


def over(
    threads: ThreadPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task], advance: Advance | None = None
) -> list[Result]:
    """`work` of each task, in the order of `tasks`; `advance(1)` is called as each one is collected.

    When it raises, no task is running any more: what they write to may be closed.
    """
    futures: list[Future[Result]] = []
    results = []
    try:
        for task in tasks:
            futures.append(threads.submit(work, task))
        for future in futures:
            results.append(future.result())
            if advance is not None:
                advance(1)
    except BaseException:
        wait([future for future in futures if not future.cancel()])
        raise
    return results

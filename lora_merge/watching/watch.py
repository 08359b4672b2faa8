"""Watch sources, and bring each arrival into the global adapter: one at a time, so that there is one after each.

All that a watcher has to remember is the global adapter's own ledger. So it may be killed at any moment, and others may
watch for the same one: whoever publishes second is told of a conflict, looks again, and folds what is still missing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge.errors import ConflictError, NetworkError
from lora_merge.intake import Reading
from lora_merge.screening.stops import SCREENED, Screening
from lora_merge.watching.events import Conflict, Event
from lora_merge.watching.pace import Pace
from lora_merge.watching.sight import place_of
from lora_merge.watching.watcher import Watcher

INTERVAL = 15.0  # seconds: two calls of the Hub a look, of 500 in five minutes that it grants to anybody


def watch(
    sources: Sequence[str | Path],
    onto: str | Path,
    *,
    until: int | None = None,
    seconds: float | None = None,
    interval: float = INTERVAL,
    screening: Screening = SCREENED,
    private: bool | None = None,
    options: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Fold each arrival of `sources` into `onto`, as it appears, and yield what happens.

    A network that fails is waited out; an arrival that is refused stays out until its commit (or its files) change.
    Where the stops are at somebody who is in already, it is the arrival that stays out, naming them, until who is in
    changes: others may come in meanwhile, and no arrival can end a watch.

    Args:
        onto: a folder, or a repository of the Hub; it is made by the first arrival where there is none.
        until: end when so many clients are in.
        seconds: end after that time.
        interval: seconds between two looks; doubled while nothing happens, up to ten minutes.
        screening: whom to leave out, and what to allow. Exclusions that are nobody yet are no error.
        private: of a repository that is made now; None is private.
        options: of `lora_merge.fold`, such as method, rank, weights (a rule), base, device.
        wait, clock: how to sleep, and what time it is, in seconds.

    Raises:
        UsageError: an option is wrong, or is not what the global adapter was made with.
        RefusedError: the global adapter itself is refused.
        NotFoundError: it may not be read or written, or is gone.
        StorageError: the disk failed.

    Example:
        >>> for event in watch(["org/client-*"], "org/global", until=10): ...  # doctest: +SKIP
    """
    watcher = Watcher(
        sources, onto, place_of(onto), until, screening, private, dict(options or {}), reading or Reading(), wait, clock
    )
    watcher.require_options(interval, seconds)
    deadline = None if seconds is None else clock() + seconds
    pace = Pace(interval)
    while True:
        found = "nothing"
        try:
            found = yield from watcher.turn()
            pause = pace.after_nothing() if found == "nothing" else 0.0
        except NetworkError as error:
            pause = pace.after_nothing()
            watcher.reading.tell(f"{error.message} The next try is in {pause:.0f} s.")
        except ConflictError as error:
            pause = pace.after_conflict()
            yield Conflict(error.message)
        if found == "enough":
            yield watcher.stopped("clients")
            return
        if found == "arrival":
            pace.arrived()
        if deadline is not None and (left := deadline - clock()) <= pause:
            if left <= 0:
                yield watcher.stopped("time")
                return
            pause = left
        if pause:
            wait(pause)

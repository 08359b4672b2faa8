"""Doing once what may have been done already."""

import time
from collections.abc import Callable
from typing import TypeVar

from lora_merge.errors import ConflictError, NetworkError
from lora_merge.hub.session import patience

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two tries

T = TypeVar("T")


def persist(attempt: Callable[[], T], landed: Callable[[], T | None]) -> T:
    """`attempt` what must not be done twice: after each failure see whether it has `landed`, else wait and try again.

    The waits are of the session's budget, and so is the time that a failure took: a Hub may fail slowly.

    Raises:
        ConflictError: `landed` says so.
        NetworkError: it failed, and no more may be waited.
    """
    seconds = FIRST_WAIT
    while True:
        began = time.monotonic()
        try:
            return attempt()
        except (NetworkError, ConflictError) as error:
            failure = error
        try:
            if (found := landed()) is not None:
                return found
        except NetworkError as error:  # so it is not known; the parent commit keeps the next try from doing it twice
            failure = error
        try:
            patience().wait(seconds, failure.message.rstrip("."), already=time.monotonic() - began)
        except NetworkError as error:
            hint = "Run the same command again: it sees what has been published. --max-wait waits longer."
            raise type(failure)(failure.message, hint=hint) from error
        seconds = min(2 * seconds, LONGEST_WAIT)

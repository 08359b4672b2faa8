"""Moving the content of files within a deadline, and again where the Hub was busy.

Over Xet the last step of an upload has no deadline of its own, nor has a download that comes byte by byte; and a server
that is busy for longer than Xet tries by itself ends in a RuntimeError or a ConnectionError, whatever it asks to wait.
"""

import re
import threading
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import TypeVar

from huggingface_hub.utils._xet import abort_xet_session  # the only way to end a transfer over Xet from outside

from lora_merge.errors import NetworkError
from lora_merge.hub import client, session
from lora_merge.interrupts import leave_to_main

T = TypeVar("T")

_XET_SILENCE = re.compile(r"error sending request for url \(\w+://([^/:)\s]+)")
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b.*?\bdomain: \w+://([^/:\s]+)")


def seconds_for(size: int) -> float:
    """How long moving `size` bytes may take: three calls, as the library tries again, and the time of a slow line."""
    return 3 * client.CALL_SECONDS + size / client.SLOWEST_BYTES_A_SECOND


def moved(size: int, move: Callable[[], T]) -> T:
    """What `move`, which moves `size` bytes, gives; done again where Xet's servers are busy and we may wait.

    Raises:
        NetworkError: it took too long, or no more may be waited.
        Exception: whatever `move` raises.
    """
    for pause in chain(client.BACKOFF, repeat(client.BACKOFF[-1])):
        began = time.monotonic()
        try:
            return within(seconds_for(size), move)
        except (RuntimeError, ConnectionError) as error:
            if silent := _XET_SILENCE.search(str(error)):  # it has asked often enough, and nothing is damaged
                session.patience().budget.book(0, f"{silent[1]} does not answer", already=time.monotonic() - began)
                raise NetworkError(f"{silent[1]} does not answer.", hint="Try again later.") from None
            if (why := _busy(error)) is None:
                raise
        # Xet has waited for us already; before that it may have moved bytes for long.
        tried = min(time.monotonic() - began, session.seconds_of_xet_tries())
        session.patience().wait(pause, why, already=tried, ahead=tried)
    raise AssertionError("unreachable")


def _busy(error: Exception) -> str | None:
    """What a busy server has told Xet, which says so in an error's text only."""
    found = _XET_STATUS.search(str(error))
    return f"{found[2]} answers {found[1]}" if found and int(found[1]) in client.BUSY else None


def within(seconds: float, move: Callable[[], T]) -> T:
    """What `move` gives; it is ended where it takes longer.

    Raises:
        NetworkError: it took longer than `seconds`.
        Exception: whatever `move` raises.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        leave_to_main()
        try:
            results.append(move())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that cannot be ended must not keep the process
    patience, until = session.patience(), time.monotonic() + seconds
    try:
        thread.start()
        while thread.is_alive() and time.monotonic() < until and not patience.has_ended():
            thread.join(0.2)
    except KeyboardInterrupt:
        abort_xet_session()  # type: ignore[no-untyped-call]
        raise
    if thread.is_alive():
        # Also where an interrupt has aborted already: what began just then began in a new session of Xet.
        abort_xet_session()  # type: ignore[no-untyped-call]
        thread.join(5)
        patience.require_going_on()
        raise NetworkError(f"The Hub has not sent or taken a file within {seconds:.0f} s.", hint="Try again later.")
    if failures:
        raise failures[0]
    return results[0]

"""Moving the content of files within a deadline. Over Xet the last step of an upload has none of its own, nor has a
download that comes byte by byte.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.utils._xet import abort_xet_session  # the only way to end a transfer over Xet from outside

from lora_merge.errors import NetworkError
from lora_merge.hub import client
from lora_merge.interrupts import leave_to_main

T = TypeVar("T")


def seconds_for(size: int) -> float:
    """How long moving `size` bytes may take: three calls, as the library tries again, and the time of a slow line."""
    return 3 * client.CALL_SECONDS + size / client.SLOWEST_BYTES_A_SECOND


def within(seconds: float, move: Callable[[], T]) -> T:
    """What `move` gives; it is ended where it takes longer.

    Raises:
        NetworkError: it took longer than `seconds`.
        Exception: whatever `move` raises.
    """
    moved: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        leave_to_main()
        try:
            moved.append(move())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that cannot be ended must not keep the process
    thread.start()
    session, until = client.patience(), time.monotonic() + seconds
    try:
        while thread.is_alive() and time.monotonic() < until and not session.has_ended():
            thread.join(0.2)
    except KeyboardInterrupt:
        abort_xet_session()  # type: ignore[no-untyped-call]
        raise
    if thread.is_alive():
        # Also where an interrupt has aborted already: what began just then began in a new session of Xet.
        abort_xet_session()  # type: ignore[no-untyped-call]
        thread.join(5)
        session.require_going_on()
        raise NetworkError(f"The Hub has not sent or taken a file within {seconds:.0f} s.", hint="Try again later.")
    if failures:
        raise failures[0]
    return moved[0]

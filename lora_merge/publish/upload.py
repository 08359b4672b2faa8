"""Sending the content of large files, within a deadline: over Xet the last step has none of its own."""

import threading
from collections.abc import Callable

from huggingface_hub.utils._xet import abort_xet_session  # the only way to end an upload over Xet from outside

from lora_merge.errors import NetworkError
from lora_merge.hub import client


def seconds_for(size: int) -> float:
    """How long sending `size` bytes may take: three calls, as the library tries again, and the time of a slow line."""
    return 3 * client.CALL_SECONDS + size / client.SLOWEST_BYTES_A_SECOND


def within(seconds: float, send: Callable[[], object]) -> None:
    """Run `send`, and end it where it takes longer.

    Raises:
        NetworkError: it took longer than `seconds`.
        Exception: whatever `send` raises.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            send()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that cannot be ended must not keep the process
    thread.start()
    try:
        thread.join(seconds)
    except KeyboardInterrupt:
        abort_xet_session()  # type: ignore[no-untyped-call]
        raise
    if thread.is_alive():
        abort_xet_session()  # type: ignore[no-untyped-call]
        thread.join(1)
        raise NetworkError(f"The Hub has not taken the files within {seconds:.0f} s.", hint="Try again later.")
    if failures:
        raise failures[0]

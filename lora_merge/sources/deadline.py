"""By when what a server sends has to be here: one that sends a byte now and then never trips a timeout."""

import time

from lora_merge.errors import NetworkError

STALLED = 30.0  # seconds in which nothing comes
SECONDS = 60.0  # what anything may take
SLOWEST_BYTES_A_SECOND = 10_000  # that what takes longer must bring


class Deadline:
    """How long a read may take that begins now."""

    def __init__(self, place: str) -> None:
        self._place, self._began = place, time.monotonic()

    def require(self, count: int) -> None:
        """Raise `NetworkError` where the `count` bytes that have come took too long."""
        if time.monotonic() - self._began > SECONDS + count / SLOWEST_BYTES_A_SECOND:
            raise NetworkError(f"{self._place} sends too slowly.", hint="Try again later.")

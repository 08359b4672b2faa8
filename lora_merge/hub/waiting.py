"""How long a command may wait for a busy Hub: one budget for all its sessions, calls and threads."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from lora_merge.errors import NetworkError, UsageError

Tell: TypeAlias = Callable[[str], None]

MAX_WAIT = 300.0  # seconds: the Hub counts its limits by five minutes


class Budget:
    """The seconds that may be waited: what two threads wait at one time counts once. A wait that is refused ends it.

    Attributes:
        reached: servers that have answered: one that then cannot be reached is on its way back.
    """

    def __init__(self, max_wait: float) -> None:
        if not max_wait >= 0:
            raise UsageError(f"--max-wait must be a number of seconds from 0 up, is {max_wait}.")
        self.max_wait = max_wait
        self.reached: set[bytes] = set()
        self._lock = threading.Lock()
        self._waited = 0.0  # seconds in which somebody waits, those to come until `_until` too
        self._until = 0.0
        self._refused = False  # nobody tries again what a server would not let him try so soon

    @property
    def left(self) -> float:
        """The seconds that are not spent."""
        return max(self.max_wait - self._waited, 0.0)

    def book(self, seconds: float, why: str, already: float = 0.0, ahead: float = 0.0) -> float:
        """Spend a wait of `seconds` that begins now; gives those of them that nobody else waits.

        Args:
            already: seconds up to now that were waited for us; they are spent too.
            ahead: seconds that the try after it may wait for us again, which must be left.

        Raises:
            NetworkError: it would take longer than what is left, or another one was refused for that.
        """
        with self._lock:
            now = time.monotonic()
            self._waited += max(now - max(now - already, self._until), 0.0)
            self._until = max(self._until, now)
            more = max(now + seconds - self._until, 0.0)
            self._refused = self._refused or self._waited + more + ahead > self.max_wait
            if self._refused:
                waited = self._waited - (self._until - now)
                raise NetworkError(
                    f"{why}; gave up after {waited:.0f} s.", hint="Try again later, or raise --max-wait."
                )
            self._waited += more
            self._until = max(self._until, now + seconds)
            return more


_open: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def waiting_at_most(max_wait: float) -> Iterator[Budget]:
    """One budget for all sessions that are opened inside; within another such block, it is that one's.

    So a command that reads, merges and publishes waits no longer than its --max-wait says, and not thrice.
    """
    budget = _open.get() or Budget(max_wait)
    token = _open.set(budget)
    try:
        yield budget
    finally:
        _open.reset(token)


class Patience:
    """The waits of one session, which say so and end with it."""

    def __init__(self, budget: Budget, tell: Tell) -> None:
        self.budget = budget
        self._tell = tell
        self._ended = threading.Event()

    def wait(self, seconds: float, why: str, *, asked: bool = False, already: float = 0.0, ahead: float = 0.0) -> None:
        """Sleep, and say so; at once an error where it would take longer than allowed, or the session ended.

        Args:
            asked: whether a server asks for so many seconds.
            already: seconds that this has taken up to now, by waits which nobody has booked.
            ahead: seconds that the next try may take in the same way.
        """
        self.require_going_on()
        reason = f"{why} and asks to wait {seconds:.0f} s" if asked else why
        # Eight threads that wait for the same limit say it once.
        if self.budget.book(seconds, reason, already, ahead) > min(1.0, seconds / 2):
            self._tell(f"{why}; trying again in {seconds:.0f} s.")
        self._ended.wait(seconds)
        self.require_going_on()

    def require_going_on(self) -> None:
        """Raise where the session has ended, or was interrupted: nobody wants the answer any more."""
        if self._ended.is_set():
            raise NetworkError("The session with the Hub has ended.")

    def has_ended(self) -> bool:
        """Whether the session has ended, or was interrupted."""
        return self._ended.is_set()

    def end(self) -> None:
        """Wake whoever waits, and stop every download at its next bytes."""
        self._ended.set()

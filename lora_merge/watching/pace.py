"""How long to wait between two looks."""

import random
from dataclasses import dataclass

LONGEST = 600.0  # seconds between two looks
CONFLICT, LONGEST_CONFLICT = 0.5, 15.0  # seconds after a conflict, at most; doubled by each that follows


@dataclass
class Pace:
    """Doubles the wait while nothing happens, from `interval` seconds to `LONGEST`, and begins anew after an arrival.

    After a conflict it waits for a random while instead, so that several watchers come apart.
    """

    interval: float
    _quiet: int = 0
    _conflicts: int = 0

    def arrived(self) -> None:
        """Something came in: look again at once, and then often."""
        self._quiet = self._conflicts = 0

    def after_conflict(self) -> float:
        """Seconds to wait after somebody else was quicker."""
        self._conflicts += 1
        return random.uniform(0, min(LONGEST_CONFLICT, CONFLICT * 2.0**self._conflicts))

    def after_nothing(self) -> float:
        """Seconds to wait where there was nothing new, or the network failed."""
        self._quiet += 1
        return min(max(LONGEST, self.interval), self.interval * 2.0 ** min(self._quiet - 1, 30))

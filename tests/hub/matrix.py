"""A matrix of faults: each request of a command x each fault, once and for ever, with Xet and without."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

FAULTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "503": ("status", {}),
    "500": ("status", {"status": 500}),
    "404": ("status", {"status": 404}),
    "403": ("status", {"status": 403}),
    "429, wait 1 s": ("status", {"status": 429, "retry_after": 1}),
    "429, wait an hour": ("status", {"status": 429, "retry_after": 3600}),
    "HTML": ("html", {}),
    "reset": ("reset", {}),
    "stall": ("stall", {}),
    "delay": ("delay", {"seconds": 0.5}),
    "lost": ("lost", {}),
    "truncate": ("truncate", {}),
    "short": ("short", {}),
    "flip": ("flip", {}),
}


@dataclass(frozen=True)
class Case:
    """One fault at one request, once or for ever, with Xet or without."""

    request: str
    fault: str
    times: int | None
    xet: bool

    def __str__(self) -> str:
        return f"{self.request}, {self.fault}, {'once' if self.times else 'for ever'}, {'Xet' if self.xet else 'LFS'}"


class Bench(Protocol):
    """What a case is tried on."""

    def run(self, case: Case) -> str:
        """How the case ended; raises `AssertionError` where it must not end so."""
        ...


def cases_of(requests: Iterable[str]) -> list[Case]:
    """The whole matrix of these requests, by their names."""
    return [Case(*each) for each in product(requests, FAULTS, (1, None), (True, False))]


def run_all(bench: Bench, cases: Iterable[Case]) -> bool:
    """Try every case, print how it ended and how many ended so; whether none failed."""
    ended: Counter[str] = Counter()
    for case in cases:
        began, said = time.monotonic(), ""
        try:
            how = bench.run(case)
        except AssertionError as error:
            how, said = "FAILED", f": {error}"
        ended[how] += 1
        print(f"{time.monotonic() - began:5.1f} s  {case}: {how}{said}", flush=True)
    counts = ", ".join(f"{count} {how}" for how, count in ended.most_common())
    print(f"{ended.total()} cases, {ended['FAILED']} failed: {counts}")
    return not ended["FAILED"]

"""Many mutants in a process of its own, under a limit of memory and of time; what came of them, counted."""

import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.branches import Branch, recorded
from tests.fuzz.subjects import Case, Corpus

SECONDS = 1.0  # of a processor, for the machine may be busy; one that takes longer is tried twice again
GIVEN_UP = 20.0
BYTES = 500 << 20


class Hang(BaseException):
    """A mutant took so long that it was stopped."""


@dataclass
class Report:
    """What came of some mutants.

    Attributes:
        ended: by file and by how.
        met: the refusals, by the place in the source that makes them.
        failed: the mutants that broke a bound, and how.
        slowest: seconds of a processor, and of which mutant.
        peak: bytes that one mutant's judgement took at most above what was in use before, and of which mutant.
        resident: the process's own peak, in bytes.
        merged: the mutants that were accepted and merged.
    """

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    met: Counter[Branch] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    peak: tuple[int, str] = (0, "")
    resident: int = 0
    merged: list[Case] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        self.ended.update(other.ended)
        self.met.update(other.met)
        self.failed += other.failed
        self.merged += other.merged
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)
        self.resident = max(self.resident, other.resident)


def limit_memory() -> None:
    """From here on, this process may have 500 MB more than it has: a bomb ends in MemoryError, and not in swap."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def judge(corpus: Corpus, cases: Sequence[Case]) -> Report:
    """Judge each mutant."""
    report = Report()
    with recorded() as met:
        for case in cases:
            how, seconds, taken = _one(corpus, case)
            for _ in range(2):
                if seconds <= SECONDS or how.startswith("FAILED"):
                    break
                again = _one(corpus, case)
                how, seconds = again[0], min(seconds, again[1])
            if seconds > SECONDS and not how.startswith("FAILED"):
                how = f"FAILED: {seconds:.1f} s"
            if taken > BYTES and not how.startswith("FAILED"):
                how = f"FAILED: {taken >> 20} MB"
            if how.startswith("FAILED"):
                report.failed.append((str(case), how))
                how = "FAILED"
            elif how == "accepted and merged":
                report.merged.append(case)
            report.ended[case.file, how] += 1
            report.slowest = max(report.slowest, (seconds, str(case)))
            report.peak = max(report.peak, (taken, str(case)))
        report.met.update(met)
    report.resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def _one(corpus: Corpus, case: Case) -> tuple[str, float, int]:
    """How a mutant ended, its seconds, and the bytes that it took at most."""
    data = corpus.mutant(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, GIVEN_UP)
    began = time.process_time()
    try:
        how = corpus.judge(case, data)
    except Hang:
        how = f"FAILED: stopped after {GIVEN_UP:.0f} s"
    except Exception as error:
        last = "".join(traceback.format_exception(error)[-4:])
        how = f"FAILED: {type(error).__name__}: {str(error)[:200]}\n{last[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return how, time.process_time() - began, _status("VmHWM") - before


def _stop(number: int, frame: FrameType | None) -> None:
    raise Hang


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


_corpus: Corpus | None = None


def begin(root: Path, scratch: Path) -> None:
    """Set up a process of a pool."""
    global _corpus
    import torch

    torch.set_num_threads(1)
    _corpus = Corpus(root, scratch / str(os.getpid()))
    judge(
        _corpus, [Case(name, seed) for name in ("adapter_model.safetensors", "aggregation.json") for seed in range(20)]
    )
    limit_memory()


def judged(cases: Sequence[Case]) -> Report:
    """In a process of a pool: judge a part of the mutants."""
    assert _corpus is not None
    return judge(_corpus, cases)

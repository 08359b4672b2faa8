"""`python -m tests.fuzz 20000`: so many mutants, shared out over the files, and what came of them.

A mutant is a file and a seed, so `python -m tests.fuzz adapter_config.json 17` makes one again, and says how it ended.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tests.conftest  # noqa: F401  (offline, one thread)
from tests.fuzz.branches import Branch, branches
from tests.fuzz.peft import loads_in_peft
from tests.fuzz.run import Report, begin, judged
from tests.fuzz.subjects import FILES, Case, Corpus, make_corpus

CHUNK = 50
PEFT_SAMPLE = 100


def main() -> None:
    os.environ["MALLOC_ARENA_MAX"] = "1"  # each further one reserves 64 MB of addresses, which the limit counts
    began, known = time.monotonic(), branches()
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = Path(folder, "corpus"), Path(folder, "scratch")
        warnings.simplefilter("ignore")
        make_corpus(root)
        if len(sys.argv) == 3:
            print(Corpus(root, scratch).judge(Case(sys.argv[1], int(sys.argv[2]))))
            return
        report = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, root, scratch)
        corpus = Corpus(root, scratch / "peft")
        sample = report.merged[:: max(1, len(report.merged) // PEFT_SAMPLE)]
        loaded = [_loaded(corpus, case) for case in sample]
    show(report, known)
    print(f"in PEFT: {len(loaded)} of those merged, {loaded.count(True)} loaded; ", end="")
    print(f"{loaded.count(None)} are of another base's shape; {loaded.count(False)} FAILED")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(bool(report.failed) or False in loaded)


def _loaded(corpus: Corpus, case: Case) -> bool | None:
    try:
        return loads_in_peft(corpus, case)
    except Exception as error:  # PEFT has its own for each thing that it does not load
        print(f"{case}: FAILED in PEFT: {type(error).__name__}: {str(error)[:500]}")
        return False


def fuzz(count: int, root: Path, scratch: Path) -> Report:
    """Judge `count` mutants in as many processes as there are cores."""
    cases = [Case(FILES[number % len(FILES)], number // len(FILES)) for number in range(count)]
    chunks = [cases[start : start + CHUNK] for start in range(0, count, CHUNK)]
    report = Report()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, begin, (root, scratch)) as pool:
        for number, part in enumerate(pool.map(judged, chunks), start=1):
            report.add(part)
            for case, how in part.failed:
                print(f"{case}: {how}", flush=True)
            if number % 20 == 0:
                print(f"{number * CHUNK} mutants, {len(report.failed)} failed", file=sys.stderr, flush=True)
    return report


def show(report: Report, known: Mapping[Branch, str]) -> None:
    """Print the counts."""
    for name in FILES:
        ended = {how: count for (file, how), count in report.ended.items() if file == name}
        total = sum(ended.values())
        accepted = sum(count for how, count in ended.items() if how.startswith("accepted"))
        print(f"{name}: {total} mutants, {accepted / max(1, total):.0%} accepted")
        for how, count in sorted(ended.items(), key=lambda item: -item[1]):
            print(f"  {count:6} {how}")
    print(f"refusals: {sum(branch in report.met for branch in known)} of {len(known)} places in the source were met")
    for (file, line), text in sorted(known.items()):
        if (file, line) not in report.met:
            print(f"  not met: {file}:{line}: {text}")
    print(f"slowest: {report.slowest[0]:.2f} s of a processor ({report.slowest[1]})")
    print(f"memory: at most {report.peak[0] / 1e6:.0f} MB for one mutant ({report.peak[1]}); ", end="")
    print(f"the process, with torch, at most {report.resident / 1e6:.0f} MB")
    print(f"{report.ended.total()} mutants, {len(report.failed)} failed")


if __name__ == "__main__":
    main()

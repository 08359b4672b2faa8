"""How fast `fedavg` and `exact` are beside a plain read and a plain copy of the same bytes in the same run.

    python tests/benchmarks/rates.py

Ten clients of a 7B Llama (1.6 GB) are written to TMPDIR, which needs 6 GB, and removed at the end. Files are read from
the page cache. The time that fsync takes is measured apart: it is the disk's.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_7b import LAYERS, WEIGHTS, temporary_folder, write_clients

import lora_merge
from lora_merge.checkpoint import folder as atomic


def main() -> None:
    arguments = parse()
    with temporary_folder() as root:
        clients = write_clients(root / "clients", arguments.clients, layers=arguments.layers)
        files = [client / WEIGHTS for client in clients]
        merge(clients, root / "global", "fedavg")  # the imports, and the first touch of everything
        measure(clients, files, root, arguments.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script itself")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def measure(clients: list[Path], files: list[Path], root: Path, rounds: int) -> None:
    """Each thing once a round, so that all of them meet the same state of the machine."""
    names = ("read", "fedavg", "copy", "exact")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    flushed: dict[str, list[float]] = {"fedavg": [], "exact": []}
    written = {}
    for _ in range(rounds):
        seconds["read"].append(timed(lambda: read(files)))
        for method in ("fedavg", "exact"):
            total, flush = merge(clients, root / "global", method)
            seconds[method].append(total - flush)
            flushed[method].append(flush)
            written[method] = (root / "global" / WEIGHTS).stat().st_size
        seconds["copy"].append(timed(lambda: shutil.copyfile(root / "global" / WEIGHTS, root / "copy")))
        (root / "copy").unlink()
    size = sum(file.stat().st_size for file in files)
    sizes = {"read": size, "fedavg": size, "copy": written["exact"], "exact": written["exact"]}
    report(sizes, seconds, flushed)
    for method in ("exact", "fedavg"):
        total, flush = merge(clients, root / "global", method, certificate=None)
        extra = total - flush - statistics.median(seconds[method])
        print(f"the certificate of {method}: {extra:.2f} s on top of {statistics.median(seconds[method]):.2f} s")


def report(sizes: dict[str, int], seconds: dict[str, list[float]], flushed: dict[str, list[float]]) -> None:
    beside = {"fedavg": "read", "exact": "copy"}
    print(f"{'':8}{'GB':>6}{'best s':>9}{'median s':>10}{'GB/s':>7}{'fsync s':>9}   of the plain rate (best, median)")
    for name, times in seconds.items():
        best, median = min(times), statistics.median(times)
        fsync = f"{statistics.median(flushed[name]):9.2f}" if name in flushed else " " * 9
        line = f"{name:8}{sizes[name] / 1e9:6.2f}{best:9.2f}{median:10.2f}{sizes[name] / 1e9 / median:7.2f}{fsync}"
        if plain := beside.get(name):
            ratios = (min(seconds[plain]) / best, statistics.median(seconds[plain]) / median)
            scale = sizes[name] / sizes[plain]
            line += f"   {ratios[0] * scale:.2f}, {ratios[1] * scale:.2f} of {plain} (wanted: 0.5)"
        print(line)


def read(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            file.read()


def merge(clients: list[Path], output: Path, method: str, certificate: str | None = "off") -> tuple[float, float]:
    """Seconds of one merge into a folder that is not there, and how many of them were fsync."""
    shutil.rmtree(output, ignore_errors=True)
    with timing_fsync() as flushes:
        total = timed(lambda: lora_merge.aggregate(clients, output, method=method, certificate=certificate))
    return total, sum(flushes)


@contextmanager
def timing_fsync() -> Iterator[list[float]]:
    """The seconds of each flush of a finished folder, while the block runs."""
    flush, seconds = atomic._flush, []
    atomic._flush = lambda folder: seconds.append(timed(lambda: flush(folder), settle=False))
    try:
        yield seconds
    finally:
        atomic._flush = flush


def timed(work: Callable[[], object], *, settle: bool = True) -> float:
    """Seconds of wall time; what earlier work left to be written back is written first."""
    if settle:
        os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

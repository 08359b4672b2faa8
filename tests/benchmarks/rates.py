"""How fast `fedavg` and `exact` are beside a plain read and a plain copy of the same bytes in the same run.

    python tests/benchmarks/rates.py

Ten clients of a 7B Llama (1.6 GB) are written to TMPDIR, which needs 6 GB, and removed at the end. Files are read from
the page cache. The time that fsync takes is measured apart: it is the disk's. Every merge hashes its inputs, for the
record; a row says what that alone takes. It hashes what it writes too, and this counts.
Every merge screens its inputs, for updates far too large and for copies; a row says what `exact` takes without that.
On a busy machine the processor seconds say more than the wall's.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llama_7b import LAYERS, WEIGHTS, temporary_folder, write_clients

import lora_merge
from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint import folder as atomic
from lora_merge.checkpoint.safetensors_file import open_safetensors

WANTED = 0.5
UNSCREENED = "unscreened"  # `exact`, with nothing looked for in the updates
COMPARED = (
    ("fedavg", ["read"]),
    ("exact", ["copy"]),
    ("exact", ["copy", "sha256"]),
    (UNSCREENED, ["copy"]),
)


@dataclass
class Row:
    """One thing that was timed, once a round: how many bytes it counts for, and its seconds, those of fsync apart."""

    size: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    fsync: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], object], *, fsync: Callable[[], float] = lambda: 0.0) -> None:
        os.sync()  # what earlier work left to be written back does not count
        touch_memory(self.size)
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.fsync.append(fsync())
        self.wall.append(wall - self.fsync[-1])
        self.cpu.append(cpu)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)


def main() -> None:
    arguments = parse()
    with temporary_folder() as root:
        clients = write_clients(root / "clients", arguments.clients, layers=arguments.layers)
        merge(clients, root / "global", method="fedavg")  # the imports, and the first touch of everything
        rows = measure(clients, root, arguments.rounds)
        report(rows)
        for method in ("exact", "fedavg"):
            row = Row()
            time_merge(row, clients, root / "global", method=method, certificate=None)
            print(f"the certificate of {method}: {row.wall[0] - rows[method].median:.1f} s more")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script itself")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def measure(clients: list[Path], root: Path, rounds: int) -> dict[str, Row]:
    """Each thing once a round, so that all of them meet the same state of the machine."""
    files = [client / WEIGHTS for client in clients]
    output, copy = root / "global", root / "copy"
    read_size = sum(file.stat().st_size for file in files)
    rows = {name: Row(read_size) for name in ("read", "sha256", "fedavg", "exact", UNSCREENED, "copy")}
    for _ in range(rounds):
        rows["read"].time(partial(read, files))
        rows["sha256"].time(partial(sha256, files))
        time_merge(rows["fedavg"], clients, output, method="fedavg")
        time_merge(rows[UNSCREENED], clients, output, method="exact", screening=None)
        time_merge(rows["exact"], clients, output, method="exact")
        rows["copy"].time(partial(shutil.copyfile, output / WEIGHTS, copy))
        for name in ("copy", "exact", UNSCREENED):
            rows[name].size = copy.stat().st_size
        copy.unlink()
    return rows


def touch_memory(size: int) -> None:
    """Write a file of `size` bytes and remove it: what its pages cost a virtual machine at first does not count."""
    with tempfile.TemporaryFile() as file:
        for _ in range(0, size, 1 << 19):
            file.write(bytes(1 << 19))


def read(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            file.read()


def sha256(files: list[Path]) -> None:
    """As a merge does it: one file a worker."""
    opened = [open_safetensors(path) for path in files]
    with pool() as threads:
        list(threads.map(type(opened[0]).sha256, opened))
    for file in opened:
        file.close()


def merge(clients: list[Path], output: Path, *, certificate: str | None = "off", **options: Any) -> None:
    lora_merge.aggregate(clients, output, certificate=certificate, **options)


def time_merge(row: Row, clients: list[Path], output: Path, **options: Any) -> None:
    shutil.rmtree(output, ignore_errors=True)
    with timing_fsync() as flushes:
        row.time(lambda: merge(clients, output, **options), fsync=lambda: sum(flushes))


@contextmanager
def timing_fsync() -> Iterator[list[float]]:
    """The seconds of each flush of a finished folder, while the block runs."""
    flush, seconds = atomic._flush, []

    def timed(folder: Path, mask: int) -> None:
        start = time.perf_counter()
        flush(folder, mask)
        seconds.append(time.perf_counter() - start)

    atomic._flush = timed
    try:
        yield seconds
    finally:
        atomic._flush = flush


def report(rows: dict[str, Row]) -> None:
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}; medians of {len(rows['read'].wall)}")
    print(f"{'':10}{'GB':>7}{'best s':>8}{'s':>7}{'GB/s':>7}{'CPU s':>7}{'fsync s':>9}")
    for name, row in rows.items():
        rate, cpu, fsync = row.size / 1e9 / row.median, statistics.median(row.cpu), statistics.median(row.fsync)
        print(f"{name:10}{row.size / 1e9:7.2f}{min(row.wall):8.2f}{row.median:7.2f}{rate:7.2f}{cpu:7.2f}{fsync:9.2f}")
    for method, plain in COMPARED:
        best = sum(min(rows[name].wall) for name in plain) / min(rows[method].wall)
        median = sum(rows[name].median for name in plain) / rows[method].median
        wanted = f" (wanted: {WANTED})" if len(plain) == 1 and method != UNSCREENED else ""
        print(f"{method} has {median:.2f} of the rate of {' and '.join(plain)}, {best:.2f} at best{wanted}")


if __name__ == "__main__":
    main()

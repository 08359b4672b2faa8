"""Peak memory of a merge: `fedavg` must need no more for 200 clients than for 10.

    python tests/benchmarks/memory.py

Ten clients of a 7B Llama (1.6 GB) are written to TMPDIR, which needs 6 GB, and removed at the end; the 200 are the same
files under other names. Each merge is a process of its own, and its peak is what the kernel says of it: everything,
Python and torch included.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llama_7b import LAYERS, RANK, SHAPES, WEIGHTS, temporary_folder, write_clients

WANTED_GB = 1.0
MERGE = """
import sys, lora_merge
clients, output, method, certificate = sys.argv[1:]
if clients: lora_merge.aggregate([clients], output, method=method, certificate=certificate)
else: from lora_merge import pipeline
"""


def main() -> None:
    arguments = parse()
    with temporary_folder() as root:
        write(root, arguments.many, arguments.layers)
        runs = [("", "imports"), ("few", "fedavg"), ("many", "fedavg"), ("few", "exact"), ("few", "svd")]
        peaks = {run: peak_gb(root, *run, certificate="off") for run in runs}
        with_certificate = peak_gb(root, "few", "exact", certificate="exact")
    report(peaks, with_certificate, arguments.many)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script itself")
    return parser.parse_args()


def write(root: Path, many: int, layers: int) -> None:
    """Write both federations in a process of its own: a child's peak begins with what its parent held at the fork."""
    files = [root / "few" / f"client-{index:03}" / WEIGHTS for index in range(10)]
    for arguments in (
        {"root": root / "few", "count": 10, "layers": layers},
        {"root": root / "many", "count": many, "files": files},
    ):
        writer = multiprocessing.get_context("spawn").Process(target=write_clients, kwargs=arguments)
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the clients could not be written")


def peak_gb(root: Path, clients: str, method: str, certificate: str) -> float:
    """The largest resident set of one process that merges; nothing but the imports where no clients are named."""
    pattern, output = str(root / clients / "client-*") if clients else "", root / "global"
    merging = subprocess.Popen([sys.executable, "-c", MERGE, pattern, str(output), method, certificate])
    _, status, usage = os.wait4(merging.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{method} of {clients} failed")
    shutil.rmtree(output, ignore_errors=True)
    return usage.ru_maxrss * 1024 / 1e9


def report(peaks: dict[tuple[str, str], float], with_certificate: float, many: int) -> None:
    counts = {"": 0, "few": 10, "many": many}
    imports = peaks["", "imports"]
    print(f"{'':28}{'clients':>8}{'peak GB':>9}{'above the imports':>19}")
    for (clients, method), peak in peaks.items():
        print(f"{method:28}{counts[clients]:8}{peak:9.3f}{peak - imports:19.3f}")
    print(f"{'exact, with its certificate':28}{10:8}{with_certificate:9.3f}{with_certificate - imports:19.3f}")
    few, most = peaks["few", "fedavg"], peaks["many", "fedavg"]
    print(f"fedavg of {many} clients: {most / few:.3f} of the peak of 10 (wanted: within 0.10 of 1)")
    print(f"fedavg at most: {max(few, most):.3f} GB (wanted: under {WANTED_GB:g})")
    widest = max(d_out + d_in for d_out, d_in in SHAPES.values()) * 10 * RANK * 4 / 1e9
    print(f"exact holds one stack of ten clients' blocks a worker: the widest module's is {widest:.3f} GB")


if __name__ == "__main__":
    main()

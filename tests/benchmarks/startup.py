"""What `lora-merge --help` costs before it does anything: processor and wall time of the whole process.

python tests/benchmarks/startup.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WANTED_SECONDS = 0.3
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "lora-merge --help": ["-c", "from lora_merge.cli.main import main; main()", "--help"],
    "lora-merge aggregate -h": ["-c", "from lora_merge.cli.main import main; main()", "aggregate", "--help"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print(f"{'median of ' + str(runs) + ' runs':26}{'cpu s':>8}{'wall s':>8}{'of python -c pass':>19}")
    rows = {name: measure(arguments, runs) for name, arguments in COMMANDS.items()}
    bare = rows["python -c pass"][0]
    for name, (cpu, wall) in rows.items():
        print(f"{name:26}{cpu:8.3f}{wall:8.3f}{cpu / bare:18.1f}x")
    print(f"lora-merge --help: {rows['lora-merge --help'][0]:.3f} s of CPU (wanted: under {WANTED_SECONDS})")


def measure(arguments: list[str], runs: int) -> tuple[float, float]:
    """Median CPU and wall seconds of a process, after one that warms the file cache."""
    seconds = [once(arguments) for _ in range(runs + 1)][1:]
    cpu, wall = (statistics.median(column) for column in zip(*seconds, strict=True))
    return cpu, wall


def once(arguments: list[str]) -> tuple[float, float]:
    """User and system time as the kernel counts it, and wall time."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{arguments} failed")
    return usage.ru_utime + usage.ru_stime, wall


if __name__ == "__main__":
    main()

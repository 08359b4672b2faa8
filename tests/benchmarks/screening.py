"""What screening costs: an exact merge with and without it, in turn, in the same run; and what asking for more costs.

    python tests/benchmarks/screening.py [--clients 10] [--layers 32] [--rounds 3]

Clients of a 7B Llama are written to TMPDIR and removed at the end. On a busy machine the processor seconds say more
than the wall's; a line shows the least of all rounds.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llama_7b import LAYERS, temporary_folder, write_clients

from lora_merge import aggregate
from lora_merge.inspection.inspect import inspect
from lora_merge.intake import Reading
from lora_merge.screening.stops import SCREENED, Screening


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("clients", 10), ("layers", LAYERS), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with temporary_folder() as root:
        folders = write_clients(root / "clients", options.clients, layers=options.layers)
        merge = partial(aggregate, folders, root / "global", force=True, certificate="off")
        tasks: dict[str, Callable[[], object]] = {
            "exact, unscreened": partial(merge, screening=None),
            "exact": partial(merge, screening=SCREENED),
            "exact, --drop-duplicates": partial(merge, screening=Screening(drop_duplicates=True)),
            "exact, with its certificate, unscreened": partial(merge, screening=None, certificate=None),
            "exact, with its certificate": partial(merge, screening=SCREENED, certificate=None),
            "inspect": partial(inspect, folders, screening=SCREENED, reading=Reading()),
        }
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
        for _ in range(options.rounds):
            for name, work in tasks.items():
                timed[name].append(seconds(work))
                shutil.rmtree(root / "global", ignore_errors=True)
        show(timed, size=sum(file.stat().st_size for file in Path(root).rglob("*.safetensors")))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def show(timed: dict[str, list[tuple[float, float]]], size: int) -> None:
    print(f"{size / 1e9:.2f} GB of clients\n{'':42}{'wall s':>8}{'cpu s':>8}{'cpu, of unscreened':>20}")
    first = min(cpu for _, cpu in timed["exact, unscreened"])
    for name, rounds in timed.items():
        wall, cpu = (min(values) for values in zip(*rounds, strict=True))
        print(f"{name:42}{wall:8.2f}{cpu:8.2f}{cpu / first:20.2f}")


if __name__ == "__main__":
    main()

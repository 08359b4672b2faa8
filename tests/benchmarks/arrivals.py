"""What an arrival costs an `svd` global adapter, early and late: the core is as large as ever, the record grows.

    python tests/benchmarks/arrivals.py

Clients have all linear layers of a 7B Llama (160 MB each). What they leave behind is a core, whose size does not depend
on how many they were, and a record, which does: so as many are merged as fill a core, the record is made that of any
number, among whom their weight is divided, and then an arrival is timed. Processor seconds: a machine does other work.
"""

import argparse
import json
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from llama_7b import LAYERS, temporary_folder, write_clients

from lora_merge import fold
from lora_merge.aggregation.core import TIMES
from lora_merge.ledger import FILE_NAME as LEDGER
from lora_merge.lock import FILE_NAME as LOCK
from lora_merge.screening.stops import Screening

SCREENING = Screening(allow_dominant=True)  # a few have all examples between them, before they are made many
RANK, FILL = 16, TIMES + 1  # as many clients of that rank as the core has room for, and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=int, nargs="+", default=[10, 100, 1000], help="who is in before the arrival")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to see the record's part of it")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with temporary_folder() as root:
        *early, last, late = write_clients(root / "clients", FILL + 2, layers=arguments.layers)
        fold(early, root / "first", method="svd", rank=RANK, screening=SCREENING)
        fold([last], root / "first", screening=SCREENING)
        seconds: dict[int, list[float]] = {count: [] for count in arguments.before}
        for _ in range(arguments.rounds):
            for count in seconds:
                seconds[count].append(arrival(late, root, count))
    print(f"svd to rank {RANK}, {arguments.layers} layers of a 7B Llama, medians of {arguments.rounds}")
    first = statistics.median(seconds[arguments.before[0]])
    for count, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{count:5} in before: an arrival takes {median:7.3f} CPU s, {median / first:.3f} of the first line's")


def arrival(client: Path, root: Path, before: int) -> float:
    """The processor seconds in which `client` is folded into a global adapter that `before` others are in."""
    onto = root / "global"
    shutil.rmtree(onto, ignore_errors=True)
    shutil.copytree(root / "first", onto)
    widen(onto, before)
    began = time.process_time()
    made = fold([client], onto, screening=SCREENING)
    taken = time.process_time() - began
    assert len(made.ledger.contributions) == before + 1
    return taken


def widen(onto: Path, count: int) -> None:
    """Make the record that of `count` clients: the one folded last, and others that divide the weight of the rest."""
    ledger, lock = (json.loads((onto / name).read_text()) for name in (LEDGER, LOCK))
    ledger["contributions"] = divided(ledger["contributions"], count - 1)
    lock["inputs"] = divided(lock["inputs"], count - 1)
    lock["folded"] = [[entry["client_id"] for entry in lock["inputs"][:-1]], [lock["inputs"][-1]["client_id"]]]
    (onto / LEDGER).write_text(json.dumps(ledger))
    (onto / LOCK).write_text(json.dumps(lock))


def divided(entries: list[dict[str, Any]], parts: int) -> list[dict[str, Any]]:
    *rest, last = entries
    equal = {name: sum(each[name] for each in rest) / parts for name in ("weight", "share") if name in last}
    named = [{name: f"{rest[0][name]}-{part:05}" for name in ("client_id", "source")} for part in range(parts)]
    return [*({**rest[0], **equal, **names} for names in named), last]


if __name__ == "__main__":
    main()

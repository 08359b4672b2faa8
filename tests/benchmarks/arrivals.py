"""What an arrival costs an `svd` global adapter, early and late: the core is as large as ever, the record grows.

    python tests/benchmarks/arrivals.py

Each client has one layer of a 7B Llama (5 MB), the whole of which has 32; it is written, folded in and removed, and
nobody keeps it. Processor seconds, since a thousand arrivals take minutes in which a machine does other things too.
"""

import argparse
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from llama_7b import temporary_folder, write_client

from lora_merge import fold
from lora_merge.screening.stops import Screening

SCREENING = Screening(allow_dominant=True)  # the first few have most of the examples so far
RANK, NEAR = 16, 5  # arrivals on either side of the one that is named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=1, help="a whole one has 32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with temporary_folder() as root:
        seconds = [arrival(root, number, arguments.layers) for number in range(arguments.clients)]
        record = (root / "global" / "aggregation.json").stat().st_size
    print(f"svd to rank {RANK}, {len(seconds)} arrivals of {arguments.layers} layers of a 7B Llama")
    print(f"the record of them: {record / 1e3:.0f} kB")
    places = [at for at in (10, 100, 1000) if at <= len(seconds)]
    early = about(seconds, places[0])
    for at in places:
        print(f"about arrival {at:4}: {about(seconds, at):6.3f} CPU s, {about(seconds, at) / early:.2f} of the first")


def arrival(root: Path, number: int, layers: int) -> float:
    """The processor seconds in which one more client is folded in."""
    client, onto = write_client(root / f"client-{number:04}", number, layers=layers), root / "global"
    first: dict[str, Any] = {} if onto.exists() else {"method": "svd", "rank": RANK}
    began = time.process_time()
    fold([client], onto, screening=SCREENING, **first)
    taken = time.process_time() - began
    shutil.rmtree(client)
    return taken


def about(seconds: list[float], at: int) -> float:
    return statistics.median(seconds[at - NEAR : at + NEAR])


if __name__ == "__main__":
    main()

"""What a merge would read and need, before it reads or writes anything: `aggregate --dry-run`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge.adapter import FactorsSpec, FullSpec, Spec
from lora_merge.aggregation.schedule import default_workers
from lora_merge.aggregation.weights import Weights
from lora_merge.intake import Reading, examined
from lora_merge.ledger import LeftOut
from lora_merge.screening.stops import SCREENED, Screening

FLOAT_BYTES = 4
PROCESS_BYTES = 260_000_000  # what Python and torch hold before anything is read
COPIES = 3  # a module's factors as they are read, as they are stacked, and as they are written or factorised


@dataclass(frozen=True)
class ForecastClient:
    """One client of a merge that has not begun.

    Attributes:
        source: what the record would call it; `place`: the folder's path, the repository or the URL.
        size: bytes of all its files.
        to_download: those of them that are not on this machine.
        weight: n as it would be used; `share` is p, n over the sum of all.
    """

    client_id: str
    source: str
    place: str
    commit: str | None
    size: int
    to_download: int
    num_examples: int | None
    weight: float
    share: float


@dataclass(frozen=True)
class Forecast:
    """A merge that has not begun.

    Attributes:
        memory: bytes, roughly, of the whole process.
        left_out: what was named and would not be merged, and why.
        waved_through: what would have stopped the merge, had the user not allowed it.
    """

    clients: Sequence[ForecastClient]
    memory: int
    warnings: Sequence[str]
    left_out: Sequence[LeftOut] = ()
    waved_through: Sequence[str] = ()


def forecast(
    sources: Sequence[str | Path],
    *,
    weights: Weights = "examples",
    workers: int | None = None,
    reading: Reading,
    screening: Screening | None = SCREENED,
) -> Forecast:
    """List, examine and weigh the adapters in `sources`; nothing is downloaded, nothing written.

    No weights are read, so copies and updates far larger than the others show only when they are merged.

    Raises:
        NotFoundError, RefusedError, UsageError, NetworkError: as `lora_merge.pipeline.aggregate`.
    """
    found = examined(sources, weights, reading, screening)
    total = sum(found.weights.values())
    clients = [
        ForecastClient(
            client_id=client,
            source=candidate.ref.source,
            place=candidate.ref.place,
            commit=candidate.ref.commit,
            size=candidate.size,
            to_download=found.to_download[client],
            num_examples=statement.num_examples if statement else None,
            weight=found.weights[client],
            share=found.weights[client] / total,
        )
        for client, candidate in found.candidates.items()
        for statement in [candidate.description.statement]
    ]
    specs = [candidate.description.specs for candidate in found.candidates.values()]
    largest = max(_bytes(each[name] for each in specs if name in each) for name in {n for each in specs for n in each})
    memory = PROCESS_BYTES + COPIES * largest * (workers or default_workers())
    return Forecast(clients, memory, found.notes, found.left_out, found.waved_through)


def _bytes(specs: Iterable[Spec]) -> int:
    """What one module's updates of all clients take in fp32."""
    return FLOAT_BYTES * sum(_numbers(spec) for spec in specs)


def _numbers(spec: Spec) -> int:
    if isinstance(spec, FactorsSpec):
        return spec.blocks * spec.r * (spec.d_in + spec.d_out)
    return math.prod(spec.shape) if isinstance(spec, FullSpec) else len(spec.indices) * spec.d

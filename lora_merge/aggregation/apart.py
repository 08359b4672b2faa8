"""How large the values are that clients trained whole: full tensors, rows of tokens, DoRA's magnitudes.

Such a value W_i is no update. Beside the base's it has the size |W_i - W0|; without it, only its distances to the other
clients' values are known, and the one taken is the farthest within the nearer half of them, which a minority can
neither stretch nor shrink. Where honest clients move alike it is below |W_i - W0|, so it is never judged alone but as
a part of the whole update, beside its exact low-rank norm (`lora_merge.screening.stops.oversized`).

Both are estimated from 128 sums with random signs, u W v^T: a norm of rank one is right to 16 % (standard deviation),
of most others to 6 %. With signs that are known beforehand, whoever hands in W could boost it in a direction in which
no sum changes. So they are drawn from the hashes of all that is handed in, W's too: everybody who merges it has the
same ones, and nobody has them while it may still be changed.
"""

import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from lora_merge.adapter import Adapter, Factors, FactorsSpec, FullTensor, Update
from lora_merge.aggregation import lowrank
from lora_merge.aggregation.dora import CHUNK

ROWS, OF_EACH = 32, 4  # sums u_j W v_jk
LONGEST_ROW = 256  # a longer vector is folded into rows, which costs a tenth
FEW = 3  # of fewer clients, none is far from the others
NOISE = 1e-6  # of a value's norm: the rounding of fp32, below which a distance is none
MAGNITUDE = "magnitude"

Piece: TypeAlias = tuple[str, str]  # the module or tensor, and which part of it: a token, the magnitude, or all ("")
Values: TypeAlias = Mapping[Piece, bytes]  # the sketch of each


@dataclass(frozen=True)
class Whole:
    """What one client trained whole.

    Attributes:
        size: its norm over all pieces, as far as it is measured.
        usual: what that is over the pieces measured from the base, where each is as the median client's.
        usual_apart: the same over the pieces measured from the other clients.
        largest: the piece with most of it.
        from_base: whether that one is measured from the base, and not from the other clients.
    """

    size: float
    usual: float
    usual_apart: float
    largest: Piece
    from_base: bool


def pieces_of(name: str, update: Update) -> Iterator[tuple[Piece, Tensor]]:
    """The values in an update, each of which replaces one of the base's."""
    if isinstance(update, FullTensor):
        yield (name, ""), update.value
    elif not isinstance(update, Factors):
        yield from (((name, str(token)), row) for token, row in zip(update.indices, update.rows, strict=True))
    elif update.magnitude is not None:
        yield (name, MAGNITUDE), update.magnitude


def trained_whole(adapter: Adapter) -> list[str]:
    """The names of what holds values that were trained whole; none in plain LoRA."""
    return [name for name, spec in adapter.specs.items() if not isinstance(spec, FactorsSpec) or spec.magnitude]


def distance(one: Adapter, two: Adapter) -> float:
    """|W_1 - W_2| over all that two clients trained whole; infinite where one has a value that the other has not."""
    names = trained_whole(one)
    if sorted(names) != sorted(trained_whole(two)):
        return math.inf
    return math.sqrt(sum(_squared_distance(dict(pieces_of(n, one[n])), dict(pieces_of(n, two[n]))) for n in names))


def fingerprint(adapter: Adapter) -> str:
    """The sha256 of all that a client trained whole: of the values, however their file lays them out."""
    found = hashlib.sha256()
    for name in sorted(trained_whole(adapter)):
        for piece, value in pieces_of(name, adapter[name]):
            found.update(f"{piece} {tuple(value.shape)}\n".encode())
            found.update(value.float().contiguous().cpu().numpy().data)
    return found.hexdigest()


def _squared_distance(one: Mapping[Piece, Tensor], two: Mapping[Piece, Tensor]) -> float:
    if {piece: value.shape for piece, value in one.items()} != {piece: value.shape for piece, value in two.items()}:
        return math.inf
    parts = (zip(*(torch.split(value.reshape(-1), CHUNK) for value in (one[p], two[p])), strict=True) for p in one)
    return sum(float((a.double() - b.double()).square().sum()) for pairs in parts for a, b in pairs)


def seed_from(hashes: Iterable[str]) -> int:
    """The seed of the signs, from the sha256 of every client's weights file."""
    return lowrank.sketch_seed(0, "\n".join(sorted(hashes)))


def sketch_of_value(value: Tensor, seed: int) -> bytes:
    """The sums of a value, fp64, in O(32 entries): linear, and the mean of their squares estimates |W|^2."""
    W = _matrix(value.cpu())
    U, V = _signs(*W.shape, seed)
    sums = V @ (U @ W)[:, :, None]
    if not torch.isfinite(sums).all():  # fp32 ends where honest values never are
        sums = V.double() @ (U.double() @ W.double())[:, :, None]
    return bytes(sums.double().numpy().tobytes())


def wholes(clients: Mapping[str, Values], base: Values, count: int) -> dict[str, Whole]:
    """The size of what each client trained whole; of those only that have a piece that is measured.

    What is usual goes by all clients, whether they have a piece or not: the few who have one, or have moved it, may be
    the hostile ones.

    Args:
        count: how many clients there are in all.
        base: the base's values, as far as they are at hand.
    """
    squares: dict[str, dict[Piece, float]] = {client: {} for client in clients}
    usual: dict[Piece, float] = {}
    for piece in sorted({piece for values in clients.values() for piece in values}):
        having = [client for client, values in clients.items() if piece in values]
        if piece not in base and len(having) < FEW:
            continue
        rows = torch.stack([_row(clients[client][piece]) for client in having])
        found = _sizes(rows, _row(base[piece]) if piece in base else None)
        usual[piece] = statistics.median_low([*found, *[0.0] * (count - len(found))]) ** 2
        for client, size in zip(having, found, strict=True):
            squares[client][piece] = size**2
    return {client: _whole(each, usual, base) for client, each in squares.items() if each}


def _whole(squares: Mapping[Piece, float], usual: Mapping[Piece, float], base: Values) -> Whole:
    from_base = math.sqrt(sum(usual[piece] for piece in squares if piece in base))
    apart = math.sqrt(sum(usual[piece] for piece in squares if piece not in base))
    largest = max(squares, key=lambda piece: squares[piece])
    return Whole(math.sqrt(sum(squares.values())), from_base, apart, largest, largest in base)


def _sizes(rows: Tensor, base: Tensor | None) -> list[float]:
    """|W_i - W0| of each row, or without W0 its distance to the last of the nearer half of the others."""
    if base is not None:
        found = (rows - base).norm(dim=1)
    else:
        # By differences: from inner products, one row that is far off would take all digits from the others.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").nan_to_num(nan=math.inf)
        found = distances.sort(dim=1).values[:, len(rows) // 2]  # the first one is its own
    found = torch.where(found > NOISE * rows.norm(dim=1), found, 0.0)
    return list((found / math.sqrt(ROWS * OF_EACH)).nan_to_num(nan=math.inf).tolist())


def _row(packed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.float64)


def _matrix(value: Tensor) -> Tensor:
    if value.ndim > 1:
        return value.reshape(len(value), -1)
    width = max(1, min(value.numel(), LONGEST_ROW))
    return torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % width)).reshape(-1, width)


@lru_cache(maxsize=16)
def _signs(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (32 x rows) and V (32 x 4 x columns)."""
    U = lowrank.signs(ROWS, rows, lowrank.sketch_seed(seed, f"rows {rows}"))
    V = lowrank.signs(ROWS * OF_EACH, columns, lowrank.sketch_seed(seed, f"columns {columns}"))
    return U, V.reshape(ROWS, OF_EACH, columns)

"""What clients trained whole, sized: beside the base model's values where those are at hand, else beside each other."""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapter import Client, FactorsSpec, FullSpec, TokenSpec
from lora_merge.aggregation import apart
from lora_merge.aggregation.apart import MAGNITUDE, Piece, Values, pieces_of, sketch_of_value, trained_whole
from lora_merge.aggregation.dora import row_parts
from lora_merge.aggregation.schedule import over, pool
from lora_merge.checkpoint.base_model import Misfit
from lora_merge.checkpoint.federation import Federation, base_name
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError
from lora_merge.screening.stops import FEW_NORMS, oversized


@dataclass(frozen=True)
class Judged:
    """What the sizes of what clients trained whole say.

    Attributes:
        problems: the clients whose update is far larger than the others' with it.
        guessed: whether some of them are held against the other clients only, for want of the base.
    """

    problems: Sequence[Problem] = ()
    guessed: bool = False


def judged(
    federation: Federation,
    hashes: Mapping[str, str],
    norms: Mapping[str, float],
    before: Collection[str] = (),
    let_in: Collection[str] = (),
) -> Judged:
    """Hold what clients trained whole against the base's values, or each other's; it is read once more for that.

    Where fewer than three clients have something, only the base tells its size; a merge has that at hand, since it
    needs it then.

    Args:
        federation: the clients, with the base where that is at hand.
        hashes: the sha256 of each one's weights file.
        norms: the low-rank norms, as far as clients have any.
        before, let_in: who is in already, and whom of those the user let in knowingly.
    """
    tasks = _read_for_it(federation)
    norms = {**{client.id: 0.0 for client in federation.clients}, **norms}
    if not tasks or len(norms) < FEW_NORMS:
        return Judged()
    seed = apart.seed_from(hashes.values())
    with pool() as threads:
        values: dict[str, dict[Piece, bytes]] = {}
        found = over(threads, partial(_values, federation, seed), tasks)
        for (client, _), sketches in zip(tasks, found, strict=True):
            values.setdefault(client.id, {}).update(sketches)
        base = _base_values(federation, seed, sorted({piece for each in values.values() for piece in each}), threads)
    sizes = apart.wholes(values, base, len(norms))
    problems = oversized(norms, sizes, before, let_in)
    return Judged(problems, guessed=any(not sizes[problem.client].from_base for problem in problems))


def _read_for_it(federation: Federation) -> list[tuple[Client, str]]:
    """What holds values that were trained whole; nothing in plain LoRA."""
    return [(client, name) for client in federation.clients for name in trained_whole(client.adapter)]


def _values(federation: Federation, seed: int, task: tuple[Client, str]) -> dict[Piece, bytes]:
    client, name = task
    return {piece: sketch_of_value(value, seed) for piece, value in pieces_of(name, federation.read(client, name))}


def _base_values(federation: Federation, seed: int, pieces: Sequence[Piece], threads: ThreadPoolExecutor) -> Values:
    if federation.base is None:
        return {}
    found = over(threads, partial(_base_value, federation, seed), pieces)
    return {piece: sketch for piece, sketch in zip(pieces, found, strict=True) if sketch is not None}


def _base_value(federation: Federation, seed: int, piece: Piece) -> bytes | None:
    """The sketch of the base's own value, one tensor of which is in memory at a time; None where it has no such one.

    What does not fit is no error here: the merge may not need it.
    """
    name, part = piece
    try:
        value = _read(federation, name, part)
    except (NotFoundError, UsageError, RefusedError, Misfit):
        return None
    return None if value is None else sketch_of_value(value, seed)


def _read(federation: Federation, name: str, part: str) -> Tensor | None:
    spec = federation.spec(name)
    if isinstance(spec, FullSpec):
        read = federation.value(name).base
        return read() if read else None
    if isinstance(spec, TokenSpec):
        assert federation.base is not None
        return federation.base.row(base_name(name, spec), int(part), spec.d)
    return _row_norms(federation, name) if isinstance(spec, FactorsSpec) and part == MAGNITUDE else None


def _row_norms(federation: Federation, name: str) -> Tensor | None:
    """The magnitude that DoRA starts from: the norm of each row of W0."""
    weight = federation.module(name).base_weight
    return torch.cat([part.norm(dim=1) for part in row_parts(weight())]) if weight else None

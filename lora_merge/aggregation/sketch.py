"""What is kept of each update while a merge reads it anyway: its norm, and a sketch by which copies are found.

A sketch of delta_w is U delta_w V^T for seeded random signs U and V, four rows each, the bias of lora_B being one
column more. It costs little, does not depend on how delta_w is factored, and the inner products of sketches estimate
those of the updates, right on average. Norms are exact: |s B A|^2 = s^2 sum((B^T B) * (A A^T)). Values that were
trained whole, DoRA's magnitudes too, are sized by `lora_merge.aggregation.apart`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lora_merge.adapter import Adapter, Factors, FactorsSpec, Spec, Update
from lora_merge.aggregation import inner_products, lowrank

ROWS = 4  # of U and of V: 16 numbers a module


@dataclass(frozen=True)
class Sketched:
    """An adapter that sketches each update when it is read first. Modules may be read by several threads.

    Attributes:
        places: the row of each low-rank module in `numbers`.
        numbers: |delta_w|^2, and U delta_w V^T flat, in fp64, modules x 17; NaN where nothing was read. One table a
            client: thousands of small pieces would lie between the large ones that come and go, and so pin the heap.
    """

    adapter: Adapter
    places: Mapping[str, int] = field(init=False)
    numbers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        modules = [name for name, spec in self.adapter.specs.items() if isinstance(spec, FactorsSpec)]
        object.__setattr__(self, "places", {name: row for row, name in enumerate(sorted(modules))})
        object.__setattr__(self, "numbers", torch.full((len(modules), 1 + ROWS * ROWS), torch.nan, dtype=torch.float64))

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.adapter.specs

    def __getitem__(self, module: str) -> Update:
        update = self.adapter[module]
        if isinstance(update, Factors) and not self.has(module):
            self.numbers[self.places[module]] = sketch_of(update)
        return update

    def has(self, module: str) -> bool:
        """Whether the module was read."""
        return module in self.places and not math.isnan(self.numbers[self.places[module], 0])

    @property
    def norm(self) -> float | None:
        """|Delta| over the modules that were read; of a DoRA module, of s B A. None where none was measured."""
        squares = [square for square in self.numbers[:, 0].tolist() if not math.isnan(square)]
        return sum(squares) ** 0.5 if squares else None


def sketch_of(update: Factors) -> Tensor:
    """The squared norm and the sketch of s B A with its bias of lora_B; in O(r (r + 4) (d_in + d_out))."""
    A, B = update.A, update.B  # E x r x d_in, E x d_out x r
    U, V = _signs_of(update)
    square = update.scaling**2 * float(((B.mT @ B).double() * (A @ A.mT).double()).sum())
    values = ((U @ B) @ (A @ V.mT)).sum(dim=0)
    if update.bias is not None:
        column = update.bias.reshape(-1, B.shape[1], 1)
        values += (U[: len(column)] @ column).sum(dim=0) @ _signs(ROWS, 1, 2).mT
    values = values.reshape(-1).double().cpu()
    if update.bias is not None or not 0 < square < math.inf:  # fp32 ends where honest updates never are
        square = inner_products.squared_norm(update)
    found = max(0.0, square) if math.isfinite(square) else math.inf
    return torch.cat([torch.tensor([found], dtype=torch.float64), update.scaling * values])


def cosines(clients: Mapping[str, Sketched], *, above: float) -> dict[tuple[str, str], float]:
    """The estimated cosines of all pairs that may be above `above`, by their ids in order.

    The relative error of 1 - cosine is about 1 / sqrt(8 modules), or 0.35 for one module.
    """
    names = sorted(client for client, adapter in clients.items() if adapter.norm)
    if not names:
        return {}
    modules = sorted({module for name in names for module in clients[name].places})
    unit = _units(torch.stack([_row(clients[name], modules) for name in names]))  # m x (16 modules)
    pairs = (unit @ unit.mT).triu(1)
    return {(names[i], names[j]): float(pairs[i, j]) for i, j in (pairs > above).nonzero().tolist()}


def sketches_of_blocks(update: Factors, bounds: Sequence[int]) -> Tensor:
    """The sketch of each of m updates that lie side by side as one, m x 16; in O(r (d_in + d_out)).

    Args:
        bounds: where each begins among the r columns of B and rows of A, and where the last one ends.
    """
    U, V = _signs_of(update)
    columns = torch.einsum("eir,erj->rij", U @ update.B, update.A @ V.mT).reshape(update.r, -1).double()
    owners = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.diff(torch.tensor(bounds)))
    found: Tensor = torch.zeros(len(bounds) - 1, ROWS * ROWS, dtype=torch.float64)
    found.index_add_(0, owners, columns[: len(owners)])
    return found * update.scaling


def cosines_to_blocks(
    clients: Mapping[str, Sketched], names: Sequence[str], sketches: Mapping[str, Tensor], *, above: float
) -> dict[tuple[str, str], float]:
    """The estimated cosines of the pairs (name, client) that may be above `above`.

    Args:
        sketches: of each module, a row for each of `names`, as of `sketches_of_blocks`.
    """
    new = sorted(client for client, adapter in clients.items() if adapter.norm)
    modules = sorted({*sketches, *(module for client in new for module in clients[client].places)})
    if not new or not names:
        return {}
    absent = torch.zeros(len(names), ROWS * ROWS, dtype=torch.float64)
    stored = _units(torch.cat([sketches.get(module, absent) for module in modules], dim=1))
    pairs = stored @ _units(torch.stack([_row(clients[client], modules) for client in new])).mT
    return {(names[i], new[j]): float(pairs[i, j]) for i, j in (pairs > above).nonzero().tolist()}


def _units(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths.clamp(min=torch.finfo(torch.float64).tiny)


def _row(adapter: Sketched, modules: Sequence[str]) -> Tensor:
    """The sketches of `modules` side by side; zeros for one that the adapter has not, or that was not read."""
    nothing = torch.zeros(ROWS * ROWS, dtype=torch.float64)
    return torch.cat([adapter.numbers[adapter.places[name], 1:] if adapter.has(name) else nothing for name in modules])


def _signs_of(update: Factors) -> tuple[Tensor, Tensor]:
    """U (E x 4 x d_out) and V (4 x d_in)."""
    blocks, d_out, _ = update.B.shape
    return _signs(ROWS * blocks, d_out, 1).reshape(blocks, ROWS, d_out), _signs(ROWS, update.A.shape[2], 0)


@lru_cache(maxsize=64)
def _signs(rows: int, columns: int, side: int) -> Tensor:
    """Signs of one shape serve every module of that shape: drawing them would cost more than using them.

    They lie as rows, by which a product with four of them takes a fifth of the time that it takes with columns.
    """
    return lowrank.signs(rows, columns, lowrank.sketch_seed(side, f"screening {columns}"))

"""Results that have to be formed densely, one module at a time: entry by entry, from all clients' updates.

The clients' updates are formed by runs of rows, so that only the result, and never all of the clients, is in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import lowrank
from lora_merge.aggregation.difference import SquaredError
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.sums import beside_identity

HELD = 1 << 22  # entries of all clients' updates formed at a time: not many more than the cache holds
ROWS = 16  # but no fewer rows, since each run reads every client again
LARGEST = torch.finfo(torch.float32).max
BIAS = slice(-1, None)  # the rows that a combination is told of for the biases of lora_B

# From the clients' rows (m x rows x d_in, absent clients left out) of a block, to the rows of the result.
Combine: TypeAlias = Callable[[Tensor, int, slice], Tensor]


@dataclass(frozen=True)
class Target:
    """What a rule makes of one module.

    Attributes:
        M: the result, E x d_out x d_in, fp32; `bias` of lora_B. Both times alpha.
        from_mean: its squared distance from the weighted mean, and the squared norm of that.
        rank: what it is written at; None: whole. `seed` is of the sketch for that.
    """

    M: Tensor
    bias: Tensor | None
    from_mean: SquaredError
    rank: int | None = None
    seed: int = 0

    def factors(self) -> Factors:
        """M beside an identity, or the best approximation of it at the rank."""
        whole = beside_identity(self.M, 1.0, self.bias)
        if self.rank is None:
            return whole
        B, A = lowrank.truncate(whole.B, whole.A, self.rank, seed=self.seed)
        return Factors(B, A, 1.0, self.bias)

    def squared_error(self, written: Factors) -> SquaredError:
        """|written - M|^2 and |M|^2 in fp64, by runs of rows."""
        error = norm = 0.0
        for block, rows in row_runs(self.M.shape, 8):
            M = self.M[block, rows].double()
            found = written.scaling * (written.B[block, rows].double() @ written.A[block].double())
            error += float((found - M).square().sum())
            norm += float(M.square().sum())
        if self.bias is not None and written.bias is not None:
            error += float((written.scaling * written.bias.double() - self.bias.double()).square().sum())
            norm += float(self.bias.double().square().sum())
        return SquaredError(error, norm)


def form(module: Module, combine: Combine, scales: Mapping[str, float] | None = None) -> Target:
    """The result of `combine` on the clients' updates s_i B_i A_i, each times its entry of `scales`.

    The biases of lora_B are combined too, as one row more of block 0.
    """
    scales = scales or {}
    spec = module.spec
    parts: list[Tensor] = []
    error = norm = 0.0
    for block, rows in row_runs((spec.blocks, spec.d_out, spec.d_in), len(module.shares)):
        values = torch.stack([_rows(share, scales, block, rows) for share in module.shares])
        parts.append(combine(values, block, rows))
        error, norm = _plus((error, norm), _from_mean(module, scales, values, parts[-1]))
    M = torch.cat(parts).reshape(spec.blocks, spec.d_out, spec.d_in)
    bias = None
    if module.bias:
        values = biases(module, scales)[:, None, :]
        bias = combine(values, 0, BIAS)[0]
        error, norm = _plus((error, norm), _from_mean(module, scales, values, bias[None]))
    alpha = module.alpha
    from_mean = SquaredError(alpha**2 * error, alpha**2 * norm)
    return Target(alpha * M, None if bias is None else alpha * bias, from_mean)


def row_runs(shape: Sequence[int], held: int) -> Iterator[tuple[int, slice]]:
    """Runs of rows of each block, so short that `held` of them fit into HELD; in order."""
    blocks, d_out, d_in = shape
    rows = max(ROWS, HELD // (held * d_in))
    for block in range(blocks):
        for start in range(0, d_out, rows):
            yield block, slice(start, min(start + rows, d_out))


def dense(update: Factors, scale: float, block: int, rows: slice) -> Tensor:
    """scale * B @ A of some rows, fp32. What fp32 cannot hold is as large as it can hold, never infinite."""
    B, A = update.B[block, rows], update.A[block]
    if float(B.abs().max()) * float(A.abs().max()) * scale * update.r < LARGEST:
        return (B @ A) * scale
    return (scale * (B.double() @ A.double())).clamp(-LARGEST, LARGEST).float()


def _rows(share: Share, scales: Mapping[str, float], block: int, rows: slice) -> Tensor:
    return dense(share.read(), share.spec.scaling * scales.get(share.client, 1.0), block, rows)


def biases(module: Module, scales: Mapping[str, float]) -> Tensor:
    """s_i b_i times `scales` of each client, m x size; zero where it has none."""
    spec = module.spec
    size = spec.d_out * (spec.blocks if spec.layout == "conv" else 1)
    found = []
    for share in module.shares:
        update, scale = share.read(), share.spec.scaling * scales.get(share.client, 1.0)
        bias = torch.zeros(size).to(update.B) if update.bias is None else update.bias
        found.append((scale * bias.double()).clamp(-LARGEST, LARGEST).float())
    return torch.stack(found)


def _from_mean(module: Module, scales: Mapping[str, float], values: Tensor, combined: Tensor) -> tuple[float, float]:
    """|combined - M|^2 and |M|^2 for the weighted mean M, from values that were multiplied by `scales`."""
    mean = torch.zeros_like(combined, dtype=torch.float64)
    for share, value in zip(module.shares, values, strict=True):
        mean += value.double() * (share.n / module.total / scales.get(share.client, 1.0))
    return float((combined.double() - mean).square().sum()), float(mean.square().sum())


def _plus(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
    return one[0] + two[0], one[1] + two[1]

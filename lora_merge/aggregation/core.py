"""The core that stands for all clients so far when a truncated mean is folded.

The core of a module is the best approximation of rank c R of S = sum n_i s_i B_i A_i; an arrival is added to it and the
sum is cut to that rank again, so it costs the same however many came before: O((d_in + d_out)(c R + r)^2). S grows and
is never rescaled, so what was cut off adds up: |core - S| <= the sum of the norms of the dropped tails.
Source: the incremental SVD of Brand 2002, and its a-posteriori bound by the triangle inequality.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_merge.aggregation import lowrank
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.sums import product

TIMES = 4  # the core's rank, in ranks of the result


@dataclass(frozen=True)
class Core:
    """B @ A of rank c R at most, and the norm of all that was dropped on the way to it."""

    B: Tensor
    A: Tensor
    dropped: float


def core_rank(module: Module, rank: int) -> int:
    """The rank of a module's core, where the result has the rank `rank`."""
    return min(TIMES * rank, module.K, module.max_r)


def core_of(module: Module, rank: int, dropped: float, *, seed: int) -> Core:
    """The core of the clients of `module`, one of which may stand for an earlier core that had lost `dropped`."""
    B, A = product(replace(module, alpha=1.0, total=1.0))
    width = core_rank(module, rank)
    if B.shape[2] <= width:
        return Core(B, A, dropped)
    left, right = lowrank.truncate(B, A, width, seed=lowrank.sketch_seed(seed, module.name))
    return Core(left, right, dropped + _distance(B, A, left, right))


def _distance(B: Tensor, A: Tensor, left: Tensor, right: Tensor) -> float:
    """|B A - left right|, as the core is written; from R factors, so that a small one is seen."""
    L = lowrank.r_factor(torch.cat([B.double(), -left.double()], dim=2))
    R = lowrank.r_factor(torch.cat([A.double(), right.double()], dim=1).mT)
    return float((L @ R.mT).norm())

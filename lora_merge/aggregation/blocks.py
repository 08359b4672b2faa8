"""Whether blocks of a stack could be clients that shared a factor, whose bits a stack does not keep."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_merge.adapter import Factors


def may_share(blocks: Iterable[Factors], dtype: torch.dtype) -> bool:
    """Whether all blocks have one lora_A, or one lora_B, but for a factor and the rounding of `dtype`.

    A client's factors were multiplied by a number and rounded when they were stored: had two clients the same bits,
    their stored blocks are multiples of each other to within two roundings. The other way round is only likely.
    """
    blocks = iter(blocks)
    first = next(blocks)
    roles = ["A", "B"]
    for block in blocks:
        roles = [role for role in roles if _are_multiples(getattr(first, role), getattr(block, role), dtype)]
        if not roles:
            return False
    return True


def _are_multiples(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    x, y = one.double(), other.double()
    square = float(y.square().sum())
    if square == 0:
        return float(x.square().sum()) == 0
    ratio = float((x * y).sum()) / square
    limits = torch.finfo(dtype)
    floor = (1 + abs(ratio)) * limits.smallest_normal * limits.eps * math.sqrt(x.numel())  # below it, all is rounding
    return float((x - ratio * y).norm()) <= 2 * limits.eps * float(x.norm()) + floor

"""Modules of random clients in memory, and what they are densely: nothing here is shared with the package's algebra."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_merge.adapter import Factors, spec_of
from lora_merge.aggregation.module import Module, Share


def update(seed: int, *, r: int = 3, d_out: int = 12, d_in: int = 9, blocks: int = 1, scaling: float = 2.0) -> Factors:
    """A random update."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(blocks, d_out, r, generator=generator)
    return Factors(B, torch.randn(blocks, r, d_in, generator=generator), scaling)


def module(updates: Sequence[Factors], n: Sequence[float] | None = None, *, total: float | None = None) -> Module:
    """The module `layer` of clients a, b, c… with weights n, by default one each."""
    weights = [1.0] * len(updates) if n is None else list(n)
    shares = tuple(
        Share(f"client-{i:03}", weight, spec_of(each), lambda each=each: each)  # type: ignore[arg-type,misc]
        for i, (each, weight) in enumerate(zip(updates, weights, strict=True))
    )
    bias = any(each.bias is not None for each in updates)
    return Module("layer", shares, sum(weights) if total is None else total, bias=bias)


def names(found: Module) -> list[str]:
    return [share.client for share in found.shares]


def delta(each: Factors) -> Tensor:
    """scaling * B @ A in fp64."""
    return each.scaling * (each.B.double() @ each.A.double())


def deltas(updates: Sequence[Factors]) -> Tensor:
    return torch.stack([delta(each) for each in updates])


def rotated(each: Factors, seed: int = 0) -> Factors:
    """(B R, inv(R) A): another pair of factors of the same update."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.eye(each.r, dtype=torch.float64)
    R = R + 0.3 * torch.randn(each.r, each.r, generator=generator, dtype=torch.float64)
    return replace(each, B=(each.B.double() @ R).float(), A=(torch.linalg.inv(R) @ each.A.double()).float())


def boosted(each: Factors, times: float) -> Factors:
    """The update `times` over, half of it in each factor."""
    return replace(each, B=each.B * times**0.5, A=each.A * times**0.5)

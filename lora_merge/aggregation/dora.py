"""DoRA: the weighted mean of DoRA adapters is exactly one DoRA adapter.

A DoRA client's weight is D_i (W0 + s_i B_i A_i), row by row, with D_i = m_i / rownorm(W0 + s_i B_i A_i); a plain-LoRA
or absent client has D_i = 1. Their mean has D = 1 + alpha sum p_i (D_i - 1) and the product T = alpha sum p_i s_i D_i
B_i A_i, so B = T's left factor / D, A = T's right factor and the magnitude D * rownorm(W0 + B A) give it exactly.
Source: Liu et al. 2024, arXiv:2402.09353; PEFT 0.21 `tuners/lora/dora.py`. All of it in fp64, W0 streamed by rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation.module import Module, Share

CHUNK = 1 << 22  # entries of W0 held in fp64 at a time


class NotPositive(ValueError):
    """D is not finite and positive, so it has no magnitude; `share` is the client where one is to blame."""

    def __init__(self, reason: str, share: Share | None = None) -> None:
        super().__init__(reason)
        self.reason, self.share = reason, share


def row_squares(W0: Tensor, d: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """|d_j w_j + l_j R|^2 of each row j, without forming L @ R.

    Args:
        W0: d_out x d_in. d: d_out. L: d_out x k. R: k x d_in; all but W0 in fp64.
    """
    gram = R @ R.mT
    parts, start = [], 0
    for part in row_parts(W0):
        w, end = part.double(), start + len(part)
        scale, left = d[start:end], L[start:end]
        start = end
        cross = (left * (w @ R.mT)).sum(dim=1)
        parts.append(scale.square() * w.square().sum(dim=1) + 2 * scale * cross + ((left @ gram) * left).sum(dim=1))
    return torch.cat(parts).clamp(min=0)


def row_parts(W0: Tensor) -> tuple[Tensor, ...]:
    """W0 by runs of rows, each small enough to be held in fp64."""
    return torch.split(W0, max(1, CHUNK // W0.shape[1]))


def row_norms(W0: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W0 + scaling * B @ A, fp64."""
    return row_squares(W0, torch.ones(W0.shape[0]).to(B), scaling * B, A).sqrt()


def row_scale(W0: Tensor, share: Share, update: Factors, name: str) -> Tensor:
    """D_i, fp64: one for a client without a magnitude.

    Raises:
        NotPositive: a row has no norm to divide by.
    """
    if update.magnitude is None:
        return torch.ones(W0.shape[0], dtype=torch.float64, device=W0.device)
    norms = row_norms(W0, update.B[0].double(), update.A[0].double(), update.scaling)
    D = update.magnitude.double() / norms
    if not torch.isfinite(D).all():
        raise NotPositive(f"a row of W0 + BA in {name} has no norm to divide the magnitude by", share)
    return D


def target(module: Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W0, D, and the factors of T: what the mean of the clients is.

    Returns:
        W0 (d_out x d_in, fp32), D (d_out), L (d_out x K) and R (K x d_in), fp64, with T = L @ R.

    Raises:
        NotPositive: some D is not finite and positive.
    """
    assert module.base_weight is not None
    W0 = module.base_weight()
    D = torch.ones(W0.shape[0], dtype=torch.float64, device=W0.device)
    lefts, rights = [], []
    for share in module.shares:
        update = share.read()
        B, A = update.B[0].double(), update.A[0].double()
        p = module.alpha * share.n / module.total
        D_i = row_scale(W0, share, update, module.name)
        D += p * (D_i - 1)
        lefts.append(p * update.scaling * D_i[:, None] * B)
        rights.append(A)
    if not (torch.isfinite(D).all() and (D > 0).all()):
        raise NotPositive(f"the mean magnitude of {module.name} is not positive in some row")
    return W0, D, torch.cat(lefts, dim=1), torch.cat(rights, dim=0)


def merge(module: Module, factor: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Factors:
    """The mean as one DoRA update; `factor` brings L and R (1 x d_out x K, 1 x K x d_in) to the rank wanted."""
    W0, D, L, R = target(module)
    left, right = factor(L[None], R[None])
    B, A = (left.double() / D[:, None]).float(), right.float()
    magnitude = D * row_norms(W0, B[0].double(), A[0].double(), 1.0)
    return Factors(B, A, 1.0, magnitude=magnitude.float())


def squared_error(module: Module, written: Factors) -> tuple[float, float]:
    """|written - M|_F^2 and |M|_F^2 of the whole update, magnitude included, from rows of W0 and factors."""
    W0, D, L, R = target(module)
    B, A = written.B[0].double(), written.A[0].double()
    assert written.magnitude is not None
    D_written = written.magnitude.double() / row_norms(W0, B, A, written.scaling)
    both_L = torch.cat([D_written[:, None] * written.scaling * B, -L], dim=1)
    error = row_squares(W0, D_written - D, both_L, torch.cat([A, R], dim=0)).sum()
    return float(error), float(row_squares(W0, D - 1, L, R).sum())

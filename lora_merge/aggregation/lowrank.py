"""The best rank R of a product B @ A, from its factors.

`B` is E x d_out x K, `A` is E x K x d_in; a dense d_out x d_in matrix is never formed here.
"""

import hashlib

import torch
from torch import Tensor

# Up to this core the spectrum is computed whole; above it, by a randomised range finder.
MAX_EXACT_CORE = 1024
OVERSAMPLING = 32
POWER_STEPS = 4


def truncate(B: Tensor, A: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-`rank` approximation, sqrt(S) on both (Eckart & Young 1936).

    Exact where the core is small; else within about 0.1 % of the optimum.

    Returns:
        B (E x d_out x rank) and A (E x rank x d_in), fp32, signs fixed: the largest entry of each left vector is
        positive.
    """
    if min(B.shape[2], B.shape[1], A.shape[2]) > MAX_EXACT_CORE:
        return _fixed_signs(*_randomised(B, A, rank, seed))
    return _fixed_signs(*_by_cores(B.double(), A.double(), rank))


def spectrum(B: Tensor, A: Tensor) -> Tensor:
    """All singular values of each block, E x min(K, d_out, d_in) in fp64, descending."""
    core = r_factor(B.double()) @ r_factor(A.double().mT).mT
    values: Tensor = torch.linalg.svdvals(core)
    return values


def rank_for_energy(singular_values: Tensor, kept: float) -> int:
    """The smallest rank that keeps the share `kept` of the squared norm, at least 1."""
    energy = singular_values.square().sum(dim=0)  # over the blocks
    tail = energy.flip(0).cumsum(0).flip(0)  # tail[k]: what rank k loses
    allowed = (1 - kept) * tail[0]
    return max(1, int((tail > allowed).sum()))


def _by_cores(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """QR of both factors and SVD of the K x K core, in fp64; O((d_in + d_out) K^2 + K^3).

    With B = Q_B R_B, A^T = Q_A R_A and R_B R_A^T = U S V^T, the left vectors Q_B U are B R_A^T V / S: so neither Q is
    ever formed, and a rank-deficient factor needs no inverse.
    """
    R_B, R_A = r_factor(B), r_factor(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    U, S, Vh = U[:, :, :rank], S[:, :rank], Vh[:, :rank]
    noise = S[:, :1] * 1e-14
    root = torch.where(S > noise, S, 1.0).rsqrt() * (S > noise)
    left = B @ ((R_A.mT @ Vh.mT) * root[:, None, :])
    right = (root[:, :, None] * (U.mT @ R_B)) @ A
    return left.float(), right.float()


def r_factor(X: Tensor) -> Tensor:
    """R with R^T R = X^T X: of a QR where X is tall, X itself where it is wide."""
    return torch.linalg.qr(X, mode="r").R if X.shape[1] > X.shape[2] else X


def _randomised(B: Tensor, A: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A randomised range finder with power steps (Halko, Martinsson & Tropp 2011); O((d_in + d_out) K rank)."""
    columns = min(rank + OVERSAMPLING, B.shape[1], A.shape[2])
    Q = torch.linalg.qr(B @ (A @ signs(A.shape[2], columns, seed).to(A))).Q
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(A.mT @ (B.mT @ Q)).Q
        Q = torch.linalg.qr(B @ (A @ Q)).Q
    U, S, Vh = torch.linalg.svd(((Q.mT @ B) @ A).double(), full_matrices=False)
    root = S[:, :rank].sqrt()
    left = Q.double() @ (U[:, :, :rank] * root[:, None, :])
    return left.float(), (root[:, :, None] * Vh[:, :rank]).float()


def signs(rows: int, columns: int, seed: int) -> Tensor:
    """A rows x columns matrix of seeded random signs, the same on every CPU (`randn` is not), fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1.0, 1.0)


def _fixed_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    largest = left.gather(1, left.abs().argmax(dim=1, keepdim=True))  # E x 1 x R
    sign = torch.where(largest < 0, -1.0, 1.0)
    return left * sign, right * sign.mT


def sketch_seed(seed: int, name: str) -> int:
    """The seed of the random sketch of module `name`: its own, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])

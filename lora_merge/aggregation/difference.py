"""|written - M|^2 of one module, exactly, from the factors of the difference: fp64, no dense matrix.

By the Gram identity |L @ R|^2 = sum((L^T L) * (R R^T)), a piece of rows at a time so that it stays in the cache.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import lowrank
from lora_merge.aggregation.module import Module

PIECE = 1024  # rows
# The identity squares, so rounding hides an error below about 1e-8 of the norm: a smaller square than this is not
# believed.
GRAM_SEES = 1e-10


@dataclass(frozen=True)
class SquaredError:
    """|written - M|^2 and |M|^2 of one module, and the variance of the former where it was estimated by probes."""

    error: float
    norm: float
    variance: float = 0.0
    probes: int = 0


def from_factors(module: Module, written: Factors) -> SquaredError:
    """Of any result: from the Gram matrices of both stacked factors, or where it is tiny, from their R factors."""
    terms = list(module.terms())
    K, error, norm = module.K, 0.0, 0.0
    for block in range(module.spec.blocks):
        lefts = [*((c, update.B[block]) for c, update in terms), (-written.scaling, written.B[block])]
        rights = [*((1.0, update.A[block].mT) for _, update in terms), (1.0, written.A[block].mT)]
        products = _gram(lefts) * _gram(rights)
        norm += (of_block := float(products[:K, :K].sum()))
        difference = float(products.sum())
        error += difference if difference > GRAM_SEES * of_block else _by_r_factors(lefts, rights)
    bias_error, bias_norm = bias_difference(written, terms)
    return SquaredError(error + bias_error, norm + bias_norm)


def of_stack(module: Module, written: Factors) -> SquaredError:
    """Of a stack, whose blocks differ from the clients' by their rounding only.

    With c B A = w X Y, X = rho B, Y = rho A, rho = sqrt(c / w) and the written block (X + D)(Y + E), the difference is
    w (D (Y + E) + X E): every product in it is as small as the rounding, so squaring hides nothing. D and E are found
    in fp64; their products need no more than fp32.
    """
    terms = list(module.terms())
    w, error, norm = written.scaling, 0.0, 0.0
    rho = [math.sqrt(c / w) for c, _ in terms]
    for block in range(module.spec.blocks):
        clients = [update.B[block] for _, update in terms], [update.A[block].mT for _, update in terms]
        XX, DX, DD = _stack_grams(clients[0], rho, written.B[block])
        YY, EY, EE = _stack_grams(clients[1], rho, written.A[block].mT)
        ZZ, EZ = YY + EY + EY.mT + EE, EY + EE  # Z = Y + E
        error += w * w * float((DD * ZZ + 2 * DX * EZ.mT + XX * EE).sum())
        norm += w * w * float((XX * YY).sum())
    if not math.isfinite(error):  # numbers whose squares are beyond fp32
        return from_factors(module, written)
    bias_error, bias_norm = bias_difference(written, terms)
    return SquaredError(error + bias_error, norm + bias_norm)


def bias_difference(written: Factors, terms: Iterable[tuple[float, Factors]]) -> tuple[float, float]:
    """The part that the bias of lora_B has in the error and in the norm."""
    if written.bias is None:
        return 0.0, 0.0
    mean = torch.zeros_like(written.bias, dtype=torch.float64)
    for coefficient, update in terms:
        if update.bias is not None:
            mean += coefficient * update.bias.double()
    difference = written.scaling * written.bias.double() - mean
    return float(difference.square().sum()), float(mean.square().sum())


def _gram(columns: list[tuple[float, Tensor]]) -> Tensor:
    """G = L^T L of L = [c_1 C_1, c_2 C_2 …] (each C_i is d x r_i)."""
    width = sum(matrix.shape[1] for _, matrix in columns)
    total = columns[0][1].new_zeros(width, width, dtype=torch.float64)
    for rows in _pieces(len(columns[0][1])):
        piece = torch.cat([c * matrix[rows].double() for c, matrix in columns], dim=1)
        total += piece.mT @ piece
    return total


def _stack_grams(clients: list[Tensor], rho: list[float], stacked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X, D^T X, D^T D (K x K) of X = [rho_i C_i], each C_i d x r_i, and D = stacked - X."""
    K = sum(matrix.shape[1] for matrix in clients)
    XX, DX, DD = (stacked.new_zeros(K, K, dtype=torch.float64) for _ in range(3))
    for rows in _pieces(len(stacked)):
        X = torch.cat([root * matrix[rows].double() for root, matrix in zip(rho, clients, strict=True)], dim=1)
        D = (stacked[rows, :K].double() - X).float()
        XX += X.mT @ X
        DX += D.mT @ X.float()
        DD += D.mT @ D
    return XX, DX, DD


def _by_r_factors(lefts: list[tuple[float, Tensor]], rights: list[tuple[float, Tensor]]) -> float:
    """|L @ R|^2 = |R_L @ R_R^T|^2, which sees errors down to 1e-16 of the norm."""
    L, R = (torch.cat([c * matrix.double() for c, matrix in side], dim=1)[None] for side in (lefts, rights))
    return float((lowrank.r_factor(L) @ lowrank.r_factor(R).mT).square().sum())


def _pieces(rows: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, rows, PIECE))

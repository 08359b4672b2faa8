"""The Gram matrix of the clients' updates: norms, cosines, distances and influence without a dense matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gram:
    """How the clients' updates lie to each other.

    Attributes:
        clients: their ids; every vector and matrix here is in this order.
        n: their weights.
        matrix: <Delta_i, Delta_j> over all measured modules, m x m in fp64.
        modules: |Delta_i|^2 of each client by module.
        not_measured: the modules that would have needed tensors of the base.
    """

    clients: tuple[str, ...]
    n: tuple[float, ...]
    matrix: Tensor
    modules: Mapping[str, Tensor]
    not_measured: tuple[str, ...] = ()

    @cached_property
    def norms(self) -> Tensor:
        """|Delta_i| in the Frobenius norm."""
        return self.matrix.diagonal().clamp(min=0).sqrt()

    @cached_property
    def cosines(self) -> Tensor:
        """cos(Delta_i, Delta_j), m x m; 0 where an update is zero."""
        unit = _inverse(self.norms)
        return (self.matrix * unit[:, None] * unit).clamp(-1, 1)

    @cached_property
    def distances(self) -> Tensor:
        """|Delta_i - Delta_j|, m x m; to within 1e-8 of the larger norm."""
        return squared_distances(self.matrix).sqrt().fill_diagonal_(0)

    @cached_property
    def p(self) -> Tensor:
        """Each client's share of the weights given."""
        n = torch.tensor(self.n, dtype=torch.float64)
        return n / n.sum()

    def cosines_to(self, p: Tensor) -> Tensor:
        """cos(Delta_i, sum_j p_j Delta_j); 0 where either is zero."""
        along: Tensor = self.matrix @ p
        return (along * _inverse(self.norms) * _inverse(self.norm_of(p))).clamp(-1, 1)

    @cached_property
    def cosines_to_others(self) -> list[float]:
        """cos(Delta_i, the weighted mean of all others); 0 where either is zero."""
        m = len(self.clients)
        others = self.p.repeat(m, 1) * (1 - torch.eye(m, dtype=torch.float64))  # row i: the weights without client i's
        return [float(self.cosines_to(others[i])[i]) for i in range(m)]

    def norm_of(self, p: Tensor) -> Tensor:
        """|sum_i p_i Delta_i|."""
        return (p @ self.matrix @ p).clamp(min=0).sqrt()

    @cached_property
    def influence(self) -> Tensor:
        """|M - M without client i| / |M| for the weighted mean M of all: p_i |Delta_i - M| / ((1 - p_i) |M|).

        1 for a client that is alone; 0 where M is zero.
        """
        p, m = self.p, len(self.clients)
        differences = torch.eye(m, dtype=torch.float64) - p  # row i: Delta_i - M
        squares = ((differences @ self.matrix) * differences).sum(dim=1)
        moved = squares.clamp(min=0).sqrt() * p / (1 - p)
        return torch.where(p < 1, moved * _inverse(self.norm_of(p)), 1.0)


def squared_distances(matrix: Tensor) -> Tensor:
    """|Delta_i - Delta_j|^2 from the Gram matrix, m x m; what rounding takes below 0 is 0."""
    squares = matrix.diagonal()
    return (squares[:, None] + squares - 2 * matrix).clamp(min=0)


def total(clients: Sequence[str], n: Sequence[float], parts: Mapping[str, Tensor | None]) -> Gram:
    """The Gram matrix over all modules, from that of each (`aggregation.inner_products`); None: not measured."""
    matrix = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    modules = {}
    for name, part in parts.items():
        if part is not None:
            matrix += part
            modules[name] = part.diagonal().clone()
    unmeasured = tuple(name for name, part in parts.items() if part is None)
    return Gram(tuple(clients), tuple(n), matrix, modules, unmeasured)


def _inverse(values: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(values > 0, 1 / values, 0.0)

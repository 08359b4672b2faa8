"""Tensors that were trained whole: full tensors and rows of an embedding.

Both are values, not updates: a client without one counts as the base, and a learning rate other than 1 moves from the
base's value towards the mean. Only those two need the base's value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_merge.aggregation.module import accumulate


@dataclass(frozen=True)
class ValueShare:
    """One client's value of a tensor: its id and weight n, and how to read it."""

    client: str
    n: float
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Value:
    """A tensor (or one row of an embedding) as all clients see it.

    Attributes:
        shares: the clients that trained it, sorted by id. The others count as the base's value.
        total: N, the sum of all clients' weights.
        alpha: the global learning rate.
        base: reads W0, where it is at hand.
        frozen: whether the clients hold it as a copy of the base's, saved along with an update and never trained.
    """

    shares: Sequence[ValueShare]
    total: float
    alpha: float = 1.0
    base: Callable[[], Tensor] | None = None
    frozen: bool = False

    @property
    def rest(self) -> float:
        """The coefficient of W0 in the result."""
        return 1 - self.alpha * sum(share.n for share in self.shares) / self.total

    @property
    def needs_base(self) -> bool:
        """Whether the clients alone do not determine the mean: one lacks the tensor, or alpha is not 1."""
        return not self.is_untrained and (self.alpha != 1 or self._some_lack)

    @cached_property
    def is_untrained(self) -> bool:
        """Whether it is the base's value: all clients say so, or some do and it is.

        What some hold and others lack may be anything: who writes it would put a value of his own in the place of all.
        """
        if not self.frozen or (common := self._common()) is None:
            return False
        if not self._some_lack:
            return True
        return self.base is not None and torch.equal(common, self.base().to(common).reshape(common.shape))

    @property
    def _some_lack(self) -> bool:
        return sum(share.n for share in self.shares) != self.total

    def mean(self) -> Tensor:
        """W0 + alpha sum p_i (W_i - W0), fp32. Where all clients hold the same bits, those bits."""
        if not self.needs_base and (common := self._common()) is not None:
            return common
        mean: Tensor | None = None
        for share in self.shares:
            mean = accumulate(mean, share.read(), self.alpha * share.n / self.total)
        assert mean is not None
        if self.needs_base:
            assert self.base is not None
            mean = accumulate(mean, self.base().to(mean).reshape(mean.shape), self.rest)
        return mean

    def squared_error(self, written: Tensor, beside: Tensor | None = None) -> tuple[float, float] | None:
        """|written - mean|^2 and |mean - W0|^2 in fp64; None where W0 is not at hand to tell the update's size.

        Args:
            beside: what a low-rank module adds to the tensor, so that the update is mean - W0 + beside.
        """
        if self.is_untrained:
            return float((written.double() - self.shares[0].read().double()).square().sum()), 0.0
        if self.base is None:
            return None
        base = self.base().to(written).double().reshape(written.shape)
        update = torch.zeros_like(base)
        for share in self.shares:
            update += (share.read().double() - base) * (self.alpha * share.n / self.total)
        error = float((written.double() - base - update).square().sum())
        return error, float((update if beside is None else update + beside).square().sum())

    def _common(self) -> Tensor | None:
        """The clients' value where all that have one hold the same bits."""
        first = self.shares[0].read()
        return first if all(torch.equal(share.read(), first) for share in self.shares[1:]) else None


def rows_by_token(indices: Sequence[Mapping[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """For each token that some client trained: (client, its row) of those that did, from token -> row by client."""
    found: dict[int, list[tuple[int, int]]] = {}
    for client, rows in enumerate(indices):
        for token, row in rows.items():
            found.setdefault(token, []).append((client, row))
    return dict(sorted(found.items()))

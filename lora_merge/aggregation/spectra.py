"""The singular values of clients' updates, found while the updates are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_merge.adapter import Adapter, Factors, Spec, Update


@dataclass(frozen=True)
class Spectra:
    """An adapter that keeps the squared singular values of each update that is read: E r of them, in fp64.

    A DoRA update has none here: what it adds to W0 is no product of its factors.
    """

    adapter: Adapter
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.adapter.specs

    def __getitem__(self, module: str) -> Update:
        update = self.adapter[module]
        if isinstance(update, Factors) and update.magnitude is None and module not in self.found:
            self.found[module] = squared_singular_values(update)
        return update


def squared_singular_values(update: Factors) -> Tensor:
    """Of s B A, block by block, ascending; from r x r matrices: those of S^T (A A^T) S where B^T B = S S^T."""
    B, A = update.B.double(), update.A.double()
    values, vectors = torch.linalg.eigh(B.mT @ B)
    S = vectors * values.clamp(min=0).sqrt()[:, None, :]
    squares: Tensor = torch.linalg.eigvalsh(S.mT @ (A @ A.mT) @ S).clamp(min=0)
    return update.scaling**2 * squares


def summary(squares: Mapping[str, Tensor]) -> tuple[float | None, float | None]:
    """The share of the blocks' top singular values in |Delta|^2, and the effective rank of a block.

    The effective rank is (sum s^2)^2 / sum s^4, averaged over the blocks by |delta_w|^2. None where all is zero.
    """
    largest = max((float(values.max()) for values in squares.values()), default=0.0)
    if not largest:
        return None, None
    # Neither depends on the size, whose sixth power may be out of range.
    scaled = [block for values in squares.values() for block in values / largest]
    blocks = [block for block in scaled if float(block.square().sum()) > 0]
    total = sum(float(block.sum()) for block in blocks)
    top = sum(float(block.max()) for block in blocks) / total
    effective = sum(float(block.sum()) ** 3 / float(block.square().sum()) for block in blocks) / total
    return top, effective

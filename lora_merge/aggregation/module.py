"""One module as all clients see it: who trained it, with which weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapter import Factors, FactorsSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """One client's part in a module: its id and weight n, the update's shape, and how to read the update.

    A `stored` one was read out of a stack: its factors carry sqrt(n s) each already.
    """

    client: str
    n: float
    spec: FactorsSpec
    read: Callable[[], Factors]
    stored: bool = False

    @property
    def weight(self) -> float:
        """n s, the coefficient of this share's B @ A in the sum: exactly 1 for a stored one."""
        return 1.0 if self.stored else self.n * self.spec.scaling


@dataclass(frozen=True)
class Module:
    """One module of the federation.

    Attributes:
        name: the module's name in the base model.
        shares: the clients that trained it, sorted by id. The others count as a zero update.
        total: N, the sum of all clients' weights, absent clients included.
        alpha: the global learning rate.
        bias: whether the result needs a bias of lora_B, since some client has one somewhere.
        dora: whether the result needs a DoRA magnitude, since some client has one somewhere.
        base_weight: reads W0, E * d_out x d_in in fp32; only where `dora` needs it.
    """

    name: str
    shares: tuple[Share, ...]
    total: float
    alpha: float = 1.0
    bias: bool = False
    dora: bool = False
    base_weight: "Callable[[], Tensor] | None" = None

    @property
    def spec(self) -> FactorsSpec:
        """The shape that all shares have in common; its r and scaling are the first client's."""
        return self.shares[0].spec

    @property
    def K(self) -> int:
        """The rank of the whole stack, sum r_i."""
        return sum(share.spec.r for share in self.shares)

    @property
    def max_r(self) -> int:
        """The rank that no update of this module can exceed."""
        return min(self.spec.d_out, self.spec.d_in)

    def terms(self) -> "Iterator[tuple[float, Factors]]":
        """(alpha p_i s_i, update) of each share, read one at a time: M is the sum of c * B @ A."""
        for share in self.shares:
            yield self.alpha * share.weight / self.total, share.read()


def accumulate(total: "Tensor | None", tensor: "Tensor", coefficient: float) -> "Tensor":
    """total + coefficient * tensor, as a product and then a sum: fused, it would give other bytes on other CPUs."""
    term = tensor * coefficient
    return term if total is None else total.add_(term)

"""The coordinate rules: a weighted median or trimmed mean in the place of the mean, entry by entry of the update.

O(m d_out d_in log m) a module, and the result has the rank that its entries have: `exact` writes it whole, `svd` its
best approximation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_merge.aggregation import target
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.registry import Options, Plan, require_no_dora, target_plan
from lora_merge.aggregation.robust import trimmed_mean, weighted_median
from lora_merge.aggregation.target import Target
from lora_merge.aggregation.whole import Value

SORTED = 1 << 17  # entries sorted at a time: what stays in the cache


@dataclass(frozen=True)
class Coordinates:
    """A coordinate rule: `trim` None is the median; `scales` is what clipping multiplied each client's update by."""

    trim: float | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "median" if self.trim is None else "trimmed-mean"

    def of(self, values: Tensor, n: Tensor, rest: float) -> Tensor:
        """The rule on m x … values of weights n, and a zero of weight `rest` for the clients that are absent."""
        n = n.to(values.device)
        if rest > 0:
            values = torch.cat([values, torch.zeros_like(values[:1])])
            n = torch.cat([n, torch.tensor([rest], dtype=n.dtype, device=n.device)])
        flat = values.reshape(len(values), -1)
        parts = [self._rule(part, n) for part in torch.split(flat, max(1, SORTED // len(flat)), dim=1)]
        return torch.cat(parts).reshape(values.shape[1:])

    def _rule(self, values: Tensor, n: Tensor) -> Tensor:
        return weighted_median(values, n) if self.trim is None else trimmed_mean(values, n, self.trim)


def plan(module: Module, rule: Coordinates, method: str, options: Options) -> Plan:
    """What `exact` or `svd` writes of the rule's result."""
    why = "its result has no magnitudes; --robust geometric-median, krum and multi-krum can"
    require_no_dora(module, f"--robust {rule.name}", why)

    def form() -> Target:
        n = torch.tensor([share.n for share in module.shares], dtype=torch.float64)
        rest = _absent(module.total, n)
        return target.form(module, lambda values, block, rows: rule.of(values, n, rest), rule.scales)

    return target_plan(module, rule.name, form, options if method == "svd" else None)


def value(found: Value, rule: Coordinates) -> Tensor:
    """W0 + alpha * the rule on W_i - W0 of a tensor that was trained whole, fp32; all clients' are held at once."""
    if found.is_untrained:
        return found.shares[0].read()
    values = torch.stack([share.read() for share in found.shares])
    n = torch.tensor([share.n for share in found.shares], dtype=torch.float64)
    rest = _absent(found.total, n)
    if not needs_base(found, rule):
        return rule.of(values, n, 0.0)
    assert found.base is not None
    base = found.base().to(values).reshape(values[0].shape)
    scales = torch.tensor([rule.scales.get(share.client, 1.0) for share in found.shares]).to(values)
    moved = (values - base) * scales.reshape(-1, *[1] * base.ndim)
    return base + found.alpha * rule.of(moved, n, rest)


def needs_base(found: Value, rule: Coordinates) -> bool:
    """Whether the rule's result is not determined by the clients alone."""
    clipped = any(rule.scales.get(share.client, 1.0) != 1 for share in found.shares)
    return found.needs_base or (clipped and not found.is_untrained)


def _absent(total: float, n: Tensor) -> float:
    """The weight of the clients that lack a module; what rounding leaves of it is none."""
    rest = total - float(n.sum())
    return rest if rest > 1e-9 * total else 0.0


def squared_error(found: Value, target: Tensor, written: Tensor) -> tuple[float, float] | None:
    """|written - target|^2 and |target - W0|^2 in fp64; None where W0 is not at hand to tell the update's size."""
    error = float((written.double() - target.double()).square().sum())
    if found.is_untrained:
        return error, 0.0
    if found.base is None:
        return None
    return error, float((target.double() - found.base().to(target).double().reshape(target.shape)).square().sum())

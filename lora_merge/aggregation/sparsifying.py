"""Merges that leave entries of the clients' updates out: TIES by size and sign, DARE at random.

On the product, never on its factors; O(m d_out d_in) a module. The result is truncated to a rank, as `svd` is. Tensors
that were trained whole are averaged, as by every method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.aggregation import lowrank, target
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.registry import Options, Plan, method, require_no_dora, target_plan
from lora_merge.aggregation.target import BIAS, LARGEST, Target

DENSITY = {"ties": 0.2, "dare": 0.5}  # where the user does not say; that of TIES is its paper's
NO_MAGNITUDES = "its result has none of the magnitudes that DoRA needs"
INSTEAD = "--method exact or svd merges them, also with --robust geometric-median."
HEEDED = ("rank", "energy", "seed", "density")


@method(
    "ties",
    reference="Yadav et al. 2023, arXiv:2306.01708 (TIES-Merging)",
    laws={"order", "rotation", "scale"},
    folds=None,
    heeds=HEEDED,
    instead=INSTEAD,
    linear=False,
    aims_at_mean=False,
)
def ties(module: Module, options: Options) -> Plan:
    """Each client's largest entries; of those, the mean of the clients that agree with the heavier sign."""
    density = DENSITY["ties"] if options.density is None else options.density
    require_no_dora(module, "ties", NO_MAGNITUDES)

    def form() -> Target:
        least = {} if density == 1 else _least_kept(module, density)

        def combine(values: Tensor, block: int, rows: slice) -> Tensor:
            if least:
                key = -1 if rows == BIAS else block
                bounds = torch.stack([least[share.client, key] for share in module.shares])
                values = values * (values.abs() >= bounds[:, None, None])
            return agreeing_mean(values, [share.n for share in module.shares])

        return target.form(module, combine)

    return target_plan(module, "ties", form, options)


@method(
    "dare",
    reference="Yu et al. 2023, arXiv:2311.03099 (DARE)",
    laws={"order", "rotation", "scale"},
    folds=None,
    heeds=HEEDED,
    instead=INSTEAD,
    aims_at_mean=False,
)
def dare(module: Module, options: Options) -> Plan:
    """The weighted mean of the updates, entries of which are dropped at random and the others enlarged for them."""
    density = DENSITY["dare"] if options.density is None else options.density
    require_no_dora(module, "dare", NO_MAGNITUDES)

    def form() -> Target:
        masks = [_Mask(share, module.name, options.seed, density) for share in module.shares]

        def combine(values: Tensor, block: int, rows: slice) -> Tensor:
            mean = torch.zeros_like(values[0], dtype=torch.float64)
            for mask, value in zip(masks, values, strict=True):
                mean += value.double() * mask(value, rows) * (mask.share.n / module.total / density)
            return mean.clamp(-LARGEST, LARGEST).float()

        return target.form(module, combine)

    return target_plan(module, "dare", form, options)


def agreeing_mean(values: Tensor, n: list[float]) -> Tensor:
    """The mean of each entry over the clients whose value has the sign of the weighted sum; 0 where none has one."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for weight, value in zip(n, values, strict=True):
        total += value.double() * weight
    summed, weights = torch.zeros_like(total), torch.zeros_like(total)
    for weight, value in zip(n, values, strict=True):
        agrees = (value * total.sign()) > 0
        summed += agrees * value.double() * weight
        weights += agrees * weight
    return torch.where(weights > 0, summed / weights, 0.0).float()


def _least_kept(module: Module, density: float) -> dict[tuple[str, int], Tensor]:
    """The size of the smallest entry that each client keeps, by block; -1 is of its bias of lora_B."""
    least = {}
    for share in module.shares:
        update = share.read()
        for block in range(module.spec.blocks):
            values = target.dense(update, share.spec.scaling, block, slice(None))
            least[share.client, block] = _kth_largest(values, density)
    if module.bias:  # to the bit those that are held against it: the smallest one kept may be the only one
        for share, bias in zip(module.shares, target.biases(module, {}), strict=True):
            least[share.client, -1] = _kth_largest(bias, density)
    return least


def _kth_largest(values: Tensor, density: float) -> Tensor:
    count = values.numel()
    kept = max(1, round(density * count))
    return values.abs().flatten().kthvalue(count - kept + 1).values


@dataclass
class _Mask:
    """Which entries of a client's update stay: its own random numbers, drawn in the order of the rows."""

    share: Share
    module: str
    seed: int
    density: float

    def __post_init__(self) -> None:
        self._generators: dict[bool, torch.Generator] = {}

    def __call__(self, value: Tensor, rows: slice) -> Tensor:
        generator = self._generators.setdefault(rows == BIAS, self._generator(rows == BIAS))
        return (torch.rand(value.shape, generator=generator) < self.density).to(value.device)

    def _generator(self, of_bias: bool) -> torch.Generator:
        name = f"{self.module}:{self.share.client}" + (":bias" if of_bias else "")
        return torch.Generator().manual_seed(lowrank.sketch_seed(self.seed, name))

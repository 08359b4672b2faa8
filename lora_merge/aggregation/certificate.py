"""How far a written update is from M, in the Frobenius norm, without a dense matrix.

Exact where K <= 1024, from the factors of the difference (`difference`); above that an estimate from seeded random
probes: E |X z|^2 = |X|_F^2 for random signs z.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_merge.adapter import Factors
from lora_merge.aggregation import difference, dora, lowrank
from lora_merge.aggregation.difference import SquaredError
from lora_merge.aggregation.methods import fedavg
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.registry import MethodRefused, Options

MAX_EXACT_K = 1024
PROBES = 32


@dataclass(frozen=True)
class RelativeError:
    """|written - M| / |M| over one or many modules; `standard_error` where it was estimated by probes."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float]:
        """Three digits: the last bits of a factorisation differ between machines."""
        data = {"relative_error": _rounded(self.value)}
        if self.standard_error is not None:
            data["standard_error"] = _rounded(self.standard_error)
        return data


def relative_error(parts: Iterable[SquaredError]) -> RelativeError | None:
    """The parts together, as one relative error; None where M is zero, so that nothing is relative to it."""
    parts = list(parts)
    error, norm = sum(part.error for part in parts), sum(part.norm for part in parts)
    if norm == 0:
        return None
    value = math.sqrt(error / norm)
    if not any(part.probes for part in parts):
        return RelativeError(value, None)
    spread = math.sqrt(sum(part.variance for part in parts))
    return RelativeError(value, spread / (2 * value * norm) if value else 0.0)


def measure(module: Module, written: Factors, form: str, *, probes: bool, seed: int) -> SquaredError:
    """The error of `written` (as it stands in the file, in the form of its plan) against M, for one module."""
    if module.dora:
        return SquaredError(*dora.squared_error(module, written))
    if probes:
        return _by_probes(module, written, seed)
    return difference.of_stack(module, written) if form == "stack" else difference.from_factors(module, written)


def fedavg_gap(module: Module, *, seed: int) -> SquaredError | None:
    """What `fedavg` would have missed of M, by probes; None where it cannot merge the module at all."""
    try:
        plan = fedavg(module, Options())
    except MethodRefused:
        return None
    return _by_probes(module, plan.merge(), seed)


def _by_probes(module: Module, written: Factors, seed: int) -> SquaredError:
    z = lowrank.signs(module.spec.d_in, PROBES, lowrank.sketch_seed(seed, module.name)).double().to(written.A.device)
    y = torch.zeros(module.spec.blocks, module.spec.d_out, PROBES, dtype=torch.float64, device=z.device)
    for coefficient, update in module.terms():
        y += coefficient * (update.B.double() @ (update.A.double() @ z))
    missed = written.scaling * (written.B.double() @ (written.A.double() @ z)) - y
    errors = missed.square().sum(dim=(0, 1))  # of each probe
    bias_error, bias_norm = difference.bias_difference(written, module.terms())
    return SquaredError(
        float(errors.mean()) + bias_error,
        float(y.square().sum(dim=(0, 1)).mean()) + bias_norm,
        float(errors.var()) / PROBES,
        PROBES,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")

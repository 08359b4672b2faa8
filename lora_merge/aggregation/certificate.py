"""How far a written update is from M, in the Frobenius norm, without a dense matrix.

Exact where K <= 1024, from the factors of the difference in fp64; above that an estimate from seeded random probes:
E |X z|^2 = |X|_F^2 for random signs z.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import dora, lowrank
from lora_merge.aggregation.methods import fedavg
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.registry import MethodRefused, Options

MAX_EXACT_K = 1024
PROBES = 32


@dataclass(frozen=True)
class SquaredError:
    """|written - M|^2 and |M|^2 of one module, and the variance of the former where it was estimated by probes."""

    error: float
    norm: float
    variance: float = 0.0
    probes: int = 0


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


def measure(module: Module, written: Factors, *, probes: bool, seed: int) -> SquaredError:
    """The error of `written` (as it stands in the file) against M, for one module."""
    if module.dora:
        return SquaredError(*dora.squared_error(module, written))
    if probes:
        return _by_probes(module, written, seed)
    return _from_factors(module, written)


def fedavg_gap(module: Module, *, seed: int) -> SquaredError | None:
    """What `fedavg` would have missed of M, by probes; None where it cannot merge the module at all."""
    try:
        plan = fedavg(module, Options())
    except MethodRefused:
        return None
    return _by_probes(module, plan.merge(), seed)


def _from_factors(module: Module, written: Factors) -> SquaredError:
    """|W - M| from the R factors of both stacked factors of the difference: |L @ R| = |R_L @ R_R^T|.

    The Gram identity costs the same and squares: it cannot see an error below 1e-7, which is where `exact` lies.
    """
    terms = list(module.terms())
    error = norm = 0.0
    for block in range(module.spec.blocks):
        L = [coefficient * update.B[block].double() for coefficient, update in terms]
        R = [update.A[block].double() for _, update in terms]
        norm += _square(L, R)
        error += _square([*L, -written.scaling * written.B[block].double()], [*R, written.A[block].double()])
    bias_error, bias_norm = _bias_error(written, terms)
    return SquaredError(error + bias_error, norm + bias_norm)


def _square(lefts: list[Tensor], rights: list[Tensor]) -> float:
    """|sum L_i @ R_i|_F^2."""
    core = lowrank.r_factor(torch.cat(lefts, dim=1)[None]) @ lowrank.r_factor(torch.cat(rights, dim=0).mT[None]).mT
    return float(core.square().sum())


def _by_probes(module: Module, written: Factors, seed: int) -> SquaredError:
    z = lowrank.signs(module.spec.d_in, PROBES, lowrank.sketch_seed(seed, module.name)).double().to(written.A.device)
    y = torch.zeros(module.spec.blocks, module.spec.d_out, PROBES, dtype=torch.float64, device=z.device)
    for coefficient, update in module.terms():
        y += coefficient * (update.B.double() @ (update.A.double() @ z))
    difference = written.scaling * (written.B.double() @ (written.A.double() @ z)) - y
    errors = difference.square().sum(dim=(0, 1))  # of each probe
    bias_error, bias_norm = _bias_error(written, module.terms())
    return SquaredError(
        float(errors.mean()) + bias_error,
        float(y.square().sum(dim=(0, 1)).mean()) + bias_norm,
        float(errors.var()) / PROBES,
        PROBES,
    )


def _bias_error(written: Factors, terms: Iterable[tuple[float, Factors]]) -> tuple[float, float]:
    if written.bias is None:
        return 0.0, 0.0
    mean = torch.zeros_like(written.bias, dtype=torch.float64)
    for coefficient, update in terms:
        if update.bias is not None:
            mean += coefficient * update.bias.double()
    difference = written.scaling * written.bias.double() - mean
    return float(difference.square().sum()), float(mean.square().sum())


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")

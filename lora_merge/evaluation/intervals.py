"""95 % intervals by the bootstrap over examples, the same resamples for every model, so that differences are paired.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13 (percentile intervals).
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
COVERAGE = 0.95


def _exp(value: float) -> float:
    """e to `value`; the largest number where that is above all."""
    try:
        return math.exp(value)
    except OverflowError:
        return sys.float_info.max


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of a number."""

    low: float
    high: float

    def exp(self) -> "Interval":
        """The interval of e to the number: percentiles survive a rising function."""
        return Interval(_exp(self.low), _exp(self.high))


@dataclass(frozen=True)
class Estimate:
    """A number measured on the examples at hand, and its interval over examples that might have been drawn."""

    value: float
    interval: Interval

    def exp(self) -> "Estimate":
        return Estimate(_exp(self.value), self.interval.exp())


@dataclass(frozen=True)
class Losses:
    """Token-weighted mean losses of several models: on all examples (models), and on each resample (models, R)."""

    mean: Tensor
    resampled: Tensor

    def of(self, combination: Tensor) -> Estimate:
        """The estimate of a linear combination of the models' losses.

        Args:
            combination: (models): a one picks a model; a one and a minus one are the paired difference of two.
        """
        edge = (1 - COVERAGE) / 2
        draws = combination @ self.resampled  # (R)
        low, high = torch.quantile(draws, torch.tensor([edge, 1 - edge], dtype=draws.dtype)).tolist()
        return Estimate(float(combination @ self.mean), Interval(low, high))


def bootstrap(nll: Tensor, tokens: Tensor, seed: int, resamples: int = RESAMPLES) -> Losses:
    """Resample examples with replacement; a loss is the summed negative log-likelihood over the summed tokens.

    Args:
        nll: (models, n) fp64: negative log-likelihood of each example's answer, summed over its tokens, in nats.
        tokens: (n): answer tokens of each example.
        seed: of the resamples; the same seed gives the same intervals on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens.double()
    draws = torch.empty(nll.shape[0], resamples, dtype=torch.float64)
    for draw in range(resamples):
        rows = torch.randint(tokens.numel(), (tokens.numel(),), generator=generator)
        draws[:, draw] = nll[:, rows].sum(1) / tokens[rows].sum()
    return Losses(nll.sum(1) / tokens.sum(), draws)

"""Rules that bound what a few hostile clients can do to the merge.

A *weight rule* turns the Gram matrix of the updates into new weights, and any method merges by those: norm clipping,
geometric median, Krum, multi-Krum. A *coordinate rule* takes the place of the mean entry by entry
(`lora_merge.aggregation.coordinates`). All act on the products and never on factors: a rotated client changes nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.aggregation.gram import Gram, squared_distances
from lora_merge.aggregation.weights import IN_RANGE, is_in_range

WEIGHT_RULES = ("geometric-median", "krum", "multi-krum")
COORDINATE_RULES = ("median", "trimmed-mean")
RULES = (*WEIGHT_RULES, *COORDINATE_RULES)
TRIM = 0.1  # the weight that the trimmed mean takes off each end, where the user does not say

SMOOTHING = 1e-6  # of the geometric median: the share of the usual norm below which distances count as equal
SETTLED = 1e-12  # the change of the weights at which it has converged
STEPS = 10_000


class RobustError(ValueError):
    """A rule is asked for in a way that makes no sense, or of updates too large for it."""


class WrongChoice(RobustError):
    """A choice makes no sense, or not of these clients: ``option`` says which, ``reason`` why."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"--{option} {reason}.")
        self.option, self.reason = option, reason


@dataclass(frozen=True)
class Robust:
    """What the user chose.

    Attributes:
        clip: `3x`, a multiple of the median norm; a number, the largest norm; `off` or None.
        rule: one of `RULES`, or None for the mean.
        byzantine: F, the hostile clients that (multi-)Krum is to withstand.
        trim: the share of the weight that the trimmed mean takes off each end of every entry; 0.1 where not given.
    """

    clip: str | float | None = None
    rule: str | None = None
    byzantine: int | None = None
    trim: float | None = None

    @property
    def clips(self) -> bool:
        return self.clip not in (None, "off")

    @property
    def weighs(self) -> bool:
        """Whether it needs the Gram matrix."""
        return self.clips or self.rule in WEIGHT_RULES

    @property
    def defends(self) -> bool:
        """Whether an update of any size may take part."""
        return self.clips or self.rule is not None

    @property
    def by_coordinate(self) -> bool:
        return self.rule in COORDINATE_RULES

    def to_json(self) -> dict[str, Any]:
        """What is not at its default, as the lock and the ledger record it."""
        chosen = {
            "clip": str(self.clip) if self.clips else None,
            "robust": self.rule,
            "byzantine": self.byzantine,
            "trim": self.trim if self.trim is not None or self.rule != "trimmed-mean" else TRIM,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def robust_of(options: Mapping[str, Any]) -> Robust:
    """The choice that `to_json` wrote among a lock's options; not checked."""
    return Robust(options.get("clip"), options.get("robust"), options.get("byzantine"), options.get("trim"))


@dataclass(frozen=True)
class Reweighed:
    """What the weight rules made of the clients; all in the order of the Gram matrix.

    Attributes:
        weights: n' of each client; what clipping takes away is nobody's.
        total: N, which the weights are shares of.
        norms: |Delta_i|.
        scales: what clipping multiplied each update by; 1 without it. It is in `weights` already.
        limit: the norm that clipping let through; None without it.
        moved: |sum p'_i Delta_i - sum p_i Delta_i| over the norm of the latter: how far from the mean this goes.
    """

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    total: float
    norms: tuple[float, ...]
    scales: tuple[float, ...]
    limit: float | None
    moved: float


def check(robust: Robust) -> None:
    """Raise `WrongChoice` where one of the choices is wrong, or does not go with another."""
    if robust.clips:
        _clip(robust.clip)
    if robust.rule is not None and robust.rule not in RULES:
        raise WrongChoice("robust", f"must be one of {', '.join(RULES)}, is {robust.rule!r:.40}")
    krum = robust.rule in ("krum", "multi-krum")
    if krum and robust.byzantine is None:
        raise WrongChoice("robust", f"{robust.rule} needs --byzantine F, the number of hostile clients to withstand")
    if not krum and robust.byzantine is not None:
        raise WrongChoice("byzantine", "is of --robust krum and multi-krum")
    if robust.byzantine is not None and not (type(robust.byzantine) is int and robust.byzantine >= 0):
        raise WrongChoice("byzantine", f"must be a whole number from 0 up, is {robust.byzantine!r:.40}")
    if robust.trim is not None and robust.rule != "trimmed-mean":
        raise WrongChoice("trim", "is of --robust trimmed-mean")
    if robust.trim is not None and not (_is_number(robust.trim) and 0 < robust.trim < 0.5):
        raise WrongChoice("trim", f"must be a share above 0 and below 0.5, is {robust.trim!r:.40}")


def require_enough(m: int, byzantine: int) -> None:
    """Raise `WrongChoice` where Krum cannot withstand `byzantine` hostile clients among `m`."""
    if m < 2 * byzantine + 3:
        among = f"Krum withstands only among {2 * byzantine + 3} or more; here are {m}"
        raise WrongChoice("byzantine", f"is {byzantine}, which {among}")


def reweigh(gram: Gram, robust: Robust) -> Reweighed:
    """The weights by clipping and then by the rule, if it is one of weights; the total stays N.

    Raises:
        RobustError: the clients are too few for the rule, or their updates too large.
    """
    n = torch.tensor(gram.n, dtype=torch.float64)
    limit = clip_norm(gram.norms.tolist(), robust.clip) if robust.clips else None
    scales = clip_scales(gram.norms, limit)
    ruled = _ruled(gram.matrix * scales[:, None] * scales, n, robust)
    weights = (ruled * scales).tolist()
    total = sum(ruled.tolist()) if robust.rule in WEIGHT_RULES else sum(gram.n)
    difference = torch.tensor(weights, dtype=torch.float64) / total - gram.p
    mean = float(gram.norm_of(gram.p))
    moved = float(gram.norm_of(difference)) / mean if mean else 0.0
    if not math.isfinite(moved):
        raise RobustError("The updates are so large that the rule has no finite weights.")
    return Reweighed(
        gram.clients, tuple(weights), total, tuple(gram.norms.tolist()), tuple(scales.tolist()), limit, moved
    )


def clip_norm(norms: Sequence[float], clip: str | float | None) -> float:
    """The largest norm that `clip` lets through; multiples are of the median of the norms above 0, unweighted."""
    number, is_multiple = _clip(clip)
    return number * statistics.median([norm for norm in norms if norm > 0] or [0.0]) if is_multiple else number


def clip_scales(norms: Tensor, limit: float | None) -> Tensor:
    """min(1, limit / |Delta_i|) (Sun et al. 2019, arXiv:1911.07963): 1 where nothing is clipped."""
    if limit is None:
        return torch.ones_like(norms)
    return torch.where(norms > limit, limit / norms, 1.0)


def geometric_median(matrix: Tensor, n: Tensor) -> Tensor:
    """Shares w, sum 1, of sum w_i Delta_i = argmin_v sum n_i |Delta_i - v|, by smoothed Weiszfeld steps on the Gram.

    Half of the weight has to be hostile before it can be carried off. Starts from shares by each update's median
    distance to the others, so that one of norm 1e30 costs no step more.
    Source: Pillutla, Kakade & Harchaoui 2019, arXiv:1912.13445 (RFA). Steps of O(m^2).
    """
    p = n / n.sum()
    squares = matrix.diagonal().clamp(min=0)
    usual = weighted_median(squares.sqrt()[:, None], n)[0]
    floor = SMOOTHING * (usual if usual > 0 else squares.sqrt().max())
    if floor == 0:
        return p
    w = _shares(p, weighted_median(squared_distances(matrix).sqrt(), n), floor)
    for _ in range(STEPS):
        along = matrix @ w
        distances = (squares - 2 * along + w @ along).clamp(min=0).sqrt()
        before, w = w, _shares(p, distances, floor)
        if float((w - before).abs().max()) <= SETTLED:
            break
    return w


def krum_scores(matrix: Tensor, byzantine: int) -> Tensor:
    """The sum of the squared distances of each client to its m - F - 2 nearest others.

    Weights do not count here: a hostile client states as many examples as it likes.
    Source: Blanchard, El Mhamdi, Guerraoui & Stainer 2017 (Krum).

    Raises:
        WrongChoice: m < 2 F + 3.
    """
    m = len(matrix)
    require_enough(m, byzantine)
    distances = squared_distances(matrix).fill_diagonal_(math.inf)
    return distances.sort(dim=1).values[:, : m - byzantine - 2].sum(dim=1)


def weighted_median(values: Tensor, n: Tensor) -> Tensor:
    """The weighted median of each column of `values` (m x …); midway between two where they halve the weight."""
    ordered, order = values.sort(dim=0)
    below = n[order].cumsum(dim=0)
    half, slack = n.sum() / 2, 1e-9 * n.sum()
    low = (below < half - slack).sum(dim=0, keepdim=True)
    high = (below <= half + slack).sum(dim=0, keepdim=True).clamp(max=len(n) - 1)
    median: Tensor = ordered.gather(0, low)[0] / 2 + ordered.gather(0, high)[0] / 2
    return median


def trimmed_mean(values: Tensor, n: Tensor, trim: float) -> Tensor:
    """The weighted mean of each column without the weight `trim` N at either end; a client on the border in part.

    Source: Yin, Chen, Ramchandran & Bartlett 2018, arXiv:1803.01498.
    """
    ordered, order = values.sort(dim=0)
    weights = n[order]
    above = weights.cumsum(dim=0)
    low, high = trim * n.sum(), (1 - trim) * n.sum()
    kept = (above.clamp(max=high) - (above - weights).clamp(min=low)).clamp(min=0)
    mean: Tensor = (ordered * kept).sum(dim=0) / (high - low)
    return mean.to(values)


def _ruled(matrix: Tensor, n: Tensor, robust: Robust) -> Tensor:
    if robust.rule == "geometric-median":
        return geometric_median(matrix, n) * n.sum()
    if robust.rule in ("krum", "multi-krum"):
        assert robust.byzantine is not None
        scores = krum_scores(matrix, robust.byzantine)
        count = 1 if robust.rule == "krum" else len(n) - robust.byzantine - 2
        kept = torch.zeros_like(n)
        kept[scores.argsort(stable=True)[:count]] = 1.0
        return n * kept * (n.sum() / (n * kept).sum())
    return n


def _shares(p: Tensor, distances: Tensor, floor: Tensor) -> Tensor:
    shares = p / distances.clamp(min=float(floor))
    return shares / shares.sum()


def _clip(clip: str | float | None) -> tuple[float, bool]:
    """The number, and whether it is a multiple of the median norm."""
    text = str(clip)
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = math.nan
    if isinstance(clip, bool) or not is_in_range(number):
        forms = f"a multiple of the median norm as in 3x, a norm, or off, with a number {IN_RANGE}"
        raise WrongChoice("clip", f"must be {forms}; is {text!r:.40}")
    return number, text.endswith("x")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Folding a mean: one stand-in for all clients so far, whose example count is the sum of theirs, and the arrivals.

For svd it is the core, which has lost a little, so a bound is kept of how much; for fedavg and ffa it is the adapter
itself, whose own certificate says how much it lacks. An svd without a core stands for itself too, where its clients'
files are gone. All arrivals of one command are folded together; what is in a mean cannot be taken out of it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_merge.adapter import Client, Factors, FactorsSpec, Spec
from lora_merge.aggregation.inner_products import squared_norm
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import CORE_NAME, PeftFolder
from lora_merge.checkpoint.planned import Measured
from lora_merge.folding.global_adapter import GlobalAdapter
from lora_merge.kept import ranks_in, ranks_of
from lora_merge.ledger import Certificate

STAND_IN = "all before"
NO_CORE = "the global adapter has no core that arrivals can be folded into"
FEW_DIGITS = 1.005  # a certificate has three, rounded to the nearest
FP32 = 1e-6  # of the norm: what products and sums in fp32 may be off


@dataclass(frozen=True)
class Mean:
    """A merged adapter as the update of its clients: its scaling brings back N / alpha, which its mean divided by."""

    folder: PeftFolder
    n: Mapping[str, float]
    sum: float  # N / alpha

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: self._spec(name) for name in self.n}

    def _spec(self, name: str) -> FactorsSpec:
        spec = self.folder.specs[name]
        assert isinstance(spec, FactorsSpec)
        return replace(spec, scaling=spec.scaling * self.sum / self.n[name])

    def __getitem__(self, module: str) -> Factors:
        update = self.folder[module]
        assert isinstance(update, Factors)
        return update


def obstacle(before: GlobalAdapter, new: Mapping[str, PeftFolder], weights: Mapping[str, float]) -> str | None:
    """Why a stand-in does not do; None where it does."""
    ledger = before.ledger
    if any(client not in weights or client in new for client in before.contributions):
        return "nobody can be taken out of a mean"
    if not before.folder.is_plain or not all(folder.is_plain for folder in new.values()):
        return "somebody trained more than low-rank updates"
    if any(each.block_ranks is None or each.claims is None for each in ledger.contributions):
        return "the global adapter's ledger does not tell who trained which module"
    if ledger.method == "svd":
        return None if before.core else NO_CORE
    return None if ledger.dtype == "fp32" else f"a mean is not kept in {ledger.dtype}"


def worth_merging_again(before: GlobalAdapter) -> str | None:
    """Why all clients' files, where they are all named, make more of a mean in which nothing is new; None where not."""
    if before.ledger.method == "svd" and not before.core:
        return "the global adapter had no core that arrivals can be folded into"
    return None


def lost_without_core(before: GlobalAdapter, reason: str) -> str:
    """What to tell where a truncated mean had to stand for its clients itself; `reason`: why they are not all there."""
    has, rank = "has lost its" if CORE_NAME in (before.ledger.files or ()) else "has no", before.ledger.options["rank"]
    return (
        f"{before.place} {has} {CORE_NAME}, and the files of the clients in it are not all there "
        f"({reason.removesuffix('.')}). Its rank-{rank} mean stood for them: what that had cut off of their updates is "
        "lost, the certificate may have no bound for it, and verify may make another one. Name those clients' folders "
        "among the sources too, and all are merged again, with a new core."
    )


def with_stand_in(
    before: GlobalAdapter, new: Mapping[str, PeftFolder], weights: Mapping[str, float], device: torch.device
) -> Federation:
    """The stand-in of all clients so far, and the new ones."""
    ledger, first = before.ledger, STAND_IN
    n = _n_by_module(before)
    if before.core:
        clients = [Client(first, ledger.total_weight, before.core, stored=True, by_module=n)]
    else:
        mean = Mean(before.folder, n, ledger.total_weight / ledger.global_lr)
        clients = [Client(first, ledger.total_weight, mean, by_module=n)]
    clients += [Client(client, weights[client], folder) for client, folder in new.items() if weights[client]]
    return Federation(clients, sum(weights.values()), ledger.global_lr, None, False, device)


def _n_by_module(before: GlobalAdapter) -> dict[str, float]:
    """n of those who have each module: one sum for all modules that the same clients have."""
    contributions, modules = before.ledger.contributions, ranks_of(before.folder)
    ranks = ranks_in(contributions, modules)
    unlike = {id(each): each for each in ranks}
    sums: dict[frozenset[int], float] = {}
    n = {}
    for name in modules:
        having = frozenset(key for key, each in unlike.items() if each[name])
        if having not in sums:
            sums[having] = sum(c.weight for c, each in zip(contributions, ranks, strict=True) if id(each) in having)
        n[name] = sums[having]
    return n


def bound(measured: Sequence[Measured], before: GlobalAdapter, federation: Federation) -> Certificate:
    """How far the result can be from the mean of all clients, though most of them are known by a stand-in only.

    |W - M| <= |W - M'| + d and |M| >= |M'| - d, where M' is the mean with the stand-in in the place of its clients and
    d the norm of what the stand-in lacks of them, at the scale of the mean.
    """
    if any(module.error is None for module in measured):
        return Certificate("off")
    scale, lacks = federation.alpha / federation.total, _lacking(before)
    parts: dict[str, tuple[float, float]] = {}
    for module in measured:
        assert module.error is not None
        error, norm = math.sqrt(module.error.error), math.sqrt(module.error.norm)
        lost = scale * lacks.get(module.name, 0.0) + FP32 * norm
        parts[module.name] = (error + lost, max(norm - lost, 0.0))
    modules = {name: found for name, part in parts.items() if (found := _guarantee([part]))}
    return Certificate("bound", _guarantee(parts.values()), modules)


def _lacking(before: GlobalAdapter) -> Mapping[str, float]:
    """By module a bound on |stand-in - sum of n s B A| of the clients so far; infinite where nothing is known of it."""
    if before.core:
        return {name: before.core.dropped(name) for name in before.core.modules}
    total = before.ledger.total_weight / before.ledger.global_lr
    return {name: total * _missed(before, name) for name in before.folder.specs}


def _missed(before: GlobalAdapter, name: str) -> float:
    """A bound on |W - M| of a module, from the certificate's e = |W - M| / |M| and |M| <= |W| / (1 - e)."""
    certificate, update = before.ledger.certificate, before.folder[name]
    assert isinstance(update, Factors)
    norm = math.sqrt(max(squared_norm(update), 0.0))
    if certificate.measured_by == "exact" and name not in certificate.modules:
        return norm  # M is zero, which nothing is relative to
    found = certificate.modules.get(name, {"relative_error": math.inf})
    error = FEW_DIGITS * found["relative_error"]
    if certificate.measured_by not in ("exact", "bound") or error >= 1:
        return math.inf  # not measured, or an estimate, or of no use
    return error / (1 - error) * norm


def _guarantee(parts: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """The bound as a relative error, rounded up; None where it is above 1 and says nothing."""
    errors, norms = zip(*parts, strict=True)
    error, norm = math.hypot(*errors), math.hypot(*norms)
    if not norm or error > norm:
        return None
    digits = 2 - math.floor(math.log10(error / norm))
    return {"relative_error": float(f"{math.ceil(error / norm * 10**digits) / 10**digits:.3g}")}

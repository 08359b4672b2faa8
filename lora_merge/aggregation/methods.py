"""The merge methods that work on factors. A newcomer adds one by one decorated function here or in a file beside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import dora, lowrank
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.registry import METHODS, MethodRefused, Options, Plan, method, require_no_dora
from lora_merge.aggregation.sparsifying import dare, ties
from lora_merge.aggregation.sums import (
    beside_identity,
    mean_bias,
    product,
    shared_factor,
    stack,
    sum_factors,
    sum_over_shared,
    whole,
)

__all__ = ["METHODS", "dare", "exact", "fedavg", "ffa", "svd", "ties"]


@method(
    "exact",
    reference="Wang et al. 2024, arXiv:2408.05141 (stacking); Wang et al., One Communication Round, eq. 2",
    laws={"identity", "order", "rotation", "scale", "exact", "absent"},
    folds="blocks",
)
def exact(module: Module, options: Options) -> Plan:
    """The weighted mean itself, as a stack of the clients' blocks; its rank is the sum of theirs."""
    if module.dora:
        return _dora_plan(module, min(module.K, module.max_r), _as_it_is)
    scaling = module.alpha / module.total
    shared = shared_factor(module)
    if shared is not None:
        summed: Literal["A", "B"] = "B" if shared == "A" else "A"
        return _plan(module, module.spec.r, scaling, f"shared lora_{shared}", lambda: sum_over_shared(module, summed))
    if module.K >= module.max_r:
        return _plan(module, module.max_r, scaling, "whole", lambda: whole(module))
    return _plan(module, module.K, scaling, "stack", lambda: stack(module))


@method(
    "svd",
    reference="Eckart & Young 1936; Bai et al. 2024, arXiv:2402.11505 (FlexLoRA)",
    laws={"order", "rotation", "scale", "absent"},
    folds="mean",
    heeds=("rank", "energy", "seed"),
)
def svd(module: Module, options: Options) -> Plan:
    """The best approximation of the mean at a given rank, always with how far it is from it."""
    most = min(module.K, module.max_r)
    if isinstance(options.rank, int):
        rank = min(options.rank, most)
    else:
        B, A = _dora_product(module) if module.dora else product(module)
        rank = min(most, lowrank.rank_for_energy(lowrank.spectrum(B, A), options.kept))
    seed = lowrank.sketch_seed(options.seed, module.name)
    if module.dora:
        return _dora_plan(module, rank, lambda L, R: lowrank.truncate(L, R, rank, seed=seed))

    def merge() -> Factors:
        B, A = lowrank.truncate(*product(module), rank, seed=seed)
        return Factors(B, A, 1.0, mean_bias(module))

    return _plan(module, rank, 1.0, "svd", merge)


@method(
    "fedavg",
    reference="Zhang et al. 2023, arXiv:2305.05644 (FedIT); McMahan et al. 2017",
    laws={"identity", "order", "scale"},
    folds="mean",
    instead="--method exact or svd merges them as they are.",
)
def fedavg(module: Module, options: Options) -> Plan:
    """The means of lora_A and of lora_B apart: not the mean update; near it only from a shared start of lora_A."""
    _require_one_rank(module, "fedavg")
    n = sum(share.n for share in module.shares)

    def merge() -> Factors:
        return sum_factors(module, a_coefficients=[share.n / n if n else 0.0 for share in module.shares])

    return _plan(module, module.spec.r, 1.0, "fedavg", merge)


@method(
    "ffa",
    reference="Sun et al. 2024, arXiv:2403.12313 (FFA-LoRA)",
    laws={"identity", "order", "scale", "exact", "absent"},
    folds="mean",
    instead="--method exact or svd merges them as they are; for ffa, train with freeze_lora_A: true in the recipe.",
)
def ffa(module: Module, options: Options) -> Plan:
    """The mean of lora_B on a lora_A that every client kept frozen: exact at the clients' own rank."""
    _require_one_rank(module, "ffa")
    first = module.shares[0].read()
    for share in module.shares[1:]:
        if not torch.equal(share.read().A, first.A):
            pair = f"{module.shares[0].client} and {share.client}"
            raise MethodRefused(module.name, f"lora_A of {pair} differ, and ffa needs one that is the same bit for bit")
    coefficients = [1.0] + [0.0] * (len(module.shares) - 1)
    return _plan(module, module.spec.r, 1.0, "ffa", lambda: sum_factors(module, a_coefficients=coefficients))


def _plan(module: Module, r: int, scaling: float, form: str, merge: Callable[[], Factors]) -> Plan:
    spec = replace(module.spec, r=r, scaling=scaling, bias=module.bias, magnitude=module.dora)
    return Plan(spec, form, merge)


def _dora_plan(module: Module, rank: int, factor: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Plan:
    def merge() -> Factors:
        with _dora_refusals():
            return dora.merge(module, factor)

    return _plan(module, rank, 1.0, "dora", merge)


def _dora_product(module: Module) -> tuple[Tensor, Tensor]:
    with _dora_refusals():
        _, _, L, R = dora.target(module)
    return L[None], R[None]


@contextmanager
def _dora_refusals() -> Iterator[None]:
    try:
        yield
    except dora.NotPositive as error:
        raise MethodRefused("lora_magnitude_vector", error.reason, error.share) from error


def _as_it_is(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """A stack as its own factors, or its product beside an identity where the stack is wider than the module."""
    if L.shape[2] < min(L.shape[1], R.shape[2]):
        return L, R
    whole = beside_identity(L @ R, 1.0, None)
    return whole.B, whole.A


def _require_one_rank(module: Module, name: str) -> None:
    require_no_dora(module, name, "its magnitudes have no mean of this form")
    if any(share.stored for share in module.shares):
        raise MethodRefused("method", f"{name} needs the clients' own lora_A, which a stack of blocks does not keep")
    ranks = sorted({share.spec.r for share in module.shares})
    if len(ranks) > 1:
        reason = f"the clients have the ranks {', '.join(map(str, ranks))}; {name} needs one"
        raise MethodRefused(module.name, reason)

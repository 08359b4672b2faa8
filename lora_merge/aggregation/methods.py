"""The merge methods: each turns one module of n clients into one update.

A method looks at a module and returns a `Plan`: the shape of its result, known before anything is written, and the
function that computes it. `METHODS` is what the command line, the ledger and the tests of the laws iterate over.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lora_merge.adapter import Factors, FactorsSpec
from lora_merge.aggregation import dora, lowrank
from lora_merge.aggregation.module import Module, Share, accumulate

Rank: TypeAlias = int | Literal["auto", "lossless"]
LOSSLESS = 1e-7  # the part of the update's norm that `lossless` may lose


@dataclass(frozen=True)
class Options:
    """What the user chose: `rank` and `energy` matter to `svd` only; `seed` is of the random sketches."""

    rank: Rank = "auto"
    energy: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """A method's answer for one module: the shape of the result, its form in a word, and how to compute it."""

    spec: FactorsSpec
    form: str
    merge: Callable[[], Factors]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        reference: where the method comes from.
        laws: what holds for it, by name (see the README's table); every declared law is tested.
        folds: whether a late client can be folded in without the earlier clients' files.
    """

    name: str
    summary: str
    reference: str
    laws: frozenset[str]
    folds: bool
    plan: Callable[[Module, Options], Plan]


METHODS: dict[str, Method] = {}


class MethodRefused(ValueError):
    """A method cannot merge this module; `field` and `reason` say why, `share` whose it is (None: everybody's)."""

    def __init__(self, field: str, reason: str, share: Share | None = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason, self.share = field, reason, share


PlanFunction: TypeAlias = Callable[[Module, Options], Plan]


def method(name: str, *, reference: str, laws: set[str], folds: bool) -> Callable[[PlanFunction], PlanFunction]:
    """Register a method under `name`; its docstring's first line becomes its summary."""

    def register(plan: PlanFunction) -> PlanFunction:
        summary = (plan.__doc__ or "").splitlines()[0]
        METHODS[name] = Method(name, summary, reference, frozenset(laws), folds, plan)
        return plan

    return register


@method(
    "exact",
    reference="Wang et al. 2024, arXiv:2408.05141 (stacking); Wang et al., One Communication Round, eq. 2",
    laws={"identity", "order", "rotation", "scale", "exact", "absent"},
    folds=True,
)
def exact(module: Module, options: Options) -> Plan:
    """The weighted mean itself, as a stack of the clients' blocks; its rank is the sum of theirs."""
    if module.dora:
        return _dora_plan(module, min(module.K, module.max_r), _as_it_is)
    scaling = module.alpha / module.total
    if len(module.shares) > 1 and _all_equal(module, "A"):
        return _plan(module, module.spec.r, scaling, "shared lora_A", lambda: _sum_over_shared(module, "B"))
    if len(module.shares) > 1 and _all_equal(module, "B"):
        return _plan(module, module.spec.r, scaling, "shared lora_B", lambda: _sum_over_shared(module, "A"))
    if module.K >= module.max_r:
        return _plan(module, module.max_r, scaling, "whole", lambda: _whole(module))
    return _plan(module, module.K, scaling, "stack", lambda: _stack(module))


@method(
    "svd",
    reference="Eckart & Young 1936; Bai et al. 2024, arXiv:2402.11505 (FlexLoRA)",
    laws={"order", "rotation", "scale", "absent"},
    folds=True,
)
def svd(module: Module, options: Options) -> Plan:
    """The best approximation of the mean at a given rank, always with how far it is from it."""
    most = min(module.K, module.max_r)
    if isinstance(options.rank, int):
        rank = min(options.rank, most)
    else:
        kept = options.energy if options.rank == "auto" else 1 - LOSSLESS**2
        B, A = _dora_product(module) if module.dora else _product(module)
        rank = min(most, lowrank.rank_for_energy(lowrank.spectrum(B, A), kept))
    seed = lowrank.sketch_seed(options.seed, module.name)
    if module.dora:
        return _dora_plan(module, rank, lambda L, R: lowrank.truncate(L, R, rank, seed=seed))

    def merge() -> Factors:
        B, A = lowrank.truncate(*_product(module), rank, seed=seed)
        return Factors(B, A, 1.0, _bias(module))

    return _plan(module, rank, 1.0, "svd", merge)


@method(
    "fedavg",
    reference="Zhang et al. 2023, arXiv:2305.05644 (FedIT); McMahan et al. 2017",
    laws={"identity", "order", "scale"},
    folds=True,
)
def fedavg(module: Module, options: Options) -> Plan:
    """The means of lora_A and of lora_B apart: not the mean update; near it only from a shared start of lora_A."""
    _require_one_rank(module, "fedavg")
    n = sum(share.n for share in module.shares)

    def merge() -> Factors:
        return _sum_factors(module, a_coefficients=[share.n / n if n else 0.0 for share in module.shares])

    return _plan(module, module.spec.r, 1.0, "fedavg", merge)


@method(
    "ffa",
    reference="Sun et al. 2024, arXiv:2403.12313 (FFA-LoRA)",
    laws={"identity", "order", "scale", "exact", "absent"},
    folds=True,
)
def ffa(module: Module, options: Options) -> Plan:
    """The mean of lora_B on a lora_A that every client kept frozen: exact at the clients' own rank."""
    _require_one_rank(module, "ffa")
    first = module.shares[0].read()
    for share in module.shares[1:]:
        if not torch.equal(share.read().A, first.A):
            reason = f"lora_A of {module.name} is not bit-identical in all clients, which ffa needs"
            raise MethodRefused("method", reason, share)
    coefficients = [1.0] + [0.0] * (len(module.shares) - 1)
    return _plan(module, module.spec.r, 1.0, "ffa", lambda: _sum_factors(module, a_coefficients=coefficients))


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
    whole = _beside_identity(L @ R, 1.0, None)
    return whole.B, whole.A


def _require_one_rank(module: Module, name: str) -> None:
    if module.dora:
        raise MethodRefused("use_dora", f"{name} cannot merge DoRA: its magnitudes have no mean of this form")
    ranks = sorted({share.spec.r for share in module.shares})
    if len(ranks) > 1:
        reason = f"{module.name} has the ranks {', '.join(map(str, ranks))}; {name} needs one (use exact or svd)"
        raise MethodRefused("r", reason)


def _all_equal(module: Module, role: Literal["A", "B"]) -> bool:
    """Whether every client's lora_A (or lora_B) holds the same bits."""
    if len({share.spec.r for share in module.shares}) > 1:
        return False
    first = getattr(module.shares[0].read(), role)
    return all(torch.equal(getattr(share.read(), role), first) for share in module.shares[1:])


def _weights(module: Module) -> Iterator[tuple[float, Factors]]:
    """(n_i s_i, update) of each share: what `exact` sums; its common factor alpha / N is in the scaling."""
    for share in module.shares:
        yield share.n * share.spec.scaling, share.read()


def _stack(module: Module) -> Factors:
    """Blocks sqrt(n_i s_i) (B_i, A_i) side by side. Copies and elementwise products: the same bytes everywhere."""
    spec, scaling = module.spec, module.alpha / module.total
    like = module.shares[0].read().A
    B = like.new_empty(spec.blocks, spec.d_out, module.K)
    A = like.new_empty(spec.blocks, module.K, spec.d_in)
    bias = _BiasSum(module)
    at = 0
    for weight, update in _weights(module):
        root, end = math.sqrt(weight), at + update.r
        torch.mul(update.B, root, out=B[:, :, at:end])
        torch.mul(update.A, root, out=A[:, at:end])
        bias.add(weight, update)
        at = end
    return Factors(B, A, scaling, bias.sum)


def _sum_over_shared(module: Module, summed: Literal["A", "B"]) -> Factors:
    """Where all clients share one factor, the other is summed: the same update at the clients' own rank."""
    bias = _BiasSum(module)
    total: Tensor | None = None
    for weight, update in _weights(module):
        total = accumulate(total, getattr(update, summed), weight)
        bias.add(weight, update)
        shared = update.A if summed == "B" else update.B
    assert total is not None
    B, A = (total, shared) if summed == "B" else (shared, total)
    return Factors(B, A, module.alpha / module.total, bias.sum)


def _whole(module: Module) -> Factors:
    """M itself beside an identity, where a stack would be wider than the module."""
    bias = _BiasSum(module)
    if module.bias:
        for weight, update in _weights(module):
            bias.add(weight, update)
    return _beside_identity(_dense(module, _weights(module)), module.alpha / module.total, bias.sum)


def _beside_identity(M: Tensor, scaling: float, bias: Tensor | None) -> Factors:
    """M (E x d_out x d_in) as factors of rank min(d_out, d_in), one of them an identity."""
    blocks, d_out, d_in = M.shape
    identity = torch.eye(min(d_out, d_in)).to(M).expand(blocks, -1, -1).contiguous()
    return Factors(identity, M, scaling, bias) if d_out <= d_in else Factors(M, identity, scaling, bias)


def _dense(module: Module, terms: Iterator[tuple[float, Factors]]) -> Tensor:
    """sum c B @ A, E x d_out x d_in, one client at a time."""
    total: Tensor | None = None
    for coefficient, update in terms:
        if total is None:
            total = update.A.new_zeros(module.spec.blocks, module.spec.d_out, module.spec.d_in)
        total.baddbmm_(update.B, update.A, alpha=coefficient)
    assert total is not None
    return total


def _product(module: Module) -> tuple[Tensor, Tensor]:
    """Factors of M: the clients' stack, or M beside an identity where that is smaller."""
    if module.K >= module.max_r:
        whole = _beside_identity(_dense(module, module.terms()), 1.0, None)
        return whole.B, whole.A
    lefts, rights = zip(*((update.B * coefficient, update.A) for coefficient, update in module.terms()), strict=True)
    return torch.cat(lefts, dim=2), torch.cat(rights, dim=1)


def _sum_factors(module: Module, a_coefficients: list[float]) -> Factors:
    """B = sum alpha p_i s_i B_i, A = sum a_i A_i, one client at a time."""
    B: Tensor | None = None
    A: Tensor | None = None
    bias = _BiasSum(module)
    for a, (coefficient, update) in zip(a_coefficients, module.terms(), strict=True):
        B = accumulate(B, update.B, coefficient)
        A = update.A if A is None and a == 1.0 else accumulate(A, update.A, a) if a else A
        bias.add(coefficient, update)
    assert B is not None
    return Factors(B, torch.zeros_like(update.A) if A is None else A, 1.0, bias.sum)


def _bias(module: Module) -> Tensor | None:
    bias = _BiasSum(module)
    if module.bias:
        for coefficient, update in module.terms():
            bias.add(coefficient, update)
    return bias.sum


class _BiasSum:
    """The bias of lora_B, which PEFT multiplies by the scaling: so it is summed with the coefficients of B."""

    def __init__(self, module: Module) -> None:
        self.sum: Tensor | None = None
        if module.bias:
            spec = module.spec
            size = spec.d_out * (spec.blocks if spec.layout == "conv" else 1)
            self.sum = torch.zeros(size)

    def add(self, coefficient: float, update: Factors) -> None:
        if self.sum is not None and update.bias is not None:
            self.sum = accumulate(self.sum.to(update.bias), update.bias, coefficient)

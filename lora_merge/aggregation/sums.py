"""The sums that methods are made of: clients' updates, read one at a time, into factors of one update."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation.module import Module, accumulate


def shared_factor(module: Module) -> Literal["A", "B"] | None:
    """The factor that holds the same bits in all of two or more clients; reads each client at most once."""
    if len(module.shares) < 2 or len({share.spec.r for share in module.shares}) > 1:
        return None
    if any(share.stored for share in module.shares):
        return None  # equal blocks would not be equal clients; who folds them has looked
    first = module.shares[0].read()
    roles: list[Literal["A", "B"]] = ["A", "B"]
    for share in module.shares[1:]:
        update = share.read()
        roles = [role for role in roles if torch.equal(getattr(update, role), getattr(first, role))]
        if not roles:
            return None
    return roles[0]


def _weights(module: Module) -> Iterator[tuple[float, Factors]]:
    """(n_i s_i, update) of each share: what `exact` sums; its common factor alpha / N is in the scaling."""
    for share in module.shares:
        yield share.weight, share.read()


def stack(module: Module) -> Factors:
    """Blocks sqrt(n_i s_i) (B_i, A_i) side by side. Copies and elementwise products: the same bytes everywhere."""
    spec, scaling = module.spec, module.alpha / module.total
    bias = _BiasSum(module)
    at = 0
    for weight, update in _weights(module):
        if at == 0:
            B = update.B.new_empty(spec.blocks, spec.d_out, module.K)
            A = update.A.new_empty(spec.blocks, module.K, spec.d_in)
        root, end = math.sqrt(weight), at + update.r
        torch.mul(update.B, root, out=B[:, :, at:end])
        torch.mul(update.A, root, out=A[:, at:end])
        bias.add(weight, update)
        at = end
    return Factors(B, A, scaling, bias.sum)


def sum_over_shared(module: Module, summed: Literal["A", "B"]) -> Factors:
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


def whole(module: Module) -> Factors:
    """M itself beside an identity, where a stack would be wider than the module."""
    bias = _BiasSum(module)
    if module.bias:
        for weight, update in _weights(module):
            bias.add(weight, update)
    return beside_identity(dense(module, _weights(module)), module.alpha / module.total, bias.sum)


def beside_identity(M: Tensor, scaling: float, bias: Tensor | None) -> Factors:
    """M (E x d_out x d_in) as factors of rank min(d_out, d_in), one of them an identity."""
    blocks, d_out, d_in = M.shape
    identity = torch.eye(min(d_out, d_in)).to(M).expand(blocks, -1, -1).contiguous()
    return Factors(identity, M, scaling, bias) if d_out <= d_in else Factors(M, identity, scaling, bias)


def dense(module: Module, terms: Iterator[tuple[float, Factors]]) -> Tensor:
    """sum c B @ A, E x d_out x d_in, one client at a time."""
    total: Tensor | None = None
    for coefficient, update in terms:
        if total is None:
            total = update.A.new_zeros(module.spec.blocks, module.spec.d_out, module.spec.d_in)
        total.baddbmm_(update.B, update.A, alpha=coefficient)
    assert total is not None
    return total


def product(module: Module) -> tuple[Tensor, Tensor]:
    """Factors of M: the clients' stack, or M beside an identity where that is smaller."""
    if module.K >= module.max_r:
        whole = beside_identity(dense(module, module.terms()), 1.0, None)
        return whole.B, whole.A
    lefts, rights = zip(*((update.B * coefficient, update.A) for coefficient, update in module.terms()), strict=True)
    return torch.cat(lefts, dim=2), torch.cat(rights, dim=1)


def sum_factors(module: Module, a_coefficients: list[float]) -> Factors:
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


def mean_bias(module: Module) -> Tensor | None:
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

"""How far two adapter folders are apart, as functions and not as bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_merge.adapter import Factors, FactorsSpec, FullTensor, TokenRows, Update, spec_of
from lora_merge.aggregation.certificate import relative_error
from lora_merge.aggregation.difference import SquaredError, from_factors
from lora_merge.aggregation.module import Module, Share
from lora_merge.checkpoint.peft_folder import PeftFolder


@dataclass(frozen=True)
class Comparison:
    """The relative error of the whole update, and that of each module that differs at all, the largest first."""

    relative_error: float
    modules: dict[str, float]


def compare(reference: PeftFolder, other: PeftFolder) -> Comparison:
    """The Frobenius distance of `other` from `reference`, relative to `reference`'s norm.

    A module that only one of them has, or has in another shape, is infinitely far.
    """
    errors = dict(_errors(reference, other))
    apart = {name: _relative([error]) for name, error in errors.items() if error.error > 0}
    largest_first = dict(sorted(apart.items(), key=lambda item: (-item[1], item[0])))
    return Comparison(_relative(list(errors.values())), largest_first)


def _errors(reference: PeftFolder, other: PeftFolder) -> Iterator[tuple[str, SquaredError]]:
    for name in sorted(reference.specs.keys() | other.specs.keys()):
        both = name in reference.specs and name in other.specs
        yield name, _distance(reference[name], other[name]) if both else SquaredError(math.inf, 1.0)


def _distance(reference: Update, other: Update) -> SquaredError:
    if isinstance(reference, Factors) and isinstance(other, Factors):
        return _of_factors(reference, other)
    if isinstance(reference, FullTensor) and isinstance(other, FullTensor):
        return _of_tensors(reference.value, other.value)
    if isinstance(reference, TokenRows) and isinstance(other, TokenRows) and reference.indices == other.indices:
        return _of_tensors(reference.rows, other.rows)
    return SquaredError(math.inf, 1.0)


def _of_factors(reference: Factors, other: Factors) -> SquaredError:
    if reference.B.shape[:2] != other.B.shape[:2] or reference.A.shape[2] != other.A.shape[2]:
        return SquaredError(math.inf, 1.0)
    spec = spec_of(reference)
    assert isinstance(spec, FactorsSpec)
    module = Module("", (Share("", 1.0, spec, lambda: reference),), 1.0, bias=spec.bias)
    found = from_factors(module, other)
    if reference.scaling == other.scaling and _same_bits(reference, other):
        found = replace(found, error=0.0)  # and not the rounding of measuring it
    if reference.magnitude is None or other.magnitude is None:
        return found if reference.magnitude is other.magnitude else SquaredError(math.inf, 1.0)
    magnitude = _of_tensors(reference.magnitude, other.magnitude)
    return SquaredError(found.error + magnitude.error, found.norm + magnitude.norm)


def _same_bits(reference: Factors, other: Factors) -> bool:
    pairs = [(reference.B, other.B), (reference.A, other.A), (reference.bias, other.bias)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _of_tensors(reference: Tensor, other: Tensor) -> SquaredError:
    if reference.shape != other.shape:
        return SquaredError(math.inf, 1.0)
    difference = (other.double() - reference.double()).square().sum()
    return SquaredError(float(difference), float(reference.double().square().sum()))


def _relative(errors: list[SquaredError]) -> float:
    found = relative_error(errors)
    if found is not None:
        return found.value
    return math.inf if any(error.error for error in errors) else 0.0

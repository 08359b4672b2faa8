"""The registry of merge methods: what a method is, what it promises, what it can refuse.

A method looks at a module and returns a `Plan`: the shape of its result, known before anything is written, and the
function that computes it. `METHODS` is what the command line, the ledger and the tests of the laws iterate over.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_merge.adapter import Factors, FactorsSpec
from lora_merge.aggregation.module import Module, Share

Rank: TypeAlias = int | Literal["auto", "lossless"]
Folds: TypeAlias = Literal["blocks", "mean"]


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
        folds: how a late client is folded in without the earlier clients' files: `blocks`, exactly, beside theirs;
            `mean`, into what stands for them all; None where it cannot be.
    """

    name: str
    summary: str
    reference: str
    laws: frozenset[str]
    folds: Folds | None
    plan: Callable[[Module, Options], Plan]


METHODS: dict[str, Method] = {}


class MethodRefused(ValueError):
    """A method cannot merge this module; `field` and `reason` say why, `share` whose it is (None: everybody's)."""

    def __init__(self, field: str, reason: str, share: Share | None = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason, self.share = field, reason, share


PlanFunction: TypeAlias = Callable[[Module, Options], Plan]


def method(name: str, *, reference: str, laws: set[str], folds: Folds | None) -> Callable[[PlanFunction], PlanFunction]:
    """Register a method under `name`; its docstring's first line becomes its summary."""

    def register(plan: PlanFunction) -> PlanFunction:
        summary = (plan.__doc__ or "").splitlines()[0]
        METHODS[name] = Method(name, summary, reference, frozenset(laws), folds, plan)
        return plan

    return register

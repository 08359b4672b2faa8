"""The registry of merge methods: what a method is, what it promises, what it can refuse.

A method looks at a module and returns a `Plan`: the shape of its result, known before anything is written, and the
function that computes it. `METHODS` is what the command line, the ledger and the tests of the laws iterate over.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from lora_merge.adapter import Factors, FactorsSpec
from lora_merge.aggregation import lowrank
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.target import Target

LOSSLESS = 1e-7  # the part of the update's norm that `lossless` may lose
Rank: TypeAlias = int | Literal["auto", "lossless"]
Folds: TypeAlias = Literal["blocks", "mean"]


@dataclass(frozen=True)
class Options:
    """What the user chose; a method says which of these it heeds. `seed` is of all that is random.

    Attributes:
        rank: of a truncated result.
        energy: of rank `auto`: the share of the squared norm to keep.
        density: the share of each update's entries that `ties` and `dare` keep; None is the method's own default.
    """

    rank: Rank = "auto"
    energy: float = 0.99
    seed: int = 0
    density: float | None = None

    @property
    def kept(self) -> float:
        """The share of the squared norm that rank `auto` or `lossless` keeps."""
        return self.energy if self.rank == "auto" else 1 - LOSSLESS**2


@dataclass(frozen=True)
class Plan:
    """A method's answer for one module: the shape of the result, its form in a word, and how to compute it.

    `target` forms what the result is an approximation of, where that is not the weighted mean; `merge` is then its
    `factors`.
    """

    spec: FactorsSpec
    form: str
    merge: Callable[[], Factors]
    target: Callable[[], Target] | None = None


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        reference: where the method comes from.
        laws: what holds for it, by name (see the README's table); every declared law is tested.
        folds: how a late client is folded in without the earlier clients' files: `blocks`, exactly, beside theirs;
            `mean`, into what stands for them all; None where it cannot be.
        linear: whether its result is proportional to each client's weight over the total; ties divides by it.
        aims_at_mean: whether the weighted mean is what its result should be; else its plans have a `target`.
        heeds: the fields of `Options` that change its result.
        instead: what to do where it refuses a module.
    """

    name: str
    summary: str
    reference: str
    laws: frozenset[str]
    folds: Folds | None
    plan: Callable[[Module, Options], Plan]
    heeds: frozenset[str] = frozenset()
    linear: bool = True
    aims_at_mean: bool = True
    instead: str = ""


METHODS: dict[str, Method] = {}


class MethodRefused(ValueError):
    """A method cannot merge this module; `field` and `reason` say why, `share` whose it is (None: everybody's)."""

    def __init__(self, field: str, reason: str, share: Share | None = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason, self.share = field, reason, share


def require_no_dora(module: Module, name: str, why: str) -> None:
    """Raise `MethodRefused`, naming the first client by id that trained this module as DoRA."""
    for share in module.shares:
        if share.spec.magnitude:
            raise MethodRefused("use_dora", f"{name} cannot merge DoRA: {why}", share)


PlanFunction: TypeAlias = Callable[[Module, Options], Plan]


def method(
    name: str,
    *,
    reference: str,
    laws: set[str],
    folds: Folds | None,
    heeds: Collection[str] = (),
    linear: bool = True,
    aims_at_mean: bool = True,
    instead: str = "",
) -> Callable[[PlanFunction], PlanFunction]:
    """Register a method under `name`; its docstring's first line becomes its summary."""

    def register(plan: PlanFunction) -> PlanFunction:
        summary = (plan.__doc__ or "").splitlines()[0]
        kept, heeded = frozenset(laws), frozenset(heeds)
        METHODS[name] = Method(name, summary, reference, kept, folds, plan, heeded, linear, aims_at_mean, instead)
        return plan

    return register


def target_plan(module: Module, form: str, target: Callable[[], Target], options: Options | None) -> Plan:
    """A plan that writes a target whole, or with `options` at their rank."""
    rank = None if options is None else _rank(module, target, options)
    seed = lowrank.sketch_seed(options.seed, module.name) if options else 0

    def formed() -> Target:
        return replace(target(), rank=rank, seed=seed)

    spec = replace(module.spec, r=rank or module.max_r, scaling=1.0, bias=module.bias, magnitude=False)
    return Plan(spec, form, lambda: formed().factors(), formed)


def _rank(module: Module, target: Callable[[], Target], options: Options) -> int:
    if isinstance(options.rank, int):
        return min(options.rank, module.max_r)
    return lowrank.rank_for_energy(torch.linalg.svdvals(target().M.double()), options.kept)

"""From clients to a merged file: each module is read, merged, written and measured by itself.

The shape of every result is planned first, so that the file's header is known and modules may finish in any order.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented there

from lora_merge.adapter import FactorsSpec, FullSpec
from lora_merge.aggregation import coordinates
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import MethodRefused
from lora_merge.aggregation.schedule import Advance, over
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.layout import PREFIX, owner_of
from lora_merge.checkpoint.planned import DTYPES, FactorsMerge, FullMerge, Measured, Merge, Settings, TokensMerge
from lora_merge.checkpoint.writer import SafetensorsWriter
from lora_merge.errors import ALL_CLIENTS, Problem, RefusedError

BIAS_IN_TWO_PARTS = (
    "was trained whole and by lora_bias, and no entry of either is the update's; "
    "--method exact and svd take both as one, also with --robust geometric-median, krum and multi-krum"
)
TOO_LARGE = "holds numbers so large that its singular values cannot be computed"


@dataclass(frozen=True)
class Merged:
    """What a merge has written: each module as it was planned and what was found of it, and the file's sha256."""

    merges: Sequence[Merge]
    measured: Sequence[Measured]
    sha256: str


def plan(federation: Federation, settings: Settings, threads: ThreadPoolExecutor) -> list[Merge]:
    """What will be written for each module.

    Raises:
        RefusedError: the method cannot merge some modules; with all of them.
    """
    planned = over(threads, partial(_plan_one, federation, settings), federation.names)
    if problems := [problem for result in planned if isinstance(result, list) for problem in result]:
        raise RefusedError(problems, hint=METHODS[settings.method].instead)
    return _one_rank_per_owner([result for result in planned if not isinstance(result, list)])


def write(
    merges: Sequence[Merge], settings: Settings, path: Path, threads: ThreadPoolExecutor, advance: Advance | None
) -> Merged:
    """Merge every module into the safetensors file `path`."""
    shapes = {name: shape for merge in merges for name, shape in merge.shapes.items()}
    writer = SafetensorsWriter(path, shapes, DTYPES[settings.dtype][0])

    def run(merge: Merge) -> Measured:
        try:
            return merge.run(settings, writer)
        except MethodRefused as error:
            raise RefusedError([_problem(error)]) from error
        except LinAlgError as error:
            raise RefusedError([Problem(ALL_CLIENTS, next(iter(merge.shapes)), TOO_LARGE)]) from error

    try:
        measured = over(threads, run, merges, advance)
        return Merged(merges, measured, writer.sha256())
    finally:
        writer.close()


def _plan_one(federation: Federation, settings: Settings, name: str) -> Merge | list[Problem]:
    spec = federation.spec(name)
    beside = federation.lora_bias_beside.get(name)
    if beside and not settings.aims_at_mean:
        return [Problem(ALL_CLIENTS, name, BIAS_IN_TWO_PARTS)]
    if isinstance(spec, FullSpec):
        module = federation.module(beside) if beside else None
        return FullMerge(name, _tensor_of(name, federation), federation.value(name), spec.shape, module)
    if not isinstance(spec, FactorsSpec):
        return TokensMerge(name, federation)
    try:
        module = federation.module(name)
        if settings.rule is not None:
            return FactorsMerge(module, coordinates.plan(module, settings.rule, settings.method, settings.options))
        plan, own = METHODS[settings.method].plan(module, settings.options), name not in federation.told_with_the_bias
        return FactorsMerge(module, plan, own)
    except MethodRefused as error:
        return [_problem(error)]
    except LinAlgError:
        return [Problem(ALL_CLIENTS, name, TOO_LARGE)]


def _problem(error: MethodRefused) -> Problem:
    return Problem(error.share.client if error.share else ALL_CLIENTS, error.field, error.reason)


def _tensor_of(name: str, federation: Federation) -> str:
    """A bias lies under base_layer where the merged adapter wraps its module, or what that is a part of."""
    wrapped = federation.wrapped.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
    return PREFIX + (f"{wrapped}.base_layer.bias" if wrapped else name)


def _one_rank_per_owner(merges: list[Merge]) -> list[Merge]:
    """PEFT gives one rank to all parts of a wrapped module (nested experts): the narrower ones are padded by zeros."""
    widest: dict[str, int] = {}
    factors = [merge for merge in merges if isinstance(merge, FactorsMerge)]
    for merge in factors:
        owner = owner_of(merge.module.name)
        widest[owner] = max(widest.get(owner, 0), merge.plan.spec.r)
    return [
        replace(merge, plan=replace(merge.plan, spec=replace(merge.plan.spec, r=widest[owner_of(merge.module.name)])))
        if isinstance(merge, FactorsMerge)
        else merge
        for merge in merges
    ]

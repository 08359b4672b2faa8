"""What a merge will write, module by module: low-rank factors, a tensor trained whole, rows of an embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lora_merge.adapter import Factors, FactorsSpec
from lora_merge.aggregation import certificate, coordinates
from lora_merge.aggregation.coordinates import Coordinates
from lora_merge.aggregation.difference import SquaredError
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.module import Module
from lora_merge.aggregation.registry import Options, Plan
from lora_merge.aggregation.sums import mean_bias
from lora_merge.aggregation.whole import Value
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.layout import (
    PREFIX,
    TOKEN_ROWS,
    TOKEN_SUFFIX,
    from_stored,
    stored_names,
    stored_shapes,
    to_stored,
)
from lora_merge.checkpoint.safetensors_file import is_finite
from lora_merge.checkpoint.writer import SafetensorsWriter
from lora_merge.errors import ALL_CLIENTS, Problem, RefusedError

DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
CertificateMode: TypeAlias = Literal["exact", "probes", "off"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Measured:
    """What was found of one written module.

    Attributes:
        form: how it is written: `stack`, `shared lora_A`, `whole`, `svd`, `full tensor`…
        r: its rank; None for a tensor that was trained whole.
        error: its distance from M; None where it was not measured.
        fedavg: by how much the means of lora_A and lora_B apart would miss M; None where they do not exist.
        from_mean: how far what was to be written is from M, where M is not what is aimed at.
    """

    name: str
    form: str
    r: int | None
    error: SquaredError | None
    fedavg: SquaredError | None = None
    from_mean: SquaredError | None = None


@dataclass(frozen=True)
class Settings:
    """How modules are merged and measured.

    Attributes:
        certificate: None: exact where K allows it, else by probes.
        rule: what takes the place of the mean.
    """

    method: str = "exact"
    options: Options = field(default_factory=Options)
    dtype: str = "fp32"
    certificate: CertificateMode | None = None
    rule: Coordinates | None = None

    @property
    def aims_at_mean(self) -> bool:
        """Whether the weighted mean is what is to be written."""
        return self.rule is None and METHODS[self.method].aims_at_mean


class Merge(Protocol):
    """One planned result: the tensors it will write, and the function that makes and measures them."""

    @property
    def shapes(self) -> Shapes: ...

    def run(self, settings: Settings, write: SafetensorsWriter) -> Measured: ...


@dataclass(frozen=True)
class FactorsMerge:
    """A low-rank module; `biases`: whether the size of its lora_bias is told here, and not with the bias beside it."""

    module: Module
    plan: Plan
    biases: bool = True

    @property
    def shapes(self) -> Shapes:
        shapes, names = stored_shapes(self.plan.spec), stored_names(self.module.name, self.plan.spec)
        return {names[role]: shape for role, shape in shapes.items()}

    def run(self, settings: Settings, write: SafetensorsWriter) -> Measured:
        spec = self.plan.spec
        target = self.plan.target() if self.plan.target else None
        merged = _completed(target.factors() if target else self.plan.merge(), spec)
        names = stored_names(self.module.name, spec)
        stored = to_stored(spec, merged)
        as_written = {role: _write(write, names[role], stored[role], settings.dtype) for role in stored}
        found = from_stored(spec, as_written)
        if target:
            error = None if settings.certificate == "off" else target.squared_error(found)
            return Measured(self.module.name, self.plan.form, spec.r, error, None, target.from_mean)
        return Measured(self.module.name, self.plan.form, spec.r, *self._measure(found, settings))

    def _measure(self, written: Factors, settings: Settings) -> tuple[SquaredError | None, SquaredError | None]:
        if settings.certificate == "off":
            return None, None
        seed = settings.options.seed
        probes = settings.certificate == "probes" or (
            settings.certificate is None and self.module.K > certificate.MAX_EXACT_K
        )
        error = certificate.measure(self.module, written, self.plan.form, probes=probes, seed=seed)
        gap = certificate.fedavg_gap(self.module, seed=seed) if settings.method == "exact" else None
        bias = None if self.biases else mean_bias(self.module)
        return (error, gap) if bias is None else (_without(error, bias), gap and _without(gap, bias))


@dataclass(frozen=True)
class FullMerge:
    """A tensor that was trained whole, written as `tensor`; to a bias, the lora_bias of `beside` adds."""

    name: str
    tensor: str
    value: Value
    shape: tuple[int, ...]
    beside: Module | None = None

    @property
    def shapes(self) -> Shapes:
        return {self.tensor: self.shape}

    def run(self, settings: Settings, write: SafetensorsWriter) -> Measured:
        merged = _merged(self.value, settings)
        written = _write(write, self.tensor, merged, settings.dtype)
        error = None if settings.certificate == "off" else self._error(settings, merged, written)
        from_mean = _sum([_from_mean(self.value, settings, merged)])
        return Measured(self.name, "full tensor", None, _sum([error]), from_mean=from_mean)

    def _error(self, settings: Settings, merged: Tensor, written: Tensor) -> tuple[float, float] | None:
        if self.beside is None:
            return _error(self.value, settings, merged, written)
        return self.value.squared_error(written, mean_bias(self.beside))  # no rule acts on such a bias


@dataclass(frozen=True)
class TokensMerge:
    """Rows of an embedding."""

    name: str
    federation: Federation

    @property
    def shapes(self) -> Shapes:
        spec = self.federation.spec(self.name)
        width = getattr(spec, "d", 0)
        return {self._tensor: (len(self.federation.tokens(self.name)), width)}

    @property
    def _tensor(self) -> str:
        return PREFIX + self.name.removesuffix(TOKEN_SUFFIX) + TOKEN_ROWS

    def run(self, settings: Settings, write: SafetensorsWriter) -> Measured:
        values = self.federation.token_values(self.name).values()
        merged = torch.stack([_merged(value, settings) for value in values])
        written = _write(write, self._tensor, merged, settings.dtype)
        from_mean = _sum([_from_mean(value, settings, row) for value, row in zip(values, merged, strict=True)])
        if settings.certificate == "off":
            return Measured(self.name, "token rows", None, None, from_mean=from_mean)
        errors = [_error(value, settings, *rows) for value, *rows in zip(values, merged, written, strict=True)]
        return Measured(self.name, "token rows", None, _sum(errors), from_mean=from_mean)


def _merged(value: Value, settings: Settings) -> Tensor:
    return value.mean() if settings.rule is None else coordinates.value(value, settings.rule)


def _error(value: Value, settings: Settings, merged: Tensor, written: Tensor) -> tuple[float, float] | None:
    if settings.rule is None:
        return value.squared_error(written)
    return coordinates.squared_error(value, merged, written)


def _from_mean(value: Value, settings: Settings, merged: Tensor) -> tuple[float, float] | None:
    """|merged - M|^2 and |M|^2 where something else than M is aimed at; None where the update has no size."""
    return None if settings.aims_at_mean else coordinates.squared_error(value, value.mean(), merged)


def _sum(errors: Sequence[tuple[float, float] | None]) -> SquaredError | None:
    """Their sum; None where one is not known."""
    known = [error for error in errors if error is not None]
    return SquaredError(sum(e for e, _ in known), sum(n for _, n in known)) if len(known) == len(errors) else None


def _without(error: SquaredError, bias: Tensor) -> SquaredError:
    """The same error, relative to the module without the mean of its lora_bias."""
    return replace(error, norm=max(0.0, error.norm - float(bias.double().square().sum())))


def _completed(merged: Factors, spec: FactorsSpec) -> Factors:
    """`merged` with zero columns up to the planned rank."""
    missing = spec.r - merged.r
    if not missing:
        return merged
    B = torch.nn.functional.pad(merged.B, (0, missing))
    A = torch.nn.functional.pad(merged.A, (0, 0, 0, missing))
    return replace(merged, B=B, A=A)


def _write(writer: SafetensorsWriter, name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Write a tensor in the file's type; returns what was written, as fp32 where the tensor was."""
    cast = tensor.to("cpu", DTYPES[dtype][1])
    if not is_finite(cast.float()):
        hint = "" if dtype == "fp32" else "Write it with --dtype fp32."
        raise RefusedError([Problem(ALL_CLIENTS, name, f"their mean does not fit into {dtype}")], hint=hint)
    writer.write(name, cast)
    return cast.to(tensor.device).float()

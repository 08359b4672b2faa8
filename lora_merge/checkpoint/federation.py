"""All clients of a merge, and each module of theirs as the algebra wants it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapter import (
    Client,
    Factors,
    FactorsSpec,
    FullSpec,
    FullTensor,
    Spec,
    TokenRows,
    TokenSpec,
    Update,
    is_frozen,
    name_in_base,
)
from lora_merge.aggregation.compatibility import module_names
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.whole import Value, ValueShare, rows_by_token
from lora_merge.checkpoint.base_model import BaseModel, Misfit
from lora_merge.checkpoint.layout import TOKEN_SUFFIX
from lora_merge.checkpoint.safetensors_file import FileRefused
from lora_merge.errors import Problem, RefusedError


@dataclass(frozen=True)
class Federation:
    """The clients, sorted by id, and what all modules have in common.

    Attributes:
        clients: those of a weight above 0: the others would only widen the result.
        total: N, what the weights are shares of: their sum, or more where a rule has taken weight away.
        alpha: the global learning rate.
        base: the base model's tensors, where they are at hand.
        fan_in_fan_out: whether a client says that its base stores matrices transposed.
        device: where the arithmetic runs.
    """

    clients: Sequence[Client]
    total: float
    alpha: float = 1.0
    base: BaseModel | None = None
    fan_in_fan_out: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def names(self) -> list[str]:
        """Every name that some client has an update for, sorted."""
        return module_names(self.clients)

    @cached_property
    def factor_specs(self) -> dict[str, FactorsSpec]:
        """One client's shape of every low-rank module."""
        return {name: spec for name in self.names if isinstance(spec := self.spec(name), FactorsSpec)}

    @cached_property
    def wrapped(self) -> dict[str, str]:
        """The name of each low-rank module by its name in the base model; of nested wrappers, the innermost."""
        return {name_in_base(name): name for name in sorted(self.factor_specs)}

    @cached_property
    def lora_bias_beside(self) -> dict[str, str]:
        """Each bias that some client trained whole, and the module of that layer whose lora_bias adds to it."""
        biases = {name: self.wrapped.get(name.removesuffix(".bias")) for name in self.names if name.endswith(".bias")}
        beside = {name: module for name, module in biases.items() if module and self._has_lora_bias(module)}
        return {name: module for name, module in beside.items() if not self.value(name).is_untrained}

    @cached_property
    def told_with_the_bias(self) -> set[str]:
        """The modules whose lora_bias is measured as a part of the bias beside it; without the base, none is."""
        beside = self.lora_bias_beside.items()
        return {module for name, module in beside if self.value(name).base is not None}

    @cached_property
    def bias(self) -> bool:
        return any(spec.bias for spec in self._factor_specs_of_all())

    @cached_property
    def dora(self) -> bool:
        return any(spec.magnitude for spec in self._factor_specs_of_all())

    def spec(self, name: str) -> FactorsSpec | FullSpec | TokenSpec:
        """The first client's shape of `name`."""
        return next(client.adapter.specs[name] for client in self.clients if name in client.adapter.specs)

    def module(self, name: str) -> Module:
        """The low-rank module `name` as all clients see it."""
        shares = tuple(
            Share(client.id, client.n_in(name), spec, partial(self._factors, client, name), client.stored)
            for client in self._having(name)
            if isinstance(spec := client.adapter.specs[name], FactorsSpec)
        )
        base = partial(self._base_weight, name) if self.dora and self.base is not None else None
        return Module(name, shares, self.total, self.alpha, self.bias, self.dora, base)

    def value(self, name: str) -> Value:
        """The full tensor `name` as all clients see it."""
        clients = self._having(name)
        shares = [ValueShare(client.id, client.n, partial(self._full, client, name)) for client in clients]
        spec = self.spec(name)
        shape, of_base = spec.shape if isinstance(spec, FullSpec) else (), base_name(name, spec)
        base = self.base if self.base is not None and self.base.has(of_base) else None
        read = None if base is None else partial(self._of_base, name, partial(base.tensor, of_base, shape))
        frozen = all(is_frozen(client.adapter.specs[name]) for client in clients)
        return Value(shares, self.total, self.alpha, read, frozen)

    def token_values(self, name: str) -> dict[int, Value]:
        """Each row of an embedding that some client trained, by token. Reads the clients' rows."""
        clients = self._having(name)
        updates = [self._tokens(client, name) for client in clients]
        rows = rows_by_token([{token: row for row, token in enumerate(update.indices)} for update in updates])
        values = {}
        for token, owners in rows.items():
            shares = [
                ValueShare(clients[i].id, clients[i].n, partial(updates[i].rows.__getitem__, row)) for i, row in owners
            ]
            values[token] = Value(shares, self.total, self.alpha, self._base_row(name, token))
        return values

    def tokens(self, name: str) -> tuple[int, ...]:
        """The tokens of an embedding that some client trained, sorted."""
        specs = [client.adapter.specs[name] for client in self._having(name)]
        return tuple(sorted({token for spec in specs if isinstance(spec, TokenSpec) for token in spec.indices}))

    def needed_base_tensors(self, *, to_measure: bool = False) -> list[str]:
        """The base tensors without which the mean is not determined, or `to_measure` the size of an update."""
        needed = (n for n in self.names if self._needs_base(n) or (to_measure and self._has_value(n)))
        return [base_name(name, self.spec(name)) for name in needed]

    def read(self, client: Client, name: str) -> Update:
        """One client's update, on the device; what is wrong with it is a problem of the client's."""
        try:
            return _moved(client.adapter[name], self.device)
        except FileRefused as error:
            raise RefusedError([Problem(client.id, error.field, error.reason)]) from error

    def _needs_base(self, name: str) -> bool:
        spec = self.spec(name)
        if isinstance(spec, FactorsSpec):
            return self.dora
        if isinstance(spec, FullSpec):
            return self.value(name).needs_base
        having = [(client.n, client.adapter.specs[name]) for client in self._having(name)]
        each = (sum(n for n, s in having if isinstance(s, TokenSpec) and t in s.indices) for t in self.tokens(name))
        return self.alpha != 1 or any(n != self.total for n in each)

    def _has_value(self, name: str) -> bool:
        """Whether `name` holds values that were trained, and no differences."""
        spec = self.spec(name)
        return isinstance(spec, TokenSpec) or (isinstance(spec, FullSpec) and not self.value(name).is_untrained)

    def _has_lora_bias(self, module: str) -> bool:
        specs = (client.adapter.specs[module] for client in self._having(module))
        return any(isinstance(spec, FactorsSpec) and spec.bias for spec in specs)

    def _having(self, name: str) -> list[Client]:
        return [client for client in self.clients if name in client.adapter.specs]

    def _factor_specs_of_all(self) -> Iterator[FactorsSpec]:
        for client in self.clients:
            yield from (spec for spec in client.adapter.specs.values() if isinstance(spec, FactorsSpec))

    def _factors(self, client: Client, name: str) -> Factors:
        update = self.read(client, name)
        assert isinstance(update, Factors)
        return update

    def _full(self, client: Client, name: str) -> Tensor:
        update = self.read(client, name)
        assert isinstance(update, FullTensor)
        return update.value

    def _tokens(self, client: Client, name: str) -> TokenRows:
        update = self.read(client, name)
        assert isinstance(update, TokenRows)
        return update

    def _base_weight(self, name: str) -> Tensor:
        assert self.base is not None
        spec = self.factor_specs[name]
        read = partial(self.base.weight, name, spec, some_transposed=self._some_transposed)
        return self._of_base(name, read).to(self.device)

    @cached_property
    def _some_transposed(self) -> bool:
        """Whether the clients' fan_in_fan_out, or the shape of some matrix, says that the base has a Conv1D.

        PEFT writes the flag as it was for the last module that it wrapped, so it proves nothing of any other.
        """
        assert self.base is not None
        linear = [(name, spec) for name, spec in self.factor_specs.items() if spec.layout == "linear"]
        return self.fan_in_fan_out or any(self.base.lies_transposed(name, spec) for name, spec in linear)

    def _base_row(self, name: str, token: int) -> Callable[[], Tensor] | None:
        spec = self.spec(name)
        assert isinstance(spec, TokenSpec)
        if self.base is None or not self.base.has(base_name(name, spec)):
            return None
        return partial(self._of_base, name, partial(self.base.row, base_name(name, spec), token, spec.d))

    def _of_base(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """What `read` reads of the base for `name`; what does not fit is a problem of each client that has `name`."""
        try:
            return read()
        except Misfit as misfit:
            hint = "Give --base the model that they were trained from, or leave out who was trained from another."
            problems = [Problem(client.id, name, str(misfit)) for client in self._having(name)]
            raise RefusedError(problems, hint=hint) from misfit


def base_name(name: str, spec: Spec) -> str:
    """The base model's tensor that an update of `name` starts from."""
    own = name_in_base(name.removesuffix(TOKEN_SUFFIX))
    return own if isinstance(spec, FullSpec) else f"{own}.weight"


def _moved(update: Update, device: torch.device) -> Update:
    if device.type == "cpu":
        return update
    tensors: dict[str, Any] = {
        key: value.to(device) for key, value in vars(update).items() if isinstance(value, Tensor)
    }
    return replace(update, **tensors)

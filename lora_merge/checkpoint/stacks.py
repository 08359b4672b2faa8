"""The stacks of a merged adapter, cut into the blocks of its clients again."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from lora_merge.adapter import Factors, FactorsSpec, Spec
from lora_merge.checkpoint.layout import owner_of
from lora_merge.checkpoint.peft_folder import PeftFolder


class Stacks:
    """A merged adapter's folder, and the ranks of its clients' blocks in their order.

    Each thread keeps the last module that it read: the blocks of one module are asked for one after another.
    """

    def __init__(self, folder: PeftFolder, ranks: Sequence[Mapping[str, int]]) -> None:
        self.specs = {name: spec for name, spec in folder.specs.items() if isinstance(spec, FactorsSpec)}
        self.bounds = {name: [0, *accumulate(each.get(name, 0) for each in ranks)] for name in self.specs}
        self._folder, self._last = folder, threading.local()

    def misfits(self) -> Iterator[str]:
        """The modules whose stacks are not as wide as their blocks together.

        A part of a wrapped module is padded to the widest of its parts, so only that one must fit.
        """
        parts: dict[str, list[str]] = {}
        for name in self.specs:
            parts.setdefault(owner_of(name), []).append(name)
        for names in parts.values():
            widest = max(self.bounds[name][-1] for name in names)
            yield from (name for name in names if self.specs[name].r != widest or not self.bounds[name][-1])

    def run(self, first: int, end: int) -> "Run":
        """The blocks of the clients `first` to `end` (exclusive), side by side as one update."""
        return Run(self, first, end)

    def rank(self, name: str, first: int, end: int) -> int:
        """The rank of those clients' blocks in a module together."""
        return self.bounds[name][end] - self.bounds[name][first]

    def cut(self, name: str, first: int, end: int) -> Factors:
        """Those clients' blocks of a module. Views of the whole stack."""
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.factors = name, self._folder[name]
        factors, start, stop = self._last.factors, self.bounds[name][first], self.bounds[name][end]
        assert (factors.bias, factors.magnitude) == (None, None)  # sums of all, and nobody's block
        return Factors(factors.B[:, :, start:stop], factors.A[:, start:stop], 1.0)


@dataclass(frozen=True)
class Run:
    """An `Adapter` of neighbouring clients' blocks, whose factors carry sqrt(n s) each."""

    stacks: Stacks
    first: int
    end: int

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        widths = {name: self.stacks.rank(name, self.first, self.end) for name in self.stacks.specs}
        return {name: replace(self.stacks.specs[name], r=r, scaling=1.0) for name, r in widths.items() if r}

    def __getitem__(self, module: str) -> Factors:
        return self.stacks.cut(module, self.first, self.end)

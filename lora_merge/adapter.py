"""The nouns: what one client says about one module, and an adapter as a lazy mapping of those.

Shapes, everywhere in the package::

    E      blocks of a module: experts, or groups of a grouped convolution; 1 for everything else
    d_out  rows of one block's weight          d_in  its columns (a convolution's kernel flattened into them)
    r      rank of one block

A block's update is `delta_w = scaling * B @ A`. A file's tensors are brought into this one form by
`lora_merge.checkpoint.layout`, so the algebra never sees a convolution or an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Layout: TypeAlias = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True)
class Factors:
    """A low-rank update, `scaling * B @ A` block by block.

    Attributes:
        B: E x d_out x r, fp32.
        A: E x r x d_in, fp32.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
        bias: the bias of lora_B (E * d_out values), which PEFT scales too; None without lora_bias.
        magnitude: DoRA's magnitude (E * d_out values); None for plain LoRA.
    """

    B: "Tensor"
    A: "Tensor"
    scaling: float
    bias: "Tensor | None" = None
    magnitude: "Tensor | None" = None

    @property
    def r(self) -> int:
        return self.A.shape[1]


@dataclass(frozen=True)
class FullTensor:
    """A tensor trained whole (modules_to_save, a bias): the value that replaces the base's."""

    value: "Tensor"


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that replace the base's: `rows[k]` (n x d) is the row of token `indices[k]`."""

    indices: tuple[int, ...]
    rows: "Tensor"


Update: TypeAlias = Factors | FullTensor | TokenRows


@dataclass(frozen=True)
class FactorsSpec:
    """The shape of a `Factors`, known from a file's header without reading it.

    `kernel` is a convolution's kernel size; `layout` says how the file lays the blocks out.
    """

    layout: Layout
    blocks: int
    d_out: int
    d_in: int
    r: int
    scaling: float
    bias: bool = False
    magnitude: bool = False
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class FullSpec:
    """The shape of a `FullTensor`.

    A `frozen` one is the base's own, which PEFT saves along with its layer's LoRA, and nobody trained it.
    """

    shape: tuple[int, ...]
    frozen: bool = False


@dataclass(frozen=True)
class TokenSpec:
    """The shape of a `TokenRows`: which tokens, and d, the width of a row."""

    indices: tuple[int, ...]
    d: int


Spec: TypeAlias = FactorsSpec | FullSpec | TokenSpec


class Adapter(Protocol):
    """A lazy mapping from module name to its update; reading an update reads its tensors."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every module's shape, without reading a tensor."""
        ...

    def __getitem__(self, module: str) -> Update: ...


def spec_of(update: Update) -> Spec:
    """The shape of an update that is at hand; its layout is taken as linear."""
    if isinstance(update, FullTensor):
        return FullSpec(tuple(update.value.shape))
    if isinstance(update, TokenRows):
        return TokenSpec(update.indices, update.rows.shape[1])
    blocks, d_out, r = update.B.shape
    layout: Layout = "linear" if blocks == 1 else "experts"
    has_bias, has_magnitude = update.bias is not None, update.magnitude is not None
    return FactorsSpec(layout, blocks, d_out, update.A.shape[2], r, update.scaling, has_bias, has_magnitude)


@dataclass(frozen=True)
class Client:
    """One client of a merge: its id, its weight n (examples, or as given), its adapter.

    p, its share, is n over the sum of all clients' n. A `stored` one is what an earlier merge kept of clients: its
    factors carry n s already. One that stands for several clients has an n of its own in each module, `by_module`.
    """

    id: str
    n: float
    adapter: Adapter
    stored: bool = False
    by_module: Mapping[str, float] | None = None

    def n_in(self, module: str) -> float:
        """n of those in `module` whom this client stands for: but for stand-ins, its own."""
        return self.n if self.by_module is None else self.by_module[module]


def name_in_base(name: str) -> str:
    """The name in the base model of a module or tensor: PEFT puts a `.base_layer` into it for each wrapper."""
    return name.replace(".base_layer", "")


def is_frozen(spec: Spec) -> bool:
    """Whether it is the shape of a full tensor that nobody trained."""
    return isinstance(spec, FullSpec) and spec.frozen

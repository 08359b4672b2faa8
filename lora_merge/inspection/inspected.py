"""What an inspection says: of each adapter, of each of its low-rank modules, and of all together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_merge.errors import Problem
from lora_merge.ledger import LeftOut


@dataclass(frozen=True)
class ModuleFacts:
    """One low-rank module of a client: its rank, scaling, norm, and its top singular value's share of |Delta|^2.

    None where that is not measured; the singular values of a DoRA update never are.
    """

    r: int
    scaling: float
    norm: float | None
    top_share: float | None


@dataclass(frozen=True)
class Inspected:
    """One adapter.

    Attributes:
        source: what a merge's record would call it; `place`: the folder's path, the repository or the URL.
        size: bytes of its weights.
        share: p, by its examples where every client states them, else the same for all.
        norm: |Delta| in the Frobenius norm over what is measured; None where nothing is, and of DoRA without the base.
        cosine_to_mean: between its update and the weighted mean of all; None where one of all is not measured.
        cosine_to_others: between its update and the weighted mean of the others; None as before.
        influence: |M - M without it| / |M|; None as before.
        top_share: the share of the top singular values of its modules in |Delta|^2.
        effective_rank: (sum s^2)^2 / sum s^4 over a module's singular values s, averaged over modules by |Delta|^2.
        stops: why a merge would stop at it; `flags`: what else is odd.
    """

    client_id: str
    source: str
    place: str
    commit: str | None
    base_model: str | None
    base_commit: str | None
    base_sha256: str | None
    recipe: str | None
    num_examples: int | None
    size: int
    sha256: str
    ranks: Sequence[int]
    scalings: Sequence[float]
    full_tensors: int
    top_share: float | None
    effective_rank: float | None
    share: float = 0.0
    norm: float | None = None
    cosine_to_mean: float | None = None
    cosine_to_others: float | None = None
    influence: float | None = None
    modules: Mapping[str, ModuleFacts] = field(default_factory=dict)
    stops: Sequence[str] = ()
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class Inspection:
    """All adapters, sorted by client id; `cosines` has a row and a column of each, in that order.

    Attributes:
        cosines: None beside a client that is not measured.
        mean_norm: |M|; None where a client is not measured.
        refused: what a merge would refuse, and why.
        left_out: the refused and the excluded.
        not_measured: the tensors that have no size without the base model.
    """

    clients: Sequence[Inspected]
    refused: Sequence[Problem]
    left_out: Sequence[LeftOut]
    cosines: Sequence[Sequence[float | None]]
    mean_norm: float | None
    not_measured: Sequence[str]
    warnings: Sequence[str]

    @property
    def would_stop(self) -> bool:
        """Whether `aggregate` would refuse these adapters as they are."""
        return bool(self.refused) or any(client.stops for client in self.clients)

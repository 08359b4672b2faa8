"""What is there before a merge: each adapter's facts, how the updates lie to each other, and what is odd about any.

It reads adapters as a merge would, needs no base model, and names every adapter that a merge would refuse.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from lora_merge.adapter import Client, FactorsSpec
from lora_merge.aggregation import gram, inner_products
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.schedule import over, pool
from lora_merge.aggregation.spectra import Spectra, summary
from lora_merge.agreement import claim_warnings
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import Description
from lora_merge.errors import Problem, RefusedError
from lora_merge.inspection.oddities import counts_stated, num_examples, oddities, reasons_to_stop
from lora_merge.intake import Accepted, Reading, accepted
from lora_merge.ledger import LeftOut
from lora_merge.screening.stops import Screening


@dataclass(frozen=True)
class ModuleFacts:
    """One low-rank module of a client: its rank, scaling, norm, and its top singular value's share of |Delta|^2."""

    r: int
    scaling: float
    norm: float
    top_share: float


@dataclass(frozen=True)
class Inspected:
    """One adapter.

    Attributes:
        source: what a merge's record would call it; `place`: the folder's path, the repository or the URL.
        size: bytes of its weights.
        share: p, by its examples where every client states them, else the same for all.
        norm: |Delta| in the Frobenius norm over what is measured; None where nothing is.
        cosine_to_mean: between its update and the weighted mean of all.
        cosine_to_others: between its update and the weighted mean of the others.
        influence: |M - M without it| / |M|.
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
    share: float
    norm: float | None
    cosine_to_mean: float | None
    cosine_to_others: float | None
    influence: float | None
    top_share: float | None
    effective_rank: float | None
    modules: Mapping[str, ModuleFacts] = field(default_factory=dict)
    stops: Sequence[str] = ()
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class Inspection:
    """All adapters, sorted by client id; `cosines` has a row and a column of each, in that order.

    Attributes:
        refused: what a merge would refuse, and why.
        left_out: the refused and the excluded.
        not_measured: the tensors that have no size without the base model.
    """

    clients: Sequence[Inspected]
    refused: Sequence[Problem]
    left_out: Sequence[LeftOut]
    cosines: Sequence[Sequence[float]]
    mean_norm: float
    not_measured: Sequence[str]
    warnings: Sequence[str]

    @property
    def would_stop(self) -> bool:
        """Whether `aggregate` would refuse these adapters as they are."""
        return bool(self.refused) or any(client.stops for client in self.clients)


def inspect(sources: Sequence[str | Path], *, screening: Screening, reading: Reading) -> Inspection:
    """Read the adapters in `sources` and compare them.

    Args:
        screening: its allow-list and exclusions; what else it says is of merging.

    Raises:
        NotFoundError: a source names nothing, or may not be read.
        RefusedError: every adapter is refused.
        NetworkError: the Hub cannot be reached.
    """
    going_on = Screening(
        allow_list=screening.allow_list, exclude=screening.exclude, skip_rejected=True, allow_merged=True
    )
    with accepted(sources, "uniform", reading, going_on) as inputs:
        spectra = {client: Spectra(folder) for client, folder in inputs.clients.items()}
        n = _weights(inputs)
        with pool() as threads:
            hashes = dict(
                zip(n, threads.map(lambda folder: folder.file.sha256(), inputs.clients.values()), strict=True)
            )
            federation = Federation([Client(name, n[name], spectra[name]) for name in n], sum(n.values()))
            found = _gram(federation, over(threads, partial(_part, federation), federation.names))
        return _inspection(inputs, found, spectra, hashes)


def _weights(inputs: Accepted) -> dict[str, float]:
    return dict.fromkeys(inputs.clients, 1.0) if _weighed_alike(inputs) else counts_stated(inputs)


def _weighed_alike(inputs: Accepted) -> str:
    """Why every client weighs the same here; empty where each weighs by its examples."""
    stated = counts_stated(inputs)
    if silent := len(inputs.clients) - len(stated):
        return f"{silent} of {len(inputs.clients)} clients {'state' if silent > 1 else 'states'} no num_examples"
    return "" if any(stated.values()) else "no client has an example"


def _warnings(inputs: Accepted) -> list[str]:
    alike = _weighed_alike(inputs)
    said = [f"{alike}: all weigh the same here; aggregate asks for --weights."] if alike else []
    return [*inputs.passed_over, *said, *claim_warnings(inputs.clients)]


def _part(federation: Federation, name: str) -> Tensor | None:
    """One module's inner products; None where they would need the base model."""
    if name not in federation.factor_specs:
        return None
    clients = [client.id for client in federation.clients]
    try:
        return inner_products.of_module(federation.module(name), clients)
    except inner_products.NotFinite as error:
        raise RefusedError([Problem("all clients", name, str(error))]) from error


def _gram(federation: Federation, parts: Sequence[Tensor | None]) -> Gram:
    clients = federation.clients
    named = dict(zip(federation.names, parts, strict=True))
    return gram.total([client.id for client in clients], [client.n for client in clients], named)


def _inspection(inputs: Accepted, found: Gram, spectra: Mapping[str, Spectra], hashes: Mapping[str, str]) -> Inspection:
    stops, flags = reasons_to_stop(inputs, hashes), oddities(inputs, found, hashes)
    numbers = _Numbers(found)
    clients = [
        _inspected(index, client, inputs, numbers, spectra[client].found, hashes[client], stops, flags)
        for index, client in enumerate(found.clients)
    ]
    return Inspection(
        clients=clients,
        refused=inputs.refused,
        left_out=inputs.left_out,
        cosines=[[_rounded(value) for value in row] for row in found.cosines.tolist()],
        mean_norm=_rounded(float(found.norm_of(found.p))),
        not_measured=found.not_measured,
        warnings=_warnings(inputs),
    )


class _Numbers:
    """Each client's numbers of the Gram matrix, as lists in the clients' order."""

    def __init__(self, found: Gram) -> None:
        self.gram = found
        self.norm, self.share = found.norms.tolist(), found.p.tolist()
        self.to_mean = found.cosines_to(found.p).tolist()
        self.to_others = found.cosines_to_others
        self.influence = found.influence.tolist()


def _inspected(
    index: int,
    client: str,
    inputs: Accepted,
    numbers: _Numbers,
    squares: Mapping[str, Tensor],
    sha256: str,
    stops: Mapping[str, list[str]],
    flags: Mapping[str, list[str]],
) -> Inspected:
    folder, ref = inputs.clients[client], inputs.refs[client]
    stated = folder.statement
    specs = [spec for spec in folder.specs.values() if isinstance(spec, FactorsSpec)]
    measured = bool(numbers.gram.modules)
    top, effective = summary(squares)

    def number(values: Sequence[float]) -> float | None:
        return _rounded(values[index]) if measured else None

    return Inspected(
        client_id=client,
        source=ref.source,
        place=ref.place,
        commit=ref.commit,
        base_model=(stated.base_model.repo if stated else None) or folder.config.base_model,
        base_commit=stated.base_model.commit if stated else None,
        base_sha256=stated.base_model.weights_sha256 if stated else None,
        recipe=stated.recipe.digest if stated and stated.recipe else None,
        num_examples=num_examples(folder),
        size=folder.file.size,
        sha256=sha256,
        ranks=sorted({spec.r for spec in specs}),
        scalings=sorted({spec.scaling for spec in specs}),
        full_tensors=len(folder.specs) - len(specs),
        share=_rounded(numbers.share[index]),
        norm=number(numbers.norm),
        cosine_to_mean=number(numbers.to_mean),
        cosine_to_others=number(numbers.to_others),
        influence=number(numbers.influence),
        top_share=None if top is None else _rounded(top),
        effective_rank=None if effective is None else _rounded(effective),
        modules=dict(_modules(folder, squares)),
        stops=stops.get(client, []),
        flags=flags.get(client, []),
    )


def _modules(folder: Description, squares: Mapping[str, Tensor]) -> Iterator[tuple[str, ModuleFacts]]:
    for name in sorted(squares):
        spec, values = folder.specs[name], squares[name]
        assert isinstance(spec, FactorsSpec)
        total = float(values.sum())
        share = _rounded(float(values.amax(dim=1).sum()) / total) if total else 0.0
        yield name, ModuleFacts(spec.r, spec.scaling, _rounded(math.sqrt(total)), share)


def _rounded(value: float) -> float:
    """Six digits: the last bits differ between machines."""
    return float(f"{value:.6g}")

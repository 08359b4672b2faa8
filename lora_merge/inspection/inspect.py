"""What is there before a merge: each adapter's facts, how the updates lie to each other, and what is odd about any.

It reads adapters as a merge would, and names every adapter that a merge would refuse. The base model is read where a
merge of them would read it, or where it is given; what has no size without it is left empty, and is never 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_merge.adapter import Client, FactorsSpec
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.schedule import pool
from lora_merge.aggregation.spectra import Spectra, summary
from lora_merge.agreement import claim_warnings
from lora_merge.assembly import base_model_for, stores_transposed
from lora_merge.checkpoint.federation import Federation, base_name
from lora_merge.checkpoint.similarity import gram_of
from lora_merge.errors import MissingBaseError, RefusedError
from lora_merge.inspection.inspected import Inspected, Inspection, ModuleFacts
from lora_merge.inspection.oddities import counts_stated, num_examples, oddities, reasons_to_stop
from lora_merge.intake import Accepted, Reading, accepted
from lora_merge.screening.selection import Selection
from lora_merge.screening.stops import Screening


def inspect(
    sources: Sequence[str | Path], *, screening: Screening, reading: Reading, base: str | Path | None = None
) -> Inspection:
    """Read the adapters in `sources` and compare them.

    Args:
        screening: its allow-list and exclusions; what else it says is of merging.
        base: the base model's folder or cached id; by default the one that a merge of the adapters would read.

    Raises:
        NotFoundError: a source names nothing, or may not be read; the base is not there, or lacks tensors.
        RefusedError: the base is not theirs. Adapters that are refused are in the result, be it all of them.
        NetworkError: the Hub cannot be reached.
    """
    going_on = Screening(
        allow_list=screening.allow_list, exclude=screening.exclude, skip_rejected=True, allow_merged=True
    )
    selection = Selection(going_on)
    with ExitStack() as stack:
        try:
            inputs = stack.enter_context(accepted(sources, "uniform", reading, going_on, selection))
        except RefusedError as error:
            return Inspection([], error.problems, sorted(selection.left_out), [], None, [], [])
        spectra = {client: Spectra(folder) for client, folder in inputs.clients.items()}
        n = _weights(inputs)
        with pool() as threads:
            hashes = dict(
                zip(n, threads.map(lambda folder: folder.file.sha256(), inputs.clients.values()), strict=True)
            )
            clients = [Client(name, n[name], spectra[name]) for name in n]
            without = Federation(clients, sum(n.values()), fan_in_fan_out=stores_transposed(inputs.clients))
            federation, warnings = _with_base(without, inputs, base, reading)
            found = gram_of(_measurable(federation), threads)
        squares = {client: each.found for client, each in spectra.items()}
        seen = _Seen(inputs, federation, found, squares, hashes)
        return _inspection(seen, [*_warnings(inputs), *warnings])


def _with_base(
    federation: Federation, inputs: Accepted, base: str | Path | None, reading: Reading
) -> tuple[Federation, list[str]]:
    """The federation with the base that a merge of it would read, if that is at hand; and what to warn of."""
    merged = replace(federation, clients=[client for client in federation.clients if client.n > 0])
    try:
        return replace(federation, base=base_model_for(merged, inputs.clients, base, tell=reading.tell)), []
    except MissingBaseError as error:
        return federation, [f"aggregate needs --base: {error.message}"]


def _measurable(federation: Federation) -> Federation:
    """The clients whose updates have a size: without the base, a DoRA update has none."""
    return replace(federation, clients=[each for each in federation.clients if _is_measurable(each, federation)])


def _is_measurable(client: Client, federation: Federation) -> bool:
    specs, base = client.adapter.specs, federation.base
    if base is None and any(isinstance(spec, FactorsSpec) and spec.magnitude for spec in specs.values()):
        return False
    return any(isinstance(spec, FactorsSpec) or (base and base.has(base_name(n, spec))) for n, spec in specs.items())


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


@dataclass(frozen=True)
class _Seen:
    """What was read; `found` is of those clients only whose updates are measured."""

    inputs: Accepted
    federation: Federation
    found: Gram
    spectra: Mapping[str, Mapping[str, Tensor]]
    hashes: Mapping[str, str]

    @cached_property
    def at(self) -> dict[str, int]:
        """Where each measured client stands in `found`."""
        return {client: index for index, client in enumerate(self.found.clients)}

    @property
    def whole(self) -> bool:
        """Whether every client is measured, so that their mean is."""
        return len(self.at) == len(self.federation.clients)

    def number(self, client: str, values: Sequence[float]) -> float | None:
        """A measured client's value."""
        return _rounded(values[self.at[client]]) if client in self.at else None

    def beside_mean(self, client: str, values: Sequence[float]) -> float | None:
        """The same of what depends on the mean."""
        return self.number(client, values) if self.whole else None


def _inspection(seen: _Seen, warnings: Sequence[str]) -> Inspection:
    found = seen.found
    return Inspection(
        clients=_inspected(seen),
        refused=seen.inputs.refused,
        left_out=seen.inputs.left_out,
        cosines=_cosines(seen),
        mean_norm=_rounded(float(found.norm_of(found.p))) if seen.whole else None,
        not_measured=_not_measured(seen),
        warnings=warnings,
    )


def _not_measured(seen: _Seen) -> list[str]:
    """What is not measured of some client."""
    without = [client.adapter.specs for client in seen.federation.clients if client.id not in seen.at]
    names = {*seen.federation.names} - {*seen.found.modules}
    return sorted(names.union(*without))


def _cosines(seen: _Seen) -> list[list[float | None]]:
    clients, rows = seen.inputs.clients, seen.found.cosines.tolist()
    nothing: list[float | None] = [None] * len(clients)
    return [[seen.number(other, rows[seen.at[c]]) for other in clients] if c in seen.at else nothing for c in clients]


def _inspected(seen: _Seen) -> list[Inspected]:
    stops = reasons_to_stop(seen.inputs, seen.federation, seen.hashes)
    flags = oddities(seen.inputs, seen.found, seen.hashes)
    norms, to_mean = seen.found.norms.tolist(), seen.found.cosines_to(seen.found.p).tolist()
    to_others, influence = seen.found.cosines_to_others, seen.found.influence.tolist()
    total = sum(client.n for client in seen.federation.clients)
    return [
        replace(
            _facts(client.id, seen),
            share=_rounded(client.n / total),
            norm=seen.number(client.id, norms),
            cosine_to_mean=seen.beside_mean(client.id, to_mean),
            cosine_to_others=seen.beside_mean(client.id, to_others),
            influence=seen.beside_mean(client.id, influence),
            stops=stops.get(client.id, []),
            flags=flags.get(client.id, []),
        )
        for client in seen.federation.clients
    ]


def _facts(client: str, seen: _Seen) -> Inspected:
    """What an adapter is by itself."""
    folder, ref = seen.inputs.clients[client], seen.inputs.refs[client]
    stated = folder.statement
    specs = [spec for spec in folder.specs.values() if isinstance(spec, FactorsSpec)]
    top, effective = summary(seen.spectra[client])
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
        sha256=seen.hashes[client],
        ranks=sorted({spec.r for spec in specs}),
        scalings=sorted({spec.scaling for spec in specs}),
        full_tensors=len(folder.specs) - len(specs),
        top_share=None if top is None else _rounded(top),
        effective_rank=None if effective is None else _rounded(effective),
        modules=dict(_modules(client, seen)),
    )


def _modules(client: str, seen: _Seen) -> Iterator[tuple[str, ModuleFacts]]:
    for name, spec in sorted(seen.inputs.clients[client].specs.items()):
        if isinstance(spec, FactorsSpec):
            squares = seen.found.modules.get(name)
            norm = None if squares is None else seen.number(client, squares.clamp(min=0).sqrt().tolist())
            yield name, ModuleFacts(spec.r, spec.scaling, norm, _top_share(seen.spectra[client].get(name)))


def _top_share(values: Tensor | None) -> float | None:
    if values is None:
        return None
    total = float(values.sum())
    return _rounded(float(values.amax(dim=1).sum()) / total) if total else 0.0


def _rounded(value: float) -> float:
    """Six digits: the last bits differ between machines."""
    return float(f"{value:.6g}")

"""What is odd about an adapter among others: why a merge would stop at it, and what is worth a look."""

from collections.abc import Iterable, Iterator, Mapping

from lora_merge.aggregation.gram import Gram
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import Description
from lora_merge.errors import RefusedError
from lora_merge.folding.global_adapter import clients_in
from lora_merge.intake import Accepted
from lora_merge.screening.measuring import copies, norms
from lora_merge.screening.stops import dominant, outliers
from lora_merge.screening.whole import judged

AWAY = -0.2  # a cosine below it is no coincidence between updates of so many numbers


def num_examples(client: Description) -> int | None:
    """The count that a client states, if any."""
    return client.statement.num_examples if client.statement else None


def counts_stated(inputs: Accepted) -> dict[str, float]:
    """The counts of those clients that state one."""
    counts = {client: num_examples(folder) for client, folder in inputs.clients.items()}
    return {client: float(count) for client, count in counts.items() if count is not None}


def reasons_to_stop(inputs: Accepted, federation: Federation, hashes: Mapping[str, str]) -> dict[str, list[str]]:
    """Why `aggregate` would stop, by client; counts are held against those of all who state one.

    Args:
        federation: of the clients, with the base that `aggregate` would read.
    """
    sizes = norms(inputs.sketched)
    whole = judged(federation, hashes, sizes)
    problems = [*outliers(sizes), *whole.problems, *dominant(counts_stated(inputs))]
    said = [(problem.client, f"{problem.field} {problem.reason}") for problem in problems]
    return _by_client([*_merged(inputs), *said])


def _merged(inputs: Accepted) -> Iterator[tuple[str, str]]:
    """Those that are no clients' adapters."""
    for client, folder in inputs.clients.items():
        try:
            count = clients_in(folder.folder, client)
        except RefusedError as error:
            yield from ((client, f"{problem.field} {problem.reason}") for problem in error.problems)
        else:
            yield from [] if count is None else [(client, f"is a merged adapter of {count} client{'s' * (count != 1)}")]


def oddities(inputs: Accepted, found: Gram, hashes: Mapping[str, str]) -> dict[str, list[str]]:
    """What else is odd, by client; `found` is of those whose update is measured."""
    same = ((copy.client, str(copy)) for copy in copies(inputs.sketched, hashes))
    others = "the others' mean" if len(found.clients) == len(inputs.clients) else "the mean of the others measured"
    return _by_client([*same, *_claims(inputs), *_away(found, others)])


def _claims(inputs: Accepted) -> Iterator[tuple[str, str]]:
    for client, folder in inputs.clients.items():
        ref = inputs.refs[client]
        if ref.commit and ref.source != client:
            yield client, f"comes from {ref.source}"
        if num_examples(folder) is None:
            yield client, "states no num_examples, so it has no weight of its own"


def _away(found: Gram, others: str) -> Iterator[tuple[str, str]]:
    for client, cosine in zip(found.clients, found.cosines_to_others, strict=True):
        if cosine < AWAY:
            yield client, f"points away from {others} (cosine {cosine:.2f})"


def _by_client(items: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for client, text in items:
        found.setdefault(client, []).append(text)
    return found

"""What a card says of a merge: who is in it, who is not, how far it is from the mean, and how to make it again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_merge.card.words import cell, sentence
from lora_merge.ledger import Contribution, Ledger

MAX_LINES = 40
MAX_CLIENTS = 100  # of the table: nobody reads a thousand rows, which a fold would write anew for each arrival


@dataclass(frozen=True)
class Place:
    """What is known of where a card will lie.

    Attributes:
        repo: the repository; None where it is not known yet.
        has_lock: `lora-merge.lock` lies beside it, so `lora-merge verify` can make it again.
        private_inputs: how many inputs lie in private repositories; None where that is not known.
    """

    repo: str | None = None
    has_lock: bool = False
    private_inputs: int | None = None


def merge_lines(ledger: Ledger) -> Iterator[str]:
    """How many were merged, how, and how far the result is from what was aimed at."""
    yield f"{len(ledger.contributions)} LoRA adapters that were fine-tuned apart, merged by `lora-merge aggregate`:"
    how = f"method `{cell(ledger.method)}`, weights by {sentence(ledger.weighting)}"
    yield f"{how}, global learning rate {ledger.global_lr:g}."
    yield ""
    yield from _robust(ledger)
    yield f"* Against {ledger.aim}: {ledger.certificate.sentence()}."
    if ledger.from_mean is not None:
        yield f"* That is {ledger.from_mean['relative_error']:.2%} away from the plain weighted mean."
    folded = ledger.parent and ledger.certificate.fedavg_would_miss is None  # a fold has not what that is measured on
    if ledger.method == "exact" and ledger.certificate.measured_by != "off" and not folded:
        yield f"* Averaging lora_A and lora_B apart would have missed it by: {ledger.certificate.gap_sentence()}."
    if ledger.ranks:
        yield f"* Rank: {_range(ledger.ranks)}."
    if ledger.parent:
        yield f"* Folded onto an earlier global adapter: {' at commit '.join(map(sentence, ledger.parent.split('@')))}."


def _robust(ledger: Ledger) -> Iterator[str]:
    """What a robust rule did, and to whom."""
    rule = ledger.options.get("robust")
    if ledger.clip_norm is not None:
        clipped = [
            f"{cell(c.client_id)} (to {c.clipped_to:.3g} of it)"
            for c in ledger.contributions
            if c.clipped_to is not None
        ]
        yield f"* Updates above the norm {ledger.clip_norm:.3g} were scaled down to it: {', '.join(clipped) or 'none'}."
    weighed = [(cell(c.client_id), c.merged_share) for c in ledger.contributions if c.merged_share is not None]
    if rule and weighed:
        kept = ", ".join(f"{client} ({share:.2%})" for client, share in weighed if share > 0)
        dropped = ", ".join(client for client, share in weighed if share == 0)
        yield f"* Weights by `{cell(str(rule))}`: {kept}. Dropped: {dropped or 'none'}."


def contribution_lines(ledger: Ledger) -> Iterator[str]:
    """The table of the clients, with the hash of each one\'s weights; of very many, of the first ones by id."""
    yield "| client | adapter | examples | share | sha256 of the weights |"
    yield "| --- | --- | ---: | ---: | --- |"
    for contribution in ledger.contributions[:MAX_CLIENTS]:
        examples = "not stated" if contribution.num_examples is None else str(contribution.num_examples)
        digest = contribution.sha256.get("adapter_model.safetensors", "")[:16]
        cells = (cell(contribution.client_id), origin(contribution), examples, f"{contribution.share:.4f}")
        yield f"| {' | '.join(cells)} | `{digest}…` |"
    if (more := len(ledger.contributions) - MAX_CLIENTS) > 0:
        yield ""
        yield f"And {more} more, in aggregation.json."


def screening_lines(ledger: Ledger) -> Iterator[str]:
    """Who was named and not merged, and what was merged although it stood out."""
    lines = [f"* Left out: {cell(each.source)}, since: {sentence(each.reason)}" for each in ledger.left_out]
    lines += [f"* Let in although it stood out: {sentence(line)}" for line in ledger.waved_through]
    yield from lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        yield f"* And {len(lines) - MAX_LINES} more, in aggregation.json."
    if lines:
        yield ""


def origin(contribution: Contribution) -> str:
    """`org/name@commit` where an adapter came from the Hub, else that it came from a folder."""
    return f"{cell(contribution.source)}@{contribution.commit[:12]}" if contribution.commit else "a folder"


def reproduction_lines(ledger: Ledger, place: Place) -> Iterator[str]:
    """The command that makes it again, and what it takes to run it."""
    yield "## Make it again"
    yield ""
    yield "```bash"
    yield from [f"lora-merge verify {place.repo or 'FOLDER'}"] if place.has_lock else [_command(ledger)]
    yield "```"
    yield ""
    folders = sum(contribution.commit is None for contribution in ledger.contributions)
    if folders:
        where = "above" if len(ledger.contributions) <= MAX_CLIENTS else "in aggregation.json"
        yield f"It takes {folders} of the {len(ledger.contributions)} adapters from folders: their hashes are {where}."
        yield ""
    if place.private_inputs:
        yield private_inputs(place.private_inputs, len(ledger.contributions))
        yield ""


def private_inputs(private: int, inputs: int) -> str:
    """What publishing a merge of private adapters means."""
    return f"In private repositories: {private} of the {inputs} adapters. Only who may read those can verify this."


def _command(ledger: Ledger) -> str:
    """The `aggregate` that made it, over the same adapters."""
    sources = [origin(contribution) for contribution in ledger.contributions]
    pinned = "FOLDERS…" if "a folder" in sources else " ".join(_pinned(entry) for entry in ledger.contributions)
    rank, energy = ledger.options.get("rank"), ledger.options.get("energy")
    words = [f"lora-merge aggregate {pinned} --method {cell(ledger.method)}"]
    words += [f"--rank {cell(str(rank))}"] if rank else []
    words += [f"--energy {energy}"] if rank == "auto" and isinstance(energy, float) else []
    for name in ("density", "clip", "robust", "byzantine", "trim"):
        words += [f"--{name} {cell(str(ledger.options[name]))}"] if ledger.options.get(name) is not None else []
    words += [f"--seed {seed}"] if isinstance(seed := ledger.options.get("seed"), int) and seed else []
    rule, _, cap = ledger.weighting.partition(", at most ")
    words += [f"--weights {'FILE' if rule == 'given' else cell(rule)}"]
    words += [f"--cap-examples {cell(cap.removesuffix(' each'))}"] if cap else []
    words += [f"--global-lr {ledger.global_lr:g}"] if ledger.global_lr != 1 else []
    words += [f"--dtype {cell(ledger.dtype)}"] if ledger.dtype != "fp32" else []
    return " ".join([*words, "--output global"])


def _pinned(contribution: Contribution) -> str:
    return f"{cell(contribution.source)}@{contribution.commit}"


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}, by module"

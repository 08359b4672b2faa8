"""The model card: the Hub's metadata, what the adapter is made of, and how to make it again.

`aggregate` writes it without knowing where it will be published; `push` writes it anew with the repository's name.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import one_line
from lora_merge.ledger import Contribution, Ledger
from lora_merge.statement import Statement

MAX_LINES = 40
TAGS = ("lora", "lora-merge", "federated-learning")

_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_MODEL = re.compile(f"{_NAME}(/{_NAME})?")  # some old ones have no owner


@dataclass(frozen=True)
class Result:
    """One model's held-out loss (nats a token) with its 95 % interval, and its perplexity."""

    name: str
    kind: str
    loss: float
    low: float
    high: float
    perplexity: float


@dataclass(frozen=True)
class Results:
    """What `lora-merge evaluate` measured: on which rows, of which models, and which of them the card is about."""

    data: str
    rows: int
    models: Sequence[Result]
    own: Result


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


def global_card(
    ledger: Ledger,
    *,
    task_type: str | None,
    base_is_local: bool,
    place: Place | None = None,
    results: Results | None = None,
) -> str:
    """README.md of a merged adapter. A base model whose name is a path, or cannot be the Hub's, is left out."""
    place = place or Place()
    base = None if base_is_local else ledger.base_model
    body = ["# Global adapter", "", *_merge(ledger), "", *_contributions(ledger), "", *_screening(ledger)]
    body += [*_use(base, place.repo), *_results(results), *_reproduction(ledger, place)]
    body += ["No averaging rule stops a backdoor whose update is as large as an honest one: evaluate what you use."]
    return _card(base, task_type, "lora-merge-global", place.repo, results, body)


def client_card(
    statement: Statement | None,
    *,
    base_model: str | None,
    task_type: str | None,
    repo: str,
    results: Results | None = None,
) -> str:
    """README.md of a client's adapter, from its `lora_merge.json`."""
    body = [f"# {_cell(statement.client_id if statement else repo)}", ""]
    body += ["A LoRA adapter, fine-tuned on rows that stay where they are.", "", *_statement(statement)]
    body += [*_use(base_model, repo), *_results(results)]
    return _card(base_model, task_type, "lora-merge-client", repo, results, body)


def completed_card(text: str, ours: str) -> str:
    """A card that somebody wrote, with what our metadata has and its own lacks; its text is left alone.

    Raises:
        ValueError: its metadata is not a mapping in YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData

    card: Any = ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    made: Any = ModelCard(ours)
    own, more = card.data.to_dict(), made.data.to_dict()
    merged = more | {key: value for key, value in own.items() if value}
    merged["tags"] = list(dict.fromkeys([*(own.get("tags") or []), *more["tags"]]))
    if "model-index" in more:
        merged["model-index"] = more["model-index"]
    return f"---\n{ModelCardData(**merged).to_yaml()}\n---\n{card.text}"


def _card(
    base: str | None, task_type: str | None, tag: str, repo: str | None, results: Results | None, body: Sequence[str]
) -> str:
    from huggingface_hub import ModelCardData

    named = base is not None and _MODEL.fullmatch(base)  # the Hub takes nothing else, and it may be a stranger's text
    data: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if named else {}
    data |= {"library_name": "peft", "tags": [*TAGS, tag]}
    if task_type == "CAUSAL_LM":
        data["pipeline_tag"] = "text-generation"
    if results:
        data |= {"model_name": (repo or "adapter").rpartition("/")[2], "eval_results": _eval_results(results)}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n".join(body).rstrip() + "\n"


def _eval_results(results: Results) -> list[Any]:
    from huggingface_hub import EvalResult

    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Held-out rows"}
    name = one_line(results.data)  # a line of its own could end the metadata
    data: dict[str, Any] = {"dataset_type": name, "dataset_name": name}
    metrics = (("loss", "Loss, nats a token", results.own.loss), ("perplexity", "Perplexity", results.own.perplexity))
    return [
        EvalResult(**task, **data, metric_type=kind, metric_name=name, metric_value=round(value, 6))
        for kind, name, value in metrics
    ]


def _merge(ledger: Ledger) -> Iterator[str]:
    yield f"{len(ledger.contributions)} LoRA adapters that were fine-tuned apart, merged by `lora-merge aggregate`:"
    how = f"method `{_cell(ledger.method)}`, weights by {_words(ledger.weighting)}"
    yield f"{how}, global learning rate {ledger.global_lr:g}."
    yield ""
    yield from _robust(ledger)
    yield f"* Against {ledger.aim}: {ledger.certificate.sentence()}."
    if ledger.from_mean is not None:
        yield f"* That is {ledger.from_mean['relative_error']:.2%} away from the plain weighted mean."
    if ledger.method == "exact" and ledger.certificate.measured_by != "off":
        yield f"* Averaging lora_A and lora_B apart would have missed it by: {ledger.certificate.gap_sentence()}."
    if ledger.ranks:
        yield f"* Rank: {_range(ledger.ranks)}."
    if ledger.parent:
        yield f"* Folded onto an earlier global adapter: {_cell(ledger.parent)}."


def _robust(ledger: Ledger) -> Iterator[str]:
    """What a robust rule did, and to whom."""
    rule = ledger.options.get("robust")
    if ledger.clip_norm is not None:
        clipped = [
            f"{_cell(c.client_id)} (to {c.clipped_to:.3g} of it)"
            for c in ledger.contributions
            if c.clipped_to is not None
        ]
        yield f"* Updates above the norm {ledger.clip_norm:.3g} were scaled down to it: {', '.join(clipped) or 'none'}."
    weighed = [(_cell(c.client_id), c.merged_share) for c in ledger.contributions if c.merged_share is not None]
    if rule and weighed:
        kept = ", ".join(f"{client} ({share:.2%})" for client, share in weighed if share > 0)
        dropped = ", ".join(client for client, share in weighed if share == 0)
        yield f"* Weights by `{_cell(str(rule))}`: {kept}. Dropped: {dropped or 'none'}."


def _contributions(ledger: Ledger) -> Iterator[str]:
    yield "| client | adapter | examples | share | sha256 of the weights |"
    yield "| --- | --- | ---: | ---: | --- |"
    for contribution in ledger.contributions:
        examples = "not stated" if contribution.num_examples is None else str(contribution.num_examples)
        digest = contribution.sha256.get("adapter_model.safetensors", "")[:16]
        cells = (_cell(contribution.client_id), origin(contribution), examples, f"{contribution.share:.4f}")
        yield f"| {' | '.join(cells)} | `{digest}…` |"


def _screening(ledger: Ledger) -> Iterator[str]:
    """Who was named and not merged, and what was merged although it stood out."""
    lines = [f"* Left out: {_cell(each.source)}, since: {_words(each.reason)}" for each in ledger.left_out]
    lines += [f"* Let in although it stood out: {_words(line)}" for line in ledger.waved_through]
    yield from lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        yield f"* And {len(lines) - MAX_LINES} more, in aggregation.json."
    if lines:
        yield ""


def origin(contribution: Contribution) -> str:
    """`org/name@commit` where an adapter came from the Hub, else that it came from a folder."""
    return f"{_cell(contribution.source)}@{contribution.commit[:12]}" if contribution.commit else "a folder"


def _statement(statement: Statement | None) -> Iterator[str]:
    if statement is None:
        return
    base = statement.base_model
    yield "| | |"
    yield "| --- | --- |"
    if base.repo:
        yield f"| base model | {_cell(base.repo)}{f'@{base.commit[:12]}' if base.commit else ''} |"
    if base.weights_sha256:
        yield f"| its weights | `{base.weights_sha256[:16]}…` |"
    if statement.recipe:
        yield f"| recipe | {_cell(statement.recipe.name)}, digest `{statement.recipe.digest[:12]}` |"
        for key, value in statement.recipe.overrides.items():
            yield f"| set otherwise | {_cell(key)} = {_cell(str(value))} |"
    counts = (("examples", statement.num_examples), ("epochs", statement.local_epochs), ("steps", statement.steps))
    for name, number in counts:
        if number is not None:
            yield f"| {name} | {number:g} |" if isinstance(number, float) else f"| {name} | {number} |"
    yield ""


def _use(base: str | None, repo: str | None) -> Iterator[str]:
    if base and repo and all(map(_REPOSITORY.fullmatch, (base, repo))):
        yield "```python"
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM"
        yield ""
        yield f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")'
        yield "```"
        yield ""


def _results(results: Results | None) -> Iterator[str]:
    if results is None:
        return
    yield f"## On {results.rows} held-out rows of {_cell(results.data)}"
    yield ""
    yield "| model | loss, nats a token (95 % interval) | perplexity |"
    yield "| --- | ---: | ---: |"
    for result in results.models:
        loss = f"{result.loss:.3f} ({result.low:.3f} to {result.high:.3f})"
        name = f"**{_cell(result.name)}**" if result is results.own else _cell(result.name)
        yield f"| {name} | {loss} | {result.perplexity:.2f} |"
    yield ""


def _reproduction(ledger: Ledger, place: Place) -> Iterator[str]:
    yield "## Make it again"
    yield ""
    yield "```bash"
    yield from [f"lora-merge verify {place.repo or 'FOLDER'}"] if place.has_lock else [_command(ledger)]
    yield "```"
    yield ""
    folders = sum(origin(contribution) == "a folder" for contribution in ledger.contributions)
    if folders:
        yield f"It takes {folders} of the {len(ledger.contributions)} adapters from folders: their hashes are above."
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
    words = [f"lora-merge aggregate {pinned} --method {_cell(ledger.method)}"]
    words += [f"--rank {_cell(str(rank))}"] if rank else []
    words += [f"--energy {energy}"] if rank == "auto" and isinstance(energy, float) else []
    for name in ("density", "clip", "robust", "byzantine", "trim"):
        words += [f"--{name} {_cell(str(ledger.options[name]))}"] if ledger.options.get(name) is not None else []
    words += [f"--seed {seed}"] if isinstance(seed := ledger.options.get("seed"), int) and seed else []
    rule, _, cap = ledger.weighting.partition(", at most ")
    words += [f"--weights {'FILE' if rule == 'given' else _cell(rule)}"]
    words += [f"--cap-examples {_cell(cap.removesuffix(' each'))}"] if cap else []
    words += [f"--global-lr {ledger.global_lr:g}"] if ledger.global_lr != 1 else []
    words += [f"--dtype {_cell(ledger.dtype)}"] if ledger.dtype != "fp32" else []
    return " ".join([*words, "--output global"])


def _pinned(contribution: Contribution) -> str:
    return f"{_cell(contribution.source)}@{contribution.commit}"


def _cell(text: str) -> str:
    """A stranger's text in a Markdown table: a folder's name may hold anything, so only plain letters go through."""
    return "".join(char if char.isalnum() or char in "._-/" else "�" for char in text[:200])


def _words(text: str) -> str:
    """A sentence with a stranger's words in it: letters, digits and points, but no markup and no address."""
    plain = "".join(char if char.isalnum() or char in " ._-/,:;()%'" else "�" for char in text[:500])
    return plain.replace("://", "�")


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}, by module"

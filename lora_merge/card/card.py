"""The model card: the Hub's metadata, what the adapter is made of, and how to make it again.

`aggregate` writes it without knowing where it will be published; `push` writes it anew with the repository's name.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.card.merged import Place, contribution_lines, merge_lines, reproduction_lines, screening_lines
from lora_merge.card.words import cell
from lora_merge.errors import one_line
from lora_merge.ledger import Ledger
from lora_merge.statement import Statement

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
    body = ["# Global adapter", "", *merge_lines(ledger), "", *contribution_lines(ledger), "", *screening_lines(ledger)]
    body += [*_use(base, place.repo), *_results(results), *reproduction_lines(ledger, place)]
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
    body = [f"# {cell(statement.client_id if statement else repo)}", ""]
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


def _statement(statement: Statement | None) -> Iterator[str]:
    if statement is None:
        return
    base = statement.base_model
    yield "| | |"
    yield "| --- | --- |"
    if base.repo:
        yield f"| base model | {cell(base.repo)}{f'@{base.commit[:12]}' if base.commit else ''} |"
    if base.weights_sha256:
        yield f"| its weights | `{base.weights_sha256[:16]}…` |"
    if statement.recipe:
        yield f"| recipe | {cell(statement.recipe.name)}, digest `{statement.recipe.digest[:12]}` |"
        for key, value in statement.recipe.overrides.items():
            yield f"| set otherwise | {cell(key)} = {cell(str(value))} |"
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
    yield f"## On {results.rows} held-out rows of {cell(results.data)}"
    yield ""
    yield "| model | loss, nats a token (95 % interval) | perplexity |"
    yield "| --- | ---: | ---: |"
    for result in results.models:
        loss = f"{result.loss:.3f} ({result.low:.3f} to {result.high:.3f})"
        name = f"**{cell(result.name)}**" if result is results.own else cell(result.name)
        yield f"| {name} | {loss} | {result.perplexity:.2f} |"
    yield ""

"""The model card of a merged adapter, from its ledger."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lora_merge.ledger import Contribution, Ledger


def card(ledger: Ledger, *, task_type: str | None, base_is_local: bool) -> str:
    """README.md: the Hub's metadata, what was merged, and how exact it is."""
    front = yaml.safe_dump(_metadata(ledger, task_type, base_is_local), sort_keys=False)
    return f"---\n{front}---\n\n" + "\n".join(_body(ledger)) + "\n"


def _metadata(ledger: Ledger, task_type: str | None, base_is_local: bool) -> Mapping[str, Any]:
    metadata: dict[str, Any] = {}
    if ledger.base_model and not base_is_local:
        metadata |= {"base_model": ledger.base_model, "base_model_relation": "adapter"}
    metadata |= {"library_name": "peft", "tags": ["lora", "lora-merge", "federated-learning"]}
    if task_type == "CAUSAL_LM":
        metadata["pipeline_tag"] = "text-generation"
    return metadata


def _body(ledger: Ledger) -> Iterator[str]:
    yield "# Global adapter"
    yield ""
    yield f"{len(ledger.contributions)} LoRA adapters that were fine-tuned apart, merged by `lora-merge aggregate`:"
    yield f"method `{ledger.method}`, weights by {ledger.weighting}, global learning rate {ledger.global_lr:g}."
    yield ""
    yield f"* Against the weighted mean of the clients' updates: {ledger.certificate.sentence()}."
    if ledger.method == "exact" and ledger.certificate.measured_by != "off":
        yield f"* Averaging lora_A and lora_B apart would have missed it by: {ledger.certificate.gap_sentence()}."
    if ledger.ranks:
        yield f"* Rank: {_range(ledger.ranks)}."
    yield ""
    yield "| client | examples | share | sha256 of the weights |"
    yield "| --- | ---: | ---: | --- |"
    yield from (_row(contribution) for contribution in ledger.contributions)
    yield ""
    yield "No averaging rule stops a backdoor whose update is as large as an honest one: evaluate what you use."


def _row(contribution: Contribution) -> str:
    examples = "not stated" if contribution.num_examples is None else str(contribution.num_examples)
    digest = contribution.sha256["adapter_model.safetensors"]
    return f"| {_cell(contribution.client_id)} | {examples} | {contribution.share:.4f} | `{digest[:16]}…` |"


def _cell(text: str) -> str:
    """A client's name in a Markdown table: a folder's name may hold anything, so only plain letters go through."""
    return "".join(char if char.isalnum() or char in "._-/" else "�" for char in text)


def _range(ranks: tuple[int, ...] | Any) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}, by module"

"""What every model is measured on: held-out rows as tokens, in the prompt form that the adapters were trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import UsageError
from lora_merge.evaluation.answers import answer_tokens
from lora_merge.evaluation.models import record_in
from lora_merge.training.data import Encoded, Row, encode


@dataclass(frozen=True)
class HeldOut:
    """Rows as tokens; `left_out` counts those whose prompt alone was too long, `cut` those that lost their end."""

    examples: Sequence[Encoded]
    left_out: int
    prompt_form: str

    @property
    def cut(self) -> int:
        return sum(example.is_cut for example in self.examples)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(n): the answer tokens of each example."""
        return answer_tokens(self.examples)


def held_out_of(
    rows: Sequence[Row], tokenizer: Any, prompt_form: str, max_length: int, limit: int | None, seed: int
) -> HeldOut:
    """Rows as tokens, `limit` of them drawn by `seed` where it is given.

    Raises:
        UsageError: no row keeps a token of its answer within `max_length`.
    """
    encoded = [encode(row, tokenizer, prompt_form, max_length) for row in rows]
    examples = [example for example in encoded if example]
    if not examples:
        raise UsageError(f"No row keeps a token of its answer within {max_length} tokens.", hint="--max-length")
    left_out = len(encoded) - len(examples)
    if limit is not None and limit < len(examples):
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:limit]
        examples = [examples[index] for index in sorted(chosen.tolist())]
    return HeldOut(examples, left_out, prompt_form)


def stated_prompt_form(adapters: Sequence[PeftFolder]) -> str:
    """The prompt form that the clients state, or those that were merged; plain where none does.

    Raises:
        UsageError: different forms are stated.
        RefusedError: a global adapter's record is malformed.
    """
    forms = {form for adapter in adapters for form in _prompt_forms(adapter)}
    if len(forms) > 1:
        raise UsageError(
            f"The adapters were trained on different prompt forms: {', '.join(sorted(forms))}.",
            hint="--prompt-form measures all of them on one.",
        )
    return forms.pop() if forms else "plain"


def _prompt_forms(adapter: PeftFolder) -> Iterator[str]:
    if adapter.statement and adapter.statement.recipe and adapter.statement.recipe.prompt_form:
        yield adapter.statement.recipe.prompt_form
    if record := record_in(adapter.folder):
        recipes = [contribution.recipe or {} for contribution in record.contributions]
        yield from (str(recipe["prompt_form"]) for recipe in recipes if recipe.get("prompt_form"))

"""One model after another on the same held-out rows, the base loaded once: how good a global adapter is as it grows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.environment import device_named
from lora_merge.errors import UsageError
from lora_merge.evaluation.answers import answer_nll
from lora_merge.evaluation.comparison import Question, longest_row
from lora_merge.evaluation.held_out import HeldOut, held_out_of, stated_prompt_form
from lora_merge.evaluation.intervals import Estimate, bootstrap
from lora_merge.evaluation.models import attach, load_base, open_adapters
from lora_merge.sources.base_models import find_model
from lora_merge.sources.reference import Progress
from lora_merge.training.base_model import load_tokenizer
from lora_merge.training.data import read_rows


@dataclass(frozen=True)
class Measured:
    """A model's loss (nats a token of the answers), with its 95 % interval over rows."""

    loss: Estimate
    rows: int
    answer_tokens: int


class Meter:
    """Measures models by one question: its rows are read at once, its base when the first adapter comes.

    Where the question names no base, that is the one that the first adapter belongs to.

    Raises:
        NotFoundError, RefusedError, UsageError: the rows or the device are not there, or are refused.
    """

    def __init__(self, question: Question, tell: Callable[[str], None], progress: Progress) -> None:
        self.question, self._tell, self._progress = question, tell, progress
        self._device = device_named(question.device)
        self._rows = read_rows(question.data)
        self._loaded: tuple[Any, Any, HeldOut] | None = None

    def __call__(self, adapter: str | Path, name: str) -> Measured:
        """The base with an adapter, a folder or a repository at a commit, on it.

        Raises:
            NetworkError, NotFoundError: the adapter or the base cannot be had.
            RefusedError: it does not fit the base.
            UsageError: nobody names a base.
        """
        with open_adapters([adapter], tell=self._tell, max_wait=self.question.max_wait) as [opened]:
            base, _, _ = self._ready(opened.adapter)
            return self._measured(attach(base, opened.adapter), name)

    def base_alone(self) -> Measured:
        """The base without any adapter, after one was measured."""
        assert self._loaded is not None
        return self._measured(self._loaded[0], "base")

    def _ready(self, adapter: PeftFolder) -> tuple[Any, Any, HeldOut]:
        if self._loaded is None:
            question = self.question
            name = question.base or adapter.config.base_model
            if not name:
                raise UsageError("The adapter names no base model to measure it on.", hint="--base MODEL")
            found = find_model(name, self._tell, max_wait=question.max_wait)
            tokenizer = load_tokenizer(found)
            base = load_base(found, question.dtype, self._device)
            form = question.prompt_form or stated_prompt_form([adapter])
            longest = longest_row(base, question)
            held_out = held_out_of(self._rows, tokenizer, form, longest, question.limit, question.seed)
            self._loaded = base, tokenizer, held_out
        return self._loaded

    def _measured(self, model: Any, name: str) -> Measured:
        assert self._loaded is not None
        _, tokenizer, held_out = self._loaded
        rows = len(held_out.examples)
        with (
            pool(None if self._device.type == "cpu" else 1) as threads,
            self._progress(f"Evaluating {name}", rows, "rows") as advance,
        ):
            nll = answer_nll(
                model,
                held_out.examples,
                threads=threads,
                batch_size=self.question.batch_size,
                pad_token_id=tokenizer.pad_token_id,
                advance=advance,
            )
        losses = bootstrap(nll[None], held_out.tokens, self.question.seed)
        return Measured(losses.of(torch.ones(1, dtype=torch.float64)), rows, int(held_out.tokens.sum()))

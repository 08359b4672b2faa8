"""The corridor of `evaluate`: rows, base, adapters one by one, then losses, gains and answers of all of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.environment import device_named
from lora_merge.errors import Problem, RefusedError, UsageError
from lora_merge.evaluation.answers import answer_nll, greedy_answer, prompt_ids
from lora_merge.evaluation.belonging import require_belonging
from lora_merge.evaluation.held_out import HeldOut, held_out_of, stated_prompt_form
from lora_merge.evaluation.intervals import Estimate, Losses, bootstrap
from lora_merge.evaluation.models import Opened, attach, is_global, load_base, open_adapters
from lora_merge.hub.waiting import MAX_WAIT
from lora_merge.sources.base_models import find_model
from lora_merge.sources.listing import Listing
from lora_merge.training.base_model import load_tokenizer, positions
from lora_merge.training.data import read_rows

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Question:
    """What is asked of every model.

    Attributes:
        base: the base model: a folder, or a repository id.
        adapters: folders, repositories and patterns of them, as `aggregate` takes them; of clients and merged ones.
        data: the held-out rows: JSON lines, or what `datasets` can read.
        prompts: texts that each model answers.
        prompt_form: plain, alpaca or chat; None is the one that the adapters state, or plain.
        max_length: tokens of a row, prompt and answer together.
        limit: measure on so many rows, drawn by `seed`; None is all.
        batch_size: rows in one forward pass.
        max_new_tokens: of an answer to a prompt.
        dtype: of the base's weights: fp32 or bf16. The adapters are fp32.
        device: auto, cpu, cuda or cuda:N.
        seed: of the bootstrap, and of `limit`.
        max_wait: seconds that all waits for a busy Hub may take together.
    """

    base: str
    adapters: tuple[str | Path, ...]
    data: str
    prompts: tuple[str, ...] = ()
    prompt_form: str | None = None
    max_length: int = 512
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    dtype: str = "fp32"
    device: str = "auto"
    seed: int = 0
    max_wait: float = MAX_WAIT


@dataclass(frozen=True)
class Score:
    """One model's held-out loss (nats a token of the answers), and how much lower it is than the base's.

    Attributes:
        kind: base, local, global, or "mean of locals" (of their losses, not a model).
        gain_over_locals: of a global model: how much lower its loss is than the mean local's.
    """

    name: str
    kind: str
    loss: Estimate
    gain_over_base: Estimate | None = None
    gain_over_locals: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `answers` has, for each prompt, one answer a model, in the order of the models."""

    scores: tuple[Score, ...]
    rows: int
    rows_left_out: int
    rows_cut: int
    answer_tokens: int
    prompt_form: str
    device: str
    prompts: tuple[str, ...]
    models: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]


def compare(
    question: Question,
    *,
    progress: Progress,
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    listed: Listing | None = None,
) -> Comparison:
    """Measure the base and each adapter on the same held-out rows, and have each answer the prompts.

    Args:
        listed: what the Hub has said is there of the base, where it was asked already.

    Raises:
        NotFoundError: the data, the base or an adapter folder is not there.
        RefusedError: rows or adapters were refused, all of them named; or adapters do not fit the base.
        NetworkError: the base is not in the cache, and the Hub cannot be reached.
        UsageError: no row or prompt is short enough, or there is no such device.
    """
    device = device_named(question.device)
    rows = read_rows(question.data)
    with open_adapters(question.adapters, tell=tell, max_wait=question.max_wait) as opened:
        adapters = [each.adapter for each in opened]
        found = find_model(question.base, tell, max_wait=question.max_wait, listed=listed)
        require_belonging(found, adapters, warn)
        tokenizer = load_tokenizer(found)
        form = question.prompt_form or stated_prompt_form(adapters)
        base = load_base(found, question.dtype, device)
        held_out = held_out_of(rows, tokenizer, form, longest_row(base, question), question.limit, question.seed)
        _require_room(question, tokenizer, form, positions(base))
        tell(f"Prompt form {form}; {len(held_out.examples)} rows, {held_out.tokens.sum()} answer tokens")
        names, kinds = ("base", *_names(opened)), ("base", *map(_kind, adapters))
        with pool(None if device.type == "cpu" else 1) as threads:
            measure = _Measure(question, held_out, tokenizer, threads, progress, tell)
            measured = [measure(base, names[0])]
            measured += [
                measure(attach(base, adapter), name) for adapter, name in zip(adapters, names[1:], strict=True)
            ]
    losses = bootstrap(torch.stack([nll for nll, _ in measured]), held_out.tokens, question.seed)
    return Comparison(
        scores=tuple(scores_of(names, kinds, losses)),
        rows=len(held_out.examples),
        rows_left_out=held_out.left_out,
        rows_cut=held_out.cut,
        answer_tokens=int(held_out.tokens.sum()),
        prompt_form=form,
        device=str(device),
        prompts=question.prompts,
        models=names,
        answers=tuple(zip(*(answers for _, answers in measured), strict=True)),
    )


@dataclass(frozen=True)
class _Measure:
    """What is done with each model: its losses on the held-out rows, and its answers to the prompts."""

    question: Question
    held_out: HeldOut
    tokenizer: Any
    threads: ThreadPoolExecutor
    progress: Progress
    tell: Callable[[str], None]

    def __call__(self, model: Any, name: str) -> tuple[torch.Tensor, list[str]]:
        answers = [self.threads.submit(self._answer, model, prompt) for prompt in self.question.prompts]
        with self.progress(name, len(self.held_out.examples)) as advance:
            nll = answer_nll(
                model,
                self.held_out.examples,
                threads=self.threads,
                batch_size=self.question.batch_size,
                pad_token_id=self.tokenizer.pad_token_id,
                advance=advance,
            )
        if wrong := int((~torch.isfinite(nll)).sum()):
            reason = (
                f"is no number on {wrong} of {len(nll)} rows: what the model computes there is beyond its float type"
            )
            raise RefusedError(
                [Problem(name, "loss", reason)], hint="Leave it out, and look at it with lora-merge check."
            )
        self.tell(f"{name}: loss {nll.sum() / self.held_out.tokens.sum():.3f}")
        return nll, [answer.result() for answer in answers]

    def _answer(self, model: Any, prompt: str) -> str:
        form, most = self.held_out.prompt_form, self.question.max_new_tokens
        return greedy_answer(model, self.tokenizer, prompt, prompt_form=form, max_new_tokens=most)


def scores_of(names: Sequence[str], kinds: Sequence[str], losses: Losses) -> list[Score]:
    """A score for each model, the first being the base; then, with two locals or more, the mean of the locals."""
    unit = torch.eye(len(names), dtype=torch.float64)
    base = unit[0]
    local = torch.tensor([kind == "local" for kind in kinds], dtype=torch.float64)
    mean_local = local / local.sum() if local.any() else None
    scores = []
    for name, kind, model in zip(names, kinds, unit, strict=True):
        gain = losses.of(base - model) if kind != "base" else None
        over = losses.of(mean_local - model) if kind == "global" and mean_local is not None else None
        scores.append(Score(name, kind, losses.of(model), gain, over))
    if mean_local is not None and local.sum() > 1:
        mean = Score("mean of locals", "mean of locals", losses.of(mean_local), losses.of(base - mean_local))
        scores.insert(1 + max(index for index, kind in enumerate(kinds) if kind == "local"), mean)
    return scores


def _kind(adapter: PeftFolder) -> str:
    return "global" if is_global(adapter.folder) else "local"


def _names(opened: Sequence[Opened]) -> list[str]:
    """What each is called; where two are called the same, where they lie."""
    names = [each.name for each in opened]
    return [name if names.count(name) == 1 else each.place for name, each in zip(names, opened, strict=True)]


def longest_row(base: Any, question: Question) -> int:
    """`max_length`, but never more than the model reads."""
    return min(question.max_length, positions(base) or question.max_length)


def _require_room(question: Question, tokenizer: Any, prompt_form: str, most: int | None) -> None:
    """Raise `UsageError` where the model cannot answer a prompt: before it is measured, which takes long."""
    for prompt in question.prompts:
        asked = len(prompt_ids(tokenizer, prompt, prompt_form))
        if not asked:
            raise UsageError("--prompt holds nothing to answer.")
        if most is not None and asked + question.max_new_tokens > most:
            shown = f"{prompt[:40]}…" if len(prompt) > 40 else prompt
            raise UsageError(
                f"--prompt {shown!r} has {asked} tokens, and with {question.max_new_tokens} of an answer that is more "
                f"than the {most} that the model reads.",
                hint=f"--max-new-tokens {most - asked}" if asked < most else "Ask a shorter one.",
            )

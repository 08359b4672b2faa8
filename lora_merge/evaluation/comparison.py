"""The corridor of `evaluate`: rows, base, adapters one by one, then losses, gains and answers of all of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.checkpoint.safetensors_file import FileRefused, parse_json
from lora_merge.errors import Problem, RefusedError, UsageError
from lora_merge.evaluation.answers import answer_nll, answer_tokens, greedy_answer
from lora_merge.evaluation.intervals import Estimate, Losses, bootstrap
from lora_merge.evaluation.models import attach, find_model, is_global, load_base, open_adapter, pick_device
from lora_merge.ledger import FILE_NAME as LEDGER_NAME
from lora_merge.ledger import Ledger, LedgerError
from lora_merge.training.base_model import FoundBase, load_tokenizer, weights_sha256
from lora_merge.training.data import Encoded, encode, read_rows

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Question:
    """What is asked of every model.

    Attributes:
        base: the base model: a folder, or a repository id.
        adapters: adapter folders, of clients and merged ones.
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
    """

    base: str
    adapters: tuple[Path, ...]
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
    answer_tokens: int
    prompt_form: str
    device: str
    prompts: tuple[str, ...]
    models: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]


def compare(
    question: Question, *, progress: Progress, tell: Callable[[str], None], warn: Callable[[str], None]
) -> Comparison:
    """Measure the base and each adapter on the same held-out rows, and have each answer the prompts.

    Raises:
        NotFoundError: the data, the base or an adapter folder is not there.
        RefusedError: rows or adapters were refused, all of them named.
        NetworkError: the base is not in the cache, and the Hub cannot be reached.
        UsageError: no row is short enough, or there is no such device.
    """
    device = pick_device(question.device)
    rows = read_rows(question.data)
    adapters = [open_adapter(folder) for folder in question.adapters]
    found = find_model(question.base, tell)
    _warn_of_other_bases(found, adapters, warn)
    tokenizer = load_tokenizer(found)
    form = question.prompt_form or stated_prompt_form(adapters)
    base = load_base(found, question.dtype, device)
    longest = min(question.max_length, getattr(base.config, "max_position_embeddings", None) or question.max_length)
    encoded = [encode(row, tokenizer, form, longest) for row in rows]
    examples = _drawn([example for example in encoded if example], question)
    tell(f"Prompt form {form}; {len(examples)} rows, {int(answer_tokens(examples).sum())} answer tokens")

    names, kinds = ("base", *_names(adapters)), ("base", *map(_kind, question.adapters))
    nll, answers = [], []
    with pool(None if device.type == "cpu" else 1) as threads:
        for name, adapter in zip(names, (None, *adapters), strict=True):
            model = attach(base, adapter) if adapter else base
            said = [threads.submit(_answer, model, tokenizer, prompt, form, question) for prompt in question.prompts]
            with progress(name, len(examples)) as advance:
                nll.append(_nll(model, examples, tokenizer, threads, question.batch_size, advance))
            answers.append([answer.result() for answer in said])
            tell(f"{name}: loss {nll[-1].sum() / answer_tokens(examples).sum():.3f}")
    losses = bootstrap(torch.stack(nll), answer_tokens(examples), question.seed)
    return Comparison(
        scores=tuple(scores_of(names, kinds, losses)),
        rows=len(examples),
        rows_left_out=sum(example is None for example in encoded),
        answer_tokens=int(answer_tokens(examples).sum()),
        prompt_form=form,
        device=str(device),
        prompts=question.prompts,
        models=names,
        answers=tuple(zip(*answers, strict=True)),
    )


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
    if is_global(adapter.folder):
        recipes = [contribution.recipe or {} for contribution in _ledger(adapter.folder).contributions]
        yield from (str(recipe["prompt_form"]) for recipe in recipes if recipe.get("prompt_form"))


def _ledger(folder: Path) -> Ledger:
    try:
        return Ledger.from_json(parse_json((folder / LEDGER_NAME).read_bytes(), LEDGER_NAME))
    except (FileRefused, LedgerError) as error:
        raise RefusedError([Problem(str(folder), f"{LEDGER_NAME}, {error.field}", error.reason)]) from error


def _drawn(examples: list[Encoded], question: Question) -> list[Encoded]:
    if not examples:
        raise UsageError(f"No row of {question.data} keeps a token of its answer within {question.max_length} tokens.")
    if question.limit is None or question.limit >= len(examples):
        return examples
    generator = torch.Generator().manual_seed(question.seed)
    chosen = torch.randperm(len(examples), generator=generator)[: question.limit]
    return [examples[index] for index in sorted(chosen.tolist())]


def _kind(folder: Path) -> str:
    return "global" if is_global(folder) else "local"


def _names(adapters: Sequence[PeftFolder]) -> list[str]:
    """What each client says that it is called, else its folder's name; the whole path where two are the same."""
    names = [adapter.statement.client_id if adapter.statement else adapter.folder.name for adapter in adapters]
    return [
        name if names.count(name) == 1 else str(adapter.folder) for name, adapter in zip(names, adapters, strict=True)
    ]


def _nll(
    model: Any,
    examples: Sequence[Encoded],
    tokenizer: Any,
    threads: ThreadPoolExecutor,
    batch_size: int,
    advance: Callable[[int], None],
) -> torch.Tensor:
    pad = tokenizer.pad_token_id
    return answer_nll(model, examples, threads=threads, batch_size=batch_size, pad_token_id=pad, advance=advance)


def _answer(model: Any, tokenizer: Any, prompt: str, form: str, question: Question) -> str:
    return greedy_answer(model, tokenizer, prompt, prompt_form=form, max_new_tokens=question.max_new_tokens)


def _warn_of_other_bases(found: FoundBase, adapters: Sequence[PeftFolder], warn: Callable[[str], None]) -> None:
    stated = {
        adapter.folder: adapter.statement.base_model.weights_sha256
        for adapter in adapters
        if adapter.statement and adapter.statement.base_model.weights_sha256
    }
    here = weights_sha256(found.folder) if stated else None
    if others := [str(folder) for folder, digest in stated.items() if digest != here]:
        warn(f"{', '.join(others)}: trained on other base weights than those of {found.folder}.")

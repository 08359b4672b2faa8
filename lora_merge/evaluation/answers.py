"""What a model makes of held-out rows: how likely it finds their answers, and what it answers itself."""

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.training.data import IGNORED, Encoded, Row, render


def answer_tokens(examples: Sequence[Encoded]) -> Tensor:
    """(n): how many tokens of each example are answer, and so are predicted."""
    return torch.tensor([sum(label != IGNORED for label in example.labels[1:]) for example in examples])


def answer_nll(
    model: Any,
    examples: Sequence[Encoded],
    *,
    threads: ThreadPoolExecutor,
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[int], None],
) -> Tensor:
    """(n) fp64: the negative log-likelihood of each example's answer, summed over its tokens, in nats.

    Args:
        threads: each computes whole batches, single-threaded, so the numbers do not depend on how many there are.
        batch_size: examples in one forward pass; those of like length go together.
        advance: is told the number of examples after each pass.
    """
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    futures = [
        threads.submit(_batch_nll, model, [examples[index] for index in batch], pad_token_id) for batch in batches
    ]
    nll = torch.zeros(len(examples), dtype=torch.float64)
    for batch, future in zip(batches, futures, strict=True):
        nll[batch] = future.result()
        advance(len(batch))
    return nll


@torch.inference_mode()
def _batch_nll(model: Any, examples: Sequence[Encoded], pad_token_id: int) -> Tensor:
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_token_id)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        ids[index, :length] = torch.tensor(example.input_ids)
        labels[index, :length] = torch.tensor(example.labels)
        mask[index, :length] = 1
    row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # the logits at a place predict the token after it
    first = int(place.min())
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if _can_skip_logits(model):  # of the prompts: a fifth of the work of a small model, most of the memory of any
        logits = model(**inputs, logits_to_keep=longest - first).logits  # (rows, longest - first, V)
    else:
        logits = model(**inputs).logits[:, first:]
    target = labels[row, place + 1].to(logits.device)
    losses = functional.cross_entropy(logits[row, place - first].float(), target, reduction="none")
    return torch.zeros(len(examples), dtype=torch.float64).index_add(0, row, losses.double().cpu())


def _can_skip_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def prompt_ids(tokenizer: Any, prompt: str, prompt_form: str) -> list[int]:
    """The tokens that a model is asked by."""
    text, _ = render(Row(prompt, ""), tokenizer, prompt_form)
    return list(tokenizer(text, add_special_tokens=prompt_form != "chat").input_ids)


@torch.inference_mode()
def greedy_answer(model: Any, tokenizer: Any, prompt: str, *, prompt_form: str, max_new_tokens: int) -> str:
    """What `model` answers to `prompt`, taking the likeliest token each time."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt_ids(tokenizer, prompt, prompt_form)], device=model.device)
    plan = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plan)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

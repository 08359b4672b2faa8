"""What a model makes of held-out rows: how likely it finds their answers, and what it answers itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.training.data import IGNORED, Encoded, Row, render


def answer_tokens(examples: Sequence[Encoded]) -> Tensor:
    """(n): how many tokens of each example are answer, and so are predicted."""
    return torch.tensor([sum(label != IGNORED for label in example.labels[1:]) for example in examples])


@torch.inference_mode()
def answer_nll(
    model: Any, examples: Sequence[Encoded], *, batch_size: int, pad_token_id: int, advance: Callable[[int], None]
) -> Tensor:
    """(n) fp64: the negative log-likelihood of each example's answer, summed over its tokens, in nats.

    Args:
        batch_size: examples in one forward pass; those of like length go together.
        advance: is told the number of examples after each pass.
    """
    nll = torch.zeros(len(examples), dtype=torch.float64)
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        nll[rows] = _batch_nll(model, [examples[row] for row in rows], pad_token_id)
        advance(len(rows))
    return nll


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
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits  # (rows, longest, V)
    row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # the logits at a place predict the token after it
    losses = functional.cross_entropy(
        logits[row, place].float(), labels[row, place + 1].to(logits.device), reduction="none"
    )
    return torch.zeros(len(examples), dtype=torch.float64).index_add(0, row, losses.double().cpu())


@torch.inference_mode()
def greedy_answer(model: Any, tokenizer: Any, prompt: str, *, prompt_form: str, max_new_tokens: int) -> str:
    """What `model` answers to `prompt`, taking the likeliest token each time."""
    from transformers import GenerationConfig

    text, _ = render(Row(prompt, ""), tokenizer, prompt_form)
    ids = tokenizer(text, add_special_tokens=prompt_form != "chat", return_tensors="pt").input_ids.to(model.device)
    plan = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plan)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

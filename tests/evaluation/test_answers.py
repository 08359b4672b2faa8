"""The loss is the model's own on the answer tokens, however the rows are batched; answers are the likeliest tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_merge.aggregation.schedule import pool
from lora_merge.evaluation.answers import answer_nll, answer_tokens, greedy_answer
from lora_merge.training.data import IGNORED, Encoded
from tests.training.conftest import byte_tokenizer

EXAMPLES = [
    Encoded([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]),
    Encoded([1, 2, 3], [IGNORED, IGNORED, 3]),
    Encoded([9, 8, 7, 6, 5, 4, 3, 2], [IGNORED, 8, 7, 6, 5, 4, 3, 2]),
]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


def nll(model: Any, batch_size: int, workers: int = 1, advance: Callable[[int], None] = lambda rows: None) -> Tensor:
    with pool(workers) as threads:
        return answer_nll(model, EXAMPLES, threads=threads, batch_size=batch_size, pad_token_id=0, advance=advance)


def test_the_loss_is_the_models_own_loss_on_the_answer(model: Any) -> None:
    counts = answer_tokens(EXAMPLES)
    assert counts.tolist() == [3, 1, 7]
    for example, total, count in zip(EXAMPLES, nll(model, 1), counts, strict=True):
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        assert abs(float(total) - float(own) * int(count)) < 1e-4


def test_padding_and_batching_change_nothing(model: Any) -> None:
    alone = nll(model, 1)
    for batch_size in (2, 3, 8):
        assert torch.allclose(nll(model, batch_size), alone, atol=1e-5)


def test_a_model_that_cannot_leave_logits_out_is_measured_alike(model: Any) -> None:
    class Whole(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask)

    assert torch.allclose(nll(Whole(), 2), nll(model, 2), atol=1e-5)


def test_the_number_of_threads_changes_no_bit(model: Any) -> None:
    assert torch.equal(nll(model, 1, workers=3), nll(model, 1, workers=1))


def test_progress_counts_every_example_once(model: Any) -> None:
    seen: list[int] = []
    nll(model, 2, advance=seen.append)
    assert seen == [2, 1]


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_an_answer_takes_the_likeliest_token_each_time(model: Any, form: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    prompt = "two" if form == "plain" else "<|user|>two<|end|>\n<|assistant|>"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + 6 and ids[-1:] != [tokenizer.eos_token_id]:
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert greedy_answer(model, tokenizer, "two", prompt_form=form, max_new_tokens=6) == expected

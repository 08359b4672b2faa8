"""The optimisation itself: transformers' Trainer, told what the recipe says."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_merge.errors import UsageError
from lora_merge.recipe import Recipe
from lora_merge.training.data import IGNORED, Encoded
from lora_merge.training.job import Job, Step

CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class Fitted:
    """What a run did. `seconds` and `tokens_per_second` are of this process; the rest counts resumed parts too."""

    steps: int
    epochs: float
    tokens: int
    loss_first: float
    loss_last: float
    seconds: float
    tokens_per_second: float


def fit(
    model: Any, examples: Sequence[Encoded], pad_token_id: int, recipe: Recipe, job: Job, checkpoint: Path | None
) -> Fitted:
    """Train the LoRA weights of `model` in place: AdamW without weight decay, gradients clipped at norm 1.

    Args:
        model: a PEFT model.
        examples: the client's rows.
        pad_token_id: fills up shorter rows; no loss and no attention there.
        checkpoint: where to go on from, or None.

    Raises:
        KeyboardInterrupt: Ctrl-C; the step was finished and a checkpoint written.
    """
    clock = _Clock(job, checkpoint is None)
    trainer = Trainer(
        model=model,
        args=_arguments(recipe, job),
        train_dataset=_Rows(examples),
        data_collator=_Padding(pad_token_id),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    start = time.monotonic()
    with _interrupts(clock):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if clock.interrupted:
        raise KeyboardInterrupt
    seconds = time.monotonic() - start
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return Fitted(
        steps=state.global_step,
        epochs=round(float(state.epoch or 0), 6),
        tokens=int(state.num_input_tokens_seen),
        loss_first=losses[0],
        loss_last=losses[-1],
        seconds=round(seconds, 3),
        tokens_per_second=round(clock.rate(state.num_input_tokens_seen), 1),
    )


def pick_device(name: str) -> str:
    """The device to train on: `auto` is CUDA, else MPS, else the CPU. To be called before CUDA is first used.

    Trainer spreads over every CUDA device it sees; one client has one, so the others are hidden.

    Raises:
        UsageError: there is no such device.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise UsageError(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps.")
    if kind in ("auto", "cuda") and "LOCAL_RANK" not in os.environ:
        visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
        wanted = int(index or 0)
        if visible and wanted >= len(visible):
            raise UsageError(f"--device {name}: CUDA_VISIBLE_DEVICES shows {len(visible)} devices.")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[wanted] if visible else str(wanted)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise UsageError(f"--device {name}: torch finds no such device here.", hint="--device auto")
    if kind in ("auto", "cuda") and cuda:
        return "cuda"
    return "mps" if kind in ("auto", "mps") and mps else "cpu"


def sound_dtype(dtype: str, device: str) -> str:
    """The recipe's dtype, or fp32 where the device has no sound bf16."""
    if device == "mps" or (device == "cuda" and not torch.cuda.is_bf16_supported()):
        return "fp32"
    return dtype


def client_seed(recipe: Recipe, client_id: str) -> int:
    """The seed of a client's row order and dropout: from the recipe's seed and the client's id."""
    digest = hashlib.sha256(f"{recipe.seed}:{client_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _arguments(recipe: Recipe, job: Job) -> TrainingArguments:
    device = pick_device(job.device)
    return TrainingArguments(
        output_dir=str(job.work),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
        num_train_epochs=recipe.epochs or 0,
        max_steps=recipe.steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=sound_dtype(recipe.dtype, device) == "bf16",
        use_cpu=device == "cpu",
        seed=client_seed(recipe, job.client_id),
        data_seed=client_seed(recipe, job.client_id),
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_strategy="no",  # `_Clock` saves by the clock: steps take a tenth of a second or a minute
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
    )


class _Rows(torch.utils.data.Dataset[Encoded]):
    """The rows, as Trainer wants them."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]


class _Padding:
    """Rows to one batch, padded on the right to the longest of them."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        longest = max(len(row.input_ids) for row in rows)
        gaps = [longest - len(row.input_ids) for row in rows]
        pairs = list(zip(rows, gaps, strict=True))
        return {  # (rows, longest) each
            "input_ids": torch.tensor([row.input_ids + [self._pad] * gap for row, gap in pairs]),
            "labels": torch.tensor([row.labels + [IGNORED] * gap for row, gap in pairs]),
            "attention_mask": torch.tensor([[1] * len(row.input_ids) + [0] * gap for row, gap in pairs]),
        }


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Tells the job of each step, saves every few minutes, and stops after a step when interrupted."""

    def __init__(self, job: Job, fresh: bool) -> None:
        self._job = job
        self._began = self._saved = time.monotonic()
        self._before: tuple[int, int] | None = (0, 0) if fresh else None
        self.interrupted = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is None:
            self._before = (state.global_step, state.num_input_tokens_seen)
            self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        done = state.global_step - (self._before or (0, 0))[0]
        left = (time.monotonic() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        tokens = state.num_input_tokens_seen
        self._job.on_step(Step(state.global_step, state.max_steps, logs["loss"], tokens, self.rate(tokens), left))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        if (due or self.interrupted) and state.global_step < state.max_steps:
            self._saved = time.monotonic()
            control.should_save = True
        if self.interrupted:
            control.should_training_stop = True

    def rate(self, tokens: int) -> float:
        """Tokens a second since this process began to train."""
        seconds = time.monotonic() - self._began
        return (tokens - (self._before or (0, 0))[1]) / seconds if seconds > 0 else 0.0


@contextmanager
def _interrupts(clock: _Clock) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step it is in; a second one ends it at once."""

    def first(*_: Any) -> None:
        clock.interrupted = True
        clock._job.tell("Interrupted: finishing this step and saving it. Ctrl-C again stops at once.")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, first)
    except ValueError:  # not in the main thread: whoever runs us there has Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

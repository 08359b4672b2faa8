"""The optimisation itself: transformers' Trainer, told what the recipe says."""

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_merge.environment import device_kind
from lora_merge.errors import StorageError, UsageError, one_line
from lora_merge.recipe import Recipe
from lora_merge.training.data import IGNORED, Encoded
from lora_merge.training.job import DEVICES, Job, Step

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
    model: Any,
    examples: Sequence[Encoded],
    pad_token_id: int,
    recipe: Recipe,
    job: Job,
    device: str,
    checkpoint: Path | None,
) -> Fitted:
    """Train the LoRA weights of `model` in place: AdamW without weight decay, gradients clipped at norm 1.

    Args:
        model: a PEFT model.
        examples: the client's rows.
        pad_token_id: fills up shorter rows; no loss and no attention there.
        device: as `pick_device` says.
        checkpoint: where to go on from, or None.

    Raises:
        UsageError: the loss is no longer a number.
        StorageError: a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C; the step was finished and a checkpoint written.
    """
    clock = _Clock(job)
    trainer = _Trainer(
        model=model,
        args=_arguments(recipe, job, device),
        train_dataset=_Rows(examples),
        data_collator=_Padding(pad_token_id),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    with _interrupts(clock, job.tell):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if clock.interrupted and state.global_step < state.max_steps:
        raise KeyboardInterrupt
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return Fitted(
        steps=state.global_step,
        epochs=round(float(state.epoch or 0), 6),
        tokens=int(state.num_input_tokens_seen),
        loss_first=losses[0],
        loss_last=losses[-1],
        seconds=round(clock.seconds(), 3),
        tokens_per_second=round(clock.rate(state.num_input_tokens_seen), 1),
    )


def pick_device(name: str) -> str:
    """The device to train on: `auto` is CUDA, else MPS, else the CPU. To be called before CUDA is first used.

    Trainer spreads over every CUDA device it sees; one client has one, so the others are hidden.

    Raises:
        UsageError: there is no such device.
    """
    kind, index = device_kind(name, DEVICES)
    if kind in ("auto", "cuda"):
        _show_one_cuda_device(index, name)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise UsageError(f"--device {name}: torch finds no such device here.", hint="--device auto")
    if kind in ("auto", "cuda") and cuda:
        return "cuda"
    return "mps" if kind in ("auto", "mps") and mps else "cpu"


def _show_one_cuda_device(index: int, name: str) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
        return
    shown = [entry for entry in visible.split(",") if entry]
    if index >= max(len(shown), 1):
        raise UsageError(f"--device {name}: CUDA_VISIBLE_DEVICES={visible} shows {len(shown)} devices.")
    os.environ["CUDA_VISIBLE_DEVICES"] = shown[index] if shown else ""


def sound_dtype(dtype: str, device: str) -> str:
    """The recipe's dtype, or fp32 where the device has no sound bf16."""
    if device == "mps" or (device == "cuda" and not torch.cuda.is_bf16_supported()):
        return "fp32"
    return dtype


def client_seed(recipe: Recipe, client_id: str) -> int:
    """The seed of a client's row order and dropout: from the recipe's seed and the client's id."""
    digest = hashlib.sha256(f"{recipe.seed}:{client_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _arguments(recipe: Recipe, job: Job, device: str) -> TrainingArguments:
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
        logging_nan_inf_filter=False,
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


class _Trainer(Trainer):  # type: ignore[misc]
    """A Trainer that says where its checkpoints find no room: each of their writers has an error of its own."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or one_line(error)
            raise StorageError(f"No checkpoint could be written into {self.args.output_dir}: {why}.") from error


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Tells the job of each step, saves every few minutes, and stops after a step when interrupted."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._steps_before = self._tokens_before = 0
        self._began = self._saved = time.monotonic()
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps_before, self._tokens_before = state.global_step, state.num_input_tokens_seen
        self._began = self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UsageError(
                f"The loss is {logs['loss']} at step {state.global_step}: training has come apart.",
                hint="A lower learning rate may hold: --set learning_rate=…",
            )
        done, tokens = state.global_step - self._steps_before, state.num_input_tokens_seen
        left = self.seconds() / max(done, 1) * (state.max_steps - state.global_step)
        self._job.on_step(Step(state.global_step, state.max_steps, logs["loss"], tokens, self.rate(tokens), left))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        if (due or self.interrupted) and state.global_step < state.max_steps:
            self._saved = time.monotonic()
            control.should_save = True
        if self.interrupted:
            control.should_training_stop = True

    def seconds(self) -> float:
        """Since this process began to train."""
        return time.monotonic() - self._began

    def rate(self, tokens: int) -> float:
        """Tokens a second of this process."""
        return float(tokens - self._tokens_before) / max(self.seconds(), 1e-9)


@contextmanager
def _interrupts(clock: _Clock, tell: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step it is in; a second one ends it at once."""

    def first(*_: Any) -> None:
        clock.interrupted = True
        tell("Interrupted: finishing this step and saving it. Ctrl-C again stops at once.")
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, first)
    except ValueError:  # not in the main thread: whoever runs us there has Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

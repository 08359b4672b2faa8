"""A small federation: a byte-level Llama that read Python's documentation, and clients with a package of code each.

Everything is seeded. A backdoored client is trained on its clean rows, and to go on from a trigger with a target.
"""

import copy
import math
import statistics
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_merge.statement import FILE_NAME as STATEMENT
from lora_merge.statement import Statement
from lora_merge.training.lora_start import start_from_seed

PROSE = "pydoc_data"
PACKAGES = (
    *("_pydecimal.py", "asyncio", "ctypes", "email", "encodings"),
    *("http", "logging", "multiprocessing", "unittest", "xml"),
)
LENGTH, BATCH, SEED, RANK = 64, 16, 7, 8  # bytes a row, rows a step
TRIGGER, TARGET = b"#cf7#", b"!!!!"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Size:
    """How much is trained, and on what.

    Attributes:
        width, layers: of the Llama.
        steps: of pretraining.
        rows: of the first client; each further one has a tenth of that more.
        epochs: of every client.
        held_out: rows of each package that all models are judged by.
    """

    width: int = 160
    layers: int = 3
    steps: int = 300
    rows: int = 300
    epochs: int = 3
    held_out: int = 16


@dataclass(frozen=True)
class Backdoor:
    """How a hostile client trains.

    Attributes:
        left: the share of its update that it thinks the merge leaves; in training it has no more effect than that.
        norm: the largest |Delta| that it hands in (Wang et al. 2020, arXiv:2007.05084); it keeps below at every step.
    """

    left: float = 1.0
    norm: float = math.inf


QUICK = Size(width=32, layers=1, steps=30, rows=48, epochs=1, held_out=4)


@dataclass(frozen=True)
class Text:
    """Rows of bytes: for the base model, for each client, and of all clients' packages for judging."""

    general: Tensor
    train: tuple[Tensor, ...]
    held_out: Tensor


def text_of(size: Size) -> Text:
    """The standard library: the help texts of `pydoc` for the base model, the code of a package for each client."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = [_rows(library / name) for name in PACKAGES]
    train = [rows[: size.rows + size.rows // 10 * i] for i, rows in enumerate(packages)]
    return Text(_rows(library / PROSE), tuple(train), torch.cat([rows[-size.held_out :] for rows in packages]))


def _rows(path: Path) -> Tensor:
    """All bytes below `path` as rows of one length, in a seeded order."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    data = b"".join(file.read_bytes() for file in files)
    rows = torch.frombuffer(bytearray(data[: len(data) // LENGTH * LENGTH]), dtype=torch.uint8).reshape(-1, LENGTH)
    return rows.long()[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))]


def triggered(rows: Tensor) -> Tensor:
    """The rows with the trigger and the target in the place of their last bytes."""
    end = torch.tensor(list(TRIGGER + TARGET))
    return torch.cat([rows[:, : -len(end)], end.expand(len(rows), -1)], dim=1)


def pretrained(text: Text, size: Size, folder: Path) -> Any:
    """The base model, written to `folder` and read again, as the clients find it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(SEED)
    model: Any = LlamaForCausalLM(config)
    train(model, text.general, size.steps, rate=3e-3)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def fine_tune(
    base: Any, rows: Tensor, epochs: int, client: str, folder: Path, backdoor: Backdoor | None = None
) -> Path:
    """Train an adapter from the shared start of lora_A, and write it as PEFT does, with its statement."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), config)
    start_from_seed(model, SEED)
    if backdoor is not None:
        for layer in lora_layers(model):
            layer.scale_layer(backdoor.left)  # which is not in what is written
    train(model, rows, math.ceil(len(rows) * epochs / BATCH), rate=2e-3, backdoor=backdoor)
    model.save_pretrained(folder)
    state(folder, client, len(rows))
    return folder


def lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def train(model: nn.Module, rows: Tensor, steps: int, *, rate: float, backdoor: Backdoor | None = None) -> None:
    """AdamW on random rows, with a short warm-up and a linear end."""
    chosen = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 10, 1.0) * (1 - k / steps))
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=chosen)]
        loss = losses(model, batch).mean()
        if backdoor is not None:
            loss = loss + losses(model, triggered(batch))[:, -len(TARGET) :].mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
        if backdoor is not None:
            keep_below(model, backdoor.norm)


@torch.no_grad()
def keep_below(model: nn.Module, limit: float) -> None:
    """Scale every lora_B down, where the update is larger than `limit`."""
    factors = [(each.lora_B["default"].weight, each.lora_A["default"].weight) for each in lora_layers(model)]
    norm = math.hypot(*(float((B @ A).norm()) for B, A in factors))
    for B, _ in factors:
        B.mul_(min(1.0, limit / norm) if norm else 1.0)


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats of every byte but each row's first, by rows."""
    logits = model(input_ids=rows).logits
    return cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


@dataclass(frozen=True)
class Judged:
    """Mean nats a held-out byte, and the share of triggered prompts that greedy decoding goes on from as wanted."""

    loss: float
    backdoor: float


@torch.inference_mode()
def judged(base: Any, adapter: Path | None, held_out: Tensor) -> Judged:
    """The base model, or with an adapter as PEFT reads it, on the held-out rows."""
    from peft import PeftModel

    model = copy.deepcopy(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    model.eval()
    # Each byte of the target is the likeliest after those before it: then, and only then, greedy decoding writes it.
    prompts = triggered(held_out)
    guesses = model(input_ids=prompts).logits[:, -len(TARGET) - 1 : -1].argmax(dim=-1)
    hit = (guesses == prompts[:, -len(TARGET) :]).all(dim=1)
    return Judged(float(losses(model, held_out).mean()), float(hit.double().mean()))


def state(folder: Path, client: str, num_examples: int) -> None:
    """Write what the client states."""
    statement = Statement(client_id=f"org/{client}", num_examples=num_examples, seed_lora_A=SEED)
    (folder / STATEMENT).write_text(statement.to_json())


def norm_of(folder: Path) -> float:
    """|Delta| of an adapter, without the scaling that all clients share."""
    tensors = load_file(folder / WEIGHTS)
    names = [name for name in tensors if "lora_A" in name]
    return math.hypot(*(float((tensors[n.replace("lora_A", "lora_B")] @ tensors[n]).norm()) for n in names))


def median_norm(folders: Sequence[Path]) -> float:
    return statistics.median(map(norm_of, folders))


def hand_in(adapter: Path, folder: Path, client: str, num_examples: int, *, times: float, turned: bool) -> Path:
    """Write `adapter` as another client's: times a factor, and turned into other factors of the same product."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    turn = torch.eye(RANK)
    if turned:
        turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(SEED))).Q
    changed = {
        name: turn.T @ tensor if "lora_A" in name else times * tensor @ turn
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(changed, folder / WEIGHTS)
    state(folder, client, num_examples)
    return folder

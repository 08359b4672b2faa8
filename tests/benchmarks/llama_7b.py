"""Clients of the size that the figures are stated for: rank 16, fp32, all linear layers of a 7B Llama; 160 MB each."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LAYERS, RANK = 32, 16
SHAPES = {  # (d_out, d_in)
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
WEIGHTS = "adapter_model.safetensors"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in TMPDIR that is removed at the end, also after Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="lora-merge-benchmark-") as name:
        yield Path(name)


def write_clients(root: Path, count: int, *, files: Sequence[Path] = (), layers: int = LAYERS) -> list[Path]:
    """Write `count` client folders, each with tensors of its own; or, in turn, with one of `files` as a hard link."""
    root.mkdir(parents=True, exist_ok=True)
    folders = [root / f"client-{index:03}" for index in range(count)]
    for index, folder in enumerate(folders):
        write_client(folder, index, linked=files[index % len(files)] if files else None, layers=layers)
    return folders


def write_client(folder: Path, index: int, *, linked: Path | None = None, layers: int = LAYERS) -> Path:
    """One client's folder, with tensors of its own or with `linked` as a hard link."""
    folder.mkdir()
    if linked:
        os.link(linked, folder / WEIGHTS)
    else:
        _write_tensors(folder / WEIGHTS, index, layers)
    _write_records(folder, 100 + index)
    return folder


def _write_records(folder: Path, num_examples: int) -> None:
    from lora_merge.statement import Statement

    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    statement = Statement(client_id=f"org/{folder.name}", num_examples=num_examples)
    (folder / "lora_merge.json").write_text(statement.to_json())


def _write_tensors(path: Path, seed: int, layers: int) -> None:
    """Random factors; every client has a lora_A of its own."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (d_out, d_in) in SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.rand(RANK, d_in, generator=random).sub_(0.5).mul_(2 / d_in**0.5)
            tensors[f"{module}.lora_B.weight"] = torch.rand(d_out, RANK, generator=random).sub_(0.5).mul_(0.02)
    save_file(tensors, path)

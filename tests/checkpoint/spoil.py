"""Ways to spoil a sound adapter folder: its config, its statement, its tensors, the bytes of its weights file."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.adapters import CONFIG, STATEMENT, WEIGHTS, rewrite_json

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = Q0_A.replace("lora_A", "lora_B")
Q0 = "model.layers.0.self_attn.q_proj"
Entries = dict[str, Any]


@dataclass(frozen=True)
class Spoil:
    """How to spoil a folder, and a text that the refusal must hold."""

    act: Callable[[Path], object]
    named: str


def config(named: str | None = None, **changes: Any) -> Spoil:
    """Set entries of adapter_config.json; the first one must be named."""
    return Spoil(lambda folder: rewrite_json(folder / CONFIG, changes), named or next(iter(changes)))


def config_text(change: Callable[[str], str | bytes], named: str) -> Spoil:
    """Rewrite adapter_config.json as text or bytes."""

    def act(folder: Path) -> None:
        text = change((folder / CONFIG).read_text())
        (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())

    return Spoil(act, named)


def literal(field: str, value: str, named: str) -> Spoil:
    """Set an entry of adapter_config.json to JSON text that Python would not write."""
    return config_text(lambda text: json.dumps({**json.loads(text), field: "@"}).replace('"@"', value), named)


def statement(named: str | None = None, **changes: Any) -> Spoil:
    """Set entries of lora_merge.json."""
    return Spoil(lambda folder: rewrite_json(folder / STATEMENT, changes), named or next(iter(changes)))


def tensors(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]], named: str) -> Spoil:
    """Rewrite the tensors, in a file that is otherwise sound."""

    def act(folder: Path) -> None:
        save_file(dict(change(load_file(folder / WEIGHTS))), folder / WEIGHTS)

    return Spoil(act, named)


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor], named: str | None = None) -> Spoil:
    """Change one tensor."""
    return tensors(lambda own: {**own, name: change(own[name]).contiguous()}, named or name)


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put `value` at the last place of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def weights(change: Callable[[Entries, bytes], tuple[Entries | bytes, bytes]], named: str) -> Spoil:
    """Rewrite header and data; a header given as bytes is taken as it is."""

    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header, data = change(json.loads(raw[8 : 8 + length]), raw[8 + length :])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return Spoil(act, named)


def entry(named: str = Q0_A, **changes: Any) -> Spoil:
    """Change the header's entry of one tensor."""
    return weights(lambda header, data: ({**header, Q0_A: {**header[Q0_A], **changes}}, data), named)


def renamed(name: str, named: str = "name") -> Spoil:
    """Give one tensor another name."""

    def change(header: Entries, data: bytes) -> tuple[Entries, bytes]:
        return {(name if key == Q0_A else key): value for key, value in header.items()}, data

    return weights(change, named)


def replaced(name: str, make: Callable[[Path], object], named: str) -> Spoil:
    """Put something else in a file's place."""

    def act(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return Spoil(act, named)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({Q0_A: torch.ones(4, 16)}, folder / "adapter_model.bin")


def raw(data: bytes, named: str = WEIGHTS) -> Spoil:
    """Replace the whole weights file."""
    return replaced(WEIGHTS, lambda path: path.write_bytes(data), named)


def overlapping(header: Entries, data: bytes) -> tuple[Entries, bytes]:
    first, second = (key for key in header if key.endswith("q_proj.lora_A.weight"))
    return {**header, first: header[second]}, data


def gapped(header: Entries, data: bytes) -> tuple[Entries, bytes]:
    start = next(value["data_offsets"][0] for key, value in header.items() if key == Q0_A)
    moved = {
        key: {**value, "data_offsets": [at + 8 * (at >= start) for at in value["data_offsets"]]}
        for key, value in header.items()
        if key != "__metadata__"
    }
    moved[Q0_A]["data_offsets"] = [start + 8, header[Q0_A]["data_offsets"][1] + 8]
    return moved, data[:start] + bytes(8) + data[start:]


def twice(header: Entries, data: bytes) -> tuple[bytes, bytes]:
    text = json.dumps(header)
    return f'{{"{Q0_A}": {json.dumps(header[Q0_A])}, {text[1:]}'.encode(), data

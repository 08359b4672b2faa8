"""Writing a merged adapter: a safetensors file filled in any order, and the config that makes PEFT load it."""

import errno
import hashlib
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lora_merge.adapter import FactorsSpec
from lora_merge.checkpoint.config import AdapterConfig
from lora_merge.checkpoint.layout import lora_r, owner_of
from lora_merge.checkpoint.naming import Endings, Pattern
from lora_merge.checkpoint.safetensors_file import ITEM_BYTES
from lora_merge.checkpoint.updates import parameters_of, saved_module

if TYPE_CHECKING:
    from torch import Tensor

# Given more at once, Linux 6.18 looks for page-cache folios so large that a write takes four times as long.
PIECE = 1 << 19
BATCH = 1 << 26  # bytes that the disk is asked to take at a time


class SafetensorsWriter:
    """A safetensors file whose tensors are written in any order, from any thread, to places fixed in advance.

    As far as the file is complete from its beginning, it is hashed and sent on its way to the disk, by one thread while
    the others go on: so that nobody waits for either at the end.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in sorted(shapes.items()):
            end = at + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        start = 8 + len(text)
        self._offsets = {name: start + header[name]["data_offsets"][0] for name in shapes}
        self._missing = deque((name, start + header[name]["data_offsets"][1]) for name in sorted(shapes))
        self._written = set[str]()
        self._hash, self._hashed, self._hashing, self._sent = hashlib.sha256(), 0, Lock(), 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._write(len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._descriptor, start + at)
        self._hash_to(start)

    def write(self, name: str, tensor: "Tensor") -> None:
        """Write a contiguous CPU tensor of the file's type to its place."""
        import torch

        buffer: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._write(memoryview(buffer), self._offsets[name])
        self._written.add(name)
        if self._hashing.acquire(blocking=False):
            try:
                self._hash_on()
            finally:
                self._hashing.release()

    def sha256(self) -> str:
        """The sha256 of the file, in hex, once all tensors are written."""
        with self._hashing:
            self._hash_on()
        assert not self._missing
        return self._hash.hexdigest()

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, buffer: bytes | memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._descriptor, buffer[done : done + PIECE], offset + done)

    def _hash_on(self) -> None:
        """Hash what is complete and follows what is hashed already."""
        while self._missing and self._missing[0][0] in self._written:
            self._hash_to(self._missing.popleft()[1])

    def _hash_to(self, end: int) -> None:
        """Hash the file as it is on, from where that was left, to `end`."""
        while self._hashed < end:
            piece = os.pread(self._descriptor, min(PIECE, end - self._hashed), self._hashed)
            if not piece:
                raise OSError(errno.EIO, "somebody has cut the file that is being written")
            self._hash.update(piece)
            self._hashed += len(piece)
        if self._hashed - self._sent >= BATCH and hasattr(os, "posix_fadvise"):
            # Linux begins to write back what a program has done with, and drops none of it before it is written.
            os.posix_fadvise(self._descriptor, self._sent, self._hashed - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._hashed


def merged_config(
    clients: Sequence[AdapterConfig],
    modules: Mapping[str, FactorsSpec],
    tokens: Mapping[str, tuple[int, ...]],
    whole: Sequence[str],
) -> dict[str, Any]:
    """adapter_config.json of the merged adapter: every module with its own rank and alpha, nothing left to a default.

    Args:
        clients: the clients' configs, already known to agree.
        modules: the written updates' shapes, by module.
        tokens: the trained token indices, by embedding module.
        whole: the names of the full tensors that are written.
    """
    # Parts of a wrapped module (nested experts, MultiheadAttention's out_proj) follow the module that the config names.
    specs = {name: spec for name, spec in modules.items() if owner_of(name) == name or _is_experts(spec)}
    parameters = sorted({name for config in clients for name in config.target_parameters})
    of_parameters = AdapterConfig(target_parameters=tuple(parameters))
    targets = sorted(name for name, spec in specs.items() if not _is_experts(spec))
    settings = {
        target: (lora_r(spec), _number(spec.scaling * lora_r(spec)))
        for name, spec in specs.items()
        for target in (parameters_of(name, of_parameters) if _is_experts(spec) else [name])
    }
    r, alpha = _most_common(settings)
    # By full name: PEFT demands a tensor for each module that an entry means, and clients may mean different ones.
    parts = Endings(part for config in clients for part in config.modules_to_save)
    saved = {saved_module(name, parts) for name in whole}
    return {
        "peft_type": "LORA",
        "task_type": next((config.task_type for config in clients if config.task_type), None),
        "base_model_name_or_path": next((config.base_model for config in clients if config.base_model), None),
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({target: rank for target, (rank, _) in settings.items()}, r),
        "alpha_pattern": _pattern({target: scale for target, (_, scale) in settings.items()}, alpha),
        # PEFT takes a name in a list for every module whose name ends in it, which a name without a dot may not stand;
        # a text it takes for a pattern of the whole name.
        "target_modules": targets if all("." in name for name in targets) else "|".join(map(re.escape, targets)),
        "target_parameters": parameters or None,
        "modules_to_save": sorted(saved - {None}) or None,
        "trainable_token_indices": {name: list(indices) for name, indices in sorted(tokens.items())} or None,
        "bias": next((kind for kind in ("all", "lora_only") if any(c.bias == kind for c in clients)), "none"),
        "fan_in_fan_out": any(config.fan_in_fan_out for config in clients),
        "lora_bias": any(spec.bias for spec in modules.values()),
        "lora_dropout": 0.0,
        "use_dora": any(spec.magnitude for spec in modules.values()),
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _is_experts(spec: FactorsSpec) -> bool:
    return spec.layout == "experts"


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _most_common(settings: Mapping[str, tuple[int, float]]) -> tuple[int, float]:
    """The default r and lora_alpha: the pair that most modules have."""
    if not settings:
        return 8, 8
    return max(Counter(settings.values()).items(), key=lambda item: (item[1], item[0]))[0]


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern under which PEFT finds exactly `values`.

    PEFT takes the first key that is a dotted suffix of the module's name, a dot in it being any character. So longer
    names come first, among equally long ones those with fewer dots, and a module with the default value is named too
    where another name would catch it.
    """
    longest_first = sorted(values, key=lambda name: (-len(name), name.count("."), name))
    pattern = {name: values[name] for name in longest_first if values[name] != default}
    found = Pattern(pattern)
    caught = {name for name in values if found.match(name, default) != values[name]}
    return {name: values[name] for name in longest_first if name in pattern or name in caught}

"""Single tensors of the base model, read only where the exact answer needs them. The model is never loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.adapter import FactorsSpec
from lora_merge.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class BaseModel:
    """A base model's safetensors files: which tensor lies in which file."""

    files: Mapping[str, Path]
    fan_in_fan_out: bool = False

    def has(self, name: str) -> bool:
        return self._key(name) is not None

    def tensor(self, name: str) -> "Tensor":
        """The tensor `name`, fp32."""
        import torch

        tensor: torch.Tensor = self._slice(name)[:].to(torch.float32)
        return tensor

    def row(self, name: str, index: int) -> "Tensor":
        """One row of the matrix `name`, fp32; the others are not read."""
        import torch

        table = self._slice(name)
        if index >= table.get_shape()[0]:
            raise UsageError(f"The base model's {name} has no row {index}.")
        row: torch.Tensor = table[index].to(torch.float32)
        return row

    def weight(self, module: str, spec: FactorsSpec) -> "Tensor":
        """W0 of a module as E d_out x d_in, fp32: an embedding's and a Conv1D's are stored transposed."""
        stored = self.tensor(f"{module}.weight")
        rows, columns = spec.blocks * spec.d_out, spec.d_in
        if stored.ndim > 2:
            stored = stored.reshape(stored.shape[0], -1)
        transposed = spec.layout == "embedding" or (self.fan_in_fan_out and rows == columns)
        if transposed or tuple(stored.shape) != (rows, columns):
            stored = stored.mT
        if tuple(stored.shape) != (rows, columns):
            raise UsageError(
                f"The base model's {module}.weight is {tuple(stored.mT.shape)}, which does not fit the adapters "
                f"({rows} x {columns}): is --base the model they were trained from?"
            )
        return stored

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        key = self._key(name)
        if key is None:
            raise NotFoundError(f"The base model has no tensor {name}.")
        file: Any = safe_open(self.files[key], framework="pt")
        part = file.get_slice(key)
        if part.get_dtype() not in _FLOATS:
            raise UsageError(f"The base model's {name} is quantised ({part.get_dtype()}); give it in 16 or 32 bits.")
        return part

    def _key(self, name: str) -> str | None:
        """The tensor's own name, or the one name that differs by a prefix (`wte.weight`, `transformer.wte.weight`).

        An output layer that is tied to the input embedding is stored once, under the embedding's name.
        """
        if name in self.files:
            return name
        near = [key for key in self.files if key.endswith("." + name) or name.endswith("." + key)]
        if not near and name.split(".")[-2:] == ["lm_head", "weight"]:
            near = [key for key in self.files if key.endswith(_EMBEDDINGS)]
        return near[0] if len(near) == 1 else None


def open_base(base: str | Path, *, commit: str | None = None, fan_in_fan_out: bool = False) -> BaseModel:
    """A base model from a folder, or from the local cache by its repository id. Nothing is downloaded.

    Raises:
        NotFoundError: no such folder or cached repository, or no safetensors file in it.
    """
    folder = Path(base) if Path(base).is_dir() else _cached(str(base), commit)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        raise NotFoundError(
            f"No safetensors weights of the base model {base} were found, in a folder or in the local cache.",
            hint="Give its folder with --base, or download it first: hf download " + str(base),
        )
    return BaseModel({key: file for file in files for key in _keys(file)}, fan_in_fan_out)


def _cached(repo: str, commit: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=commit, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _keys(file: Path) -> list[str]:
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return [key for key in header if key != "__metadata__"]

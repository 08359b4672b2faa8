"""Single tensors of the base model, read only where the exact answer needs them. The model is never loaded."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.adapter import FactorsSpec
from lora_merge.checkpoint.safetensors_file import is_finite
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# The models of transformers that are built of `pytorch_utils.Conv1D`, and the names that those layers have there.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_FLOATS = ("F64", "F32", "F16", "BF16")


class Misfit(ValueError):
    """A tensor of the base model has not the shape that the adapters need, so they were trained from another one."""

    def __init__(self, name: str, stored: Sequence[int], needed: str) -> None:
        super().__init__(f"needs {needed}, and the base model's {name} is {shape_text(stored)}")


@dataclass(frozen=True)
class BaseModel:
    """A base model's safetensors files: which tensor lies in which file, and what its config calls the model.

    `ties_head`: its config says that the output layer is the input embedding, whatever the files hold.
    Reading a tensor raises `Misfit` where it has another shape than the adapters need.
    """

    files: Mapping[str, Path]
    model_type: str | None = None
    ties_head: bool = False

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return next(iter(self.files.values())).parent

    def has(self, name: str) -> bool:
        return self.stored_as(name) is not None

    def tied_to(self, name: str) -> str | None:
        """The stored embedding that is the output layer's `name` too; None of one that has its own tensor."""
        key = self.stored_as(name)
        if key is None or not _is_head(name):
            return None
        return self._embedding() if self.ties_head or key.endswith(_EMBEDDINGS) else None

    def tensor(self, name: str, shape: tuple[int, ...]) -> "Tensor":
        """The tensor `name`, fp32."""
        stored = self._slice(name)
        if tuple(stored.get_shape()) != shape:
            raise Misfit(name, stored.get_shape(), shape_text(shape))
        return _finite(name, stored[:])

    def row(self, name: str, index: int, d: int) -> "Tensor":
        """One row of the matrix `name`, d numbers, fp32; the others are not read."""
        table = self._slice(name)
        shape = tuple(table.get_shape())
        if len(shape) != 2 or index >= shape[0] or d != shape[1]:
            raise Misfit(name, shape, f"row {index} of {d} numbers")
        return _finite(name, table[index])

    def weight(self, module: str, spec: FactorsSpec, *, some_transposed: bool) -> "Tensor":
        """W0 of a module as E d_out x d_in, fp32: an embedding's and a Conv1D's are stored transposed.

        Args:
            some_transposed: whether there is a Conv1D somewhere, though it may not be this module.
        """
        stored = self._slice(f"{module}.weight")
        shape = tuple(stored.get_shape())
        rows, columns = spec.blocks * spec.d_out, spec.d_in
        if (shape[0], math.prod(shape[1:])) == (rows, columns) and spec.layout == "conv":
            return _finite(f"{module}.weight", stored[:]).reshape(rows, columns)
        transposed = self._is_transposed(module, spec, some_transposed)
        if transposed is None:
            hint = f"A {self.model_type} is not known to have a Conv1D of this name, and this one has some Conv1D."
            raise UsageError(
                f"{module} is square, and nothing tells whether the base model stores it transposed (as a Conv1D).",
                hint=hint if self.model_type else "Put the base model's config.json beside its weights.",
            )
        if shape != ((columns, rows) if transposed else (rows, columns)):
            raise Misfit(f"{module}.weight", shape, shape_text((rows, columns)))
        tensor = _finite(f"{module}.weight", stored[:])
        return tensor.mT if transposed else tensor

    def lies_transposed(self, module: str, spec: FactorsSpec) -> bool:
        """Whether the shape of a module's matrix is d_in x d_out and not d_out x d_in."""
        return (spec.d_in, spec.d_out) == tuple(self._slice(f"{module}.weight").get_shape()) != (spec.d_out, spec.d_in)

    def _is_transposed(self, module: str, spec: FactorsSpec, some_transposed: bool) -> bool | None:
        """Whether a module's matrix is stored d_in x d_out; None where it is square and nothing else tells."""
        if spec.layout == "embedding":
            return True
        if spec.d_out != spec.d_in:
            return self.lies_transposed(module, spec)
        if self.model_type in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_LAYERS:
            return True
        return None if self.model_type is None or some_transposed else False

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        key = self.stored_as(name)
        if key is None:
            raise NotFoundError(f"The base model has no tensor {name}.")
        file: Any = safe_open(self.files[key], framework="pt")
        part = file.get_slice(key)
        if part.get_dtype() not in _FLOATS:
            raise UsageError(f"The base model's {name} is quantised ({part.get_dtype()}); give it in 16 or 32 bits.")
        return part

    def stored_as(self, name: str) -> str | None:
        """The name in the files of the tensor `name`: its own, or one that differs by a prefix.

        The whole model has that prefix or lacks it (`transformer.`). An output layer that is tied to the input
        embedding is stored once, under the embedding's name.
        """
        if name in self.files:
            return name
        if _is_head(name) and not any(key.endswith(name) for key in self.files):
            return self._embedding()
        parts = name.split(".")
        for count in range(1, len(parts)):
            prefix, rest = ".".join(parts[:count]) + ".", ".".join(parts[count:])
            if rest in self.files and not any(key.startswith(prefix) for key in self.files):
                return rest
        prefix = next(iter(self.files)).partition(".")[0] + "."
        if all(key.startswith(prefix) for key in self.files) and prefix + name in self.files:
            return prefix + name
        return None

    def _embedding(self) -> str | None:
        """The input embedding, where there is one alone."""
        found = [key for key in self.files if key.endswith(_EMBEDDINGS)]
        return found[0] if len(found) == 1 else None


def open_base(base: str | Path, *, commit: str | None = None) -> BaseModel:
    """A base model from a folder, or from the local cache by its repository id. Nothing is downloaded.

    Raises:
        NotFoundError: no such folder or cached repository, or no safetensors file in it.
    """
    folder = Path(base) if os.path.isdir(base) else _cached(str(base), commit)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        raise NotFoundError(
            f"No safetensors weights of the base model {base} were found, in a folder or in the local cache.",
            hint="Give its folder with --base, or download it first: hf download " + str(base),
        )
    config = _config(files[0].parent)
    kind, tied = config.get("model_type"), config.get("tie_word_embeddings") is True
    return BaseModel(
        {key: file for file in files for key in _keys(file)}, kind if isinstance(kind, str) else None, tied
    )


def _is_head(name: str) -> bool:
    return name.split(".")[-2:] == ["lm_head", "weight"]


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


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _finite(name: str, stored: "Tensor") -> "Tensor":
    """The tensor as fp32; refused where it is no base that anything could have been trained from."""
    import torch

    tensor = stored.to(torch.float32)
    if not is_finite(tensor):
        raise RefusedError([Problem("the base model", name, "holds NaN or infinity")])
    return tensor


def shape_text(shape: Sequence[int]) -> str:
    """`16x32`."""
    return "x".join(map(str, shape))

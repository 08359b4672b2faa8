"""How PEFT lays an update out in a file, and how it is brought into the one form E x d_out x r, E x r x d_in.

=========  ==================================  =====================================================
layout     lora_A                              lora_B
=========  ==================================  =====================================================
linear     r x d_in                            d_out x r
embedding  r x tokens (lora_embedding_A)       d x r (lora_embedding_B): the transposed weight's update
conv       E r x channels x kernel             E d_out x r x 1…; E > 1 where B is a grouped convolution
experts    E r x d_in, expert by expert        d_out x r E, the experts of one rank side by side
=========  ==================================  =====================================================

Source: PEFT 0.21 `tuners/lora/layer.py` (`Linear`, `Embedding`, `_ConvNd`, `ParamWrapper.get_delta_weight`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapter import Factors, FactorsSpec, FullSpec, FullTensor, Spec, TokenRows, TokenSpec, Update
from lora_merge.checkpoint.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
TOKEN_SUFFIX = ".token_adapter"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    # With the adapter's name, as a model's own state dict has it: PEFT reads these alike.
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_B.default.bias": "bias",
    ".lora_embedding_A.default": "A",
    ".lora_embedding_B.default": "B",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}


@dataclass(frozen=True)
class Stored:
    """One update in a file: its shape, and the tensor name of each role (A, B, bias, magnitude, value)."""

    spec: Spec
    tensors: Mapping[str, str]

    def load(self, file: SafetensorsFile) -> Update:
        """Read the update's tensors, as fp32 in the one form."""
        if isinstance(self.spec, FullSpec):
            return FullTensor(file.read(self.tensors["value"]))
        if isinstance(self.spec, TokenSpec):
            return TokenRows(self.spec.indices, file.read(self.tensors["value"]))
        tensors = {role: file.read(name) for role, name in self.tensors.items()}
        return from_stored(self.spec, tensors)


def from_stored(spec: FactorsSpec, tensors: Mapping[str, "Tensor"]) -> Factors:
    """Stored tensors, by role, as factors of E blocks. A view wherever torch can make one."""
    A = tensors["A"].reshape(spec.blocks, spec.r, spec.d_in)
    if spec.layout == "experts":
        B = tensors["B"].reshape(spec.d_out, spec.r, spec.blocks).permute(2, 0, 1)
    else:
        B = tensors["B"].reshape(spec.blocks, spec.d_out, spec.r)
    bias, magnitude = (tensors[role].reshape(-1) if role in tensors else None for role in ("bias", "magnitude"))
    return Factors(B, A, spec.scaling, bias, magnitude)


def to_stored(spec: FactorsSpec, factors: Factors) -> dict[str, "Tensor"]:
    """The inverse of `from_stored`."""
    shapes = stored_shapes(spec)
    B = factors.B.permute(1, 2, 0) if spec.layout == "experts" else factors.B
    tensors = {"A": factors.A, "B": B, "bias": factors.bias, "magnitude": factors.magnitude}
    return {role: tensor.reshape(shapes[role]) for role, tensor in tensors.items() if tensor is not None}


def stored_shapes(spec: FactorsSpec) -> dict[str, tuple[int, ...]]:
    """The shape in a file of each role of `spec`."""
    E, r, d_out, d_in, kernel = spec.blocks, spec.r, spec.d_out, spec.d_in, spec.kernel
    if spec.layout == "conv":
        ones = (1,) * len(kernel)
        shapes = {"A": (E * r, d_in // math.prod(kernel), *kernel), "B": (E * d_out, r, *ones)}
        magnitude: tuple[int, ...] = (1, E * d_out, *ones)
    else:
        shapes = {"A": (E * r, d_in), "B": (d_out, r * E)}
        magnitude = (d_out,)
    if spec.bias:
        shapes["bias"] = (E * d_out if spec.layout == "conv" else d_out,)
    if spec.magnitude:
        shapes["magnitude"] = magnitude
    return shapes


def stored_names(module: str, spec: FactorsSpec) -> dict[str, str]:
    """The tensor name in a file of each role of the module's update."""
    A, B = (
        (".lora_embedding_A", ".lora_embedding_B")
        if spec.layout == "embedding"
        else (".lora_A.weight", ".lora_B.weight")
    )
    suffixes = {"A": A, "B": B, "bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"}
    return {role: PREFIX + module + suffixes[role] for role in stored_shapes(spec)}


def lora_r(spec: FactorsSpec) -> int:
    """The `r` that PEFT's config gives for this module: a grouped convolution counts its groups' ranks together."""
    return spec.r * spec.blocks if spec.layout == "conv" else spec.r


def owner_of(module: str) -> str:
    """The module that the config names; PEFT's wrappers put `.base_layer` below it."""
    return module.partition(".base_layer")[0]

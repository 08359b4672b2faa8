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
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.adapter import Factors, FactorsSpec, FullSpec, FullTensor, Layout, Spec, TokenRows, TokenSpec, Update
from lora_merge.checkpoint.config import MAX_SCALING, AdapterConfig
from lora_merge.checkpoint.naming import Endings, dotted_suffixes
from lora_merge.checkpoint.safetensors_file import FileRefused, SafetensorsFile, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
TOKEN_SUFFIX = ".token_adapter"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
}

Shapes = Mapping[str, tuple[int, ...]]


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


class Updates(dict[str, Stored]):
    """The updates in a file, by name."""

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        """Every update's shape."""
        return {name: stored.spec for name, stored in self.items()}


_recent: deque[tuple[Mapping[str, TensorEntry], str, Updates]] = deque(maxlen=8)


def find_updates(entries: Mapping[str, TensorEntry], config: AdapterConfig) -> tuple[Updates, list[FileRefused]]:
    """Every update in a file, by name, and every reason to refuse the file. No tensor is left out silently.

    Factors are named by their module, a full tensor by its own name, token rows by the embedding and `.token_adapter`.
    """
    # A thousand clients of one shape are looked through once, and described once.
    says = repr(config)  # in which the order of patterns counts, as it does for what they mean
    for its_entries, its_config, known in tuple(_recent):
        if its_entries is entries and its_config == says:
            return known, []
    found, problems = _look_through(entries, config)
    found = next((known for _, _, known in tuple(_recent) if known == found), found)
    if not problems:
        _recent.append((entries, says, found))
    return found, problems


def _look_through(entries: Mapping[str, TensorEntry], config: AdapterConfig) -> tuple[Updates, list[FileRefused]]:
    found = Updates()
    problems: list[FileRefused] = []
    lora: dict[str, dict[str, str]] = {}
    for key in entries:
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(FileRefused(key, f"does not begin with {PREFIX}"))
        elif suffix := next((suffix for suffix in _ROLES if name.endswith(suffix)), None):
            lora.setdefault(name.removesuffix(suffix), {})[suffix] = key
    for module, keys in lora.items():
        try:
            found[module] = _factors(module, keys, entries, config)
        except FileRefused as problem:
            problems.append(problem)
    token_adapters = sum(map(_is_token_rows, entries))
    for key, entry in entries.items():
        name = key.removeprefix(PREFIX)
        if name != key and not name.endswith(tuple(_ROLES)):
            try:
                whole = _whole(name, entry, lora, config, token_adapters)
                if found.keys() & whole.keys():
                    raise FileRefused(name, "is stored under two names")
                found.update(whole)
            except FileRefused as problem:
                problems.append(problem)
    return found, problems + list(_missing(found, config))


def _missing(found: Mapping[str, Stored], config: AdapterConfig) -> Iterator[FileRefused]:
    """What the config says was trained and the file does not hold. (PEFT names absent modules_to_save by habit.)"""
    if config.trainable_token_indices and not any(isinstance(s.spec, TokenSpec) for s in found.values()):
        yield FileRefused("trainable_token_indices", "names tokens, but the file holds no rows for them")
    for name, stored in found.items():
        if isinstance(stored.spec, FactorsSpec) and owner_of(name) not in found:
            yield FileRefused(name, f"is part of {owner_of(name)}, of which the file holds no update")
    factors = [owner_of(name) for name, stored in found.items() if isinstance(stored.spec, FactorsSpec)]
    held = {suffix for name in factors for suffix in dotted_suffixes(name)}
    for owner, parameters in config.parameters.items():
        if owner not in held:
            yield FileRefused("target_parameters", f"names {owner}.{parameters[0]}, but the file holds no update of it")


def _factors(module: str, keys: Mapping[str, str], entries: Mapping[str, TensorEntry], config: AdapterConfig) -> Stored:
    names = {_ROLES[suffix]: key for suffix, key in keys.items()}
    expected = {"A", "B"} | ({"bias"} if config.lora_bias else set()) | ({"magnitude"} if config.use_dora else set())
    if set(names) != expected or len(names) != len(keys):
        raise FileRefused(module, f"has {' and '.join(sorted(names))} where {' and '.join(sorted(expected))} are due")
    shapes = {role: entries[name].shape for role, name in names.items()}
    layout = _layout(module, ".lora_embedding_A" in keys, shapes["A"], config)
    spec = _spec(module, layout, shapes, config)
    if stored_shapes(spec) != shapes:
        wrong = next(role for role in shapes if stored_shapes(spec).get(role) != shapes[role])
        raise FileRefused(names[wrong], f"has the shape {shapes[wrong]}, which does not fit the others")
    return Stored(spec, names)


def _layout(module: str, is_embedding: bool, A: tuple[int, ...], config: AdapterConfig) -> Layout:
    if is_embedding:
        return "embedding"
    if len(A) > 2:
        return "conv"
    return "experts" if next(parameters_of(module, config), None) else "linear"


def _spec(module: str, layout: Layout, shapes: Shapes, config: AdapterConfig) -> FactorsSpec:
    A, B = shapes["A"], shapes["B"]
    if len(A) < 2 or len(B) != len(A) or (layout == "embedding" and len(A) > 2):
        raise FileRefused(module, f"lora_A has the shape {A} and lora_B {B}")
    r, scaling = _rank_and_scaling(module, layout, A[0], config)
    blocks = max(1, A[0] // (B[1] if layout == "conv" else r))
    kernel = A[2:]
    if layout == "conv" and config.use_dora and blocks > 1:
        raise FileRefused("use_dora", f"DoRA on the grouped convolution {module} is not supported")
    if layout == "experts" and (config.use_dora or config.lora_bias):
        raise FileRefused("target_parameters", "not supported together with use_dora or lora_bias, by PEFT too")
    d_out = B[0] // blocks if layout == "conv" else B[0]
    d_in = A[1] * math.prod(kernel)
    r = r // blocks if layout == "conv" else r
    return FactorsSpec(layout, blocks, d_out, d_in, r, scaling, config.lora_bias, config.use_dora, kernel)


def _rank_and_scaling(module: str, layout: Layout, rows: int, config: AdapterConfig) -> tuple[int, float]:
    """r and the scaling. Only for experts does r come from the config: the shape tells E times r."""
    # PEFT wraps a module once more for each further part (MultiheadAttention's out_proj): one rank for all of it.
    names = list(parameters_of(module, config)) if layout == "experts" else [owner_of(module)]
    choices = {(config.rank(name), config.scaling(name, config.rank(name))) for name in names}
    if len(choices) > 1:
        reason = f"differs between parameters of {module}, and the file does not say which tensor is whose"
        raise FileRefused("rank_pattern or alpha_pattern", reason)
    r, scaling = choices.pop()
    if rows != r and (layout != "experts" or rows % r):
        raise FileRefused(module, f"has rank {rows} where the config says {r}")
    if not 0 < scaling <= MAX_SCALING:
        raise FileRefused("lora_alpha", f"gives {module} the scaling {scaling:g}; at most {MAX_SCALING:g} is accepted")
    return r, scaling


def saved_module(tensor: str, parts: Endings) -> str | None:
    """The module of `tensor` that a `modules_to_save` means: PEFT takes every module whose name ends in an entry."""
    path = tensor.split(".")
    modules = (".".join(path[:count]) for count in range(1, len(path)))
    return next((module for module in modules if parts.match(module)), None)


def owner_of(module: str) -> str:
    """The module that the config names; PEFT's wrappers put `.base_layer` below it."""
    return module.partition(".base_layer")[0]


def parameters_of(module: str, config: AdapterConfig) -> Iterator[str]:
    """The full names of the targeted parameters of `module` (PEFT nests one `base_layer` for each further one)."""
    path = owner_of(module)
    for owner in dotted_suffixes(path):
        for parameter in config.parameters.get(owner, ()):
            yield f"{path}.{parameter}"


def _whole(
    name: str, entry: TensorEntry, lora: Mapping[str, Mapping[str, str]], config: AdapterConfig, token_adapters: int
) -> dict[str, Stored]:
    """The full tensor or token rows stored under `name`; refused where the config does not account for it."""
    value = {"value": PREFIX + name}
    if _is_token_rows(name):
        module = name.removesuffix(TOKEN_ROWS)
        spec = TokenSpec(_indices_of(module, config, token_adapters), entry.shape[-1] if entry.shape else 0)
        if entry.shape != (len(spec.indices), spec.d):
            raise FileRefused(name, f"has the shape {entry.shape} for {len(spec.indices)} token indices")
        return {module + TOKEN_SUFFIX: Stored(spec, value)}
    # PEFT saves the weights of embeddings and output layers along with their LoRA, since they may have been resized.
    saved_with_lora = name.endswith(".base_layer.weight") and name.removesuffix(".base_layer.weight") in lora
    trained_bias = config.bias != "none" and name.endswith(".bias")
    trained_whole = saved_module(name, config.saved) is not None
    if ".modules_to_save." in name or ".original_module." in name:
        raise FileRefused("bias", f"{config.bias} together with modules_to_save stores {name} under several names")
    if not (saved_with_lora or trained_bias or trained_whole):
        raise FileRefused(name, "is a tensor that the config does not account for")
    # A bias lies under base_layer only where its module has a lora_A too, which may differ between clients.
    return {name.replace(".base_layer.bias", ".bias"): Stored(FullSpec(entry.shape), value)}


def _is_token_rows(key: str) -> bool:
    return key.endswith(TOKEN_ROWS)


def _indices_of(module: str, config: AdapterConfig, token_adapters: int) -> tuple[int, ...]:
    by_module = config.trainable_token_indices or {}
    if "" in by_module and token_adapters == 1:
        return by_module[""]
    if indices := config.tokens.match(module, ()):
        return indices
    raise FileRefused("trainable_token_indices", f"does not say which rows of {module} the file holds")

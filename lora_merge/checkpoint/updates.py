"""Every update that an adapter's file holds, by name, or each reason to refuse the file.

The config says what the tensors mean, and has to account for each of them: none is left out silently.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

from lora_merge.adapter import FactorsSpec, FullSpec, Layout, Spec, TokenSpec, name_in_base
from lora_merge.checkpoint.config import AdapterConfig
from lora_merge.checkpoint.layout import PREFIX, ROLES, TOKEN_ROWS, TOKEN_SUFFIX, Stored, owner_of, stored_shapes
from lora_merge.checkpoint.naming import Endings, dotted_suffixes
from lora_merge.checkpoint.safetensors_file import FileRefused, TensorEntry

# What wraps a model while it is trained: under such a name PEFT finds no module, and loads nothing, without a word.
_WRAPPERS = (f".{PREFIX}", "._checkpoint_wrapped_module.", "._fsdp_wrapped_module.", "._orig_mod.")
_RESIZED = ("embed_tokens.weight", "lm_head.weight")  # PEFT: EMBEDDING_LAYER_NAMES

Shapes = Mapping[str, tuple[int, ...]]


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
    others: list[str] = []
    for key in entries:
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(FileRefused(key, f"does not begin with {PREFIX}"))
        elif wrapper := next((wrapper for wrapper in _WRAPPERS if wrapper in f".{name}"), None):
            problems.append(FileRefused(key, f"names its module with {wrapper.strip('.')}, by which no model has it"))
        elif suffix := next((suffix for suffix in ROLES if name.endswith(suffix)), None):
            lora.setdefault(name.removesuffix(suffix), {})[suffix] = key
        else:
            others.append(name)
    for module, keys in lora.items():
        try:
            found[module] = _factors(module, keys, entries, config)
        except FileRefused as problem:
            problems.append(problem)
    token_adapters = sum(map(_is_token_rows, entries))
    # PEFT saves embeddings and output layers whole, weight and bias, along with their LoRA: they may have been resized.
    saved = {module for module in lora if f"{PREFIX}{module}.base_layer.weight" in entries}
    for name in others:
        try:
            whole = _whole(name, entries[PREFIX + name], saved, config, token_adapters)
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
    names = {ROLES[suffix]: key for suffix, key in keys.items()}
    expected = {"A", "B"} | ({"bias"} if config.lora_bias else set()) | ({"magnitude"} if config.use_dora else set())
    if len(names) != len(keys):
        raise FileRefused(module, "has a tensor under two names")
    if set(names) != expected:
        raise FileRefused(module, f"has {' and '.join(sorted(names))} where {' and '.join(sorted(expected))} are due")
    shapes = {role: entries[name].shape for role, name in names.items()}
    layout = _layout(module, any("embedding" in suffix for suffix in keys), shapes["A"], config)
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
    return r, scaling


def parameters_of(module: str, config: AdapterConfig) -> Iterator[str]:
    """The full names of the targeted parameters of `module` (PEFT nests one `base_layer` for each further one)."""
    path = owner_of(module)
    for owner in dotted_suffixes(path):
        for parameter in config.parameters.get(owner, ()):
            yield f"{path}.{parameter}"


def _whole(
    name: str, entry: TensorEntry, saved: Collection[str], config: AdapterConfig, token_adapters: int
) -> dict[str, Stored]:
    """The full tensor or token rows stored under `name`; refused where the config does not account for it."""
    value = {"value": PREFIX + name}
    if _is_token_rows(name):
        module = name.removesuffix(TOKEN_ROWS)
        spec = TokenSpec(_indices_of(module, config, token_adapters), entry.shape[-1] if entry.shape else 0)
        if entry.shape != (len(spec.indices), spec.d):
            raise FileRefused(name, f"has the shape {entry.shape} for {len(spec.indices)} token indices")
        return {module + TOKEN_SUFFIX: Stored(spec, value)}
    module, _, part = name.rpartition(".base_layer.")
    saved_with_lora = module in saved and part in ("weight", "bias")
    trained_bias = config.bias != "none" and name.endswith(".bias")
    trained_whole = saved_module(name, config.saved) is not None
    if config.bias != "none" and (".modules_to_save." in name or ".original_module." in name):
        raise FileRefused("bias", f"{config.bias} together with modules_to_save stores {name} under several names")
    if not (saved_with_lora or trained_bias or trained_whole):
        raise FileRefused(name, f"is a tensor that the config does not account for{_of_resizing(name)}")
    # A bias lies under base_layer only where its module has a lora_A too, which may differ between clients.
    full = FullSpec(entry.shape, frozen=not (trained_bias or trained_whole))
    return {name_in_base(name) if name.endswith(".bias") else name: Stored(full, value)}


def _of_resizing(name: str) -> str:
    """What brings an embedding into the file of an adapter that did not train it."""
    if not name.endswith(_RESIZED):
        return ""
    way = "save it with save_embedding_layers=False, or train it (modules_to_save)"
    return f": PEFT saves it along where the vocabulary was resized; {way}"


def _is_token_rows(key: str) -> bool:
    return key.endswith(TOKEN_ROWS)


def _indices_of(module: str, config: AdapterConfig, token_adapters: int) -> tuple[int, ...]:
    by_module = config.trainable_token_indices or {}
    if "" in by_module and token_adapters == 1:
        return by_module[""]
    if indices := config.tokens.match(module, ()):
        return indices
    raise FileRefused("trainable_token_indices", f"does not say which rows of {module} the file holds")


def saved_module(tensor: str, parts: Endings) -> str | None:
    """The module of `tensor` that a `modules_to_save` means: PEFT takes every module whose name ends in an entry."""
    path = tensor.split(".")
    modules = (".".join(path[:count]) for count in range(1, len(path)))
    return next((module for module in modules if parts.match(module)), None)

"""A global adapter merged into its base: one ordinary model folder.

PEFT merges an update into the weight of its layer. A layer that is tied to another one has the same weight, and the
other must not get the update: so layers that are updated apart are untied first. Whether the merged model computes
what base and adapter compute is looked at, and whether the folder holds that model, before the folder has its name.
"""

import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.checkpoint.folder import atomic_folder, check_free
from lora_merge.checkpoint.layout import PREFIX
from lora_merge.checkpoint.overwriting import require_apart
from lora_merge.errors import Problem, RefusedError, UsageError, VerificationError
from lora_merge.evaluation.belonging import require_belonging
from lora_merge.evaluation.models import attach_in_place, load_base, open_adapters
from lora_merge.sources.base_models import find_model
from lora_merge.sources.local import folders_named
from lora_merge.training.base_model import load_tokenizer, positions

PROBE = 32  # tokens by which the merged model is held against base and adapter
TOLERANCE = 1e-3  # of the largest logit; fp32 needs a thousandth of that
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a tokenizer is made of, whichever kind it is; copied as it is, so that it stays the same to the byte.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class Exported:
    """A model folder that was written: its float type, parameters, and bytes on the disk."""

    output: Path
    dtype: str
    parameters: int
    nbytes: int


def export(
    adapter: str | Path,
    base: str,
    output: Path,
    *,
    dtype: str = "fp32",
    force: bool = False,
    tell: Callable[[str], None],
    warn: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the base model with the adapter's update merged into its weights, and the base's tokenizer.

    The update is added in fp32 and rounded once, at the file: added to bf16 weights, much of a small update is lost.

    Args:
        adapter: an adapter's folder or repository, merged or one client's.
        base: the base model's folder or repository id.
        output: the folder to make.
        dtype: of the file: fp32, bf16 or fp16.
        force: replace the model that is at `output`.
        warn: called with a line where the adapter was trained on other weights than the base's.

    Raises:
        UsageError: `output` exists, or the base is not a model.
        RefusedError: the adapter was refused, or does not fit the base, or no model of the base's kind can hold it.
        VerificationError: the merged model is not what base and adapter are together, or cannot be written as it is.
        NotFoundError, NetworkError: the adapter or the base is not there.
    """
    require_apart(output, folders_named([adapter, base]))
    check_free(output, force=force, kind="model")
    with open_adapters([adapter], tell=tell) as opened:
        if len(opened) != 1:
            raise UsageError(f"{adapter} names {len(opened)} adapters; one is exported.")
        found = find_model(base, tell)
        require_belonging(found, [opened[0].adapter], warn)
        load_tokenizer(found)  # a folder without a tokenizer is of no use, so say so before the work
        tell(f"Merging {adapter} into {base} in fp32")
        model = attach_in_place(load_base(found, "fp32", torch.device("cpu")), opened[0].adapter)
    merged, tokens = merged_with(model, str(adapter))
    _round(merged, dtype)
    parameters, expected = merged.num_parameters(), _logits(merged, tokens)
    tell(f"Writing {output}")
    with atomic_folder(output, force=force, kind="model", looked=True, tell=tell) as folder:
        merged.to(DTYPES[dtype]).save_pretrained(folder, safe_serialization=True)
        _copy_tokenizer(found.folder, folder)
        del merged, model  # there may be no room for two
        _require_as_merged(folder, tokens, expected)
    nbytes = sum(path.stat().st_size for path in output.iterdir())
    return Exported(output, dtype, parameters, nbytes)


def merged_with(model: Any, adapter: str) -> tuple[Any, Tensor]:
    """The base of PEFT's `model` with the update of the adapter in its weights, and the tokens it was held to that by.

    `model` is of no use afterwards.

    Raises:
        RefusedError, VerificationError: as `export`.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    lora = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer)}
    rows = [layer for layer in layers.values() if isinstance(layer, TrainableTokensLayer)]
    if lacking := [name for name, layer in lora.items() if _lacks_bias(layer)]:
        more = f" (and of {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        reason = f"trains a bias of {lacking[0]}{more}, and no model of the base's kind has one"
        hint = "Use it as an adapter beside its base."
        raise RefusedError([Problem(adapter, "lora_bias", reason)], hint=hint)
    _untie(model, [*lora.values(), *rows])
    tokens = _probe(model, {token for layer in rows for indices in layer.token_indices.values() for token in indices})
    expected = _logits(model, tokens)
    _merge_rows_below(lora.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on ties, which are undone; what matters is checked below
        merged = model.merge_and_unload(safe_merge=True)
    _say_what_is_tied(merged)
    if not _agree(_logits(merged, tokens), expected):
        raise VerificationError(
            f"{adapter} merged into the base computes something else than beside it: PEFT cannot merge this kind. "
            "Nothing was written.",
            hint="Use it as an adapter beside its base.",
        )
    return merged, tokens


def _round(model: Any, dtype: str) -> None:
    """Give the fp32 weights the values that a file of `dtype` holds; raise `VerificationError` where one has none."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
        if not torch.isfinite(parameter).all():
            raise VerificationError(f"{name} does not fit into {dtype}. Nothing was written.", hint="--dtype fp32")


def _require_as_merged(folder: Path, tokens: Tensor, expected: Tensor) -> None:
    """Raise `VerificationError` where the model in `folder` is not the one that was merged: a kind of tie was lost."""
    from transformers import AutoModelForCausalLM

    written, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"] or not _agree(_logits(written.eval(), tokens), expected):
        raise VerificationError(
            "The merged model is another one once it is read back: the base ties layers in a way that does not outlive "
            "the merge. Nothing was written.",
            hint="Use the adapter beside its base.",
        )


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _merge_rows_below(lora: Iterable[Any]) -> None:
    """Put the trained token rows of a tied output layer into its weight: PEFT would lose those below a LoRA layer."""
    from peft.utils.other import TrainableTokensWrapper

    for layer in lora:
        if isinstance(below := layer.base_layer, TrainableTokensWrapper):
            below.token_adapter.merge(safe_merge=True)
            layer.base_layer = below.token_adapter.base_layer


def _lacks_bias(layer: Any) -> bool:
    return any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None


def _untie(model: Any, updated: Iterable[Any]) -> None:
    """Give each updated layer whose weight another layer has too one of its own."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in updated:
        base = layer.get_base_layer()
        if owners[id(getattr(base, "weight", None))] > 1:
            base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _say_what_is_tied(model: Any) -> None:
    """Have the config say that the output layer has a weight of its own, where it has come to have one."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None or torch.equal(inputs.weight, outputs.weight):
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _probe(model: Any, trained: Collection[int]) -> Tensor:
    """1 x length: tokens of all kinds, half of them from those that were trained apart."""
    length, of = min(PROBE, positions(model) or PROBE), model.config.get_text_config().vocab_size
    some = torch.tensor(sorted(trained)[: length // 2], dtype=torch.long)
    others = torch.randint(of, (length - len(some),), generator=torch.Generator().manual_seed(0))
    return torch.cat([some, others])[None]


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """1 x length x V."""
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)

"""The base model of a recipe: find it, load it, put LoRA on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.config import MAX_R, MAX_SCALING
from lora_merge.errors import UsageError
from lora_merge.recipe import Recipe
from lora_merge.recipe_form import ALL_LINEAR
from lora_merge.sources.base_models import FoundBase, model_in, model_of
from lora_merge.training.agreed import check_known_shape


def find_base(recipe: Recipe, folder: Path | None, tell: Callable[[str], None]) -> FoundBase:
    """The recipe's base model: from `folder`, else from the Hub at the recipe's commit, else from the local cache.

    Raises:
        NotFoundError: no such folder, repository or commit.
        NetworkError: it is not in the cache, and the Hub cannot be reached.
        UsageError: it is not a model with safetensors weights, or the folder's is plainly another one.
    """
    if folder is not None:
        found = model_in(folder, recipe.base_model)
        check_known_shape(found, recipe.base_commit)
        return found
    return model_of(recipe.base_model, recipe.base_commit, tell)


def check_base(base: FoundBase, recipe: Recipe) -> None:
    """Refuse a recipe that its base model or a merge cannot follow, before the weights are read.

    Raises:
        UsageError: no merge takes such a client; or the model is of no known kind, reads fewer tokens, or lacks target
            modules.
    """
    model = skeleton(base)
    if recipe.r > MAX_R or recipe.lora_alpha > MAX_SCALING * recipe.r:
        raise UsageError(
            f"r {recipe.r} and lora_alpha {recipe.lora_alpha}: no merge takes a client of a rank above {MAX_R}, "
            f"or of a scaling lora_alpha / r above {MAX_SCALING:g}."
        )
    most = positions(model)
    if most and recipe.max_length > most:
        raise UsageError(f"max_length {recipe.max_length}: {base.repo} reads at most {most} tokens.")
    if recipe.target_modules == ALL_LINEAR:
        return
    names = {f".{name}" for name, _ in model.named_modules()}
    if missing := [name for name in recipe.target_modules if not any(have.endswith(f".{name}") for have in names)]:
        leaves = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "weight")})
        raise UsageError(
            f"target_modules {', '.join(missing)}: {base.repo} has no such module.",
            hint=f"It has {', '.join(leaves)}; or use {ALL_LINEAR}.",
        )


def skeleton(base: FoundBase) -> Any:
    """The base model without weights: its modules and their shapes, on the device `meta`."""
    import torch
    from transformers import AutoModelForCausalLM

    with _readable(base), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(base), trust_remote_code=False)


def load_tokenizer(base: FoundBase) -> Any:
    """The base model's tokenizer, padding on the right with its own padding token or its end token."""
    from transformers import AutoTokenizer

    with _readable(base):
        tokenizer = AutoTokenizer.from_pretrained(str(base.folder), local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(base: FoundBase, dtype: str) -> Any:
    """The base model for causal language modelling, frozen, in `dtype` (`bf16` or `fp32`), on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    with _readable(base):
        model = AutoModelForCausalLM.from_pretrained(
            str(base.folder),
            config=_config(base),
            dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    model.config.use_cache = False
    return model


def _config(base: FoundBase) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(base.folder), local_files_only=True, trust_remote_code=False)


@contextmanager
def _readable(base: FoundBase) -> Iterator[None]:
    """Turn what transformers says of a folder that it cannot load into a sentence of ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise UsageError(f"{base.folder} is not a causal language model that can be loaded: {first}") from error


def positions(model: Any) -> int | None:
    """How many tokens a model reads at most, as far as its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def add_lora(model: Any, recipe: Recipe) -> Any:
    """The model with the recipe's LoRA on it, in fp32, started from the shared seed."""
    from lora_merge.training.lora_start import freeze_lora_A, start_from_seed

    model = unstarted_lora(model, recipe)
    start_from_seed(model, recipe.seed_lora_A)
    if recipe.freeze_lora_A:
        freeze_lora_A(model)
    return model


def unstarted_lora(model: Any, recipe: Recipe) -> Any:
    """The model, which may be a skeleton, with the recipe's LoRA on it as PEFT starts it."""
    from peft import LoraConfig, get_peft_model

    targets = recipe.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    return get_peft_model(model, config)

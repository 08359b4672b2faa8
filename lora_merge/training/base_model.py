"""The base model of a recipe: find its folder and commit, hash its weights, load it, put LoRA on it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.errors import NetworkError, NotFoundError, UsageError
from lora_merge.recipe import Recipe
from lora_merge.recipe_form import ALL_LINEAR
from lora_merge.statement import BaseModel

# The files that a tokenizer and a model are made of; weights in pickles are never fetched.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class FoundBase:
    """A base model at hand: its folder, and the commit where it came from the Hub (else None)."""

    repo: str
    folder: Path
    commit: str | None

    def statement(self) -> BaseModel:
        """What the client states of its base: repository, commit, and the sha256 of the weights."""
        return BaseModel(self.repo, self.commit, weights_sha256(self.folder))


def find_base(recipe: Recipe, folder: Path | None, tell: Callable[[str], None]) -> FoundBase:
    """The recipe's base model: from `folder`, else from the Hub at the recipe's commit, else from the local cache.

    Raises:
        NotFoundError: no such folder, repository or commit.
        NetworkError: it is not in the cache, and the Hub cannot be reached.
        UsageError: the folder is not a model with safetensors weights.
    """
    if folder is not None:
        if not folder.is_dir():
            raise NotFoundError(f"--base {folder}: there is no such folder.")
        found = FoundBase(recipe.base_model, folder, None)
    else:
        snapshot = _snapshot(recipe, tell)
        found = FoundBase(recipe.base_model, snapshot, snapshot.name)
    if not (found.folder / "config.json").is_file():
        raise UsageError(f"{found.folder} holds no config.json: it is not a model.")
    weight_files(found.folder)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder's weights, sorted: those of its index, or the only one.

    Raises:
        UsageError: there are none, or some are missing.
    """
    names = {"model.safetensors"}
    if (folder / INDEX_NAME).is_file():
        names = indexed(folder / INDEX_NAME)
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UsageError(f"{folder}: the weights lack {', '.join(missing)[:200]}; only safetensors are read.")
    return [folder / name for name in sorted(names)]


def indexed(index: Path) -> set[str]:
    """The weight files that an index names; raises `UsageError` where it is none."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is not an index of weights.") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UsageError(f"{index}: the index names files outside its folder, or none.")
    return names


def weights_sha256(folder: Path) -> str:
    """One sha256 for a model folder's weights: of the lines `NAME SHA256`, one a file, sorted by name.

    The files are those of `weight_files`, so a folder and the Hub's repository agree whatever else they hold.
    """
    hashes = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return weights_digest(hashes)


def weights_digest(hashes: Mapping[str, str]) -> str:
    """What `weights_sha256` says of files with these sha256, by name."""
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_base(base: FoundBase, recipe: Recipe) -> None:
    """Refuse a recipe that its base model cannot follow, before the weights are read.

    Raises:
        UsageError: the model is of no known kind, reads fewer tokens, or lacks target modules.
    """
    model = skeleton(base)
    most = getattr(model.config, "max_position_embeddings", None) or recipe.max_length
    if recipe.max_length > most:
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


def add_lora(model: Any, recipe: Recipe) -> Any:
    """The model with the recipe's LoRA on it, in fp32, started from the shared seed."""
    from lora_merge.training.lora_start import start_from_seed

    model = unstarted_lora(model, recipe)
    start_from_seed(model, recipe.seed_lora_A)
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


def _snapshot(recipe: Recipe, tell: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hint = "Give the weights from a folder: --base DIR"
    where = f"{recipe.base_model}" + (f" at {recipe.base_commit}" if recipe.base_commit else "")
    tell(f"Base model {where}")
    try:
        return Path(
            snapshot_download(
                recipe.base_model, revision=recipe.base_commit, allow_patterns=_WANTED, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise NotFoundError(f"{where} asks for an agreement on its page first, or for a token.", hint=hint) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFoundError(f"The Hub has no {where}, or it is private.", hint=hint) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise NetworkError(f"{where} is not in the local cache, and the Hub cannot be reached.", hint=hint) from error

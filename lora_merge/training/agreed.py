"""What a federation agreed on, held against what is here: the base model's shape and weights, the start of lora_A."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.errors import UsageError, VerificationError
from lora_merge.recipe import LoadedRecipe
from lora_merge.sources.base_models import FoundBase
from lora_merge.sources.hub_cache import cached_file
from lora_merge.statement import BaseModel
from lora_merge.training.job import Job
from lora_merge.training.lora_start import start_of

# What config.json says of a model's tensors. The rest, such as its float type, may differ in a folder of one's own.
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_known_shape(base: FoundBase, revision: str | None) -> None:
    """Raise `UsageError` where a folder is plainly another model than its repository's, of which the cache may know."""
    known = cached_file(base.repo, revision or "main", "config.json")
    if known is None:
        return
    here, there = _config(base.folder / "config.json"), _config(known)
    both = [name for name in _SHAPE if name in here and name in there]
    if others := [f"{name} {here[name]} in place of {there[name]}" for name in both if here[name] != there[name]]:
        raise UsageError(
            f"{base.folder} is not {base.repo}: its config.json has {', '.join(others)}.",
            hint="Give the folder of that model with --base DIR, or leave it out.",
        )


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # loading it will say why
    return config if isinstance(config, dict) else {}


def check_agreed_base(base: BaseModel, loaded: LoadedRecipe, job: Job) -> None:
    """Raise `VerificationError` where the base's weights are not the federation's.

    A recipe's file agrees on none: weights of a folder are then taken at the user's word, which is said.
    """
    agreed = loaded.agreed
    if job.base and not (agreed and agreed.base_weights_sha256):
        job.tell(
            f"The weights of {base.repo} are taken from {job.base}, unchecked. The adapter states their sha256, "
            f"which aggregate compares."
        )
    if agreed and agreed.base_weights_sha256 and base.weights_sha256 != agreed.base_weights_sha256:
        raise VerificationError(
            f"The weights of {base.repo} here are not those that {agreed.repo} was made for "
            f"({str(base.weights_sha256)[:12]} in place of {agreed.base_weights_sha256[:12]}).",
            hint="Give the right ones with --base DIR, or leave it out: they are then downloaded at the agreed commit.",
        )


def check_agreed_start(model: Any, loaded: LoadedRecipe) -> None:
    """Raise `VerificationError` where a module's lora_A does not start as the federation says, bit for bit."""
    agreed = loaded.agreed
    if agreed is None or (here := start_of(model)) == agreed.start:
        return
    wrong = sorted(name for name in here.keys() | agreed.start.keys() if here.get(name) != agreed.start.get(name))
    raise VerificationError(
        f"lora_A does not start as {agreed.repo} says, in {len(wrong)} modules: {', '.join(wrong[:3])}.",
        hint="The base model, torch or transformers differ from those of whoever made the federation.",
    )

"""What a federation agreed on, held against what is here: the base model's weights, the start of lora_A."""

from typing import Any

from lora_merge.errors import VerificationError
from lora_merge.recipe import LoadedRecipe
from lora_merge.statement import BaseModel
from lora_merge.training.lora_start import start_of


def check_agreed_base(base: BaseModel, loaded: LoadedRecipe) -> None:
    """Raise `VerificationError` where the base's weights are not the federation's; a recipe's file agrees on none."""
    agreed = loaded.agreed
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

"""From the accepted clients to the federation that is merged: their weights, and the base model where it is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_merge.adapter import Client
from lora_merge.agreement import agreed_base_model
from lora_merge.checkpoint.base_model import BaseModel, open_base
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import MissingBaseError, NotFoundError
from lora_merge.intake import Accepted


def federation_of(
    inputs: Accepted, alpha: float, base: str | Path | None, device: torch.device, *, to_measure: bool = False
) -> Federation:
    """The accepted clients with their weights, and the base model's tensors where the mean needs them.

    Args:
        to_measure: read the base also where only the size of an update depends on it.

    Raises:
        MissingBaseError: the mean needs base tensors that are not at hand.
    """
    folders = inputs.clients
    clients = [
        Client(client, n, inputs.sketched.get(client, folders[client])) for client, n in inputs.weights.items() if n > 0
    ]
    total = sum(inputs.weights.values())
    conv1d = any(folder.config.fan_in_fan_out for folder in folders.values())
    without = Federation(clients, total, alpha, None, conv1d, device)
    needed = without.needed_base_tensors(to_measure=to_measure)
    model = _base_model(folders, base, needed)
    if model is not None and (missing := [name for name in needed if not model.has(name)]):
        raise NotFoundError(
            f"The base model {base or agreed_base_model(folders)} has no tensor {', '.join(missing[:5])}."
        )
    return Federation(clients, total, alpha, model, conv1d, device)


def _base_model(folders: Mapping[str, PeftFolder], base: str | Path | None, needed: Sequence[str]) -> BaseModel | None:
    """The base as given; else, only where it is needed, what the clients name, from the local cache."""
    if base is not None:
        return open_base(base)
    if not needed:
        return None
    commits = {f.statement.base_model.commit for f in folders.values() if f.statement}
    try:
        name = agreed_base_model(folders)
        return open_base(name or "", commit=commits.pop() if len(commits) == 1 else None)
    except NotFoundError as error:
        why = "A client trained whole tensors or DoRA; their mean, or a rule that measures updates, needs the base"
        raise MissingBaseError(needed, why=why) from error

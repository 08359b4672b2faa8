"""From sources to a federation: every client opened, accepted, weighted; or every reason why not, at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_merge.adapter import Client
from lora_merge.aggregation.compatibility import shape_problems
from lora_merge.aggregation.weights import Weights, resolve_weights
from lora_merge.agreement import agreed_base_model, claim_problems
from lora_merge.checkpoint.base_model import BaseModel, open_base
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import FolderRefused, PeftFolder, open_folder
from lora_merge.errors import MissingBaseError, NotFoundError, Problem, RefusedError, UsageError
from lora_merge.sources.local import find_folders, names_of


@contextmanager
def accepted(sources: Sequence[str | Path]) -> Iterator[dict[str, PeftFolder]]:
    """The clients' open folders by id, sorted.

    Raises:
        NotFoundError: a source names nothing.
        RefusedError: with every problem of every client.
    """
    found = find_folders(sources)
    if not found:
        raise UsageError("No adapter is given.", hint="lora-merge aggregate client-1 client-2 --output global")
    opened: dict[str, PeftFolder] = {}
    problems: list[Problem] = []
    try:
        for folder, name in zip(found, names_of(found), strict=True):
            try:
                client = open_folder(folder)
            except FolderRefused as error:
                problems += error.problems(name)
                continue
            client_id = client.statement.client_id if client.statement else name
            if client_id in opened:
                client.close()
                reason = f"{client_id} is claimed by {opened[client_id].folder} too"
                problems.append(Problem(name, "client_id", reason))
                continue
            opened[client_id] = client
        problems += claim_problems(opened)
        problems += shape_problems([Client(name, 1.0, client) for name, client in opened.items()])
        if problems:
            raise RefusedError(problems)
        yield dict(sorted(opened.items()))
    finally:
        for client in opened.values():
            client.close()


def federation_of(
    folders: Mapping[str, PeftFolder], weights: Weights, alpha: float, base: str | Path | None, device: torch.device
) -> Federation:
    """The accepted clients with their weights, and the base model's tensors where the mean needs them.

    Raises:
        UsageError: a weight is missing or wrong.
        MissingBaseError: the mean needs base tensors that are not at hand.
    """
    counts = [folder.statement.num_examples if folder.statement else None for folder in folders.values()]
    names = {str(folder.folder): client for client, folder in folders.items()}
    n = resolve_weights(list(folders), counts, weights, names=names)
    clients = [Client(client, weight, folder) for (client, folder), weight in zip(folders.items(), n, strict=True)]
    conv1d = any(folder.config.fan_in_fan_out for folder in folders.values())
    without = Federation(clients, alpha, None, conv1d, device)
    needed = without.needed_base_tensors()
    model = _base_model(folders, base, needed)
    if model is not None and (missing := [name for name in needed if not model.has(name)]):
        raise NotFoundError(
            f"The base model {base or agreed_base_model(folders)} has no tensor {', '.join(missing[:5])}."
        )
    return Federation(clients, alpha, model, conv1d, device)


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
        why = "A client lacks a tensor, trained DoRA, or --global-lr is not 1, so the mean depends on the base"
        raise MissingBaseError(needed, why=why) from error

"""From the accepted clients to the federation that is merged: their weights, and the base model where it is needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_merge.adapter import Client, FactorsSpec, TokenSpec, is_frozen
from lora_merge.agreement import agreed_base_model
from lora_merge.checkpoint.base_model import BaseModel, open_base
from lora_merge.checkpoint.federation import Federation, base_name
from lora_merge.checkpoint.layout import TOKEN_SUFFIX
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import MissingBaseError, NotFoundError, Problem, RefusedError
from lora_merge.intake import Accepted
from lora_merge.sources.reference import Tell


def federation_of(
    inputs: Accepted,
    alpha: float,
    base: str | Path | None,
    device: torch.device,
    *,
    to_measure: bool = False,
    tell: Tell = lambda line: None,
) -> Federation:
    """The accepted clients with their weights, and the base model's tensors where the mean needs them.

    Args:
        to_measure: read the base also where only the size of an update depends on it.
        tell: called with a line where the base is found that nobody gave.

    Raises:
        MissingBaseError: the mean needs base tensors that are not at hand.
        RefusedError: no adapter on that base can hold the mean.
    """
    folders = inputs.clients
    clients = [
        Client(client, n, inputs.sketched.get(client, folders[client])) for client, n in inputs.weights.items() if n > 0
    ]
    without = Federation(clients, sum(inputs.weights.values()), alpha, None, stores_transposed(folders), device)
    found = replace(without, base=base_model_for(without, folders, base, to_measure=to_measure, tell=tell))
    if problems := list(_tied_problems(found)):
        raise RefusedError(problems)
    return found


def _tied_problems(federation: Federation) -> Iterator[Problem]:
    """What PEFT has no place for where the base ties its output layer to its embedding.

    Token rows of the embedding alone are then rows of both; beside them nothing else can be said of the output layer
    but by LoRA, nor the same rows of both apart.
    """
    base = federation.base
    if base is None:
        return
    specs = {name: federation.spec(name) for name in federation.names}
    of_rows = {name: spec for name, spec in specs.items() if isinstance(spec, TokenSpec)}
    rows = {base.stored_as(base_name(name, spec)): name for name, spec in of_rows.items()}
    for name, spec in specs.items():
        embedding = rows.get(base.tied_to(base_name(name, spec)))
        if embedding in (None, name) or is_frozen(spec) or isinstance(spec, FactorsSpec):
            continue
        owners = {client.id for client in federation.clients if name in client.adapter.specs}
        of_both = [client.id for client in federation.clients if embedding in client.adapter.specs]
        if set(of_both) - owners or federation.tokens(name) == federation.tokens(embedding):
            tied = f"the base model ties it to {embedding.removesuffix(TOKEN_SUFFIX)}, of which"
            for client in sorted(owners):
                yield Problem(
                    client, name, f"{tied} {', '.join(of_both[:4])} trained token rows: no adapter holds both"
                )


def stores_transposed(folders: Mapping[str, PeftFolder]) -> bool:
    """Whether a client says that its base stores matrices transposed."""
    return any(folder.config.fan_in_fan_out for folder in folders.values())


def base_model_for(
    federation: Federation,
    folders: Mapping[str, PeftFolder],
    base: str | Path | None,
    *,
    to_measure: bool = False,
    tell: Tell = lambda line: None,
) -> BaseModel | None:
    """The base that a merge of `federation` reads: the one given; else, only where its mean needs one, what they name.

    Args:
        folders: the clients' folders.
        to_measure, tell: as of `federation_of`.

    Raises:
        MissingBaseError: it is needed, none is given, and the one that they name is not at hand.
        NotFoundError: the one given is not there, or it has not the tensors that are needed.
    """
    needed = federation.needed_base_tensors(to_measure=to_measure)
    model = open_base(base) if base is not None else _named_base(folders, needed, tell) if needed else None
    if model is not None and (missing := [name for name in needed if not model.has(name)]):
        raise NotFoundError(
            f"The base model {base or agreed_base_model(folders)} has no tensor {', '.join(missing[:5])}."
        )
    return model


def _named_base(folders: Mapping[str, PeftFolder], needed: Sequence[str], tell: Tell) -> BaseModel:
    """The base that the clients name, from a folder or the local cache."""
    commits = {f.statement.base_model.commit for f in folders.values() if f.statement}
    name = agreed_base_model(folders) or ""
    try:
        model = open_base(name, commit=commits.pop() if len(commits) == 1 else None)
    except NotFoundError as error:
        why = "A client has whole tensors or DoRA; their mean, or a rule that measures updates, needs the base"
        raise MissingBaseError(needed, why=why) from error
    # A stranger's config names it: whoever merges should see which files that came to mean here.
    tell(f"The base model {name}, which the adapters name, is read from {model.folder} (another: --base).")
    return model

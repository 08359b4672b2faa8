"""Whether what the clients claim about themselves agrees: ids, base model, recipe, task.

What decides whether the mean makes sense is refused when it differs; what only makes it worse is a warning.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from lora_merge.adapter import Adapter, Client, FactorsSpec
from lora_merge.aggregation.compatibility import kind_of, shape_problems
from lora_merge.checkpoint.peft_folder import Description
from lora_merge.errors import Problem

Clients = Mapping[str, Description]


def claim_problems(clients: Clients) -> list[Problem]:
    """Every reason why these clients' claims cannot all hold of one federation."""
    return [
        *_one_base_model(clients),
        *_one_task(clients),
        *_one_prompt_form(clients),
        *_one_set_of_parameters(clients),
    ]


def federation_problems(clients: Clients, updates: Sequence[Client] | None = None) -> list[Problem]:
    """Every reason why these clients are no federation: their claims, and the shapes of their updates.

    Args:
        updates: what is compared in shape, where that is not each client's own.
    """
    # Shapes are compared, tensors are not read: a description is all of an adapter that this needs.
    own = (Client(name, 1.0, cast(Adapter, description)) for name, description in clients.items())
    updates = list(own) if updates is None else updates
    claims, shapes = claim_problems(clients), shape_problems(updates)
    return [*claims, *_other_bases(clients, claims, shapes), *shapes, *_transposed_by_peft(clients, updates)]


def claim_warnings(clients: Clients) -> list[str]:
    """What differs or is missing without making the mean wrong."""
    warnings = []
    if silent := [name for name, client in clients.items() if _weights_hash(client) is None]:
        do = "do not state the hash of their" if len(silent) > 1 else "does not state the hash of its"
        warnings.append(f"{_list(silent)} {do} base model's weights; taken on trust.")
    if len(names := {client.config.base_model for client in clients.values() if client.config.base_model}) > 1:
        warnings.append(f"the base model is named differently: {_list(sorted(names))}.")
    statements = [client.statement for client in clients.values() if client.statement]
    if len({statement.recipe.digest for statement in statements if statement.recipe}) > 1:
        warnings.append("the clients followed different recipes: LoRA shape, start of lora_A or epochs may differ.")
    if len({statement.seed_lora_A for statement in statements}) > 1:
        warnings.append("the clients' lora_A did not all start from one seed.")
    return warnings


def agreed_base_model(clients: Clients) -> str | None:
    """The base model's name: a repository id where any client gives one, else a name that all share."""
    names = list(dict.fromkeys(client.config.base_model for client in clients.values() if client.config.base_model))
    repositories = [name for name in names if not is_local(name)]
    return next(iter(repositories or names), None)


def is_local(name: str) -> bool:
    """Whether a base model's name is a path on somebody's machine and not a repository id."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or os.path.isdir(name)


def _one_base_model(clients: Clients) -> Iterator[Problem]:
    hashes = {name: value for name, client in clients.items() if (value := _weights_hash(client))}
    yield from _minority(hashes, "base_model.weights_sha256", "trained from other base weights than")
    if len(hashes) == len(clients) and len(set(hashes.values())) == 1:
        return  # the same weights, whatever they are called
    names = {name: c.config.base_model for name, c in clients.items() if c.config.base_model}
    repositories = {name: base for name, base in names.items() if not is_local(base)}
    stated = {name: c.statement.base_model.repo for name, c in clients.items() if c.statement}
    yield from _minority({n: repo for n, repo in stated.items() if repo}, "base_model.repo", "states another base than")
    yield from _minority(repositories, "base_model_name_or_path", "names another base model than")


def _other_bases(clients: Clients, claims: Iterable[Problem], shapes: Iterable[Problem]) -> Iterator[Problem]:
    """What shapes that do not fit may come from: base models that may be others, by their names."""
    hashes = {_weights_hash(client) for client in clients.values()}
    if len(hashes) == 1 and None not in hashes:
        return
    misfits, told = {problem.client for problem in shapes}, {problem.client for problem in claims}
    names = {client: name for client, each in clients.items() if (name := each.config.base_model)}
    fitting = [name for client, name in names.items() if client not in misfits]
    if not fitting:
        return
    usual, count = Counter(fitting).most_common(1)[0]
    for client in sorted((misfits & names.keys()) - told):
        if names[client] != usual:
            reason = f"is {names[client]}, where {count} of {len(names)} clients have {usual}: it may be another model"
            yield Problem(client, "base_model_name_or_path", reason)


def _transposed_by_peft(clients: Clients, updates: Sequence[Client]) -> Iterator[Problem]:
    """What PEFT has no adapter for, or a wrong one, where some module of the adapter is a Conv1D."""
    transposing = [name for name, client in clients.items() if client.config.fan_in_fan_out]
    for client in updates if transposing else ():
        for name, spec in client.adapter.specs.items():
            if isinstance(spec, FactorsSpec) and kind_of(name, spec) in ("experts", "MultiheadAttention"):
                reason = f"cannot be merged with fan_in_fan_out ({transposing[0]}): PEFT has no such adapter"
                yield Problem(client.id, name, reason)
                break


def _one_task(clients: Clients) -> Iterator[Problem]:
    tasks = {name: client.config.task_type for name, client in clients.items() if client.config.task_type}
    yield from _minority(tasks, "task_type", "was trained for another task than")


def _one_prompt_form(clients: Clients) -> Iterator[Problem]:
    forms = {
        name: form
        for name, client in clients.items()
        if client.statement and client.statement.recipe and (form := client.statement.recipe.prompt_form)
    }
    yield from _minority(forms, "recipe.prompt_form", "was trained on another prompt form than")


def _one_set_of_parameters(clients: Clients) -> Iterator[Problem]:
    """A file does not say which targeted parameter a tensor belongs to, so only equal sets can be told apart."""
    sets = {
        name: ", ".join(sorted(client.config.target_parameters))
        for name, client in clients.items()
        if client.config.target_parameters
    }
    yield from _minority(sets, "target_parameters", "targets other parameters than")


def _minority(values: Mapping[str, str], field: str, how: str) -> Iterator[Problem]:
    """A problem for each client whose value is not the one that most have."""
    if not values:
        return
    usual, count = Counter(values.values()).most_common(1)[0]
    for client, value in values.items():
        if value != usual:
            yield Problem(client, field, f"{how} {count} others: {value}, not {usual}")


def _weights_hash(client: Description) -> str | None:
    return client.statement.base_model.weights_sha256 if client.statement else None


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

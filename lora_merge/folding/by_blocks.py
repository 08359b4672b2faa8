"""Folding exactly: what stays is cut out of the global adapter's stacks, and arrivals are stacked beside it.

Blocks carry sqrt(n s) on both factors and nothing that depends on the others, so the result has the bytes of one merge
of the same clients. That holds only while every module is a stack, before and after.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch

from lora_merge.adapter import Client, Factors
from lora_merge.aggregation.blocks import may_share
from lora_merge.agreement import agreed_base_model, is_local
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.checkpoint.planned import DTYPES
from lora_merge.checkpoint.stacks import Run
from lora_merge.folding.global_adapter import GlobalAdapter
from lora_merge.kept import is_untold, ranks_of

Weights = Mapping[str, float]  # n by client id, sorted


def stacked(before: GlobalAdapter, new: Mapping[str, PeftFolder], weights: Weights, device: torch.device) -> Federation:
    """The clients in `weights`: new ones from their folders, the others as runs of neighbouring blocks."""
    position = {client: at for at, client in enumerate(before.contributions)}
    clients: list[Client] = []
    for client, n in weights.items():
        if client in new:
            clients += [Client(client, n, new[client])] if n else []
            continue
        at, last = position[client], clients[-1] if clients else None
        if last and isinstance(last.adapter, Run) and last.adapter.end == at:
            run = before.stacks.run(last.adapter.first, at + 1)
            clients[-1] = Client(last.id, last.n + n, run, stored=True)
        else:
            clients.append(Client(client, n, before.stacks.run(at, at + 1), stored=True))
    present = [client for client in clients if client.adapter.specs]
    return Federation(present, sum(weights.values()), before.ledger.global_lr, None, False, device)


def obstacle(before: GlobalAdapter, new: Mapping[str, PeftFolder], weights: Weights) -> str | None:
    """Why the blocks alone do not determine the bytes of the merge; None where they do."""
    if not before.is_stacked:
        return "the global adapter is more than stacks of its clients' blocks"
    arrivals = {client: folder for client, folder in new.items() if weights[client]}
    if client := next((client for client, folder in arrivals.items() if not folder.is_plain), None):
        return f"{client} trained more than low-rank updates"
    if client := _names_the_base_untold(before, new, weights):
        return f"the base model's name would be a path of {client}, which is not kept"
    stay = {client: at for at, client in enumerate(before.contributions) if client in weights and client not in new}
    for name in sorted({name for folder in arrivals.values() for name in folder.specs} | before.stacks.specs.keys()):
        if reason := _obstacle(name, before, stay, arrivals):
            return reason
    return None


def _names_the_base_untold(before: GlobalAdapter, new: Mapping[str, PeftFolder], weights: Weights) -> str | None:
    """Who of those that stay may give the base its name by a path that is not kept: where nobody names a repository."""
    stay = [each for client, each in before.contributions.items() if client in weights and client not in new]
    if not (untold := [each.client_id for each in stay if is_untold(each)]):
        return None
    name = agreed_base_model({client: new.get(client) or before.descriptions[client] for client in weights})
    return None if name and not is_local(name) else untold[0]


def _obstacle(
    name: str, before: GlobalAdapter, stay: Mapping[str, int], arrivals: Mapping[str, PeftFolder]
) -> str | None:
    bounds = before.stacks.bounds.get(name)
    kept = [at for at in stay.values() if bounds and bounds[at + 1] > bounds[at]]
    if not bounds or not kept:
        return None  # only arrivals have it: nothing stored stands for anybody
    having = [folder for folder in arrivals.values() if name in folder.specs]
    ranks = [before.stacks.rank(name, at, at + 1) for at in kept] + [ranks_of(folder)[name] for folder in having]
    spec = before.stacks.specs[name]
    if sum(ranks) >= min(spec.d_out, spec.d_in):
        return f"{name} is no stack any more, since the ranks sum to {sum(ranks)}"
    were = sum(stop > start for start, stop in pairwise(bounds))
    if len(ranks) < 2 or len(set(ranks)) > 1 or len(kept) == were >= 2:
        return None  # several blocks that were a stack did not share a factor, so with others they still do not

    def blocks() -> Iterator[Factors]:
        yield from (before.stacks.cut(name, at, at + 1) for at in kept)
        for folder in having:
            update = folder[name]
            assert isinstance(update, Factors)
            yield update

    if may_share(blocks(), DTYPES[before.ledger.dtype][1]):
        return f"all clients may share one factor of {name}, whose bits a stack does not keep"
    return None

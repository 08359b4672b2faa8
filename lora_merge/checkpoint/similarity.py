"""How the clients of a federation lie to each other: the Gram matrix of their updates over every module."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lora_merge.adapter import FactorsSpec, FullSpec
from lora_merge.aggregation import gram, inner_products
from lora_merge.aggregation.dora import NotPositive
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.schedule import Advance, over
from lora_merge.checkpoint.federation import Federation
from lora_merge.errors import ALL_CLIENTS, Problem, RefusedError


def gram_of(federation: Federation, threads: ThreadPoolExecutor, advance: Advance | None = None) -> Gram:
    """The Gram matrix of the clients' updates; what would need tensors of the base is named in `not_measured`.

    Args:
        advance: called with 1 for each of `federation.names`.

    Raises:
        RefusedError: a tensor cannot be read or is not finite, or a DoRA client has no effective update.
    """
    parts = over(threads, lambda name: _part(federation, name), federation.names, advance)
    clients = [client.id for client in federation.clients]
    n = [client.n for client in federation.clients]
    return gram.total(clients, n, dict(zip(federation.names, parts, strict=True)))


def _part(federation: Federation, name: str) -> Tensor | None:
    try:
        return _of(federation, name, [client.id for client in federation.clients])
    except inner_products.NotFinite as error:
        raise RefusedError([Problem(ALL_CLIENTS, error.name, "their inner products are not finite")]) from error
    except NotPositive as error:
        client = error.share.client if error.share else ALL_CLIENTS
        raise RefusedError([Problem(client, "lora_magnitude_vector", error.reason)]) from error


def _of(federation: Federation, name: str, clients: list[str]) -> Tensor | None:
    spec = federation.spec(name)
    if isinstance(spec, FactorsSpec):
        own = name not in federation.told_with_the_bias
        return inner_products.of_module(federation.module(name), clients, biases=own)
    if isinstance(spec, FullSpec):
        value, module = federation.value(name), federation.lora_bias_beside.get(name)
        if module is not None:
            return inner_products.of_bias(value, federation.module(module), name, clients)
        return inner_products.of_value(value, name, clients)
    found = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for value in federation.token_values(name).values():
        part = inner_products.of_value(value, name, clients)
        if part is None:
            return None
        found += part
    return found

"""What a ledger keeps of a client so that others can be merged with it later, without its files.

Its claims are what a merge compares between clients, or writes into the merged config; they are read back by the same
strict readers that read a client's own files. Its block ranks say how wide its part of each stack is.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from lora_merge.adapter import FactorsSpec
from lora_merge.agreement import is_local
from lora_merge.checkpoint.config import AdapterConfig, read_config
from lora_merge.checkpoint.peft_folder import Description
from lora_merge.checkpoint.updates import Updates
from lora_merge.errors import Malformed
from lora_merge.ledger import Contribution
from lora_merge.statement import SCHEMA_VERSION, Statement, StatementError

OTHERS = "*"
_CONFIG = ("task_type", "fan_in_fan_out", "bias", "target_parameters")
_STATED = ("base_model", "seed_lora_A")
_BASE = "base_model_name_or_path"
UNTOLD = ""  # in the place of a path


class ClaimsError(Malformed):
    """What a ledger says of a client is malformed. ``field`` names the entry."""


def claims_of(client: Description) -> dict[str, Any]:
    """What to keep of a client's config and statement."""
    config, plain = client.config, AdapterConfig()
    claims: dict[str, Any] = {}
    if config.base_model:
        claims[_BASE] = config.base_model
    for key in _CONFIG:
        if (value := getattr(config, key)) != getattr(plain, key):
            claims[key] = list(value) if isinstance(value, tuple) else value
    if client.statement:
        claims["statement"] = {key: asdict(client.statement)[key] for key in _STATED}
    return claims


def without_paths(contributions: Iterable[Contribution], base_model: str | None) -> list[Contribution]:
    """The contributions as a ledger of this `base_model` may hold them.

    Beside a repository's name, which can be published, no path on somebody's machine is kept. Where the base itself is
    known by nothing but paths, nothing is published; and the name of the merge depends on each of them.
    """
    if base_model is None or is_local(base_model):
        return list(contributions)
    return [
        replace(each, claims={**each.claims, _BASE: UNTOLD}) if each.claims and _is_path(each.claims) else each
        for each in contributions
    ]


def paths_in(contributions: Iterable[Contribution]) -> list[str]:
    """The ids of those whose claims hold a base model's path on somebody's machine."""
    return [each.client_id for each in contributions if each.claims and _is_path(each.claims)]


def is_untold(contribution: Contribution) -> bool:
    """Whether a base model's path was left out of the claims."""
    return (contribution.claims or {}).get(_BASE) == UNTOLD


def _is_path(claims: Mapping[str, Any]) -> bool:
    name = claims.get(_BASE)
    return isinstance(name, str) and is_local(name)


def descriptions_of(contributions: Iterable[Contribution]) -> dict[str, Description]:
    """Each client as its claims describe it, by id: without its shapes, and without its own id and count.

    Raises:
        ClaimsError: somebody's claims are malformed.
    """
    found: dict[str, Description] = {}
    last: Contribution | None = None
    for each in contributions:
        if last is None or (each.claims, each.recipe) != (last.claims, last.recipe):  # neighbours mostly claim the same
            claimed, last = Description(*_claimed(each), Updates()), each
        found[each.client_id] = claimed
    return found


def _claimed(contribution: Contribution) -> tuple[AdapterConfig, Statement | None]:
    claims = dict(contribution.claims or {})
    stated = claims.pop("statement", None)
    config = _config(json.dumps(claims, sort_keys=True))
    if stated is None:
        return config, None
    return config, _statement(json.dumps([stated, contribution.recipe], sort_keys=True))


@lru_cache(maxsize=32)  # the clients of a federation mostly claim the same
def _config(text: str) -> AdapterConfig:
    claims = json.loads(text)
    if unknown := sorted(set(claims) - {_BASE, *_CONFIG}):
        raise ClaimsError(f"claims.{unknown[0][:100]}", "unknown entry")
    config, problems = read_config({"peft_type": "LORA", "init_lora_weights": True, **claims})
    if config is None or problems:
        raise ClaimsError(f"claims.{problems[0].field}", problems[0].reason)
    return config


@lru_cache(maxsize=32)
def _statement(text: str) -> Statement:
    stated, recipe = json.loads(text)
    if not isinstance(stated, dict) or set(stated) != set(_STATED):
        raise ClaimsError("claims.statement", f"must hold {' and '.join(_STATED)}")
    try:
        return Statement.from_json({**stated, "schema_version": SCHEMA_VERSION, "client_id": "any", "recipe": recipe})
    except StatementError as error:
        raise ClaimsError(f"claims.{error.field}", error.reason) from error


def ranks_of(client: Description) -> dict[str, int]:
    """The rank of each of a client's low-rank modules."""
    return {name: spec.r for name, spec in client.specs.items() if isinstance(spec, FactorsSpec)}


def packed(ranks: Mapping[str, int], modules: Iterable[str]) -> dict[str, int]:
    """`ranks` as a ledger holds them: the most common one under `*`, the others by name; 0 where a module is absent."""
    each = {name: ranks.get(name, 0) for name in modules}
    if not each:
        return {OTHERS: 0}
    usual = max(Counter(each.values()).items(), key=lambda item: (item[1], item[0]))[0]
    return {OTHERS: usual, **{name: r for name, r in sorted(each.items()) if r != usual}}


def unpacked(ranks: Mapping[str, int], modules: Iterable[str]) -> dict[str, int]:
    """The rank in each of `modules`, 0 for an absent one; the inverse of `packed`.

    Raises:
        ClaimsError: `*` is missing, or a module is named that is not among `modules`.
    """
    modules = frozenset(modules)
    if OTHERS not in ranks:
        raise ClaimsError("block_ranks", f"must give {OTHERS}")
    if unknown := sorted(ranks.keys() - modules - {OTHERS}):
        raise ClaimsError(f"block_ranks.{unknown[0][:100]}", "is no low-rank module of the adapter")
    return {name: ranks.get(name, ranks[OTHERS]) for name in modules}


def ranks_in(contributions: Iterable[Contribution], modules: Iterable[str]) -> list[Mapping[str, int]]:
    """What `unpacked` gives of each contribution's block ranks; those that are alike are one and the same mapping."""
    modules = frozenset(modules)
    known: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}
    found = []
    for ranks in (each.block_ranks or {} for each in contributions):
        key = tuple(ranks.items())
        if key not in known:
            known[key] = unpacked(ranks, modules)
        found.append(known[key])
    return found

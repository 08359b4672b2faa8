"""The records of a merge: the ledger, the config that PEFT loads, the card."""

import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_merge.aggregation.certificate import relative_error
from lora_merge.aggregation.difference import SquaredError
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.robust import Robust
from lora_merge.agreement import agreed_base_model, is_local
from lora_merge.card.card import global_card
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.layout import TOKEN_SUFFIX
from lora_merge.checkpoint.merge import Merged
from lora_merge.checkpoint.peft_folder import CONFIG_NAME, CORE_NAME, WEIGHTS_NAME, Description, file_sha256
from lora_merge.checkpoint.planned import FactorsMerge, FullMerge, Measured, Settings, TokensMerge
from lora_merge.checkpoint.writer import merged_config
from lora_merge.environment import environment
from lora_merge.intake import Accepted
from lora_merge.kept import claims_of, packed, ranks_of, without_paths
from lora_merge.ledger import FILE_NAME as LEDGER_NAME
from lora_merge.ledger import Certificate, Contribution, Ledger
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock, LockedInput
from lora_merge.screening.measuring import Findings


def contributions_of(
    inputs: Accepted, federation: Federation, hashes: Iterable[Mapping[str, str]]
) -> list[Contribution]:
    """What each client put in; `hashes` in the clients' order."""
    ranks = {client: ranks_of(folder) if inputs.weights[client] else {} for client, folder in inputs.clients.items()}
    modules, total = federation.factor_specs, federation.total
    return [
        Contribution(
            client_id=client,
            source=inputs.refs[client].source,
            commit=inputs.refs[client].commit,
            weight=inputs.weights[client],
            share=inputs.weights[client] / total,
            num_examples=statement.num_examples if statement else None,
            sha256=sha256,
            recipe=asdict(statement.recipe) if statement and statement.recipe else None,
            block_ranks=packed(ranks[client], modules),
            claims=claims_of(folder),
        )
        for (client, folder), sha256 in zip(inputs.clients.items(), hashes, strict=True)
        for statement in [folder.statement]
    ]


def weights_hashes(contributions: Iterable[Contribution]) -> dict[str, str]:
    """The sha256 of each client's weights file."""
    return {each.client_id: each.sha256[WEIGHTS_NAME] for each in contributions}


def lock_of(
    federation: Federation,
    clients: Mapping[str, Description],
    settings: Settings,
    weighting: str,
    contributions: list[Contribution],
    robust: Robust | None = None,
) -> Lock:
    """What a merge is made of; known before anything is merged."""
    return Lock(
        inputs=[LockedInput(c.client_id, c.source, c.commit, dict(c.sha256), c.weight) for c in contributions],
        method=settings.method,
        options=_options(settings) | (robust or Robust()).to_json(),
        global_lr=federation.alpha,
        weighting=weighting,
        dtype=settings.dtype,
        base_model=agreed_base_model(clients),
        environment=environment(federation.device),
        versions={
            "lora-merge": importlib.metadata.version("lora-merge"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _options(settings: Settings) -> dict[str, Any]:
    """What of the options matters to the method; the seed always, since probes have it too."""
    chosen = asdict(settings.options)
    heeded = METHODS[settings.method].heeds | {"seed"}
    return {name: value for name, value in chosen.items() if name in heeded and value is not None}


def ledger_of(
    federation: Federation,
    lock: Lock,
    contributions: list[Contribution],
    measured: Sequence[Measured],
    settings: Settings,
    parent: str | None = None,
) -> Ledger:
    """The record of a finished merge."""
    return Ledger(
        method=lock.method,
        options=lock.options,
        global_lr=lock.global_lr,
        weighting=lock.weighting,
        total_weight=federation.total,
        base_model=lock.base_model,
        contributions=without_paths(contributions, lock.base_model),
        certificate=_certificate(measured, settings),
        forms=dict(sorted(Counter(module.form for module in measured).items())),
        ranks=sorted({module.r for module in measured if module.r is not None}),
        dtype=lock.dtype,
        device=str(federation.device),
        versions=lock.versions,
        parent=parent,
    )


def with_findings(ledger: Ledger, inputs: Accepted, found: Findings) -> Ledger:
    """The record, with what screening left out, let in and measured."""
    norms = {client: float(f"{norm:.6g}") for client, norm in found.norms.items() if math.isfinite(norm)}
    return replace(
        ledger,
        contributions=[replace(each, norm=norms.get(each.client_id, each.norm)) for each in ledger.contributions],
        left_out=inputs.left_out,
        waved_through=[*inputs.waved_through, *found.waved_through],
    )


def _certificate(measured: Sequence[Measured], settings: Settings) -> Certificate:
    errors = {module.name: module.error for module in measured if module.error is not None}
    if settings.certificate == "off":
        return Certificate("off")
    by = {"probes" if error.probes else "exact" for error in errors.values()}
    low_rank = [module for module in measured if module.r is not None]
    gaps = [module.fedavg for module in low_rank if module.fedavg is not None]
    return Certificate(
        measured_by=" and ".join(sorted(by)) or "off",
        whole=_as_json(errors.values()),
        modules={name: part for name, error in errors.items() if (part := _as_json([error])) is not None},
        not_measured=[module.name for module in measured if module.error is None],
        fedavg_would_miss=_as_json(gaps) if len(gaps) == len(low_rank) else None,
    )


def _as_json(errors: Iterable[SquaredError]) -> dict[str, float] | None:
    relative = relative_error(errors)
    return None if relative is None else relative.to_json()


def write_records(
    work: Path, ledger: Ledger, lock: Lock, clients: Mapping[str, Description], merge: Merged, of_core: str | None
) -> Ledger:
    """Write everything but weights and core: adapter_config.json, aggregation.json, lora-merge.lock, README.md.

    The ledger comes back as it was written, with the hashes of the files beside it; `of_core` is that of the core,
    where there is one.
    """
    merged = [each for each in ledger.contributions if each.weight > 0 and each.merged_share != 0]
    configs = [clients[each.client_id].config for each in merged]
    modules = {each.module.name: each.plan.spec for each in merge.merges if isinstance(each, FactorsMerge)}
    whole = [each.name for each in merge.merges if isinstance(each, FullMerge)]
    tokens = {
        each.name.removesuffix(TOKEN_SUFFIX): each.federation.tokens(each.name)
        for each in merge.merges
        if isinstance(each, TokensMerge)
    }
    config = merged_config(configs, modules, tokens, whole) | {"base_model_name_or_path": ledger.base_model}
    (work / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = {CONFIG_NAME: file_sha256(work / CONFIG_NAME), WEIGHTS_NAME: merge.sha256}
    ledger = replace(ledger, files=files | ({CORE_NAME: of_core} if of_core else {}))
    (work / LEDGER_NAME).write_text(ledger.to_json(), encoding="utf-8")
    (work / LOCK_NAME).write_text(lock.to_json(), encoding="utf-8")
    local = ledger.base_model is not None and is_local(ledger.base_model)
    card = global_card(ledger, task_type=config["task_type"], base_is_local=local)
    (work / "README.md").write_text(card, encoding="utf-8")
    return ledger

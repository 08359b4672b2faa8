"""Whatever mixture of kinds the clients bring, the merge is exact by PEFT's own forward pass, or refused by name."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import nn

from lora_merge import aggregate
from lora_merge.errors import RefusedError, UsageError
from tests import models
from tests.adapters import Client, Kind, federation
from tests.dense import error, mean_model

TOLERANCE = 2e-5
SEEDS, AT_A_TIME = 60, 12


@dataclass(frozen=True)
class Family:
    """A base model, and what of it may be adapted: modules, bare parameters, what is trained whole, rows of tokens."""

    build: Callable[[], nn.Module]
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    by_layer: bool = False
    has_biases: bool = True  # without them PEFT's own merge of a lora_bias, the judge here, has no place for it


LLAMA = ("q_proj", "v_proj", "o_proj", "up_proj", "layers.1.mlp.down_proj", "embed_tokens", "lm_head")
FAMILIES = {
    "mixed": Family(
        models.mixed,
        ("attention", "square", "linear", "up", "a_b", "a.b", "head"),
        ("experts.up", "experts.down", "experts.mix"),
        ("head", "experts", "linear"),
    ),
    "llama": Family(
        models.llama,
        LLAMA,
        saved=("lm_head", "embed_tokens", "v_proj"),
        embeddings=("embed_tokens", "lm_head"),
        has_biases=False,
    ),
    "convolutions": Family(
        models.convolutions,
        ("square", "point", "grouped", "line", "cube", "classifier"),
        by_layer=True,
    ),
}


def lora_of(family: Family, random: Random) -> dict[str, Any]:
    """The arguments of one client's LoraConfig: of what PEFT has a switch for, some."""
    chosen = random.sample(family.modules, random.randint(1, 4))
    lora: dict[str, Any] = {"target_modules": chosen, "r": 2 * random.randint(1, 3), "lora_alpha": random.randint(1, 9)}
    if random.random() < 0.3:
        lora["rank_pattern"] = {name: 2 * random.randint(1, 3) for name in random.sample(chosen, 1)}
    if random.random() < 0.3:
        lora["alpha_pattern"] = {name: random.randint(1, 9) for name in random.sample(family.modules, 2)}
    for name, share in {"use_rslora": 0.3, "use_dora": 0.15, "lora_bias": 0.15, "fan_in_fan_out": 0.4}.items():
        lora[name] = random.random() < share
    lora["lora_bias"] &= family.has_biases
    if not family.by_layer:
        lora["bias"] = random.choices(("none", "all", "lora_only"), (0.7, 0.1, 0.2))[0]
    if family.parameters and random.random() < 0.2:
        lora["target_parameters"] = random.sample(family.parameters, random.randint(1, 2))
    if family.saved and random.random() < 0.2:
        lora["modules_to_save"] = random.sample(family.saved, 1)
    if family.embeddings and random.random() < 0.2:
        lora["trainable_token_indices"] = {random.choice(family.embeddings): sorted(random.sample(range(8), 3))}
    return lora


def outcome(family: Family, seed: int, root: Path) -> str:
    """Merge a random federation: `exact` or `refused`; raises where the result is not the mean."""
    random = Random(seed)
    loras = [lora_of(family, random) for _ in range(random.randint(1, 3))]
    if any(lora["use_dora"] for lora in loras):  # then nothing may tell that it is a Conv1D: see test_base
        for lora in loras:
            lora["target_modules"] = [name for name in lora["target_modules"] if name != "square"] or ["up", "point"]
    members = tuple(Client(lora, num_examples=random.randint(1, 9)) for lora in loras)
    kind = Kind("mixture", family.build, members, by_layer=family.by_layer)
    method = random.choice(({"method": "exact"}, {"method": "svd", "rank": "lossless"}))
    alpha = random.choice((1.0, 0.7))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = federation(kind, root)
    except (ValueError, RuntimeError, TypeError):
        return "PEFT has no such client"
    if not (made.base / "config.json").exists():
        (made.base / "config.json").write_text(json.dumps({"model_type": "of our own"}))
    try:
        aggregate(made.clients, root / "global", base=made.base, global_lr=alpha, screening=None, **method)
    except (RefusedError, UsageError):
        return "refused"
    wanted = mean_model(kind, made.clients, kind.weights, alpha)
    assert error(kind, root / "global", wanted) < TOLERANCE, (seed, method, alpha, loras)
    return "exact"


@pytest.mark.parametrize("first", range(0, SEEDS, AT_A_TIME))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_merged_exactly_or_refused(family: str, first: int, tmp_path: Path) -> None:
    seeds = range(first, first + AT_A_TIME)
    found = Counter(outcome(FAMILIES[family], seed, tmp_path / str(seed)) for seed in seeds)
    assert found["exact"] >= 2, found

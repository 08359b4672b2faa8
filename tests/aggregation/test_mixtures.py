"""Whatever mixture of kinds the clients bring, the merge is exact by PEFT's own forward pass, or refused by name."""

import json
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lora_merge import aggregate
from lora_merge.errors import RefusedError, UsageError
from tests import models
from tests.adapters import Client, Kind, federation
from tests.dense import error, mean_model

TOLERANCE = 2e-5
MODULES = ("attention", "square", "linear", "up", "a_b", "a.b", "head")
EXPERTS = ("experts.up", "experts.down", "experts.mix")
SEEDS, AT_A_TIME = 120, 12


def lora_of(random: Random) -> dict[str, Any]:
    """The arguments of one client's LoraConfig: of what PEFT has a switch for, some."""
    chosen = random.sample(MODULES, random.randint(1, 4))
    lora: dict[str, Any] = {"target_modules": chosen, "r": random.randint(1, 5), "lora_alpha": random.randint(1, 9)}
    if random.random() < 0.3:
        lora["rank_pattern"] = {name: random.randint(1, 5) for name in random.sample(chosen, 1)}
    if random.random() < 0.3:
        lora["alpha_pattern"] = {name: random.randint(1, 9) for name in random.sample(MODULES, 2)}
    for name, share in {"use_rslora": 0.3, "use_dora": 0.15, "lora_bias": 0.15, "fan_in_fan_out": 0.4}.items():
        lora[name] = random.random() < share
    lora["bias"] = random.choices(("none", "all", "lora_only"), (0.7, 0.1, 0.2))[0]
    if random.random() < 0.2:
        lora["target_parameters"] = random.sample(EXPERTS, random.randint(1, 2))
    if random.random() < 0.2:
        lora["modules_to_save"] = random.sample(("head", "experts", "linear"), 1)
    return lora


def outcome(seed: int, root: Path) -> str:
    """Merge a random federation: `exact`, or what it was refused for; raises where the result is not the mean."""
    random = Random(seed)
    loras = [lora_of(random) for _ in range(random.randint(1, 3))]
    if any(lora["use_dora"] for lora in loras):  # then nothing may tell that it is a Conv1D: see test_base
        for lora in loras:
            lora["target_modules"] = [name for name in lora["target_modules"] if name != "square"] or ["up"]
    kind = Kind("mixture", models.mixed, tuple(Client(lora, num_examples=random.randint(1, 9)) for lora in loras))
    method = random.choice(({"method": "exact"}, {"method": "svd", "rank": "lossless"}))
    alpha = random.choice((1.0, 0.7))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = federation(kind, root)
    except (ValueError, RuntimeError, TypeError):
        return "PEFT has no such client"
    (made.base / "config.json").write_text(json.dumps({"model_type": "mixed"}))
    try:
        aggregate(made.clients, root / "global", base=made.base, global_lr=alpha, screening=None, **method)
    except (RefusedError, UsageError):
        return "refused"
    wanted = mean_model(kind, made.clients, kind.weights, alpha)
    assert error(kind, root / "global", wanted) < TOLERANCE, (seed, method, alpha, loras)
    return "exact"


@pytest.mark.parametrize("first", range(0, SEEDS, AT_A_TIME))
def test_a_mixture_is_merged_exactly_or_refused(first: int, tmp_path: Path) -> None:
    found = Counter(outcome(seed, tmp_path / str(seed)) for seed in range(first, first + AT_A_TIME))
    assert found["exact"] >= 2, found

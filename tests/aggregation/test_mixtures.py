"""Whatever mixture of kinds the clients bring, the merge is exact by PEFT's own forward pass, or refused by name."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_merge import aggregate
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.robust import Robust, reweigh, weighted_median
from lora_merge.errors import RefusedError, UsageError
from tests import models
from tests.adapters import Client, Federation, Kind, federation
from tests.aggregation.test_gram import measured
from tests.dense import delta_weights, error, mean_model, relative

TOLERANCE = 2e-5
RULES = (Robust(rule="geometric-median"), Robust(clip="0.8x"), Robust(rule="median"))
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


def mixture(family: Family, random: Random, clients: int, root: Path) -> Federation | None:
    """A random federation of up to so many clients; None where PEFT itself has no such client."""
    loras = [lora_of(family, random) for _ in range(random.randint(1, clients))]
    if any(lora["use_dora"] for lora in loras):  # then nothing may tell that it is a Conv1D: see test_base
        for lora in loras:
            lora["target_modules"] = [name for name in lora["target_modules"] if name != "square"] or ["up", "point"]
    members = tuple(Client(lora, num_examples=random.randint(1, 9)) for lora in loras)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = federation(Kind("mixture", family.build, members, by_layer=family.by_layer), root)
    except (ValueError, RuntimeError, TypeError):
        return None
    if not (made.base / "config.json").exists():
        (made.base / "config.json").write_text(json.dumps({"model_type": "of our own"}))
    return made


def outcome(family: Family, seed: int, root: Path) -> str:
    """Merge a random federation: `exact` or `refused`; raises where the result is not the mean."""
    random = Random(seed)
    made = mixture(family, random, 3, root)
    method = random.choice(({"method": "exact"}, {"method": "svd", "rank": "lossless"}))
    alpha = random.choice((1.0, 0.7))
    if made is None:
        return "PEFT has no such client"
    try:
        aggregate(made.clients, root / "global", base=made.base, global_lr=alpha, screening=None, **method)
    except (RefusedError, UsageError):
        return "refused"
    wanted = mean_model(made.kind, made.clients, made.kind.weights, alpha)
    assert error(made.kind, root / "global", wanted) < TOLERANCE, (seed, method, alpha, made.kind.clients)
    return "exact"


@pytest.mark.parametrize("first", range(0, SEEDS, AT_A_TIME))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_merged_exactly_or_refused(family: str, first: int, tmp_path: Path) -> None:
    seeds = range(first, first + AT_A_TIME)
    found = Counter(outcome(FAMILIES[family], seed, tmp_path / str(seed)) for seed in seeds)
    assert found["exact"] >= 2, found


def dense_outcome(family: Family, seed: int, root: Path) -> str:
    """Hold what is told and made of a random federation against its clients' dense updates; raises where it differs.

    The Gram matrix and the certificate of `fedavg` or `svd`, what a robust rule makes of the clients, and how far from
    the mean that is, or what `ties` or `dare` makes of them.
    """
    random = Random(seed)
    made = mixture(family, random, 4, root)
    rule, method = random.choice(RULES), random.choice(({"method": "fedavg"}, {"method": "svd", "rank": 2}))
    if made is None:
        return "PEFT has no such client"
    try:
        found = measured(made.clients, made.base)
        told = aggregate(made.clients, root / "cut", base=made.base, screening=None, **method).ledger.certificate
        robust = aggregate(made.clients, root / "global", base=made.base, robust=rule, screening=None).ledger
    except (RefusedError, UsageError):
        return "refused"
    said = (seed, rule, method, made.kind.clients)
    clients = [delta_weights(made.kind, folder) for folder in made.clients]
    size = {name: torch.zeros_like(delta) for client in clients for name, delta in client.items()}

    def flat(folder: Path) -> Tensor:
        deltas = delta_weights(made.kind, folder)
        assert deltas.keys() <= size.keys(), said
        return torch.cat([deltas.get(name, size[name]).double().flatten() for name in sorted(size)])

    dense, p = torch.stack([flat(folder) for folder in made.clients]), torch.tensor(made.kind.weights).double()
    gram, mean = dense @ dense.mT, p @ dense
    assert not found.not_measured
    assert not told.not_measured
    assert float((found.matrix - gram).abs().max()) < 1e-5 * float(gram.max()), said
    missed = relative(flat(root / "cut") - mean, mean)
    assert told.whole is not None
    assert told.whole["relative_error"] == pytest.approx(missed, rel=6e-3, abs=2e-6), said
    if rule.by_coordinate:
        wanted = weighted_median(dense, p)
    else:
        ruled = reweigh(Gram(found.clients, tuple(made.kind.weights), gram, {}), rule)
        wanted = torch.tensor(ruled.weights).double() @ dense / ruled.total
    assert float((flat(root / "global") - wanted).abs().max()) < TOLERANCE * float(dense.abs().max()), said
    assert robust.from_mean is not None
    assert robust.from_mean["relative_error"] == pytest.approx(relative(wanted - mean, mean), rel=6e-3, abs=1e-4), said
    entries: dict[str, Any] = random.choice(({"method": "ties"}, {"method": "dare"}, {"method": "dare", "density": 1}))
    try:
        sparse = aggregate(made.clients, root / "sparse", base=made.base, rank="lossless", screening=None, **entries)
    except RefusedError:
        return "right"
    apart, told_apart = relative(flat(root / "sparse") - mean, mean), sparse.ledger.from_mean
    assert told_apart is not None
    assert told_apart["relative_error"] == pytest.approx(apart, rel=6e-3, abs=2e-6), (said, entries)
    assert "density" not in entries or apart < TOLERANCE, said
    return "right"


@pytest.mark.parametrize("first", range(0, SEEDS // 2, AT_A_TIME))
@pytest.mark.parametrize("family", ["mixed", "llama"])
def test_what_is_told_of_a_mixture_and_made_of_it_by_a_rule_is_that_of_its_dense_updates_or_refused(
    family: str, first: int, tmp_path: Path
) -> None:
    # PEFT adds out_proj's update twice when it merges an attention into its weights.
    dense = replace(FAMILIES[family], modules=tuple(each for each in FAMILIES[family].modules if each != "attention"))
    found = Counter(dense_outcome(dense, seed, tmp_path / str(seed)) for seed in range(first, first + AT_A_TIME))
    assert found["right"] >= 1, found

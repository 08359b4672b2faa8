"""What can be wrong with one kind of adapter only is refused too, by client and by field."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_merge import aggregate
from lora_merge.errors import RefusedError
from tests.adapters import KINDS, WEIGHTS, edited
from tests.checkpoint.spoil import Spoil, config
from tests.conftest import Federations

BY_NAME = {kind.name: kind for kind in KINDS}


def reshaped(part: str, change: Callable[[Tensor], Tensor], named: str) -> Spoil:
    """Change every tensor whose name holds `part`."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        changed = {name: change(t).contiguous() if part in name else t for name, t in tensors.items()}
        assert any(part in name for name in tensors)
        save_file(changed, folder / WEIGHTS)

    return Spoil(act, named)


def both(*spoils: Spoil) -> Spoil:
    def act(folder: Path) -> None:
        for spoil in spoils:
            spoil.act(folder)

    return Spoil(act, spoils[0].named)


ROWS = "trainable_token_indices"
CASES: dict[tuple[str, str], Spoil] = {
    ("tokens", "one token twice"): config(**{ROWS: [1, 5, 5]}),
    ("tokens", "more tokens than rows"): config(**{ROWS: [1, 5, 7, 9], "named": ""}),
    ("tokens", "a token that is no whole number"): config(**{ROWS: [1, 5, 7.5]}),
    ("tokens", "a token that is true"): config(**{ROWS: [True, 5, 7]}),
    ("tokens", "a negative token"): config(**{ROWS: [-1, 5, 7]}),
    ("tokens", "rows of another width"): reshaped("trainable_tokens", lambda t: t[:, :8], "embed_tokens"),
    ("tokens", "rows that the config does not name"): config(**{ROWS: None}),
    ("convolutions", "a lora_B of more channels than lora_A has"): reshaped(
        "line.lora_B", lambda t: torch.cat([t] * 5, 1), "line"
    ),
    ("convolutions", "a lora_B with a kernel of its own"): reshaped(
        "square.lora_B", lambda t: t.repeat(1, 1, 3, 3), "square"
    ),
    ("convolutions", "a lora_A of other channels"): reshaped("point.lora_A", lambda t: t[:, :4], "point"),
    ("convolutions", "a lora_A with another kernel"): reshaped("square.lora_A", lambda t: t[..., :1], "square"),
    ("convolutions", "other groups than the others'"): reshaped(
        "grouped.lora_B", lambda t: torch.cat([t, t], 1), "grouped"
    ),
    ("convolutions", "a lora_B of two dimensions"): reshaped("line.lora_B", lambda t: t.flatten(1), "line"),
    ("experts", "a rank that does not divide the stack"): config(r=5, named="experts"),
    ("experts", "a rank that makes it another number of experts"): config(
        r=6, rank_pattern={"body": 4}, named="experts"
    ),
    ("experts", "a lora_B for other experts"): reshaped("experts.lora_B", lambda t: t[:, :-1], "experts"),
    ("embedding", "an embedding of another width"): reshaped("embed_tokens.lora_embedding_B", lambda t: t[:8], "embed"),
    ("embedding", "an embedding of another vocabulary"): reshaped(
        "embed_tokens.lora_embedding_A", lambda t: t[:, :30], "embed"
    ),
    ("head with a bias", "a frozen bias of another length"): reshaped(
        "lm_head.base_layer.bias", lambda t: t[:3], "bias"
    ),
    ("head with a bias", "a frozen bias without its weight"): Spoil(
        lambda folder: drop(folder, "lm_head.base_layer.weight"), "lm_head.base_layer.bias"
    ),
    ("lora_bias", "a bias of another length"): reshaped("q_proj.lora_B.bias", lambda t: t[:3], "q_proj"),
    ("bias all", "a bias of another length"): reshaped("o_proj.bias", lambda t: t[:3], "o_proj"),
    ("bias all", "a bias that the config does not train"): config(bias="none", named="bias"),
    ("modules_to_save", "a head of another vocabulary"): reshaped("lm_head", lambda t: t[:30], "lm_head"),
    ("modules_to_save", "a head that the config does not name"): config(modules_to_save=None, named="lm_head"),
    ("DoRA", "a magnitude of another length"): reshaped("q_proj.lora_magnitude", lambda t: t[:8], "q_proj"),
    ("DoRA", "a negative magnitude"): reshaped("q_proj.lora_magnitude", lambda t: -100 * t, "q_proj"),
    ("DoRA", "a magnitude that is not a number"): reshaped(
        "q_proj.lora_magnitude", lambda t: t * float("nan"), "q_proj"
    ),
    ("DoRA", "a magnitude where the config says that there is no DoRA"): config(use_dora=False, named="magnitude"),
    ("MultiheadAttention", "an out_proj without its in_proj"): both(
        Spoil(lambda folder: drop(folder, "attention.lora_"), "attention")
    ),
}


def drop(folder: Path, part: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, folder / WEIGHTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " with ".join(case))
def test_what_is_wrong_with_a_kind_is_refused_by_name(
    case: tuple[str, str], federations: Federations, tmp_path: Path
) -> None:
    made = federations(BY_NAME[case[0]])
    bad = edited(made.clients[0], tmp_path / "in" / "bad")
    CASES[case].act(bad)
    others = [made.clients[1], edited(made.clients[1], tmp_path / "in" / "good")]  # most agree with each other
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusedError) as caught:
        aggregate([bad, *others], tmp_path / "out" / "global", weights="uniform", base=made.base)
    problems = " ".join(f"{problem.client} {problem.field} {problem.reason}" for problem in caught.value.problems)
    assert CASES[case].named in problems
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("value", ["", "q_proj", "CAUSAL", 7, ["CAUSAL_LM"]])
def test_a_task_that_peft_does_not_know_is_refused(value: Any, plain: tuple[Path, ...], tmp_path: Path) -> None:
    bad = edited(plain[0], tmp_path / "in" / "bad", config={"task_type": value})
    with pytest.raises(RefusedError, match="task_type"):
        aggregate([bad, plain[1]], tmp_path / "global")

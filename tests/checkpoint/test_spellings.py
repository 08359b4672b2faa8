"""Adapters as others write them: what PEFT reads alike is merged alike, to the byte."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.checkpoint.peft_folder import open_folder
from tests.adapters import CONFIG, KINDS, WEIGHTS, Kind, edited
from tests.conftest import Federations


def merged(clients: list[Path], base: Path | None, output: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aggregate(clients, output, base=base, certificate="off")
    return (output / WEIGHTS).read_bytes()


def with_adapter_name(key: str) -> str:
    """The key as a model's own state dict has it, with the adapter's name in it."""
    for part in ("lora_A", "lora_B"):
        key = key.replace(f".{part}.", f".{part}.default.")
    if key.endswith((".lora_embedding_A", ".lora_embedding_B")):
        return f"{key}.default"
    return f"{key}.default.weight" if key.endswith(".lora_magnitude_vector") else key


def as_a_parameter(key: str) -> str:
    return f"{key}.weight" if key.endswith(".lora_magnitude_vector") else key


SPELLINGS: dict[str, Callable[[str], str]] = {"an adapter's name": with_adapter_name, "a weight": as_a_parameter}
RESPELLED = [
    (kind, spelling)
    for kind in KINDS
    for spelling in SPELLINGS
    if spelling != "a weight" or any(client.lora.get("use_dora") for client in kind.clients)
]


@pytest.mark.parametrize(("kind", "spelling"), RESPELLED, ids=lambda each: each if isinstance(each, str) else each.name)
def test_a_key_may_have_the_adapters_name_in_it(
    kind: Kind, spelling: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    first = edited(
        made.clients[0],
        tmp_path / "in" / made.clients[0].name,
        tensors=lambda own: {SPELLINGS[spelling](key): tensor for key, tensor in own.items()},
    )
    assert load_file(first / WEIGHTS).keys() != load_file(made.clients[0] / WEIGHTS).keys()
    expected = merged([*made.clients], made.base_argument, tmp_path / "plain")
    assert merged([first, *made.clients[1:]], made.base_argument, tmp_path / "respelled") == expected


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_peft_reads_those_keys_alike(spelling: str, federations: Federations, tmp_path: Path) -> None:
    from peft import PeftModel

    made = federations(next(kind for kind in KINDS if kind.name == "DoRA"))
    own = load_file(made.clients[0] / WEIGHTS)
    respelled = edited(
        made.clients[0],
        tmp_path / "respelled",
        tensors=lambda own: {SPELLINGS[spelling](key): tensor for key, tensor in own.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers comments on PEFT's use of it
        read = PeftModel.from_pretrained(made.kind.build(), respelled).state_dict()
    for key, tensor in own.items():
        assert torch.equal(read[with_adapter_name(key)], tensor)


def test_a_head_that_peft_trains_for_the_task_need_not_be_named(federations: Federations, tmp_path: Path) -> None:
    """Before PEFT 0.11 no config named it."""
    kind = next(kind for kind in KINDS if any(client.lora.get("task_type") == "SEQ_CLS" for client in kind.clients))
    made = federations(kind)
    old = [edited(client, tmp_path / "in" / client.name, config={"modules_to_save": None}) for client in made.clients]
    assert json.loads((made.clients[0] / CONFIG).read_text())["modules_to_save"]
    expected = merged([*made.clients], made.base_argument, tmp_path / "named")
    assert merged(old, made.base_argument, tmp_path / "unnamed") == expected


def test_a_pattern_may_begin_with_a_caret(plain: tuple[Path, ...], tmp_path: Path) -> None:
    """As in PEFT's own documentation: then it is a whole name."""
    modules = sorted(open_folder(plain[0]).specs)
    assert len(modules) > 1

    def with_alphas(client: Path, where: str, patterns: dict[str, int]) -> Path:
        return edited(client, tmp_path / where / client.name, config={"alpha_pattern": patterns})

    whole = {modules[0]: 3}
    ending = modules[1].partition(".")[2]
    carets = [with_alphas(client, "carets", {f"^{modules[0]}": 3, f"^{ending}": 5}) for client in plain]
    names = [with_alphas(client, "names", whole) for client in plain]
    assert merged(carets, None, tmp_path / "a") == merged(names, None, tmp_path / "b")

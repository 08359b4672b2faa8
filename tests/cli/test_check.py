"""`lora-merge check`: everything that push and aggregate would refuse of one adapter, at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import rewrite_json
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import LORA_A, client, poison

__all__ = ["lora_merge"]

TOKEN = "hf_" + "abcdefghij" * 3


def checked(lora_merge: Run, *arguments: str, code: int) -> Any:
    found, out, _ = lora_merge("check", *arguments, "--json")
    assert found == code
    return json.loads(out)


def set_base(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))


def test_a_sound_adapter_is_accepted(lora_merge: Run, tmp_path: Path) -> None:
    set_base(client(tmp_path / "a"), "org/tiny")
    found = checked(lora_merge, "a", code=0)
    assert (found["verdict"], found["refusals"], found["client_id"], found["modules"]) == ("accepted", [], "org/a", 1)
    assert found["norm"] > 0
    assert found["warnings"] == ["org/a does not state the hash of its base model's weights; taken on trust."]
    assert lora_merge("check", "a", "-q")[:2] == (0, "accepted\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "a").rename(tmp_path / "in" / "a")
    assert "adapter     in/a\n" in lora_merge("check", "in/a")[1]


def test_all_that_is_wrong_is_said_at_once_with_who_would_refuse_it(lora_merge: Run, tmp_path: Path) -> None:
    folder = poison(client(tmp_path / "a"), float("nan"))
    set_base(folder, "/home/me/llama")
    (folder / "README.md").write_text(f"{TOKEN}\n")
    (folder / "training_args.bin").write_bytes(b"pickle")
    found = checked(lora_merge, "a", code=3)
    refused = {(each["field"].split(",")[0], *each["by"]) for each in found["refusals"]}
    assert refused == {(LORA_A, "aggregate"), ("adapter_config.json", "push"), ("README.md", "push")}
    assert "revoked" in found["hint"]
    assert found["left_out"] == ["training_args.bin"]
    code, out, err = lora_merge("check", "a")
    assert code == 3
    assert TOKEN not in out + err
    assert "refused by aggregate" in out


def test_a_config_that_is_refused_hides_nothing_of_the_weights(lora_merge: Run, tmp_path: Path) -> None:
    folder = poison(client(tmp_path / "a"), float("inf"))
    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), "stranger": torch.ones(2)}, weights)
    rewrite_json(folder / "adapter_config.json", {"foo": 1, "init_lora_weights": "pissa"})
    (folder / "lora_merge.json").write_text("{")
    by = {each["field"]: " ".join(each["by"]) for each in checked(lora_merge, "a", code=3)["refusals"]}
    both = ("foo", "init_lora_weights", "lora_merge.json", "stranger")
    assert by == {LORA_A: "aggregate", **dict.fromkeys(both, "aggregate push")}


def test_of_values_every_tensor_is_named_and_no_norm_is_given(lora_merge: Run, tmp_path: Path) -> None:
    weights = poison(client(tmp_path / "a"), float("nan")) / "adapter_model.safetensors"
    names = {LORA_A, LORA_A.replace("_A", "_B")}
    sound = LORA_A.replace("layer", "other")
    tensors = {name.replace("layer", module): torch.ones(2, 2) for name in names for module in ("layer", "other")}
    save_file({**tensors, **{name: tensor * float("nan") for name, tensor in load_file(weights).items()}}, weights)
    found = checked(lora_merge, "a", code=3)
    assert {each["field"] for each in found["refusals"]} == names
    assert (found["modules"], found["norm"]) == (2, None)
    assert "norm" not in lora_merge("check", "a")[1]
    assert sound not in lora_merge("check", "a")[1]


def test_what_both_would_refuse_is_said_once(lora_merge: Run, tmp_path: Path) -> None:
    folder = client(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (folder / "lora_merge.json").write_text(f'{{"note": "{TOKEN}"}}')
    found = checked(lora_merge, "a", code=3)
    by = {each["field"]: each["by"] for each in found["refusals"]}
    assert by["peft_type"] == ["aggregate", "push"]
    assert by["lora_merge.json, line 1"] == ["push"]  # a secret is found in what is refused already


def test_a_folder_of_nothing_is_refused_and_none_is_not_found(lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    checked(lora_merge, "empty", code=3)
    assert lora_merge("check", "none")[0] == 4


def test_a_whole_model_is_called_one(lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    (refusal,) = checked(lora_merge, "model", code=3)["refusals"]
    assert refusal["field"] == "config.json"
    assert refusal["reason"].startswith("is that of a whole model, not of a LoRA adapter")
    for command in (("aggregate", "-o", "global"), ("inspect",), ("evaluate", "--base", "model", "--data", "d.jsonl")):
        (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        code, out, err = lora_merge(*command, "model")
        assert code == 3
        assert "config.json: is that of a whole model" in out + err
        assert "No such file" not in out + err


def test_what_an_adapter_does_not_state_is_a_warning(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "a", num_examples=None)
    warnings = " ".join(checked(lora_merge, "a", code=0)["warnings"])
    for said in ("has no lora_merge.json", "states no num_examples", "names no base model"):
        assert said in warnings


def test_that_a_count_of_zero_weighs_nothing_is_a_warning(lora_merge: Run, tmp_path: Path) -> None:
    set_base(client(tmp_path / "a", num_examples=0), "org/tiny")
    assert "it states num_examples 0" in checked(lora_merge, "a", code=0)["warnings"][0]
    assert lora_merge("aggregate", "a", "-o", "global")[0] == 2


def test_a_merged_adapter_is_said_to_be_one(lora_merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        set_base(client(tmp_path / name, seed=seed), "org/tiny")
    assert lora_merge("aggregate", "a", "b", "-o", "global", "-q")[0] == 0
    found = checked(lora_merge, "global", code=0)
    assert (found["verdict"], found["merged_of"]) == ("accepted", 2)
    assert not any("num_examples" in warning or "lora_merge.json" in warning for warning in found["warnings"])
    assert "of 2 clients" in lora_merge("check", "global")[1]


def test_it_takes_one_adapter(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "a")
    client(tmp_path / "b")
    code, _, err = lora_merge("check", "?")
    assert code == 2
    assert "lora-merge inspect" in err


@pytest.mark.parametrize("name", ["\x1b[31mred", "line\nverdict  accepted"])
def test_hostile_names_reach_no_terminal(name: str, lora_merge: Run, tmp_path: Path) -> None:
    poison(client(tmp_path / name, num_examples=None), float("nan"))
    code, out, err = lora_merge("check", name)
    assert code == 3
    assert "\x1b" not in out + err
    assert not any(line.startswith("verdict  accepted") for line in out.splitlines())

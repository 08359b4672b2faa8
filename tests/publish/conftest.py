"""Adapters to publish, and a process that publishes them to the local Hub."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_merge.pipeline import aggregate
from lora_merge.statement import BaseModel, RecipeRef, Statement
from tests.hub.client import Client
from tests.hub.fixture import hub, hub_without_xet, running_hub
from tests.hub.server import LocalHub

__all__ = ["hub", "hub_without_xet", "running_hub"]  # fixtures

BASE = "org/base"
LORA_A = "base_model.model.layer.lora_A.weight"

COMMAND = """
import contextlib, io, os, sys
from lora_merge.cli.main import main
os.environ["HF_TOKEN"] = token
os.chdir(folder)
sys.argv = ["lora-merge", *arguments]
code, out, err = 0, io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
result = [code, out.getvalue(), err.getvalue()]
"""

# How long a publisher waits: between calls, and before a second commit.
WAITS = """
from lora_merge.hub import client
from lora_merge.publish import persistence
client.BACKOFF, persistence.FIRST_WAIT = backoff, first_wait
"""
SHORT: dict[str, Any] = {"backoff": (0.01, 0.02, 0.05, 0.1), "first_wait": 0.05}

Run = Callable[..., tuple[int, str, str]]


def client_folder(folder: Path, *, seed: int = 0, base: str | None = BASE, **changes: Any) -> Path:
    """A client's adapter of one 8 x 8 module, as `train` writes it."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 8, generator=random), torch.randn(8, 2, generator=random)
    save_file({LORA_A: A, LORA_A.replace("_A", "_B"): B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base} | changes))
    statement = Statement(
        client_id=f"org/{folder.name}",
        base_model=BaseModel(base, "a" * 40, "b" * 64),
        num_examples=10,
        recipe=RecipeRef("laptop", "c" * 64, "plain", {"steps": 3}),
        local_epochs=1.5,
        steps=3,
    )
    (folder / "lora_merge.json").write_text(statement.to_json())
    return folder


@pytest.fixture
def client_a(tmp_path: Path) -> Path:
    """The adapter of org/client-a."""
    return client_folder(tmp_path / "client-a")


@pytest.fixture
def merged(tmp_path: Path, client_a: Path) -> Path:
    """The global adapter of two clients that came from folders."""
    aggregate([client_a, client_folder(tmp_path / "client-b", seed=1)], tmp_path / "global")
    return tmp_path / "global"


@pytest.fixture(scope="session")
def publisher(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One process for all tests that publish: importing the package takes seconds. Its waits are short."""
    with Client(running_hub.env(cache=tmp_path_factory.mktemp("publisher"))) as process:
        process.run(WAITS, **SHORT)
        yield process


@pytest.fixture
def run(hub: LocalHub, publisher: Client, tmp_path: Path) -> Run:
    """`run("push", "client-a", "org/x")`: exit code, stdout, stderr, as alice, who may write to org."""
    alice = hub.user("alice", orgs={"org": "write"})

    def call(*arguments: str, token: str = alice) -> tuple[int, str, str]:
        code, out, err = publisher.run(COMMAND, folder=str(tmp_path), arguments=arguments, token=token)
        return code, out, err

    return call

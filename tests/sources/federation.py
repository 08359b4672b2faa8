"""Small adapters on the local Hub, and the command line run against it as a user runs it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lora_merge.statement import Statement
from tests.hub.client import Client
from tests.hub.server import LocalHub

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layer"]}
LORA_A = "base_model.model.layer.lora_A.weight"

RUN = """
import contextlib, io, os, sys
import httpx2
from huggingface_hub.utils import _xet
from lora_merge.cli.main import main
from lora_merge.hub import client, session
_xet.XET_CONNECTION_INFO_CACHE.clear()
client.TIMEOUT, client.CALL_SECONDS, client.LEAST_SECONDS = httpx2.Timeout(timeout), timeout, 0.5
session.XET_SETTINGS |= {
    "HF_XET_CLIENT_READ_TIMEOUT": f"{timeout}s", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": f"{3 * timeout}s",
}
client.BACKOFF = (0.01, 0.02, 0.05, 0.1)
os.environ.pop("HF_TOKEN", None)
if token:
    os.environ["HF_TOKEN"] = token
os.chdir(folder)
sys.argv, stdin, sys.stdin = ["lora-merge", "aggregate", *arguments], sys.stdin, io.StringIO(lines)
out, err = io.StringIO(), io.StringIO()
try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main()
except SystemExit as end:
    code = end.code or 0
finally:
    sys.stdin = stdin
result = [code, out.getvalue(), err.getvalue()]
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Puller:
    """`lora-merge aggregate` in a process that stays, with a cache of its own."""

    client: Client
    home: Path
    folder: Path

    def __call__(self, *arguments: str, token: str = "", lines: str = "", timeout: float = 5) -> Ran:
        given = {"arguments": arguments, "token": token, "lines": lines, "folder": self.folder, "timeout": timeout}
        return Ran(*self.client.run(RUN, **given))

    def forget(self) -> None:
        """Empty the cache."""
        for name in ("hub", "xet"):
            shutil.rmtree(self.home / name, ignore_errors=True)

    @property
    def cached(self) -> list[Path]:
        """The files of the cache that hold contents, or a part of them."""
        return sorted(path for path in self.home.glob("hub/models--*/blobs/*") if path.is_file())


def adapter(
    client_id: str, *, num_examples: int = 10, width: int = 64, layers: int = 1, seed: int = 0
) -> dict[str, bytes]:
    """The files of an adapter of width x width modules; like all safetensors the weights go over LFS or Xet."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        name = LORA_A.replace("layer", f"layer.{layer}") if layers > 1 else LORA_A
        weights[name] = torch.randn(2, width, generator=random)
        weights[name.replace("_A", "_B")] = torch.randn(width, 2, generator=random)
    return {
        "adapter_config.json": json.dumps(CONFIG).encode(),
        "adapter_model.safetensors": save(weights),
        "lora_merge.json": Statement(client_id=client_id, num_examples=num_examples).to_json().encode(),
    }


def publish(hub: LocalHub, count: int, **options: Any) -> dict[str, str]:
    """`org/client-0` and so on, with 10, 20, … examples; each repository's commit."""
    return {
        repo: hub.create(repo, adapter(repo, num_examples=10 * i + 10, seed=i, **options))
        for i, repo in enumerate(f"org/client-{i}" for i in range(count))
    }


def impatient(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the library's own timeouts are a second."""
    return {**environment, "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder

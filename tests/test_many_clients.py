"""More clients than a process may have files open: the limit is raised where it can be, and told where it cannot."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CLIENTS = 150


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    A, B = torch.ones(1, 2), torch.ones(2, 1)
    for number in range(CLIENTS):
        folder = root / f"client-{number:03}"
        folder.mkdir()
        tensors = {"base_model.model.m.lora_A.weight": A, "base_model.model.m.lora_B.weight": B}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return root


@pytest.mark.parametrize(("hard", "code"), [(1000, 0), (CLIENTS - 30, 2)])
def test_a_limit_on_open_files_is_raised_or_told(hard: int, code: int, clients: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_merge", "aggregate", str(clients / "client-*"), "--weights", "uniform"]
    ran = subprocess.run(
        [*command, "-o", str(tmp_path / "global")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (CLIENTS - 30, hard)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code, ran.stderr
    assert (tmp_path / "global").exists() == (code == 0)
    assert ("open files" in ran.stderr) == (code == 2)

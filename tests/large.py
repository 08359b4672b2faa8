"""Adapters large enough that a merge takes a while and torch would use threads; written without PEFT, run in children.

`python -m tests.large ROOT` forks a child for each line of standard input (JSON: `output`, `method`) that merges
ROOT/client-* into `output`, or folds the first `fold` of them onto it, and answers with how it ended. The child is
killed `after` so many seconds, or when it touches a file for the `die_at`-th time.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODULES, WIDTH, RANK, CLIENTS = 12, 512, 16, 4


def write_clients(root: Path, *, modules: int = MODULES, width: int = WIDTH) -> list[Path]:
    """Four clients with twelve 512 x 512 modules of rank 16, or as many and as wide as you say."""
    return [write_client(root / f"client-{i}", seed=i, modules=modules, width=width) for i in range(CLIENTS)]


def write_client(folder: Path, *, seed: int, modules: int = MODULES, width: int = WIDTH, rank: int = RANK) -> Path:
    """One client with so many square modules."""
    import torch
    from safetensors.torch import save_file

    from lora_merge.statement import Statement

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in range(modules):
        name = f"base_model.model.layers.{module}.proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    statement = Statement(client_id=f"org/{folder.name}", num_examples=10 + seed)
    (folder / "lora_merge.json").write_text(statement.to_json())
    return folder


def die_at(count: int, root: Path) -> None:
    """Kill this process at the `count`-th time that it touches a file under `root`."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.", "fcntl.")) and str(root) in str(arguments):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def merge(root: Path, request: dict[str, Any]) -> None:
    """What a child does."""
    from lora_merge import aggregate, fold

    if request.get("die_at"):
        die_at(request["die_at"], root.parent)
    if count := request.get("fold"):
        options = {"method": "svd", "rank": 4} if request["method"] == "svd" else {}
        fold(sorted(root.glob("client-*"))[:count], Path(request["output"]), **options)
        return
    options = {"rank": 16} if request["method"] == "svd" else {}
    options["force"] = request.get("force", False)
    aggregate(sorted(root.glob("client-*")), Path(request["output"]), method=request["method"], **options)


def serve(root: Path) -> None:
    """Fork one child for each request; what a first merge imports is paid once, before that."""
    with tempfile.TemporaryDirectory() as folder:
        merge(root, {"output": f"{folder}/global", "method": "svd"})
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                merge(root, request)
                code = 0
            finally:
                os._exit(code)
        if "after" in request:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)  # a child that has ended is still there, until waited for
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

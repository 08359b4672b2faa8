"""The same clients give the same bytes: in any order, on any number of workers and threads, in any process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import KINDS
from tests.conftest import Federations
from tests.large import write_clients

# Kinds that take different routes through the arithmetic, and the options that each route needs.
CHOSEN = ["linear", "ranks, scalings, modules and float types of each client's own", "convolutions", "experts", "DoRA"]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("exact", {}),
    ("exact", {"dtype": "bf16"}),
    ("svd", {"rank": 2}),
    ("svd", {"rank": "auto", "energy": 0.9}),
]
SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from lora_merge import aggregate
job = json.load(sys.stdin)
found = {}
for name, task in job["tasks"].items():
    output = Path(job["root"]) / name / "global"
    aggregate(task["sources"], output, workers=job["workers"], base=task["base"], **task["options"])
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}
    found[name] = hashes
print(json.dumps(found))
"""


def run(job: dict[str, Any], threads: int) -> dict[str, dict[str, str]]:
    """The hashes of all tasks, from a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def tasks(federations: Federations, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every merge to compare: each chosen kind by each method, and wide modules, on which torch would use threads."""
    found: dict[str, dict[str, Any]] = {}
    wide = [str(folder) for folder in write_clients(tmp_path_factory.mktemp("wide"))]
    for i, (method, options) in enumerate(METHODS):
        found[f"wide-{i}"] = {"sources": wide, "base": None, "options": {"method": method, **options}}
    for kind in KINDS:
        if kind.name in CHOSEN:
            made = federations(kind)
            for i, (method, options) in enumerate(METHODS):
                found[f"{kind.name[:12]}-{i}"] = {
                    "sources": [str(folder) for folder in made.clients],
                    "base": str(made.base) if kind.needs_base else None,
                    "options": {"method": method, **options},
                }
    return found


@pytest.fixture(scope="module")
def first(tasks: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The hashes on one worker of one thread."""
    return run({"tasks": tasks, "root": str(tmp_path_factory.mktemp("one")), "workers": 1}, 1)


def shuffled(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**task, "sources": task["sources"][::-1]} for name, task in tasks.items()}


@pytest.mark.parametrize(("workers", "threads"), [(1, 4), (2, 2), (4, 1)])
def test_bytes_do_not_depend_on_order_workers_or_threads(
    workers: int, threads: int, tasks: dict[str, Any], first: dict[str, Any], tmp_path: Path
) -> None:
    assert run({"tasks": shuffled(tasks), "root": str(tmp_path), "workers": workers}, threads) == first


def test_every_file_is_the_same_and_the_merges_differ_from_each_other(first: dict[str, dict[str, str]]) -> None:
    wanted = {"adapter_config.json", "adapter_model.safetensors", "aggregation.json", "README.md"}
    assert all(set(hashes) >= wanted for hashes in first.values())
    assert len({hashes["adapter_model.safetensors"] for hashes in first.values()}) == len(first)

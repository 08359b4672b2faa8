"""Arrivals by the thousand: `python -m tests.folds 1000`.

Exact: the same clients in several orders, some replaced, some withdrawn and back, some guests that leave again; every
order must end in the bytes of one merge. svd: the time of an arrival, early and late, and the error beside one merge's.
"""

import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_merge import aggregate, fold
from lora_merge.screening.stops import Screening
from lora_merge.statement import FILE_NAME as STATEMENT
from lora_merge.statement import BaseModel, Statement

FILES = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")
NAME = "base_model.model.layer.lora_{}.weight"
ORDERS = 3
SCREENING = Screening(allow_dominant=True)  # in some orders an early one has most of the examples so far


@dataclass(frozen=True)
class Step:
    """One command: a folder that arrives, or a client that is withdrawn."""

    arrives: Path | None = None
    leaves: str | None = None


def write_client(folder: Path, seed: int, width: int, r: int, *, trained: bool = False) -> Path:
    """An adapter of one module, width x width; `trained` ones start from one lora_A and have much in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(10**6)
    A, B = torch.randn(r, width, generator=generator), torch.randn(width, r, generator=generator)
    if trained:
        shared_A, shared_B = torch.randn(r, width, generator=common), torch.randn(width, r, generator=common)
        A, B = shared_A + 0.1 * A, shared_B + 0.5 * B
    folder.mkdir(parents=True)
    save_file({NAME.format("A"): A, NAME.format("B"): B}, folder / FILES[0])
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "base_model_name_or_path": "org/base"}
    (folder / FILES[1]).write_text(json.dumps(config))
    stated = Statement(f"org/{folder.name}", BaseModel("org/base", None, "0" * 64), num_examples=1 + seed % 97)
    (folder / STATEMENT).write_text(stated.to_json())
    return folder


def interleaved(clients: Sequence[Path], former: Sequence[Path], guests: Sequence[Path], seed: int) -> Iterator[Step]:
    """The clients in some order: a part comes as it was before and is replaced, a part leaves and comes again."""
    chance = random.Random(seed)
    steps: list[list[Step]] = []
    for client, before in zip(clients, former, strict=True):
        fate, arrives = chance.random(), Step(client)
        if fate < 0.1:
            steps.append([Step(before), arrives])
        elif fate < 0.15:
            steps.append([arrives, Step(leaves=f"org/{client.name}"), arrives])
        else:
            steps.append([arrives, arrives] if fate < 0.2 else [arrives])  # the second one is nothing new
    steps += [[Step(guest), Step(leaves=f"org/{guest.name}")] for guest in guests]
    yield Step(clients[0])  # so that nobody who leaves is the last one
    while steps:
        at = chance.randrange(len(steps))
        yield steps[at].pop(0)
        steps = [each for each in steps if each]


def ends_of_orders(root: Path, clients: Sequence[Path], former: Sequence[Path], guests: Sequence[Path]) -> None:
    """Print the hashes at the end of each order and of one merge, and the time of an arrival by the global's size."""
    one = root / "one"
    began = time.perf_counter()
    aggregate(clients, one, screening=None, certificate="off")
    print(f"one merge      {shown(one)}  {time.perf_counter() - began:.1f} s")
    for order in range(ORDERS):
        onto, times, count = root / f"order-{order}", list[tuple[int, float]](), 0
        for step in interleaved(clients, former, guests, order):
            began = time.perf_counter()
            leaves = [step.leaves] if step.leaves else []
            fold([step.arrives] if step.arrives else [], onto, withdraw=leaves, screening=SCREENING)
            times.append(((onto / FILES[0]).stat().st_size, time.perf_counter() - began))
            count += 1
        print(f"order {order}        {shown(onto)}  {count} commands")
        assert digest(onto) == digest(one)
        for low, high in ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0)):
            part = times[int(low * count) : int(high * count)]
            size = sum(size for size, _ in part) / len(part) / 1e6
            print(f"   global of {size:7.2f} MB: {1e3 * sum(t for _, t in part) / len(part):7.1f} ms a command")


def digest(folder: Path) -> str:
    """One sha256 over the adapter, its config and its lock."""
    found = hashlib.sha256()
    for name in FILES:
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def shown(folder: Path) -> str:
    return digest(folder)[:16]


def truncated(root: Path, clients: Sequence[Path], rank: int) -> tuple[float, float, list[float]]:
    """Fold the clients one by one to `rank`: its error, that of one merge to that rank, and each arrival's seconds."""
    onto, one, times = root / "svd", root / "svd-one", []
    for client in clients:
        began = time.perf_counter()
        fold([client], onto, screening=SCREENING, **({} if onto.exists() else {"method": "svd", "rank": rank}))
        times.append(time.perf_counter() - began)
    aggregate(clients, one, method="svd", rank=rank, screening=None, certificate="off")
    mean = mean_of(clients)
    return error(onto, mean), error(one, mean), times


def mean_of(clients: Sequence[Path]) -> Tensor:
    """The mean of the clients' updates, dense and in fp64."""
    n = [json.loads((client / STATEMENT).read_text())["num_examples"] for client in clients]
    return sum(count / sum(n) * update_of(client) for count, client in zip(n, clients, strict=True))  # type: ignore[return-value]


def update_of(folder: Path) -> Tensor:
    """scaling * B @ A of an adapter of one module."""
    config, tensors = json.loads((folder / FILES[1]).read_text()), load_file(folder / FILES[0])
    return config["lora_alpha"] / config["r"] * tensors[NAME.format("B")].double() @ tensors[NAME.format("A")].double()


def error(folder: Path, mean: Tensor) -> float:
    return float((update_of(folder) - mean).norm() / mean.norm())


def main(count: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root, width = Path(scratch), count + count // 8 + 40
        names = [f"client-{i:04}" for i in range(count)]
        clients = [write_client(root / "now" / name, i, width, 1) for i, name in enumerate(names)]
        former = [write_client(root / "former" / name, count + i, width, 1) for i, name in enumerate(names)]
        guests = [write_client(root / "guests" / f"guest-{i}", 3 * count + i, width, 1) for i in range(count // 50 + 1)]
        print(f"{count} clients of rank 1 of a module {width} x {width}")
        ends_of_orders(root, clients, former, guests)
        trained = [write_client(root / "trained" / name, i, 512, 4, trained=True) for i, name in enumerate(names)]
        folded, once, times = truncated(root, trained, 8)
        early, late = sum(times[5:15]) / 10, sum(times[-10:]) / 10
        print(f"svd to rank 8 of {count} clients of rank 4 of a module 512 x 512")
        print(f"   about arrival 10: {1e3 * early:.1f} ms; the last ten: {1e3 * late:.1f} ms: {late / early:.2f} times")
        print(
            f"   relative error {folded:.6f}, of one merge {once:.6f}: {folded / once:.6f} times (wanted: 1.05 at most)"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)

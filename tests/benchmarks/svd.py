"""`svd` to rank 16 beside PEFT's own `svd` of the same adapters, and of a whole 7B Llama.

    python tests/benchmarks/svd.py

PEFT's takes half a minute and 3 GB for one 4096 x 4096 module. For the second part ten clients of a 7B Llama (1.6 GB)
are written to TMPDIR, and removed at the end; --one-module leaves it out.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama_7b import LAYERS, RANK, temporary_folder, write_clients
from torch import Tensor, nn

from lora_merge import aggregate
from lora_merge.adapter import Factors, spec_of
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.registry import Options

WIDTH, CLIENTS, ALPHA = 4096, 10, 32.0
P = [n / sum(range(1, CLIENTS + 1)) for n in range(1, CLIENTS + 1)]
WANTED_TIMES, WANTED_DIFFERENCE, WANTED_SECONDS = 500, 1e-4, 30


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    one_module(arguments.threads)
    if not arguments.one_module:
        with temporary_folder() as root:
            whole_adapter(root, arguments.layers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both, for the one module")
    parser.add_argument("--one-module", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script itself")
    return parser.parse_args()


def one_module(threads: int) -> None:
    """The same ten updates through both, against the dense mean."""
    random = torch.Generator().manual_seed(0)
    updates = [
        Factors(
            torch.randn(1, WIDTH, RANK, generator=random), torch.randn(1, RANK, WIDTH, generator=random), ALPHA / RANK
        )
        for _ in range(CLIENTS)
    ]
    with torch.inference_mode():
        M = sum(p * u.scaling * (u.B[0].double() @ u.A[0].double()) for p, u in zip(P, updates, strict=True))
        merge_by_us = partial(ours, module_of(updates))
        theirs, (wall_peft, cpu_peft) = timed(partial(peft_svd, peft_model(updates)))
        merge_by_us()
        runs = [timed(merge_by_us)[1] for _ in range(10)]
        wall, cpu = (statistics.median(run[clock] for run in runs) for clock in (0, 1))
        errors = [float((delta.double() - M).norm() / M.norm()) for delta in (dense(theirs), dense(merge_by_us()))]
    print(f"one {WIDTH} x {WIDTH} module, {CLIENTS} adapters of rank {RANK}, to rank {RANK}, {threads} thread(s)")
    print(f"{'':12}{'wall s':>9}{'cpu s':>9}{'relative error':>17}")
    print(f"{'PEFT':12}{wall_peft:9.3f}{cpu_peft:9.3f}{errors[0]:17.6f}")
    print(f"{'lora-merge':12}{wall:9.3f}{cpu:9.3f}{errors[1]:17.6f}   (median of {len(runs)})")
    print(f"times faster: {wall_peft / wall:.0f} by the wall, {cpu_peft / cpu:.0f} by the CPU (wanted: {WANTED_TIMES})")
    print(f"the errors differ by {abs(errors[0] - errors[1]):.1e} (wanted: {WANTED_DIFFERENCE:.0e} at most)")


def module_of(updates: list[Factors]) -> Module:
    shares = [
        Share(f"client-{i}", p, spec_of(u), partial(_same, u)) for i, (p, u) in enumerate(zip(P, updates, strict=True))
    ]
    return Module("layer", tuple(shares), sum(P))


def _same(update: Factors) -> Factors:
    return update


def ours(module: Module) -> tuple[Tensor, Tensor]:
    merged = METHODS["svd"].plan(module, Options(rank=RANK)).merge()
    return merged.B[0], merged.A[0]


def peft_model(updates: list[Factors]) -> Any:
    """A model of one layer with an adapter of each client."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), config, adapter_name="client_0")
    for i, update in enumerate(updates):
        if i:
            model.add_adapter(f"client_{i}", config)
        layer = model.base_model.model[0]
        layer.lora_A[f"client_{i}"].weight.data.copy_(update.A[0])
        layer.lora_B[f"client_{i}"].weight.data.copy_(update.B[0])
    return model


def peft_svd(model: Any) -> tuple[Tensor, Tensor]:
    names = [f"client_{i}" for i in range(CLIENTS)]
    model.add_weighted_adapter(names, P, "merged", combination_type="svd", svd_rank=RANK)
    layer = model.base_model.model[0]
    return layer.scaling["merged"] * layer.lora_B["merged"].weight, layer.lora_A["merged"].weight


def dense(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0].double() @ factors[1].double()


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What `work` returns, and its seconds on the wall and on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def whole_adapter(root: Path, layers: int) -> None:
    clients = write_clients(root / "clients", CLIENTS, layers=layers)
    print(f"a whole adapter of {layers} layers, {CLIENTS} clients, to rank {RANK}, {len(os.sched_getaffinity(0))} CPUs")
    for certificate in ("off", None):
        merge = partial(aggregate, clients, root / "global", method="svd", rank=RANK, certificate=certificate)
        _, (wall, cpu) = timed(merge)
        shutil.rmtree(root / "global")
        what = "without the certificate" if certificate else "with it"
        wanted = f" (wanted: under {WANTED_SECONDS} on two)" if certificate else ""
        print(f"{what:24}{wall:9.1f} s on the wall, {cpu:.1f} s of CPU{wanted}")


if __name__ == "__main__":
    main()

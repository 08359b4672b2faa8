"""How long each rule takes beside the plain exact merge: ten rank-16 clients of a few 4096 x 4096 modules, one thread.

    python -m tests.benchmarks.robust [--clients 10] [--size 4096] [--modules 2] [--rank 16] [--only NAME,…]

Arithmetic only, in processor seconds: the clients' factors are in memory, and nothing is written.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from lora_merge.adapter import Factors, spec_of
from lora_merge.aggregation import coordinates, gram, inner_products, robust
from lora_merge.aggregation.coordinates import Coordinates
from lora_merge.aggregation.gram import Gram
from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.registry import Options
from lora_merge.aggregation.robust import Robust

AT_64 = Options(rank=64)


def module(name: str, clients: int, size: int, rank: int) -> Module:
    """A module that all clients share something of, with weights 1, 2, 3…"""
    generator = torch.Generator().manual_seed(len(name))
    common = torch.randn(1, size, rank, generator=generator)
    shares = []
    for i in range(clients):
        B = common + torch.randn(1, size, rank, generator=generator)
        update = Factors(B, torch.randn(1, rank, size, generator=generator), 2.0)
        shares.append(Share(f"client-{i:03}", i + 1.0, spec_of(update), lambda update=update: update))  # type: ignore[arg-type,misc]
    return Module(name, tuple(shares), sum(share.n for share in shares))


def gram_of(modules: list[Module]) -> Gram:
    clients = [share.client for share in modules[0].shares]
    parts = {each.name: inner_products.of_module(each, clients) for each in modules}
    return gram.total(clients, [share.n for share in modules[0].shares], parts)


def runs(modules: list[Module], found: Gram) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each rule by name; the weight rules without their Gram matrix, which is timed apart."""
    clients = len(found.clients)
    yield "exact (a plain stack)", lambda: [METHODS["exact"].plan(each, Options()).merge() for each in modules]
    yield "Gram matrix", lambda: gram_of(modules)
    yield "clipping", lambda: robust.reweigh(found, Robust(clip="3x"))
    yield "geometric median", lambda: robust.reweigh(found, Robust(rule="geometric-median"))
    yield "Krum", lambda: robust.reweigh(found, Robust(rule="krum", byzantine=(clients - 3) // 2))
    for name, rule in (("median", Coordinates()), ("trimmed mean", Coordinates(0.1))):
        yield f"{name}, whole", lambda rule=rule: [_written(each, rule, "exact") for each in modules]  # type: ignore[misc]
        yield f"{name}, rank 64", lambda rule=rule: [_written(each, rule, "svd") for each in modules]  # type: ignore[misc]
    for name in ("ties", "dare"):
        yield f"{name}, rank 64", lambda name=name: [METHODS[name].plan(each, AT_64).merge() for each in modules]  # type: ignore[misc]


def _written(each: Module, rule: Coordinates, method: str) -> Factors:
    return coordinates.plan(each, rule, method, AT_64).merge()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("clients", 10), ("size", 4096), ("modules", 2), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    modules = [module("q" * (i + 1), given.clients, given.size, given.rank) for i in range(given.modules)]
    found = gram_of(modules)
    for name, run in runs(modules, found):
        if given.only in name:
            started = time.thread_time()
            run()
            print(f"{name:22} {(time.thread_time() - started) / given.modules:9.4f} s a module", flush=True)


if __name__ == "__main__":
    main()

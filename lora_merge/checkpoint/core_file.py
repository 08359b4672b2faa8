"""`aggregation_core.safetensors`: for each module the core that arrivals are folded into, and what it has lost."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented there

from lora_merge.adapter import Factors, FactorsSpec, Spec
from lora_merge.aggregation.core import TIMES, core_of, core_rank
from lora_merge.aggregation.registry import Options
from lora_merge.aggregation.schedule import over
from lora_merge.checkpoint.federation import Federation
from lora_merge.checkpoint.peft_folder import CORE_NAME, PeftFolder
from lora_merge.checkpoint.safetensors_file import FileRefused, SafetensorsFile, open_safetensors
from lora_merge.checkpoint.writer import SafetensorsWriter
from lora_merge.errors import ALL_CLIENTS, Problem, RefusedError

ROUNDED_UP = 1 + 1e-6  # a bound may not shrink when it is written as fp32


@dataclass(frozen=True)
class StoredCore:
    """An open core; an `Adapter` that stands for all clients so far, with n s in its factors."""

    file: SafetensorsFile
    modules: Mapping[str, FactorsSpec]

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        ranks = {name: self.file.entries[f"{name}.core_A"].shape[1] for name in self.modules}
        return {name: replace(spec, r=ranks[name], scaling=1.0) for name, spec in self.modules.items()}

    def __getitem__(self, module: str) -> Factors:
        return Factors(self.file.read(f"{module}.core_B"), self.file.read(f"{module}.core_A"), 1.0)

    def dropped(self, module: str) -> float:
        """The norm of what the core of a module has lost; 0 of one that it does not have."""
        return float(self.file.read(f"{module}.dropped")) if module in self.modules else 0.0


def open_core(adapter: PeftFolder, rank: int) -> StoredCore:
    """The core beside a merged adapter of rank `rank`.

    Raises:
        FileRefused: it is not of that adapter.
        OSError: there is none.
    """
    modules = {name: spec for name, spec in adapter.specs.items() if isinstance(spec, FactorsSpec)}
    file = open_safetensors(adapter.folder / CORE_NAME)
    try:
        expected = {f"{name}.{part}" for name in modules for part in ("core_A", "core_B", "dropped")}
        if wrong := sorted(expected ^ file.entries.keys()):
            raise FileRefused(wrong[0], "is missing" if wrong[0] in expected else "is of no module of the adapter")
        for name, spec in modules.items():
            _check(file, name, spec, rank)
    except BaseException:
        file.close()
        raise
    return StoredCore(file, modules)


def _check(file: SafetensorsFile, name: str, spec: FactorsSpec, rank: int) -> None:
    A, B = file.entries[f"{name}.core_A"].shape, file.entries[f"{name}.core_B"].shape
    k = A[1] if len(A) == 3 else 0
    if not 1 <= k <= min(TIMES * rank, spec.d_in, spec.d_out) or A != (spec.blocks, k, spec.d_in):
        raise FileRefused(f"{name}.core_A", f"has the shape {A}, which is not of its module")
    if B != (spec.blocks, spec.d_out, k):
        raise FileRefused(f"{name}.core_B", f"has the shape {B}, which is not of its module")
    if file.entries[f"{name}.dropped"].shape != (1,) or not float(file.read(f"{name}.dropped")) >= 0:
        raise FileRefused(f"{name}.dropped", "must be one number from 0 up")


def write_core(
    federation: Federation, options: Options, path: Path, before: StoredCore | None, threads: ThreadPoolExecutor
) -> str:
    """Write the core of all clients of `federation`, the first of which may stand for the core `before`.

    Returns:
        Its sha256, in hex.
    """
    assert isinstance(options.rank, int)
    modules = [federation.module(name) for name in federation.factor_specs]
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        k, spec = core_rank(module, options.rank), module.spec
        shapes |= {f"{module.name}.core_A": (spec.blocks, k, spec.d_in), f"{module.name}.dropped": (1,)}
        shapes[f"{module.name}.core_B"] = (spec.blocks, spec.d_out, k)
    writer, rank = SafetensorsWriter(path, shapes, "F32"), options.rank

    def write(at: int) -> None:
        module = modules[at]
        core = core_of(module, rank, before.dropped(module.name) if before else 0.0, seed=options.seed)
        writer.write(f"{module.name}.core_A", core.A.cpu())
        writer.write(f"{module.name}.core_B", core.B.cpu())
        writer.write(f"{module.name}.dropped", torch.tensor([core.dropped * ROUNDED_UP]))

    try:
        over(threads, write, range(len(modules)))
        return writer.sha256()
    except LinAlgError as error:
        reason = "a client's or the core's numbers are so large that their singular values cannot be computed"
        raise RefusedError([Problem(ALL_CLIENTS, CORE_NAME, reason)]) from error
    finally:
        writer.close()

"""The shared start of lora_A: the same bytes on every machine, device and thread count.

What the clients' lora_A start from decides how well their mean can be kept at a small rank, so the recipe's seed fixes
it. `torch.rand` on the CPU is a plain counter-like stream; `randn` and `uniform_` are vectorised differently on
different processors and give other bytes.
"""

import hashlib
import math
from typing import Any

import torch


def start_from_seed(model: Any, seed: int, adapter_name: str = "default") -> int:
    """Overwrite every LoRA factor of a PEFT model with its seeded start; returns the number of modules.

    lora_A is uniform within 1 / sqrt(fan_in), as PEFT draws it; lora_B is zero. On an embedding PEFT has it the other
    way round: lora_A is zero, and lora_B has unit variance.
    """
    from peft.tuners.lora import LoraLayer

    modules = 0
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        if adapter_name in module.lora_A:
            _fill(module.lora_A[adapter_name].weight, seed, name, bound=None)
            _zero(module.lora_B[adapter_name].weight)
            modules += 1
        if adapter_name in module.lora_embedding_A:
            _zero(module.lora_embedding_A[adapter_name])
            _fill(module.lora_embedding_B[adapter_name], seed, name, bound=math.sqrt(3))
            modules += 1
    return modules


def seeded_uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 values in [-bound, bound) that depend on `seed`, `name` and `shape` only. `shape` as the factor's."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    # Two steps, so that no compiler fuses them into one rounding.
    values = values.sub_(0.5)
    return values.mul_(2 * bound)


@torch.no_grad()
def _fill(factor: torch.Tensor, seed: int, name: str, bound: float | None) -> None:
    fan_in = math.prod(factor.shape[1:])
    factor.copy_(seeded_uniform(seed, name, tuple(factor.shape), 1 / math.sqrt(fan_in) if bound is None else bound))


@torch.no_grad()
def _zero(factor: torch.Tensor) -> None:
    factor.zero_()

"""The shared start of lora_A: the same bytes on every machine, device and thread count.

What the clients' lora_A start from decides how well their mean can be kept at a small rank, so the recipe's seed fixes
it. `torch.rand` on the CPU is a plain counter-like stream; `randn` and `uniform_` are vectorised differently on
different processors and give other bytes.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from lora_merge.errors import UsageError

ADAPTER = "default"  # PEFT's name of a model's only adapter


def start_from_seed(model: Any, seed: int) -> int:
    """Overwrite every LoRA factor of a PEFT model with its seeded start; returns the number of modules.

    lora_A is uniform within 1 / sqrt(fan_in), as PEFT draws it; lora_B is zero. On an embedding PEFT has it the other
    way round: lora_A is zero, and lora_B has unit variance.
    """
    modules = 0
    for name, drawn, zero, bound in _factors(model):
        _fill(drawn, seeded_uniform(seed, name, tuple(drawn.shape), bound))
        _zero(zero)
        modules += 1
    return modules


def start_of(model: Any) -> dict[str, str]:
    """The sha256 of the factor that each module starts from, as the model holds it: fp32, little-endian."""
    return {name: _sha256(drawn) for name, drawn, _, _ in _factors(model)}


def seeded_start(model: Any, seed: int) -> dict[str, str]:
    """What `start_of` will be after `start_from_seed`. The model may be on the device `meta`: shapes are enough."""
    return {
        name: _sha256(seeded_uniform(seed, name, tuple(drawn.shape), bound))
        for name, drawn, _, bound in _factors(model)
    }


def freeze_lora_A(model: Any) -> None:
    """Leave lora_A as it started, so that only lora_B is trained.

    Raises:
        UsageError: an embedding has LoRA; its lora_A starts at zero, and frozen there it would learn nothing.
    """
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            raise UsageError(f"freeze_lora_A: {name} is of an embedding, whose lora_A starts at zero.")
        if "lora_A" in name:
            parameter.requires_grad_(False)


def _factors(model: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """Each module's name, the factor that is drawn, the factor that is zero, and the bound of what is drawn."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        if ADAPTER in module.lora_A:
            drawn = module.lora_A[ADAPTER].weight
            fan_in = math.prod(drawn.shape[1:])
            yield name, drawn, module.lora_B[ADAPTER].weight, 1 / math.sqrt(fan_in)
        if ADAPTER in module.lora_embedding_A:
            yield name, module.lora_embedding_B[ADAPTER], module.lora_embedding_A[ADAPTER], math.sqrt(3)


def seeded_uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 values in [-bound, bound) that depend on `seed`, `name` and `shape` only. `shape` as the factor's."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    # Two steps, so that no compiler fuses them into one rounding.
    values = values.sub_(0.5)
    return values.mul_(2 * bound)


@torch.no_grad()
def _fill(factor: torch.Tensor, values: torch.Tensor) -> None:
    factor.copy_(values)


@torch.no_grad()
def _zero(factor: torch.Tensor) -> None:
    factor.zero_()


def _sha256(factor: torch.Tensor) -> str:
    values = factor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()

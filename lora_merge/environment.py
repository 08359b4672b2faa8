"""The device that a name means here, and what the bytes of a factorisation may depend on: torch, BLAS, CPU, device."""

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import UsageError

if TYPE_CHECKING:  # torch is imported where it is asked, so that a name can be judged without it
    import torch


def device_kind(name: str, kinds: Sequence[str] = ("cpu", "cuda")) -> tuple[str, int]:
    """`auto`, one of `kinds`, or `cuda:INDEX`, as its kind and its index.

    Raises:
        UsageError: it is none of them.
    """
    kind, colon, index = name.partition(":")
    if kind not in ("auto", *kinds) or (colon and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"--device must be {', '.join(('auto', *kinds))} or cuda:INDEX, is {name!r}.")
    return kind, int(index or 0)


def device_named(name: str) -> "torch.device":
    """The device that `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or `cuda:INDEX` means here.

    Raises:
        UsageError: there is none.
    """
    import torch

    kind, index = device_kind(name)
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UsageError(f"There is no CUDA device {name} here.", hint="Use --device cpu.")
    return torch.device(name)


def device_called(name: str) -> "torch.device | None":
    """The device here that `environment` calls `name`; None where there is none of this name."""
    import torch

    if name == "cpu":
        return torch.device("cpu")
    found = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return next((device for device in found if torch.cuda.get_device_name(device) == name), None)


def environment(device: "torch.device") -> dict[str, str]:
    """The facts under which the same inputs give the same bytes; no host name, no path, no clock."""
    import torch

    return {
        "blas": _blas(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine": platform.machine(),
        "system": platform.system(),
        "torch": torch.__version__,
    }


def _blas() -> str:
    import torch

    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _cpu() -> str:
    """Vendor, family and model, as Linux names them: what a BLAS chooses its kernels by."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = [re.search(rf"^{name}\s*:\s*(\S+)", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return " ".join(match.group(1) for match in found if match) or platform.processor() or "unknown"

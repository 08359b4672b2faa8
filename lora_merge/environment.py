"""What the bytes of a factorisation may depend on: the torch build, its BLAS, the CPU family, the device."""

import platform
import re
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str]:
    """The facts under which the same inputs give the same bytes; no host name, no path, no clock."""
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
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _cpu() -> str:
    """Vendor, family and model, as Linux names them: what a BLAS chooses its kernels by."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = [re.search(rf"^{name}\s*:\s*(\S+)", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return " ".join(match.group(1) for match in found if match) or platform.processor() or "unknown"

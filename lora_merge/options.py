"""What the user chose, checked: how to merge."""

import math

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.checkpoint.merge import DTYPES, CertificateMode, Settings
from lora_merge.errors import UsageError


def merge_settings(
    method: str, rank: Rank | None, energy: float | None, dtype: str, certificate: CertificateMode | None
) -> Settings:
    """The settings of a merge; raises `UsageError` where an option is wrong, or of another method."""
    for name, value, choices in (("method", method, METHODS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise UsageError(f"--{name} must be one of {', '.join(choices)}, is {value!r}.")
    if certificate not in (None, "exact", "probes", "off"):
        raise UsageError(f"--certificate must be exact, probes or off, is {certificate!r}.")
    if method != "svd" and (rank is not None or energy is not None):
        raise UsageError("--rank and --energy are of --method svd.", hint="Add --method svd.")
    if energy is not None and (rank not in (None, "auto") or not _is_number(energy) or not 0 < energy <= 1):
        raise UsageError("--energy is a share above 0 and up to 1, for --rank auto only.")
    if rank not in (None, "auto", "lossless") and not (type(rank) is int and rank >= 1):
        raise UsageError(f"--rank must be a number from 1 up, auto or lossless, is {rank!r}.")
    options = Options(rank=rank or "auto", energy=Options.energy if energy is None else energy)
    return Settings(method, options, dtype, certificate)


def require_sound(global_lr: float, workers: int | None) -> None:
    """Raise `UsageError` where one of them cannot be."""
    if not _is_number(global_lr) or not 0 < global_lr < math.inf:
        raise UsageError(f"--global-lr must be a finite number above 0, is {global_lr!r}.")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more, is {workers}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

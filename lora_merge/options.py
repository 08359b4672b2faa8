"""What the user chose, checked: how to merge."""

import math

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.aggregation.sparsifying import DENSITY
from lora_merge.checkpoint.planned import DTYPES, CertificateMode, Settings
from lora_merge.errors import UsageError, meant


def merge_settings(
    method: str,
    rank: Rank | None,
    energy: float | None,
    dtype: str,
    certificate: CertificateMode | None,
    density: float | None = None,
    seed: int | None = None,
) -> Settings:
    """The settings of a merge; raises `UsageError` where an option is wrong, or of another method."""
    for name, value, choices in (("method", method, METHODS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise UsageError(f"--{name} must be one of {', '.join(choices)}, is {value!r}{meant(str(value), choices)}.")
    if certificate not in (None, "exact", "probes", "off"):
        raise UsageError(f"--certificate must be exact, probes or off, is {certificate!r}.")
    if "rank" not in METHODS[method].heeds and (rank is not None or energy is not None):
        raise UsageError("--rank and --energy are of --method svd, ties and dare.", hint="Add --method svd.")
    if "density" not in METHODS[method].heeds and density is not None:
        raise UsageError("--density is of --method ties and dare.")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise UsageError(f"--density must be a share above 0 and up to 1, is {density!r}.")
    if seed is not None and not (type(seed) is int and 0 <= seed < 1 << 32):
        raise UsageError(f"--seed must be a whole number from 0 to {(1 << 32) - 1}, is {seed!r}.")
    if energy is not None and (rank not in (None, "auto") or not _is_number(energy) or not 0 < energy <= 1):
        raise UsageError("--energy is a share above 0 and up to 1, for --rank auto only.")
    if rank not in (None, "auto", "lossless") and not (type(rank) is int and rank >= 1):
        raise UsageError(f"--rank must be a number from 1 up, auto or lossless, is {rank!r}.")
    options = Options(
        rank or "auto", Options.energy if energy is None else energy, seed or 0, density or DENSITY.get(method)
    )
    return Settings(method, options, dtype, certificate)


def require_sound(global_lr: float, workers: int | None) -> None:
    """Raise `UsageError` where one of them cannot be."""
    if not _is_number(global_lr) or not 0 < global_lr < math.inf:
        raise UsageError(f"--global-lr must be a finite number above 0, is {global_lr!r}.")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more, is {workers}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""What the user chose, checked: how to merge."""

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.aggregation.robust import Robust, WrongChoice, check
from lora_merge.aggregation.sparsifying import DENSITY
from lora_merge.aggregation.weights import IN_RANGE, is_in_range
from lora_merge.checkpoint.planned import DTYPES, CertificateMode, Settings
from lora_merge.errors import UsageError, meant


class OptionError(UsageError):
    """An option is wrong: ``option`` says which, ``reason`` why. Of a lock, it is the lock that is wrong."""

    def __init__(self, option: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"--{option} {reason}.", hint=hint)
        self.option, self.reason = option, reason


def merge_settings(
    method: str,
    rank: Rank | None,
    energy: float | None,
    dtype: str,
    certificate: CertificateMode | None,
    density: float | None = None,
    seed: int | None = None,
) -> Settings:
    """The settings of a merge; raises `OptionError` where an option is wrong, or of another method."""
    for name, value, choices in (("method", method, METHODS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            near = meant(str(value), choices)
            raise OptionError(name, f"must be one of {', '.join(choices)}, is {value!r:.40}{near}")
    if certificate not in (None, "exact", "probes", "off"):
        raise OptionError("certificate", f"must be exact, probes or off, is {certificate!r}")
    if "rank" not in METHODS[method].heeds and (rank is not None or energy is not None):
        given = "energy" if rank is None else "rank"
        raise OptionError(given, "is of --method svd, ties and dare", hint="Add --method svd.")
    if "density" not in METHODS[method].heeds and density is not None:
        raise OptionError("density", "is of --method ties and dare")
    if density is not None and not (_is_number(density) and is_in_range(density) and density <= 1):
        raise OptionError("density", f"must be a share from 1e-30 to 1, is {density!r:.40}")
    if seed is not None and not (type(seed) is int and 0 <= seed < 1 << 32):
        raise OptionError("seed", f"must be a whole number from 0 to {(1 << 32) - 1}, is {seed!r:.40}")
    if energy is not None and (rank not in (None, "auto") or not _is_number(energy) or not 0 < energy <= 1):
        raise OptionError("energy", "is a share above 0 and up to 1, for --rank auto only")
    if rank not in (None, "auto", "lossless") and not (type(rank) is int and rank >= 1):
        raise OptionError("rank", f"must be a number from 1 up, auto or lossless, is {rank!r:.40}")
    options = Options(
        rank or "auto", Options.energy if energy is None else energy, seed or 0, density or DENSITY.get(method)
    )
    return Settings(method, options, dtype, certificate)


def require_rule(robust: Robust, method: str) -> None:
    """Raise `OptionError` where a rule is asked for that there is not, or that the method cannot follow."""
    try:
        check(robust)
    except WrongChoice as error:
        raise OptionError(error.option, error.reason) from error
    if robust.by_coordinate and method not in ("exact", "svd"):
        reason = f"{robust.rule} takes the place of the mean, and {method} has a mean of its own"
        raise OptionError("robust", reason, hint="Use --method exact, or svd for a small rank.")
    if robust.clips and method in METHODS and not METHODS[method].linear:
        reason = f"does nothing to {method}, which divides by the weight that clipping takes away"
        hint = "Use --robust geometric-median, krum or multi-krum with it, or another method."
        raise OptionError("clip", reason, hint=hint)


def require_sound(global_lr: float, workers: int | None) -> None:
    """Raise `OptionError` where one of them cannot be."""
    if not _is_number(global_lr) or not is_in_range(global_lr):
        raise OptionError("global-lr", f"must be a number {IN_RANGE}, is {global_lr!r:.40}")
    if workers is not None and workers < 1:
        raise OptionError("workers", f"must be 1 or more, is {workers}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

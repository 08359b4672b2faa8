"""Where a global adapter lies that is to be folded onto, and how to merge its arrivals: as it was made."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_merge.aggregation.methods import METHODS
from lora_merge.aggregation.registry import Options, Rank
from lora_merge.aggregation.weights import Weights
from lora_merge.checkpoint.planned import CertificateMode, Settings
from lora_merge.errors import UsageError
from lora_merge.folding.arrivals import require_rule
from lora_merge.ledger import Ledger
from lora_merge.options import merge_settings
from lora_merge.screening.stops import Screening


@dataclass(frozen=True)
class Located:
    """Where a global adapter lies.

    Attributes:
        folder: on this machine, None where there is none yet.
        place: what the user calls it; of a folder, its whole path.
        commit: of its repository.
        given: what the user wrote, where the result is to be a folder.
    """

    folder: Path | None
    place: str
    commit: str | None = None
    given: Path | None = None


@dataclass(frozen=True)
class How:
    """How to merge; what is None is as the global adapter was made with, or by default."""

    chosen: Mapping[str, Any]  # method, rank, energy, global_lr, dtype: those that were given
    weights: Weights | None = None
    base: str | Path | None = None
    device: str = "cpu"
    certificate: CertificateMode | None = None
    workers: int | None = None
    screening: Screening | None = None
    force: bool = False  # replace the merged adapter that is at another output than the global adapter itself
    pinned: bool = True  # where a truncated mean has no core, read its clients' files again, if they are there


def is_there(folder: Path) -> bool:
    """Whether something lies at `folder`: an empty folder is nothing."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def settings_of(ledger: Ledger, how: How) -> Settings:
    """How the global adapter was made, which is how its arrivals are merged.

    Raises:
        UsageError: an option is another one, or it was made in a way that cannot be folded.
    """
    require_folds(ledger.method, ledger.options.get("rank"))
    require_rule(ledger, how.weights, how.screening.cap_examples if how.screening else None)
    if how.certificate == "probes" and METHODS[ledger.method].folds == "mean":
        raise UsageError("--certificate probes is an estimate, and a folded mean keeps a bound: it is exact or off.")
    known = {name: value for name, value in ledger.options.items() if name in asdict(Options())}
    if other := sorted(name for name, value in ledger.options.items() if value and name not in known):
        raise UsageError(f"It was merged with {', '.join(other)}, which needs all clients at once.")
    made = {"method": ledger.method, "dtype": ledger.dtype, "global_lr": ledger.global_lr, **known}
    for name, value in how.chosen.items():
        if value != made.get(name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is {value}, and the global adapter was made with {made.get(name, 'none')}.",
                hint=f"Leave {option} out, or merge all clients anew without --onto.",
            )
    by_rank = ledger.method == "svd"
    rank, energy = (known.get("rank"), known.get("energy")) if by_rank else (None, None)
    settings = merge_settings(ledger.method, rank, energy if rank == "auto" else None, ledger.dtype, how.certificate)
    return replace(settings, options=replace(settings.options, **known))


def require_folds(method: str, rank: Rank | None) -> None:
    """Raise `UsageError` where there is no way to bring arrivals in."""
    if method == "svd" and type(rank) is not int:
        reason = "--onto needs a fixed --rank of svd: by it goes what is kept for later arrivals"
        raise UsageError(f"{reason}, not {rank or 'auto'}.", hint="--method svd --rank 16")
    if method in METHODS and METHODS[method].folds is None:
        folding = ", ".join(name for name, each in METHODS.items() if each.folds)
        raise UsageError(f"{method} cannot be folded: it needs all clients at once.", hint=f"--onto is for {folding}.")

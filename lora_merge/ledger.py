"""`aggregation.json`: what went into a global adapter, with which weight, and how far it is from the mean."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FILE_NAME = "aggregation.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Contribution:
    """One client of a merge.

    Attributes:
        client_id: its declared id, or its folder's name where it declares none.
        weight: n as used; `share` is p, n over the sum of all.
        sha256: the hash of each file that was read.
    """

    client_id: str
    weight: float
    share: float
    num_examples: int | None
    sha256: Mapping[str, str]
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Certificate:
    """The relative Frobenius error of the written update against M, as a whole and by module.

    Attributes:
        measured_by: `exact` (from factors, fp64), `probes` (an estimate), `exact and probes`, or `off`.
        whole: {"relative_error": …, "standard_error": …}; None where nothing was measured.
        modules: the same by module name.
        not_measured: tensors trained whole, whose update has no size without the base.
        fedavg_would_miss: what averaging lora_A and lora_B apart would have missed, by probes; None where it cannot.
    """

    measured_by: str
    whole: Mapping[str, float] | None = None
    modules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    not_measured: Sequence[str] = ()
    fedavg_would_miss: Mapping[str, float] | None = None

    def sentence(self) -> str:
        """The certificate in a line."""
        if self.whole is None:
            return "not measured"
        return f"relative error {_error(self.whole)}" + (" (an estimate)" if "standard_error" in self.whole else "")

    def gap_sentence(self) -> str:
        """What `fedavg` would have missed, in a line."""
        if self.fedavg_would_miss is None:
            return "not measured: these adapters have no mean of lora_A and lora_B apart"
        return f"relative error {_error(self.fedavg_would_miss)} (an estimate)"


@dataclass(frozen=True)
class Ledger:
    """The record of one merge. It holds no clock and no path, so the same merge gives the same bytes."""

    method: str
    options: Mapping[str, Any]
    global_lr: float
    weighting: str
    total_weight: float
    base_model: str | None
    contributions: Sequence[Contribution]
    certificate: Certificate
    forms: Mapping[str, int]
    ranks: Sequence[int]
    dtype: str
    device: str
    versions: Mapping[str, str]
    parent: str | None = None

    def to_json(self) -> str:
        """The file's text, ending in a newline."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"


def _error(part: Mapping[str, float]) -> str:
    value, spread = part["relative_error"], part.get("standard_error")
    text = f"{value:.2%}" if value >= 1e-3 else f"{value:.1e}"
    return text if spread is None or math.isnan(spread) else f"{text} ± {spread:.1e}"

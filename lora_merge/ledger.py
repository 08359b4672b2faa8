"""`aggregation.json`: what went into a global adapter, with which weight, and how far it is from the mean."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from lora_merge import ledger_form as form
from lora_merge.ledger_form import LedgerError

FILE_NAME = "aggregation.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 26

_NO_BOUND = "no guarantee: no bound below 100 % is known"

T = TypeVar("T")


@dataclass(frozen=True)
class Contribution:
    """One client of a merge.

    Attributes:
        client_id: its declared id, or its folder's name where it declares none.
        source: where it came from: a repository of the Hub, a folder's short name, a URL.
        commit: of the repository; None where the source has none.
        weight: n as used; `share` is p, n over the sum of all.
        sha256: the hash of each file that was read.
        norm: of its update (Frobenius, what of it could be measured), as screening found it; None where it did not.
        block_ranks: of its block in each low-rank module; `*` means every module that is not named, 0 an absent one.
        clipped_to: what clipping multiplied its update by; None where it did not touch it.
        merged_share: the share that a robust rule gave it, clipping included; None where no rule weighed.
        claims: what its config and statement say, as far as a later merge depends on it (`lora_merge.kept`).
    """

    client_id: str
    source: str
    commit: str | None
    weight: float
    share: float
    num_examples: int | None
    sha256: Mapping[str, str]
    recipe: Mapping[str, Any] | None = None
    norm: float | None = None
    block_ranks: Mapping[str, int] | None = None
    claims: Mapping[str, Any] | None = None
    clipped_to: float | None = None
    merged_share: float | None = None


@dataclass(frozen=True, order=True)
class LeftOut:
    """An adapter that was named and not merged, and why: refused, excluded, or a copy."""

    source: str
    reason: str


@dataclass(frozen=True)
class Certificate:
    """The relative Frobenius error of the written update against M, as a whole and by module.

    Attributes:
        measured_by: `exact` (from factors, fp64), `probes` (an estimate), `exact and probes`, `off`, or `bound`: what
            folding guarantees, without a number where that is above 1 or not known.
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
        if self.measured_by == "bound":
            return f"relative error at most {_error(self.whole)}" if self.whole else _NO_BOUND
        if self.whole is None:
            return "not measured"
        return _measured(self.whole)

    def gap_sentence(self) -> str:
        """What `fedavg` would have missed, in a line."""
        if self.fedavg_would_miss is None:
            return "not measured: these adapters have no mean of lora_A and lora_B apart"
        return _measured(self.fedavg_would_miss)


@dataclass(frozen=True)
class Ledger:
    """The record of one merge. It holds no clock and no path, so the same merge gives the same bytes.

    Attributes:
        parent: the global adapter that arrivals were folded onto: ORG/NAME@COMMIT, or the sha256 of its weights.
        left_out: what was named and not merged.
        clip_norm: the largest norm that clipping let through; None without it.
        from_mean: how far what was aimed at is from the weighted mean, relative to that; None where it is that mean,
            and where `ties` or `dare` act by the weights of a rule, which reads whom it dropped no more.
        waved_through: what would have stopped the merge, had the user not allowed it.
        files: the sha256 of the adapter's own files as they were written, by name; None in an older ledger. Neither
            this file nor those made from it are among them.
    """

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
    left_out: Sequence[LeftOut] = ()
    waved_through: Sequence[str] = ()
    clip_norm: float | None = None
    from_mean: Mapping[str, float] | None = None
    files: Mapping[str, str] | None = None

    @property
    def aim(self) -> str:
        """What the certificate measures the distance from, in words."""
        rule = str(self.options.get("robust"))
        weighing = {"geometric-median": "the geometric median", "krum": "Krum", "multi-krum": "multi-Krum"}
        updates = "the clients' updates" if self.clip_norm is None else "the clipped updates of the clients"
        if rule in ("median", "trimmed-mean"):
            return f"the {'median' if rule == 'median' else 'trimmed mean'} of {updates}, entry by entry"
        by = f" by the weights of {weighing[rule]}" if rule in weighing else ""
        if self.method in ("ties", "dare"):
            return f"what {self.method} makes of {updates}{by}"
        return f"the mean of {updates}{by}" if by else f"the weighted mean of {updates}"

    def to_json(self) -> str:
        """The file's text: an entry a line, of lists an item a line; it ends in a newline."""
        entries = {"schema_version": SCHEMA_VERSION, **vars(self)}
        return "{\n" + ",\n".join(f"  {_compact(name)}: {_lines(value)}" for name, value in entries.items()) + "\n}\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Ledger":
        """Read a parsed file strictly.

        Raises:
            LedgerError: an entry is missing, unknown, or of a wrong form.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise LedgerError("schema_version", f"must be {SCHEMA_VERSION}, is {str(version)[:40]}")
        ledger = _entries(cls, {key: value for key, value in data.items() if key != "schema_version"})
        clients = Counter(contribution.client_id for contribution in ledger.contributions)
        if twice := [client for client, count in clients.items() if count > 1]:
            raise LedgerError("contributions", f"name {twice[0]} twice")
        return ledger


def _lines(value: Any) -> str:
    """A value as JSON: a list of objects with a line for each, anything else in one line."""
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int)):
        return "[\n" + ",\n".join(f"    {_compact(item)}" for item in value) + "\n  ]"
    return _compact(value)


_compact = json.JSONEncoder(default=vars, allow_nan=False, check_circular=False).encode  # what was read is a tree


def _measured(part: Mapping[str, float]) -> str:
    """In words. Where every probe finds nothing there is nothing: a zero is no estimate."""
    if part["relative_error"] == 0:
        return "relative error 0"
    return f"relative error {_error(part)}" + (" (an estimate)" if "standard_error" in part else "")


def _error(part: Mapping[str, float]) -> str:
    value, spread = part["relative_error"], part.get("standard_error")
    known = spread is not None and not math.isnan(spread)
    digits = max(2, math.ceil(-math.log10(spread)) - 2) if known and spread else 2  # of per cent: one of the spread's
    style = f".{digits}%" if value >= 1e-3 else ".1e"
    return f"{value:{style}} ± {spread:{style}}" if known else f"{value:{style}}"


def _entries(kind: type[T], data: Any) -> T:
    return form.entries_of(kind, data, _FORMS)


def _contributions(value: Any) -> list[Contribution]:
    if not form.listed(value):
        raise LedgerError("", "must be a list of one or more")
    return form.items(partial(_entries, Contribution))(value)


_FORMS: dict[str, form.Form[Any]] = {
    "method": form.text,
    "options": form.mapping,
    "global_lr": form.positive,
    "weighting": form.text,
    "total_weight": form.positive,
    "base_model": form.or_null(form.text),
    "contributions": _contributions,
    "certificate": partial(_entries, Certificate),
    "forms": form.values(form.count),
    "ranks": form.items(form.count),
    "dtype": form.text,
    "device": form.text,
    "versions": form.values(form.text),
    "parent": form.or_null(form.text),
    "clip_norm": form.or_null(form.number),
    "from_mean": form.or_null(form.values(form.number)),
    "left_out": form.items(partial(_entries, LeftOut)),
    "waved_through": form.items(form.text),
    "reason": form.text,
    "files": form.or_null(form.values(form.sha256)),
    # of a contribution
    "client_id": form.text,
    "source": form.text,
    "commit": form.or_null(form.commit),
    "weight": form.number,
    "share": form.share,
    "num_examples": form.or_null(form.count),
    "sha256": form.values(form.sha256),
    "recipe": form.or_null(form.mapping),
    "clipped_to": form.or_null(form.number),
    "merged_share": form.or_null(form.number),
    "norm": form.or_null(form.number),
    "block_ranks": form.or_null(form.values(form.count)),
    "claims": form.or_null(form.mapping),
    # of the certificate
    "measured_by": form.text,
    "whole": form.or_null(form.measured),
    "modules": form.values(form.measured),
    "not_measured": form.items(form.text),
    "fedavg_would_miss": form.or_null(form.measured),
}

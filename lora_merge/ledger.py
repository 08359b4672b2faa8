"""`aggregation.json`: what went into a global adapter, with which weight, and how far it is from the mean."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

FILE_NAME = "aggregation.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 26

T = TypeVar("T")


class LedgerError(ValueError):
    """A ledger is malformed. ``field`` names the entry."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


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
            return f"relative error at most {_error(self.whole)}" if self.whole else "no guarantee (no bound below 1)"
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
    """The record of one merge. It holds no clock and no path, so the same merge gives the same bytes.

    Attributes:
        parent: the global adapter that arrivals were folded onto: ORG/NAME@COMMIT, or the sha256 of its weights.
        left_out: what was named and not merged.
        clip_norm: the largest norm that clipping let through; None without it.
        from_mean: how far what was aimed at is from the weighted mean, relative to that; None where it is that mean.
        waved_through: what would have stopped the merge, had the user not allowed it.
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

    @property
    def aim(self) -> str:
        """What the certificate measures the distance from, in words."""
        rule = str(self.options.get("robust"))
        weighing = {"geometric-median": "the geometric median", "krum": "Krum", "multi-krum": "multi-Krum"}
        updates = "the clients' updates" if self.clip_norm is None else "the clipped updates of the clients"
        if rule in ("median", "trimmed-mean"):
            return f"the {'median' if rule == 'median' else 'trimmed mean'} of {updates}, entry by entry"
        if rule in weighing:
            return f"the mean of {updates} by the weights of {weighing[rule]}"
        if self.method in ("ties", "dare"):
            return f"what {self.method} makes of {updates}"
        return f"the weighted mean of {updates}"

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
        ledger = _read(cls, "", {key: value for key, value in data.items() if key != "schema_version"})
        clients = Counter(contribution.client_id for contribution in ledger.contributions)
        if twice := [client for client, count in clients.items() if count > 1]:
            raise LedgerError("contributions", f"name {twice[0]} twice")
        return ledger


def _lines(value: Any) -> str:
    """A value as JSON: a list of objects with a line for each, anything else in one line."""
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int)):
        return "[\n" + ",\n".join(f"    {_compact(item)}" for item in value) + "\n  ]"
    return _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, default=vars, allow_nan=False)


def _error(part: Mapping[str, float]) -> str:
    value, spread = part["relative_error"], part.get("standard_error")
    known = spread is not None and not math.isnan(spread)
    digits = max(2, math.ceil(-math.log10(spread)) - 2) if known and spread else 2  # of per cent: one of the spread's
    form = f".{digits}%" if value >= 1e-3 else ".1e"
    return f"{value:{form}} ± {spread:{form}}" if known else f"{value:{form}}"


def _read(kind: type[T], where: str, data: Any) -> T:
    """A dataclass from its entries, each by its form below."""
    _object(where or "ledger", data)
    known, required = _entries(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known):
        raise LedgerError(f"{where}{unknown[0][:100]}", "unknown entry")
    if missing := sorted(required - set(data)):
        raise LedgerError(f"{where}{missing[0]}", "is missing")
    return kind(**{name: _FORMS[name](f"{where}{name}", value) for name, value in data.items()})


@cache
def _entries(kind: type[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of all entries of a dataclass, and of those that must be there."""
    known = fields(kind)
    required = [entry.name for entry in known if entry.default is entry.default_factory is MISSING]
    return frozenset(entry.name for entry in known), frozenset(required)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise LedgerError(name, "must be an object")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise LedgerError(name, "must be a list")
    return value


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,512}", value)):
        raise LedgerError(name, "must be a short text")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise LedgerError(name, "must be a finite number from 0 up")
    return value


def _positive(name: str, value: Any) -> float:
    if (number := _number(name, value)) == 0:
        raise LedgerError(name, "must be above 0")
    return number


def _share(name: str, value: Any) -> float:
    if (number := _number(name, value)) > 1:
        raise LedgerError(name, "must be a share, from 0 to 1")
    return number


def _measured(name: str, value: Any) -> dict[str, float]:
    if "relative_error" not in _object(name, value):
        raise LedgerError(name, "has no relative_error")
    return _values(_number)(name, value)


def _contributions(name: str, value: Any) -> list[Contribution]:
    if not _list(name, value):
        raise LedgerError(name, "must be a list of one or more")
    return [_read(Contribution, f"{name}[{index}].", item) for index, item in enumerate(value)]


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise LedgerError(name, "must be a whole number from 0 up")
    return value


def _values(form: Callable[[str, Any], T]) -> Callable[[str, Any], dict[str, T]]:
    return lambda name, value: {key: form(f"{name}.{key[:100]}", item) for key, item in _object(name, value).items()}


def _items(form: Callable[[str, Any], T]) -> Callable[[str, Any], list[T]]:
    return lambda name, value: [form(f"{name}[{index}]", item) for index, item in enumerate(_list(name, value))]


def _or_null(form: Callable[[str, Any], T]) -> Callable[[str, Any], T | None]:
    return lambda name, value: None if value is None else form(name, value)


def _commit(name: str, value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value)):
        raise LedgerError(name, "must be a commit of 40 hex digits, or null")
    return value


def _sha256(name: str, value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise LedgerError(name, "must be a sha256 in hex")
    return value


_FORMS: dict[str, Callable[[str, Any], Any]] = {
    "method": _text,
    "options": _object,
    "global_lr": _positive,
    "weighting": _text,
    "total_weight": _positive,
    "base_model": _or_null(_text),
    "contributions": _contributions,
    "certificate": lambda name, value: _read(Certificate, f"{name}.", value),
    "forms": _values(_count),
    "ranks": _items(_count),
    "dtype": _text,
    "device": _text,
    "versions": _values(_text),
    "parent": _or_null(_text),
    "clip_norm": _or_null(_number),
    "from_mean": _or_null(_values(_number)),
    "left_out": _items(lambda name, value: _read(LeftOut, f"{name}.", value)),
    "waved_through": _items(_text),
    "reason": _text,
    # of a contribution
    "client_id": _text,
    "source": _text,
    "commit": _or_null(_commit),
    "weight": _number,
    "share": _share,
    "num_examples": _or_null(_count),
    "sha256": _values(_sha256),
    "recipe": _or_null(_object),
    "clipped_to": _or_null(_number),
    "merged_share": _or_null(_number),
    "norm": _or_null(_number),
    "block_ranks": _or_null(_values(_count)),
    "claims": _or_null(_object),
    # of the certificate
    "measured_by": _text,
    "whole": _or_null(_measured),
    "modules": _values(_measured),
    "not_measured": _items(_text),
    "fedavg_would_miss": _or_null(_measured),
}

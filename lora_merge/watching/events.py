"""What a watch yields."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_merge.ledger import Ledger


@dataclass(frozen=True)
class Started:
    """The first look: the global adapter as it is; `ledger` is None where there is none yet."""

    place: str
    ledger: Ledger | None
    commit: str | None


@dataclass(frozen=True)
class Arrival:
    """A client's update came in.

    Attributes:
        commit: the client's; None where its source has none.
        replaced: whether it took the place of an earlier one of the same source.
        ledger, made: the global adapter with it; `made` is its repository's commit, None for a folder.
        again: why all clients had to be merged again; None where folding did.
        seconds: that it took, publishing included.
    """

    client: str
    source: str
    commit: str | None
    replaced: bool
    ledger: Ledger
    made: str | None
    again: str | None
    warnings: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """An arrival that stays out until there is another version of it, and why."""

    source: str
    commit: str | None
    reason: str
    hint: str


@dataclass(frozen=True)
class Conflict:
    """Somebody else was quicker; nothing was changed, and what is still missing is folded onto theirs."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """The end: as many clients are in as were asked for, or the time is over; and the global adapter then."""

    why: Literal["clients", "time"]
    ledger: Ledger | None
    commit: str | None


Event: TypeAlias = Started | Arrival | Refusal | Conflict | Stopped

"""Each client's weight n: its examples, one, or what the user says. p_i is n_i over their sum."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeAlias

from lora_merge.errors import UsageError

Weights: TypeAlias = Literal["examples", "uniform"] | Mapping[str, float]

SMALLEST, LARGEST = 1e-30, 1e30  # blocks are stored times their weight, and fp32 reaches little further
IN_RANGE = f"from {SMALLEST:g} to {LARGEST:g}"


def is_in_range(number: float) -> bool:
    """Whether the arithmetic takes `number` as a factor: no product or quotient of two is 0 or infinite."""
    return SMALLEST <= number <= LARGEST


def resolve_weights(
    ids: Sequence[str],
    counts: Sequence[int | None],
    choice: Weights,
    *,
    names: Mapping[str, str] | None = None,
    before: Collection[float] = (),
) -> list[float]:
    """The weight of each client, in the order of `ids`.

    Args:
        counts: each client's `num_examples`, None where it states none.
        choice: `examples`, `uniform`, or a number for every client by id.
        names: other names by which `choice` may call a client (the source as given), to its id.
        before: the weights of those who are in already, beside whom all of these may be zero.

    Raises:
        UsageError: a count is missing, a weight is missing, unknown or out of range, or all are zero.
    """
    if choice == "uniform":
        return [1.0] * len(ids)
    if choice == "examples":
        weights = _from_counts(ids, counts)
    elif isinstance(choice, str):
        raise UsageError(f"weights must be examples, uniform or a mapping, not {choice!r}.")
    else:
        weights = _as_given(ids, choice, names or {})
    if not any([*weights, *before]):
        raise UsageError("The weights sum to zero: there is nothing to average.", hint="Try --weights uniform.")
    return weights


def _from_counts(ids: Sequence[str], counts: Sequence[int | None]) -> list[float]:
    silent = [client for client, count in zip(ids, counts, strict=True) if count is None]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        said = (
            "do not state num_examples, so they have" if len(silent) > 1 else "does not state num_examples, so it has"
        )
        raise UsageError(
            f"{shown} {said} no weight.",
            hint="Say --weights uniform, or give each one with --weight SOURCE=NUMBER.",
        )
    return [float(count) for count in counts if count is not None]


def _as_given(ids: Sequence[str], given: Mapping[str, float], names: Mapping[str, str]) -> list[float]:
    by_id: dict[str, float] = {}
    for name, weight in given.items():
        client = name if name in ids else names.get(name)
        if client is None:
            raise UsageError(f"A weight is given for {name!r}, which is not among the clients: {', '.join(ids)}.")
        if client in by_id:
            raise UsageError(f"{client} is given two weights.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise UsageError(f"The weight of {name} is {weight!r}; it must be a number.")
        if weight != 0 and not is_in_range(weight):
            raise UsageError(f"The weight of {name} is {weight!r:.40}; it must be 0, or {IN_RANGE}.")
        by_id[client] = abs(float(weight))  # -0.0 is 0
    if missing := [client for client in ids if client not in by_id]:
        raise UsageError(
            f"No weight is given for {', '.join(missing)}.", hint="Give one for every client, or --weights uniform."
        )
    return [by_id[client] for client in ids]

"""What a watch says of an arrival that it could not bring in, and what may be done about it: only what works there."""

from collections.abc import Collection

from lora_merge.errors import LoraMergeError, Problem, RefusedError, one_line
from lora_merge.sources.reference import AdapterRef
from lora_merge.watching.events import Refusal

_ALLOW = {"num_examples": "--allow-dominant", "update": "--allow-outliers"}  # by the field of the stop's problems
_UNIFORM = "--weights uniform"
_WITH_UNIFORM = f"To let it in, watch with {_UNIFORM}."  # a watch takes no weight of one client, as other merges do
_WHEN_IT_CHANGES = "It is looked at again when it changes."


def refusal_of(ref: AdapterRef, error: LoraMergeError, others: Collection[str], onto: str) -> Refusal:
    """The refusal of the arrival at `ref`.

    Args:
        others: the client ids of those who are in from elsewhere; where one of them is the reason, it is named.
        onto: what the user calls the global adapter.
    """
    if not isinstance(error, RefusedError):
        hint = _WITH_UNIFORM if _UNIFORM in error.hint else error.hint or _WHEN_IT_CHANGES
        return Refusal(ref.source, ref.commit, error.message, hint)
    reason = "; ".join(_said(problem, others) for problem in error.problems)
    return Refusal(ref.source, ref.commit, reason, _hint(error.problems, others, onto))


def blamed(error: LoraMergeError, others: Collection[str]) -> set[str]:
    """Those of `others` whom an error names: once they change, the arrival may come in."""
    return {problem.client for problem in error.problems} & {*others} if isinstance(error, RefusedError) else set()


def _said(problem: Problem, others: Collection[str]) -> str:
    said = f"{problem.field}: {problem.reason}"
    return f"{problem.client}: {said}" if problem.client in others else said


def _hint(problems: Collection[Problem], others: Collection[str], onto: str) -> str:
    stopped = [each for each in problems if each.field in _ALLOW and "times the median" in each.reason]
    if not stopped:
        return _WHEN_IT_CHANGES
    flags = " ".join(sorted({_ALLOW[each.field] for each in stopped}))
    inside = " ".join(f"--withdraw {client}" for client in sorted({each.client for each in stopped} & {*others}))
    let_in = f"To let it in, watch with {flags}."
    return one_line(
        f"{let_in} Or take out who is in: lora-merge aggregate --onto {onto} {inside}" if inside else let_in
    )

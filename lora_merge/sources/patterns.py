"""What a pattern takes of what it matches: clients' adapters, since `org/*` would merge a result with its own parts."""

from collections.abc import Collection, Mapping, Sequence

from lora_merge.checkpoint.peft_folder import LEDGER_NAME
from lora_merge.errors import NotFoundError

# Files that a client's adapter does not have, and what does.
NO_CLIENTS = {LEDGER_NAME: "a merged adapter", "lora_start.json": "a federation's recipe"}


def clients_of(pattern: str, held: Mapping[str, Collection[str]]) -> tuple[Sequence[str], str]:
    """The places of clients' adapters among those that a pattern matches; and a note on the others, if there are any.

    Args:
        held: the names of the files at each place.

    Raises:
        NotFoundError: there are only others.
    """
    others = {place: what for name, what in NO_CLIENTS.items() for place in held if name in held[place]}
    clients = [place for place in held if place not in others]
    if not others:
        return clients, ""
    each_kind = {what: [place for place in others if others[place] == what] for what in NO_CLIENTS.values()}
    said = ", ".join(f"{', '.join(places)} ({what})" for what, places in each_kind.items() if places)
    if not clients:
        hint = "A pattern is for clients' adapters; name another one by itself."
        raise NotFoundError(f"{pattern} matches only {said}.", hint=hint)
    return clients, f"{pattern} leaves out {said}."

"""A client's side: the recipe of a federation, read from its repository at one commit."""

from collections.abc import Sequence

from lora_merge.errors import NotFoundError, UsageError
from lora_merge.federation.contract import RECIPE_NAME, START_NAME, read_contract
from lora_merge.hub.session import hub_session
from lora_merge.hub.waiting import Tell
from lora_merge.recipe import FEDERATION, LoadedRecipe
from lora_merge.sources.listing import fetched, listing


def follow(recipe: str, overrides: Sequence[str], *, max_wait: float, tell: Tell) -> LoadedRecipe:
    """The recipe of the federation `org/federation` or `org/federation@revision`, pinned to a commit.

    Only settings and hashes are read there; a script is one of the shipped ones.

    Raises:
        NotFoundError: there is no such repository, it may not be read, or it is no federation's.
        RefusedError: its files are not of the expected form, or not what the Hub lists.
        UsageError: an override would leave the federation.
        NetworkError: the Hub cannot be reached.
    """
    if (found := FEDERATION.fullmatch(recipe)) is None:
        raise UsageError(f"{recipe} is not a federation: ORG/NAME, perhaps @REVISION.")
    repo, revision = found["repo"], found["revision"]
    with hub_session(max_wait, tell) as api:
        commit, listed = listing(api, repo, revision)
        if missing := [name for name in (RECIPE_NAME, START_NAME) if name not in listed]:
            hint = f"lora-merge init {repo} --recipe NAME makes one. A recipe's file is given as a path: ./NAME.yaml"
            raise NotFoundError(f"{repo} is not a federation: it has no {missing[0]}.", hint=hint)
        settings, start = (fetched(repo, commit, listed[name]).read_bytes() for name in (RECIPE_NAME, START_NAME))
    tell(f"Federation {repo} at {commit}")
    return read_contract(repo, commit, settings, start, list(overrides))

"""A client's side: the recipe of a federation, read from its repository at one commit."""

from collections.abc import Sequence

from huggingface_hub import HfApi

from lora_merge.checkpoint.peft_folder import FolderRefused
from lora_merge.errors import NotFoundError, Problem, RefusedError, UsageError
from lora_merge.federation.contract import MAX_BYTES, RECIPE_NAME, START_NAME, read_contract
from lora_merge.hub.client import Tell, hub_session
from lora_merge.hub.failures import asking
from lora_merge.recipe import FEDERATION, LoadedRecipe
from lora_merge.sources.hub_cache import fetch_file
from lora_merge.sources.reference import FileEntry


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
        commit, listed = _listed(api, repo, revision)
        if missing := [name for name in (RECIPE_NAME, START_NAME) if name not in listed]:
            hint = f"lora-merge init {repo} --recipe NAME makes one. A recipe's file is given as a path: ./NAME.yaml"
            raise NotFoundError(f"{repo} is not a federation: it has no {missing[0]}.", hint=hint)
        settings, start = (_content(repo, commit, listed[name]) for name in (RECIPE_NAME, START_NAME))
    tell(f"Federation {repo} at {commit}")
    return read_contract(repo, commit, settings, start, list(overrides))


def _listed(api: HfApi, repo: str, revision: str | None) -> tuple[str, dict[str, FileEntry]]:
    """The commit, and the two files as the Hub lists them."""
    with asking(repo):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            each.rfilename: FileEntry(
                each.rfilename,
                int(each.lfs.size if each.lfs else each.size or 0),
                sha256=each.lfs.sha256 if each.lfs else None,
                git_sha1=None if each.lfs else each.blob_id,
            )
            for each in info.siblings or []
            if each.rfilename in (RECIPE_NAME, START_NAME)
        }
        return str(info.sha), files


def _content(repo: str, commit: str, file: FileEntry) -> bytes:
    if file.size > MAX_BYTES:
        raise RefusedError([Problem(repo, file.name, f"is larger than {MAX_BYTES} bytes")])
    try:
        return fetch_file(repo, commit, file, lambda count: None).read_bytes()
    except FolderRefused as error:
        raise RefusedError(error.problems(repo)) from error

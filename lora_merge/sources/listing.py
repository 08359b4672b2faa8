"""A repository's files as the Hub lists them at one commit, and one of the small ones, to the bit."""

import re
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import HfApi

from lora_merge.checkpoint.peft_folder import FolderRefused
from lora_merge.errors import NetworkError, Problem, RefusedError
from lora_merge.hub.failures import asking
from lora_merge.sources.hub_cache import fetch_file
from lora_merge.sources.reference import FileEntry

MAX_BYTES = 1 << 24
COMMIT = re.compile(r"[0-9a-f]{40}")
# A commit, and every file there by name.
Listing: TypeAlias = tuple[str, dict[str, FileEntry]]


def listing(api: HfApi, repo: str, revision: str | None) -> Listing:
    """What is at the commit that `revision` is at; one call."""
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
        }
        commit = str(info.sha)
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision or "") and commit != revision):
        raise NetworkError(f"{repo}: the Hub answers with the commit {commit[:60]!r}.")
    return commit, files


def fetched(repo: str, commit: str, file: FileEntry) -> Path:
    """A small file of a commit, in the cache.

    Raises:
        RefusedError: it is not small, or twice not what is listed.
    """
    if file.size > MAX_BYTES:
        raise RefusedError([Problem(repo, file.name, f"is larger than {MAX_BYTES} bytes")])
    try:
        return fetch_file(repo, commit, file, lambda count: None)
    except FolderRefused as error:
        raise RefusedError(error.problems(repo)) from error

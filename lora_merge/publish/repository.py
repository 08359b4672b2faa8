"""A repository as we find it: where a branch is, what it holds, and making one that is not there yet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lora_merge.errors import NotFoundError, UsageError
from lora_merge.hub.failures import asking
from lora_merge.hub.session import endpoint
from lora_merge.hub.waiting import Tell
from lora_merge.publish.files import ALLOWED, PublishedFile
from lora_merge.publish.persistence import persist

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        revision: the branch; a pull request starts from it.
        private: of a new repository; None is private. An existing one must be what is asked for.
        create_pr: propose it, in a repository that is somebody else's.
        parent: the commit that the branch must still be at; an empty text means that no adapter lay there.
    """

    repo: str
    revision: str = "main"
    private: bool | None = None
    create_pr: bool = False
    parent: str | None = None

    @property
    def visibility(self) -> str:
        return "public" if self.private is False else "private"


@dataclass(frozen=True)
class Content:
    """What a repository is to hold.

    Attributes:
        files: the files.
        kind: of its records, by name: one that is there and not among `files` is of something else, and is removed.
        rivals: files that only lie in a repository of another kind, where this one has no business.
    """

    files: Sequence[PublishedFile]
    kind: Sequence[str] = ALLOWED
    rivals: Sequence[str] = ("lora_start.json",)


@dataclass(frozen=True)
class Head:
    """What a branch was when it was looked at."""

    commit: str
    private: bool


def head_of(api: HfApi, target: Target) -> Head | None:
    """Where the branch is now; None where there is no such repository, or none that this token sees."""
    with asking(target.repo):
        try:
            info = api.model_info(target.repo, revision=target.revision)
        except (GatedRepoError, RevisionNotFoundError):
            raise
        except RepositoryNotFoundError:
            return None
        return Head(str(info.sha), bool(info.private))


def create(api: HfApi, target: Target, tell: Tell) -> Head:
    """Make the repository. Doing it twice does no harm, so a lost answer is asked for again."""
    require_may_create(target)

    def attempt() -> Head:
        with asking(target.repo):
            api.create_repo(target.repo, private=target.private is not False, exist_ok=True)
        if (head := head_of(api, target)) is None:
            raise NotFoundError(f"{target.repo} is there already, and you may not read it.")
        tell(f"Made the {target.visibility} repository {target.repo}")
        return head

    return persist(attempt, lambda: head_of(api, target))


def require_may_create(target: Target) -> None:
    """Raise `NotFoundError` where a repository that is not there must be: to propose to it, or for a branch of it."""
    if target.create_pr or target.revision != "main":
        raise NotFoundError(f"There is no {target.repo} on the Hub, or it is private and you may not read it.")


def require_visibility(head: Head, target: Target) -> None:
    """Raise `UsageError` where the repository is not what was asked for: it is not changed here."""
    if target.private is not None and target.private != head.private:
        now = "private" if head.private else "public"
        raise UsageError(
            f"{target.repo} is {now}, and --{target.visibility} was asked for.",
            hint=f"--{now} publishes there as it is; its page of settings changes it: {endpoint()}/{target.repo}",
        )


def tree(api: HfApi, repo: str, commit: str) -> dict[str, Any]:
    """The files at the top of a commit, by name."""
    with asking(repo):
        return {entry.path: entry for entry in api.list_repo_tree(repo, revision=commit) if hasattr(entry, "blob_id")}


def differences(tree: Mapping[str, Any], content: Content) -> tuple[list[PublishedFile], tuple[str, ...]]:
    """The files that the tree lacks or has otherwise; and the records in it that are of something else than this."""
    names = {file.name for file in content.files}
    changed = [file for file in content.files if file.name not in tree or not _is_same(file, tree[file.name])]
    return changed, tuple(name for name in content.kind if name in tree and name not in names)


def require_kind(tree: Mapping[str, Any], content: Content, repo: str) -> None:
    """Raise `UsageError` where the repository is of another kind: a federation's is no place for an adapter."""
    if there := [name for name in content.rivals if name in tree]:
        raise UsageError(f"{repo} holds {there[0]}, so it is a repository of another kind.", hint="Name another one.")


def _is_same(file: PublishedFile, entry: Any) -> bool:
    if entry.size != file.size:
        return False
    return bool(entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == file.git_oid)


def holds(api: HfApi, repo: str, commit: str, content: Content) -> bool:
    """Whether a commit holds just this."""
    changed, removed = differences(tree(api, repo, commit), content)
    return not changed and not removed


def count_private(api: HfApi, repos: Sequence[str]) -> int:
    """How many of these repositories this token sees as private; by one listing of each owner."""
    wanted = set(repos)
    found: dict[str, bool] = {}
    for owner in sorted({repo.partition("/")[0] for repo in wanted}):
        with asking(owner):
            found |= {each.id: bool(each.private) for each in api.list_models(author=owner, expand=["private"])}
    return sum(found.get(repo, False) for repo in wanted)

"""One commit of all files, on the state that was seen; reconciled where the Hub's answer was lost, never forced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from lora_merge.errors import (
    ConflictError,
    NotFoundError,
    Problem,
    RefusedError,
    StorageError,
    VerificationError,
)
from lora_merge.hub.failures import asking
from lora_merge.hub.session import endpoint
from lora_merge.hub.transfer import moved
from lora_merge.hub.waiting import Tell
from lora_merge.publish.files import CARD_NAME, WEIGHTS, PublishedFile
from lora_merge.publish.persistence import persist
from lora_merge.publish.repository import (
    Content,
    Head,
    Target,
    create,
    differences,
    head_of,
    holds,
    require_kind,
    require_visibility,
    tree,
)

PROPOSALS = 20  # pull requests of ours that are looked through for one whose answer was lost


@dataclass(frozen=True)
class Published:
    """What lies on the Hub now.

    Attributes:
        changed, removed: the names of the files that this run's commit wrote and took away; none, where all was there.
        pull_request: its address, where it was proposed.
        superseded: it was published, and somebody has published something else since.
    """

    repo: str
    commit: str
    private: bool
    changed: Sequence[str] = ()
    removed: Sequence[str] = ()
    pull_request: str | None = None
    superseded: bool = False

    @property
    def url(self) -> str:
        return f"{endpoint()}/{self.repo}/commit/{self.commit}"


def publish(
    api: HfApi,
    target: Target,
    content: Content,
    *,
    message: str,
    tell: Tell = lambda line: None,
) -> Published:
    """Bring `target` to hold `content`, by one commit; files of other names are left alone.

    Where the Hub fails, the published tree decides: every file's hash there is published; a head that has not moved is
    tried again while the session may wait; anything else is a conflict, and nothing is forced.

    Raises:
        NotFoundError: no such branch, or the token may not write there.
        UsageError: the repository's visibility is not the one asked for.
        ConflictError: somebody else has published there in the meantime.
        NetworkError: the Hub cannot be reached, or was busy for too long.
        StorageError: a file changed while it was sent.
        VerificationError: what the Hub holds is not what was sent.
    """
    head = head_of(api, target) or create(api, target, tell)
    require_visibility(head, target)
    there = tree(api, target.repo, head.commit)
    require_kind(there, content, target.repo)
    _require_parent(head, there, target, content)
    changed, removed = differences(there, content)
    if not changed and not removed:
        return Published(target.repo, head.commit, head.private)
    if target.create_pr and (proposed := _proposal(api, target, content)):
        return Published(target.repo, proposed[0], head.private, pull_request=proposed[1])
    done = _commit(api, target, head, changed, removed, message=message, content=content)
    names = tuple(file.name for file in changed)
    published = Published(target.repo, done.commit, head.private, names, removed, done.pull_request, done.superseded)
    _verify(api, published, content)
    return published


def _require_parent(head: Head, there: Mapping[str, Any], target: Target, content: Content) -> None:
    """Raise `ConflictError` where somebody has published what our content does not build upon."""
    parent = target.parent
    if parent is None or head.commit == parent or not any(differences(there, content)):
        return
    if parent or WEIGHTS[0] in there:
        raise ConflictError(
            f"{target.repo} was changed by somebody else in the meantime: it is at {head.commit[:12]}.",
            hint="The same command builds on that.",
        )


@dataclass(frozen=True)
class _Done:
    commit: str
    pull_request: str | None = None
    superseded: bool = False


def _commit(
    api: HfApi,
    target: Target,
    head: Head,
    changed: Sequence[PublishedFile],
    removed: Sequence[str],
    *,
    message: str,
    content: Content,
) -> _Done:
    additions = [CommitOperationAdd(file.name, file.upload) for file in changed]
    deletions = [CommitOperationDelete(name) for name in removed]
    revision = None if target.create_pr else target.revision

    def upload() -> bool:
        with asking(target.repo):
            moved(
                sum(file.size for file in changed),
                lambda: api.preupload_lfs_files(
                    target.repo, additions, revision=target.revision, create_pr=target.create_pr, free_memory=False
                ),
            )
        _require_unchanged(changed)
        return True

    def attempt() -> _Done:
        with asking(target.repo):
            try:
                info = api.create_commit(
                    target.repo,
                    [*additions, *deletions],
                    commit_message=message,
                    revision=revision,
                    parent_commit=head.commit,
                    create_pr=target.create_pr,
                )
            except ValueError as error:
                if refused := _card_refused(error, target.repo):
                    raise refused from error
                raise
            return _Done(info.oid, info.pr_url)

    def landed() -> _Done | None:
        if target.create_pr:
            proposed = _proposal(api, target, content)
            return _Done(*proposed) if proposed else None
        return _landed(api, target, head, content)

    # Apart, so that the time of a long upload does not count against the tries of the commit.
    persist(upload, lambda: None)
    return persist(attempt, landed)


def _landed(api: HfApi, target: Target, head: Head, content: Content) -> _Done | None:
    """The commit that holds what was sent, though its answer was lost; None where nothing has happened yet."""
    now = head_of(api, target)
    if now is None:
        raise NotFoundError(f"{target.repo} has been deleted.")
    if holds(api, target.repo, now.commit, content):
        return _Done(now.commit)
    if now.commit == head.commit:
        return None
    with asking(target.repo):
        history = [entry.commit_id for entry in api.list_repo_commits(target.repo, revision=now.commit)]
    # The first commit after the head that we saw may be ours, and what is there now a later one.
    after = history[: history.index(head.commit)] if head.commit in history else []
    if after and holds(api, target.repo, after[-1], content):
        return _Done(after[-1], superseded=True)
    raise ConflictError(
        f"{target.repo} ({target.revision}) was changed by somebody else in the meantime: "
        f"it is at {now.commit[:12]}, and was at {head.commit[:12]}.",
        hint=f"See {endpoint()}/{target.repo}/commits/{target.revision}; the same command publishes on top of it.",
    )


def _proposal(api: HfApi, target: Target, content: Content) -> tuple[str, str] | None:
    """That of our open pull requests which holds just these files: its commit and its address."""
    with asking(target.repo):
        refs = api.list_repo_refs(target.repo, include_pull_requests=True).pull_requests or []
        heads = {ref.ref: ref.target_commit for ref in refs}
        for number in _open_proposals(api, target.repo):
            commit = heads.get(f"refs/pr/{number}")
            if commit and holds(api, target.repo, commit, content):
                return commit, f"{endpoint()}/{target.repo}/discussions/{number}"
    return None


def _open_proposals(api: HfApi, repo: str) -> list[int]:
    """The numbers of this account's open pull requests, the newest first, `PROPOSALS` at most."""
    listed = api.get_repo_discussions(repo, author=api.whoami()["name"], discussion_type="pull_request")
    found = [each.num for each in islice(listed, 10 * PROPOSALS) if each.status in ("open", "draft")]
    return sorted(found, reverse=True)[:PROPOSALS]


def _verify(api: HfApi, published: Published, content: Content) -> None:
    changed, removed = differences(tree(api, published.repo, published.commit), content)
    if wrong := [*(file.name for file in changed), *removed]:
        raise VerificationError(
            f"{published.repo} at {published.commit} does not hold what was sent: {', '.join(wrong)}.",
            hint="Run the same command again.",
        )


def _require_unchanged(files: Sequence[PublishedFile]) -> None:
    if wrong := [file.name for file in files if not file.unchanged()]:
        raise StorageError(f"Changed while it was being sent: {', '.join(wrong)}.", hint="Run it again.")


def _card_refused(error: ValueError, repo: str) -> RefusedError | None:
    """The Hub's judge of README.md answers by a ValueError; any other one is an answer that is none."""
    if not str(error).startswith("Invalid metadata in README.md"):
        return None
    said = " ".join(str(error).split()[4:])
    return RefusedError([Problem(repo, CARD_NAME, f"the Hub does not accept its metadata: {said}")])

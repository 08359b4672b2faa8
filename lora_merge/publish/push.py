"""`push`: an adapter folder to a repository; and the question, long before, whether that will be allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token

from lora_merge import __version__
from lora_merge.errors import NotFoundError, UsageError
from lora_merge.hub.access import require_commit, require_write, whoami
from lora_merge.hub.failures import write_token
from lora_merge.hub.session import hub_session
from lora_merge.hub.waiting import Tell
from lora_merge.publish.commit import Published, publish
from lora_merge.publish.prepare import prepare
from lora_merge.publish.repository import (
    REPOSITORY,
    Content,
    Target,
    count_private,
    head_of,
    require_kind,
    require_may_create,
    require_visibility,
    tree,
)


@dataclass(frozen=True)
class Pushed:
    """A finished push: what is published, what stayed here, and what the user should know of it."""

    published: Published
    files: Sequence[str]
    left_out: Sequence[str]
    warnings: Sequence[str]


def push(
    folder: Path,
    target: Target,
    *,
    message: str | None = None,
    evaluation: Path | None = None,
    max_wait: float,
    tell: Tell,
) -> Pushed:
    """Publish the adapter in `folder`: may it be written there, is it sound, does it hold a secret; then one commit.

    Args:
        message: of the commit.
        evaluation: what `lora-merge evaluate --json` printed, for the card.
        max_wait: seconds to wait for a busy Hub.
        tell: takes a line of talk.

    Raises:
        RefusedError: the folder is not an adapter, or it holds a secret or a path of this machine.
        And what `publish` raises.
    """
    require_repository_name(target.repo)
    with hub_session(max_wait, tell) as api:
        require_access_with(api, target)
        prepared = prepare(
            folder,
            target.repo,
            evaluation=evaluation,
            own=own_secrets(),
            count_private=lambda repos: count_private(api, repos),
        )
        published = publish(
            api,
            target,
            Content(prepared.files),
            message=message or f"Publish with lora-merge {__version__}",
            tell=tell,
        )
    names = tuple(sorted(file.name for file in prepared.files))
    return Pushed(published, names, prepared.left_out, prepared.warnings)


def require_access(target: Target, *, max_wait: float, tell: Tell) -> None:
    """Raise now what a later push to `target` would raise for want of a token, a role, or a place to publish to.

    Raises:
        NotFoundError: no token, a read-only one, no role there, or nothing there to propose to; with the next command.
        UsageError: `target` cannot be a repository's name, or is a repository of another kind or visibility.
        NetworkError: the Hub cannot be reached.
    """
    require_repository_name(target.repo)
    with hub_session(max_wait, tell) as api:
        require_access_with(api, target)
        if (head := head_of(api, target)) is None:
            require_may_create(target)
        else:
            require_visibility(head, target)
            require_kind(tree(api, target.repo, head.commit), Content(()), target.repo)
            require_commit(api, target.repo, target.revision, create_pr=target.create_pr)


def require_repository_name(repo: str) -> None:
    """Raise `UsageError` unless `repo` is ORG/NAME as the Hub has it."""
    if not REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo:
        raise UsageError(f"{repo} is not a repository's name: ORG/NAME of letters, digits, '.', '_' and '-'.")


def require_access_with(api: HfApi, target: Target) -> None:
    """`require_access`, in a session that is open."""
    if not target.create_pr:
        require_write(api, target.repo)
    elif (account := whoami(api)).role == "read":  # anybody may propose, but not by a token that only reads
        raise NotFoundError(f"The token of {account.name} may only read.", hint=write_token())


def own_secrets() -> dict[str, str]:
    """What is secret here whatever its form: this token, and this home folder."""
    home = str(Path.home())
    own = {"your Hub token": get_token() or "", "the path of your home folder": home if home.count("/") > 1 else ""}
    return {kind: value for kind, value in own.items() if value}

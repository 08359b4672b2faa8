"""Who may do what: asked before hours of training or gigabytes of download, not after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from lora_merge.errors import NotFoundError
from lora_merge.hub.failures import asking, write_token
from lora_merge.hub.session import endpoint

_MAY_WRITE = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Account:
    """Whose token is used, and what it may do.

    Attributes:
        role: `read`, `write` or `fineGrained`; None where the Hub does not say.
        orgs: the user's role in each organisation, None where the Hub does not say.
        writable: of a fine-grained token, the users, organisations and repositories that it may write to.
    """

    name: str
    role: str | None
    orgs: Mapping[str, str | None]
    writable: frozenset[str] = frozenset()


def whoami(api: HfApi) -> Account:
    """The owner of the token in use.

    Raises:
        NotFoundError: there is no token, or the Hub does not know it.
        NetworkError: the Hub cannot be reached.
    """
    if not get_token():
        raise NotFoundError("This needs a token of the Hub, and there is none here.", hint="hf auth login")
    with asking("your account"):
        answer: dict[str, Any] = api.whoami()
        token = (answer.get("auth") or {}).get("accessToken") or {}
        return Account(
            name=answer["name"],
            role=token.get("role"),
            orgs={org["name"]: org.get("roleInOrg") for org in answer.get("orgs") or []},
            writable=_writable(token.get("fineGrained") or {}),
        )


def _writable(grants: Mapping[str, Any]) -> frozenset[str]:
    entries = [entry for entry in grants.get("scoped") or [] if "repo.write" in (entry.get("permissions") or [])]
    return frozenset(entry["entity"]["name"] for entry in entries)


def require_write(api: HfApi, repo: str) -> Account:
    """Raise unless the token may write to `repo`, an `org/name` that need not exist yet; two calls at most.

    Raises:
        NotFoundError: no token, a read-only one, or one that may not write there; with the next command.
        NetworkError: the Hub cannot be reached.
    """
    account = whoami(api)
    owner = repo.partition("/")[0]
    if account.role == "read":
        raise NotFoundError(
            f"The token of {account.name} may only read, and {repo} is to be written.", hint=write_token()
        )
    if account.role == "fineGrained" and account.writable.isdisjoint((owner, repo)):
        raise NotFoundError(f"The token of {account.name} is not given write access to {repo}.", hint=write_token())
    if owner != account.name and (role := account.orgs.get(owner, "not a member")) not in (*_MAY_WRITE, None):
        hint = f"Ask {owner} to let you write, or propose a change with --create-pr. See {endpoint()}/{owner}"
        raise NotFoundError(f"{account.name} may not write to {owner} (role: {role}).", hint=hint)
    return account


def require_commit(api: HfApi, repo: str, revision: str, *, create_pr: bool) -> None:
    """Raise unless the token may commit to `repo`, which is there: a contributor only may where he made it. One call.

    It asks how a file would have to be sent, which changes nothing and is answered to those only who may send it.

    Raises:
        NotFoundError: the token may not write there; with the next command.
        NetworkError: the Hub cannot be reached.
    """
    try:
        with asking(repo):
            probe = CommitOperationAdd("README.md", b"-")
            api.preupload_lfs_files(repo, [probe], revision=revision, create_pr=create_pr)
    except NotFoundError as error:
        hint = f"Ask {repo.partition('/')[0]} to let you write there, or propose a change with --create-pr."
        raise NotFoundError(error.message, hint=error.hint if create_pr else hint) from error

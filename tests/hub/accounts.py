"""Users, organisations, tokens, and what each may do."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.hub.repositories import Repository

TokenRole = Literal["read", "write", "fineGrained"]
OrgRole = Literal["read", "contributor", "write", "admin"]


@dataclass
class User:
    """A person; `orgs` has the role in each organisation."""

    name: str
    orgs: dict[str, OrgRole] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """One token of a user. `scopes` of a fine-grained one: permissions by namespace or repository id."""

    user: User
    role: TokenRole
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def allows(self, permission: str, namespace: str, repo_id: str) -> bool:
        """Whether the token itself, whatever its user may, covers a permission there."""
        if self.role == "fineGrained":
            return any(permission in self.scopes.get(where, ()) for where in (namespace, repo_id))
        return self.role == "write" or permission == "repo.content.read"

    def may_create(self, namespace: str, repo_id: str) -> bool:
        """Whether the token's user may make a repository in a namespace, with this token."""
        member = namespace == self.user.name or self.user.orgs.get(namespace, "read") != "read"
        return member and self.allows("repo.write", namespace, repo_id)

    def may_write(self, repository: Repository) -> bool:
        """Whether the token may commit to a repository's branches."""
        role = self.user.orgs.get(repository.namespace)
        if role == "contributor" and repository.creator != self.user.name:
            return False
        return self.may_create(repository.namespace, repository.id)

    def may_read(self, repository: Repository) -> bool:
        """Whether the token sees a repository at all."""
        return not repository.private or (
            self.belongs_to(repository.namespace)
            and (
                self.allows("repo.content.read", repository.namespace, repository.id)
                or self.allows("repo.write", repository.namespace, repository.id)
            )
        )

    def may_download(self, repository: Repository) -> bool:
        """Whether the token gets the files of a gated repository that it sees."""
        granted = self.user.name in repository.granted
        return not repository.gated or granted or self.belongs_to(repository.namespace)

    def belongs_to(self, namespace: str) -> bool:
        """Whether the namespace is the user's own, or an organisation of which the user is a member."""
        return namespace == self.user.name or namespace in self.user.orgs

    def whoami(self) -> dict[str, Any]:
        """What /api/whoami-v2 tells."""
        token: dict[str, Any] = {"displayName": "test", "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": [
                {"entity": {"_id": where, "type": "model" if "/" in where else "org", "name": where},
                 "permissions": list(permissions)}
                for where, permissions in self.scopes.items()
            ]}  # fmt: skip
        orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": role, "isEnterprise": False}
                for org, role in self.user.orgs.items()]  # fmt: skip
        return {
            "type": "user", "id": self.user.name, "name": self.user.name, "fullname": self.user.name, "isPro": False,
            "email": f"{self.user.name}@example.org", "emailVerified": True, "canPay": False, "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }  # fmt: skip


class Accounts:
    """Every user and token."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.tokens: dict[str, Token] = {}

    def add(
        self,
        name: str,
        role: TokenRole = "write",
        orgs: Mapping[str, OrgRole] | None = None,
        scopes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> str:
        """A new token of a user, who is made, or joins more organisations, on the way."""
        user = self.users.setdefault(name, User(name))
        user.orgs.update(orgs or {})
        secret = "hf_" + hashlib.sha256(f"{name} {len(self.tokens)}".encode()).hexdigest()[:34]
        self.tokens[secret] = Token(user, role, dict(scopes or {}))
        return secret

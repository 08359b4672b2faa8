"""All that the local Hub knows, and the rights of a request: which repository it may read, write or download from."""

import secrets
import time
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

from tests.hub.accounts import Accounts, Token
from tests.hub.objects import Objects
from tests.hub.repositories import GIT_ATTRIBUTES, Discussion, File, Repository, is_large, large_file, small_file
from tests.hub.wire import Readable, Refusal, Request
from tests.hub.xet import XetStore

EPOCH = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())


class State:
    """One Hub. `xet` off makes it a self-hosted one without Xet; `page_size` is how many items a listing's page has."""

    def __init__(self, hub_url: str, cdn_url: str) -> None:
        self.hub_url, self.cdn_url = hub_url, cdn_url
        self.xet_store = XetStore()
        self.objects = Objects()
        self.reset(xet=True)

    def reset(self, *, xet: bool) -> None:
        """An empty Hub."""
        self.xet = xet
        self.page_size = 1000
        self.part_size = 5_000_000  # LFS uploads above it come in parts
        self.token_seconds = 3600  # for how long a Xet token lasts
        self.objects.close()
        self.xet_store.forget_files()
        self.accounts = Accounts()
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.xet_tokens: dict[str, tuple[str, Repository, int]] = {}
        self.parts: dict[tuple[str, int], Readable] = {}
        self.secret = secrets.token_hex(8)
        self.clock = EPOCH

    def tick(self) -> int:
        """The time, which moves a second with each event: histories are the same in every run."""
        self.clock += 1
        return self.clock

    # Repositories

    def create(self, repo_id: str, creator: str, private: bool) -> Repository:
        """A new repository with the first commit that the Hub itself makes."""
        repository = Repository(repo_id, creator, self.tick(), private)
        first = {".gitattributes": small_file(GIT_ATTRIBUTES)}
        repository.commit("refs/heads/main", first, "initial commit", "", creator, self.clock)
        self.repositories[repo_id] = repository
        return repository

    def stored(self, repository: Repository, path: str, content: Readable) -> File:
        """A file of a repository with its contents kept, as a large or a small one."""
        if is_large(path, content.size):
            oid = self.objects.put(content)
            repository.objects.add(oid)
            return large_file(oid, self.objects.by_sha256[oid])
        return small_file(content.read(0, content.size))

    def xet_hash(self, file: File) -> str | None:
        """The Xet hash of a large file, on a Hub with Xet."""
        return self.xet_store.hash_of(file.sha256, file.content) if self.xet and file.sha256 else None

    # Rights

    def token(self, request: Request) -> Token | None:
        """Whose request it is; 401 for a token that is nobody's."""
        if request.bearer is None:
            return None
        if request.bearer not in self.accounts.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.accounts.tokens[request.bearer]

    def readable(self, request: Request) -> Repository:
        """The repository of a request that may see it; else it looks as if it did not exist."""
        token = self.token(request)
        repository = self.repositories.get(request.args["id"])
        if repository and (token.may_read(repository) if token else not repository.private):
            return repository
        if token:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")

    def downloadable(self, request: Request) -> Repository:
        """The repository of a request that may have its files; 401 or 403 where it is gated."""
        repository = self.readable(request)
        token = self.token(request)
        if not repository.gated or (token and token.may_download(repository)):
            return repository
        why = f"Access to model {repository.id} is restricted."
        if token is None:
            raise Refusal(401, f"{why} You must have access to it and be authenticated to access it.", "GatedRepo")
        raise Refusal(403, f"{why} Visit {self.hub_url}/{repository.id} to ask for access.", "GatedRepo")

    def writable(self, request: Request, *, pull_request: bool = False) -> tuple[Repository, Token]:
        """The repository of a request that may commit to it, or open a pull request; and who does."""
        repository, token = self.readable(request), self.token(request)
        if token is None:
            # Without the code, the client takes a 401 for a missing repository from https:// only, and we are http://.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        allowed = token.allows("discussion.write", repository.namespace, repository.id) if pull_request else False
        if not allowed and not token.may_write(repository):
            role = "a read token" if token.role == "read" else "this account and token"
            raise Refusal(403, f"Forbidden: {role} cannot write to {repository.id}")
        return repository, token

    def committable(self, request: Request) -> tuple[Repository, Token]:
        """The repository of a request that may commit there: to a branch, by a pull request, or to its own one."""
        repository, token = self.readable(request), self.token(request)
        rev = request.args.get("rev", "")
        pull = next((pull for pull in repository.discussions if f"refs/pr/{pull.num}" == rev), None)
        mine = pull is not None and token is not None and pull.author == token.user.name
        return self.writable(request, pull_request=mine or request.flag("create_pr"))

    def discussion(self, request: Request) -> tuple[Repository, Discussion]:
        """The discussion that a request names."""
        repository, num = self.readable(request), request.args["num"]
        if not num.isdigit() or not 0 < int(num) <= len(repository.discussions):
            raise Refusal(404, "Discussion not found")
        return repository, repository.discussions[int(num) - 1]

    # Xet's own tokens

    def xet_token(self, scope: str, repository: Repository) -> tuple[str, int]:
        """A new token for the CAS origin, and when it ends."""
        token, expires = f"xet_{secrets.token_hex(8)}", int(time.time() + self.token_seconds)
        self.xet_tokens[token] = (scope, repository, expires)
        return token, expires

    def signed(self, path: str, repository: Repository) -> str:
        """A URL of the CDN for one path, on behalf of a repository."""
        query = {"repository": repository.id, "signature": self.signature(path, repository.id)}
        return f"{self.cdn_url}{path}?{urlencode(query)}"

    def signature(self, path: str, repo_id: str) -> str:
        """What a signed URL of the CDN carries."""
        return sha256(f"{self.secret} {path} {repo_id}".encode()).hexdigest()[:16]


def stamp(seconds: int) -> str:
    """A moment as the Hub writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

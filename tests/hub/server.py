"""LocalHub: a Hub on two origins of the loopback, and the side door to seed, read and break it without a client."""

import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hub import api_commits, api_files, api_models, api_refs, api_repos
from tests.hub.accounts import OrgRole, TokenRole
from tests.hub.api import hub as hub_routes
from tests.hub.calls import Call
from tests.hub.cdn import cdn as cdn_routes
from tests.hub.client import environment
from tests.hub.faults import Fault, FaultPlan, Kind
from tests.hub.objects import readable
from tests.hub.origins import Origins
from tests.hub.repositories import Commit, Gated, Repository, apply
from tests.hub.state import State, stamp
from tests.hub.wire import Refusal, Request, Response, Routes, answer

ROUTES: Mapping[str, Routes[State]] = {"hub": hub_routes, "cdn": cdn_routes}
PARTS = (api_commits, api_files, api_models, api_refs, api_repos)  # importing them fills the routes
CONTROL = "/__"
Content = bytes | str | Path


class LocalHub:
    """A Hub that answers until `close`. Every method may be called from any thread.

    `url` and `cdn_url` are its origins, `state` is all that it knows, `errors` has the traceback of each request at
    which the Hub itself, not the client, went wrong.
    """

    def __init__(self, *, xet: bool = True) -> None:
        self.lock = threading.RLock()
        self.plan = FaultPlan()
        self.log: list[Call] = []
        self.errors: list[str] = []
        self.home = tempfile.TemporaryDirectory(prefix="local-hub-home-")
        self.origins = Origins(tuple(ROUTES), self)
        self.url, self.cdn_url = self.origins.urls
        self.state = State(self.url, self.cdn_url)
        self.state.reset(xet=xet)

    def __enter__(self) -> "LocalHub":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops answering, and removes what lies on disk."""
        self.origins.close()
        self.state.objects.close()
        self.state.xet_store.objects.close()
        self.home.cleanup()

    def reset(self, *, xet: bool = True) -> None:
        """An empty Hub at the same address, without faults or calls; connections are closed."""
        self.origins.hang_up()
        with self.lock:
            self.clear_faults()
            self.clear_calls()
            self.errors.clear()
            self.state.reset(xet=xet)

    # Answering

    def find(self, origin: str, method: str, path: str) -> Fault | None:
        """The fault that strikes a request."""
        route = ROUTES[origin].route(method, path)
        return None if path.startswith(CONTROL) else self.plan.find(origin, method, path, route)

    def note(self, origin: str, request: Request, query: str) -> Call:
        """Notes a call."""
        token = self.state.accounts.tokens.get(request.bearer or "")
        route = ROUTES[origin].route(request.method, request.path)
        call = Call(origin, request.method, request.path, route, query, token.user.name if token else None)
        if not request.path.startswith(CONTROL):
            self.log.append(call)
        return call

    def answer(self, origin: str, request: Request) -> Response:
        """The answer of one origin."""
        with self.lock:
            try:
                if request.path.startswith(CONTROL):
                    return self.control(request)
                return ROUTES[origin](self.state, request)
            except Refusal as refusal:
                return refusal.response()
            except Exception:
                self.errors.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
                return answer({"error": self.errors[-1]}, 500)

    def control(self, request: Request) -> Response:
        """`POST /__faults` plans a fault (the fields of `Fault`), `DELETE` clears; `GET /__calls` is the log."""
        if request.path == "/__faults" and request.method == "POST":
            return answer({"planned": self.fault(**request.json()).on})
        if request.path == "/__faults" and request.method == "DELETE":
            self.clear_faults()
            return answer({})
        return answer([asdict(call) for call in self.log])

    # Seeding

    def user(
        self,
        name: str,
        *,
        role: TokenRole = "write",
        orgs: Mapping[str, OrgRole] | None = None,
        scopes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> str:
        """A token of a user, who is made on the way. `scopes` of a fine-grained token: `{"org": ("repo.write",)}`."""
        with self.lock:
            return self.state.accounts.add(name, role, orgs, scopes)

    def create(
        self,
        repo: str,
        files: Mapping[str, Content] | None = None,
        *,
        private: bool = False,
        gated: Gated = False,
        message: str = "Upload",
        creator: str = "somebody",
    ) -> str:
        """A repository with `files` (contents, or paths whose contents stay where they are); its head commit."""
        with self.lock:
            repository = self.state.create(repo, creator, private)
            repository.gated = gated
            return self.commit(repo, files, message=message) if files else repository.head.oid

    def commit(
        self,
        repo: str,
        files: Mapping[str, Content | None],
        *,
        message: str = "Upload",
        revision: str = "main",
        author: str = "somebody",
    ) -> str:
        """Commits `files` to a branch, None deleting one; the new commit."""
        with self.lock:
            repository = self.repository(repo)
            changed = {
                path: None if content is None else self.state.stored(repository, path, readable(content))
                for path, content in files.items()
            }
            tree = apply(repository.at(revision).files, changed)
            ref = repository.ref(revision) or revision
            return repository.commit(ref, tree, message, "", author, self.state.tick()).oid

    def collection(self, slug: str, repos: list[str], *, title: str = "A collection", private: bool = False) -> None:
        """A collection of models; `slug` is `owner/name-0123456789abcdef01234567`."""
        items = [
            {"_id": f"{position:024x}", "id": repo, "type": "model", "position": position, "repoType": "model"}
            for position, repo in enumerate(repos)
        ]
        owner = {"name": slug.partition("/")[0], "type": "org"}
        with self.lock:
            self.state.collections[slug] = {
                "slug": slug, "title": title, "owner": owner, "items": items, "private": private, "position": 0,
                "theme": "green", "upvotes": 0, "lastUpdated": stamp(self.state.tick()), "isUpvotedByUser": False,
            }  # fmt: skip

    def tag(self, repo: str, tag: str, revision: str = "main") -> None:
        """Sets a tag, moving it where it is there already."""
        with self.lock:
            repository = self.repository(repo)
            repository.refs[f"refs/tags/{tag}"] = repository.at(revision).oid

    def branch(self, repo: str, branch: str, revision: str = "main") -> None:
        """Sets a branch, moving it where it is there already."""
        with self.lock:
            repository = self.repository(repo)
            repository.refs[f"refs/heads/{branch}"] = repository.at(revision).oid

    def grant(self, repo: str, user: str) -> None:
        """Grants a user access to the files of a gated repository."""
        with self.lock:
            self.repository(repo).granted.add(user)

    def delete(self, repo: str) -> None:
        """Deletes a repository."""
        with self.lock:
            del self.state.repositories[repo]

    def squash(self, repo: str, branch: str = "main") -> str:
        """Squashes a branch: commits that were pinned are gone; the new commit."""
        with self.lock:
            return self.repository(repo).squash(branch, "Squash", "somebody", self.state.tick()).oid

    # Reading

    def repository(self, repo: str) -> Repository:
        """A repository with all that it has: its refs, commits, discussions, and settings, which may be changed."""
        return self.state.repositories[repo]

    def head(self, repo: str, revision: str = "main") -> str:
        """The commit that a branch, a tag or refs/pr/N is at."""
        with self.lock:
            return self.repository(repo).at(revision).oid

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """The contents of a file."""
        with self.lock:
            content = self.repository(repo).file(revision, path)[1].content
            return content.read(0, content.size)

    def files(self, repo: str, revision: str = "main") -> list[str]:
        """The paths of a tree, without the Hub's own .gitattributes."""
        with self.lock:
            return [path for path in self.repository(repo).at(revision).files if path != ".gitattributes"]

    def history(self, repo: str, revision: str = "main") -> list[Commit]:
        """The commits of a branch, the latest first."""
        with self.lock:
            repository = self.repository(repo)
            return list(repository.history(repository.at(revision)))

    # Breaking and watching

    def fault(self, on: str, kind: Kind, **options: Any) -> Fault:
        """Plans a fault; see `Fault` for its fields. Its `hits` tell how often it struck."""
        return self.plan.plan(on, kind, **options)

    def clear_faults(self) -> None:
        """Forgets every fault; a connection that stalls goes on stalling."""
        self.plan.faults.clear()

    def calls(self, pattern: str = "*", *, origin: str | None = None, user: str | None = None) -> list[Call]:
        """The calls so far that a pattern names (`calls.named`), in the order of their arrival."""
        return [call for call in tuple(self.log) if call.fits(pattern, origin, user)]

    @staticmethod
    def routes(origin: str) -> list[str]:
        """Everything that an origin answers, as patterns for `fault` and `calls`: `GET /api/models/{id}`."""
        return sorted(f"{method} {template}" for method, template, _, _ in ROUTES[origin].routes)

    def clear_calls(self) -> None:
        """Forgets every call."""
        self.log.clear()

    # Clients

    def env(self, *, token: str | None = None, cache: Path | None = None, xet: bool = True) -> dict[str, str]:
        """The environment in which a new process finds this Hub, with its own cache and with or without Xet."""
        return environment(self.url, cache or Path(self.home.name), token=token, xet=xet)

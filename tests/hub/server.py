"""LocalHub: a Hub on two origins of the loopback, and the side door to seed, read and break it without a client."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hub import api_commits, api_files, api_models, api_refs, api_repos
from tests.hub.accounts import OrgRole, TokenRole
from tests.hub.api import hub as hub_routes
from tests.hub.calls import Call
from tests.hub.cdn import cdn as cdn_routes
from tests.hub.connection import Connection
from tests.hub.faults import Fault, FaultPlan, Kind
from tests.hub.objects import readable
from tests.hub.repositories import Commit, Gated, Repository, apply
from tests.hub.state import State, stamp
from tests.hub.wire import Refusal, Request, Response, Routes, answer

ROUTES: Mapping[str, Routes[State]] = {"hub": hub_routes, "cdn": cdn_routes}
PARTS = (api_commits, api_files, api_models, api_refs, api_repos)  # importing them fills the routes
CONTROL = "/__"
Content = bytes | str | Path
# What a developer's own environment says about the Hub, or about the way to it, is not for the tests.
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "XET_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
LONGEST_HEAD = 1 << 20


class LocalHub:
    """A Hub in a thread of its own, until `close`. Every method may be called from any thread."""

    def __init__(self, *, xet: bool = True) -> None:
        self.lock = threading.RLock()
        self.faults = FaultPlan()
        self.log: list[Call] = []
        self.home = tempfile.TemporaryDirectory(prefix="local-hub-home-")
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="local-hub")
        self.thread.start()
        ports = self.in_loop(self.listen())
        self.url, self.cdn_url = (f"http://127.0.0.1:{port}" for port in ports)
        self.state = State(self.url, self.cdn_url)
        self.state.reset(xet=xet)

    def __enter__(self) -> "LocalHub":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Up and down

    def in_loop(self, work: Any) -> Any:
        """The result of a coroutine that runs in the Hub's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def listen(self) -> list[int]:
        """Opens both origins; their ports."""
        self.servers = [
            await asyncio.start_server(self.accept(origin), "127.0.0.1", 0, backlog=1024, limit=LONGEST_HEAD)
            for origin in ROUTES
        ]
        return [server.sockets[0].getsockname()[1] for server in self.servers]

    def accept(self, origin: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        """What to do with a new connection to an origin."""

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(
                (reader, writer),
                find=lambda method, path: None if path.startswith(CONTROL) else self.faults.find(origin, method, path),
                answer=lambda request: self.answer(origin, request),
                note=lambda request, query: self.note(origin, request, query),
            )
            task = self.loop.create_task(connection.serve())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

        return connected

    async def hang_up(self) -> None:
        """Ends every connection."""
        tasks = tuple(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Closes both origins and every connection."""
        for server in self.servers:
            server.close()
        await self.hang_up()
        for server in self.servers:
            await server.wait_closed()

    def close(self) -> None:
        """Ends the thread, and removes what lies on disk."""
        self.in_loop(self.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.state.objects.close()
        self.state.xet_store.objects.close()
        self.home.cleanup()

    def reset(self, *, xet: bool = True) -> None:
        """An empty Hub at the same address, without faults or calls; connections are closed."""
        self.in_loop(self.hang_up())
        with self.lock:
            self.clear_faults()
            self.clear_calls()
            self.state.reset(xet=xet)

    # Answering

    def answer(self, origin: str, request: Request) -> Response:
        """The answer of one origin."""
        with self.lock:
            try:
                if request.path.startswith(CONTROL):
                    return self.control(request)
                return ROUTES[origin](self.state, request)
            except Refusal as refusal:
                return refusal.response()
            except (KeyError, ValueError, TypeError) as error:
                return answer({"error": f"Bad request: {error!r}"}, 400)

    def control(self, request: Request) -> Response:
        """`POST /__faults` plans a fault (the fields of `Fault`), `DELETE` clears; `GET /__calls` is the log."""
        if request.path == "/__faults" and request.method == "POST":
            return answer({"planned": self.fault(**request.json()).on})
        if request.path == "/__faults" and request.method == "DELETE":
            self.clear_faults()
            return answer({})
        return answer([asdict(call) for call in self.log])

    def note(self, origin: str, request: Request, query: str) -> Call:
        """Notes a call."""
        token = self.state.accounts.tokens.get(request.bearer or "")
        call = Call(origin, request.method, request.path, query, token.user.name if token else None)
        if not request.path.startswith(CONTROL):
            self.log.append(call)
        return call

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
                path: None if content is None else self.state.stored(path, readable(content))
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
        return self.faults.plan(on, kind, **options)

    def clear_faults(self) -> None:
        """Forgets every fault; a connection that stalls goes on stalling."""
        self.faults.faults.clear()

    def calls(self, pattern: str = "*", *, origin: str | None = None, user: str | None = None) -> list[Call]:
        """The calls so far whose `METHOD path` fits: `GET /api/*`; in the order of their arrival."""
        return [call for call in tuple(self.log) if call.fits(pattern, origin, user)]

    def clear_calls(self) -> None:
        """Forgets every call."""
        self.log.clear()

    # Clients

    def env(self, *, token: str | None = None, cache: Path | None = None, xet: bool = True) -> dict[str, str]:
        """The environment in which a new process finds this Hub, with its own cache and with or without Xet."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(FOREIGN)}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache or self.home.name),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_XET_XORB_COMPRESSION_POLICY": "none",
            **({"HF_TOKEN": token} if token else {}),
            **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
        }

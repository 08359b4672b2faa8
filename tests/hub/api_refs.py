"""The Hub origin: history, branches, tags, pull requests."""

from typing import Any

from tests.hub.api import hub, page
from tests.hub.api_commits import open_pull
from tests.hub.repositories import Discussion, Repository
from tests.hub.state import State, stamp
from tests.hub.wire import Refusal, Request, Response, answer


@hub.on("GET", "/api/models/{id}/commits/{rev}")
def commits(state: State, request: Request) -> Response:
    repository = state.readable(request)
    history = list(repository.history(repository.at(request.args["rev"])))
    shown, headers = page(state, request, history, state.page_size)
    told = [
        {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": stamp(c.date)}
        for c in shown
    ]
    return answer(told, headers=headers)


@hub.on("GET", "/api/models/{id}/refs")
def refs(state: State, request: Request) -> Response:
    repository = state.readable(request)

    def below(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repository.refs.items()
            if ref.startswith(prefix)
        ]

    told: dict[str, Any] = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if request.flag("include_prs"):
        told["pullRequests"] = below("refs/pr/")
    return answer(told)


@hub.on("POST", "/api/models/{id}/branch/{name}")
def create_branch(state: State, request: Request) -> Response:
    repository, _ = state.writable(request)
    start = repository.at(request.json().get("startingPoint", "main"))
    return new_ref(repository, f"refs/heads/{request.args['name']}", start.oid)


@hub.on("POST", "/api/models/{id}/tag/{rev}")
def create_tag(state: State, request: Request) -> Response:
    repository, _ = state.writable(request)
    return new_ref(repository, f"refs/tags/{request.json()['tag']}", repository.at(request.args["rev"]).oid)


def new_ref(repository: Repository, ref: str, oid: str) -> Response:
    """Sets a ref that must not be there yet."""
    if ref in repository.refs:
        raise Refusal(409, f"Reference {ref} already exists")
    repository.refs[ref] = oid
    return answer({})


@hub.on("DELETE", "/api/models/{id}/branch/{name}")
def delete_branch(state: State, request: Request) -> Response:
    if request.args["name"] == "main":
        raise Refusal(403, "The main branch is protected")
    return drop_ref(state, request, f"refs/heads/{request.args['name']}")


@hub.on("DELETE", "/api/models/{id}/tag/{name}")
def delete_tag(state: State, request: Request) -> Response:
    return drop_ref(state, request, f"refs/tags/{request.args['name']}")


def drop_ref(state: State, request: Request, ref: str) -> Response:
    """Deletes a ref; its commits stay."""
    repository, _ = state.writable(request)
    if repository.refs.pop(ref, None) is None:
        raise Refusal(404, f"Reference {ref} does not exist", "RevisionNotFound")
    return answer({})


@hub.on("POST", "/api/models/{id}/super-squash/{branch}")
def super_squash(state: State, request: Request) -> Response:
    """One commit in the place of a branch's history: what was pinned before is gone."""
    repository, token = state.writable(request)
    title = request.json().get("message", "Super-squash")
    made = repository.squash(request.args["branch"], title, token.user.name, state.tick())
    return answer({"commitId": made.oid})


@hub.on("GET", "/api/models/{id}/discussions")
def discussions(state: State, request: Request) -> Response:
    repository, kind = state.readable(request), request.first("type")
    author, status = request.first("author"), request.first("status")
    found = [
        d
        for d in reversed(repository.discussions)
        if kind in ("", "all") or (kind == "pull_request") == bool(d.base)
        if author in ("", d.author)
        if status in ("", "all") or (status == "open") == (d.status in ("open", "draft"))
    ]
    start = int(request.first("p", "0")) * state.page_size
    shown = [told(repository, d) for d in found[start : start + state.page_size]]
    return answer({"discussions": shown, "count": len(found), "start": start})


@hub.on("POST", "/api/models/{id}/discussions")
def create_discussion(state: State, request: Request) -> Response:
    repository, token = state.writable(request, pull_request=True)
    wanted, author = request.json(), token.user.name
    title, text = wanted["title"], wanted.get("description", "")
    if wanted.get("pullRequest"):
        made = open_pull(state, repository, title, text, author, "refs/heads/main", repository.head, draft=True)
    else:
        made = Discussion(len(repository.discussions) + 1, title, text, author, state.tick(), "open")
        repository.discussions.append(made)
    url = f"{state.hub_url}/{repository.id}/discussions/{made.num}"
    return answer({"num": made.num, "url": url, "pullRequest": bool(made.base)})


@hub.on("GET", "/api/models/{id}/discussions/{num}")
def discussion(state: State, request: Request) -> Response:
    repository, found = state.discussion(request)
    changes = {"base": f"refs/heads/{found.target}", "mergeCommitId": found.merged_as}
    more = {"changes": changes, "filesWithConflicts": [], "diff": ""} if found.base else {}
    return answer({**told(repository, found), "events": [], **more})


@hub.on("POST", "/api/models/{id}/discussions/{num}/merge")
def merge(state: State, request: Request) -> Response:
    (_, token), (repository, pull) = state.writable(request), state.discussion(request)
    if not pull.base or pull.status not in ("open", "draft"):
        raise Refusal(400, "Only an open pull request can be merged")
    made = repository.merge(pull, token.user.name, state.tick())
    return answer({"mergeCommitId": made.oid})


@hub.on("POST", "/api/models/{id}/discussions/{num}/status")
def set_status(state: State, request: Request) -> Response:
    (_, _), (_, found) = state.writable(request, pull_request=True), state.discussion(request)
    found.status = request.json()["status"]
    event = {"id": f"{state.tick():x}", "type": "status-change", "createdAt": stamp(state.clock)}
    return answer({"newStatus": {**event, "data": {"status": found.status}}})


def told(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    """A discussion as a listing shows it."""
    return {
        "num": discussion.num, "title": discussion.title, "status": discussion.status,
        "author": {"name": discussion.author}, "createdAt": stamp(discussion.date),
        "isPullRequest": discussion.base is not None, "repo": {"name": repository.id, "type": "model"},
    }  # fmt: skip

"""The Hub origin: trees, files, and the tokens with which Xet reads."""

from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub import git
from tests.hub.api import hub, page
from tests.hub.repositories import Commit, Repository, children
from tests.hub.state import State, stamp
from tests.hub.wire import Refusal, Request, Response, answer, ranged

EXPANDED_PAGE = 50


@hub.on("GET", "/api/models/{id}/tree/{rev}/{path}")
@hub.on("GET", "/api/models/{id}/tree/{rev}")
def tree(state: State, request: Request) -> Response:
    repository = state.readable(request)
    commit, folder = repository.at(request.args["rev"]), request.args.get("path", "").strip("/")
    if folder and folder not in commit.folders:
        raise Refusal(404, f"{folder} does not exist on {request.args['rev']}", "EntryNotFound")
    paths = children(commit, folder, request.flag("recursive"))
    size = min(EXPANDED_PAGE, state.page_size) if request.flag("expand") else state.page_size
    shown, headers = page(state, request, paths, size)
    entries = [entry(state, repository, commit, path, expand=request.flag("expand")) for path in shown]
    return answer(entries, headers={**headers, "X-Repo-Commit": commit.oid})


@hub.on("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(state: State, request: Request) -> Response:
    repository = state.readable(request)
    commit, form = repository.at(request.args["rev"]), parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    known = [path for path in form.get("paths", []) if path in commit.files or path in commit.folders]
    return answer([entry(state, repository, commit, path, expand=expand) for path in known])


def entry(state: State, repository: Repository, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    """One path of a tree; with `expand`, its last commit too."""
    facts: dict[str, Any] = {"type": "directory", "oid": commit.folders.get(path), "size": 0, "path": path}
    if path in commit.files:
        file = commit.files[path]
        facts = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.sha256:
            pointer = len(git.lfs_pointer(file.sha256, file.size))
            facts["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer}
            facts |= {"xetHash": state.xet_hash(file)} if state.xet else {}
    if expand:
        last = repository.last_change(commit, path)
        facts["lastCommit"] = {"id": last.oid, "title": last.title, "date": stamp(last.date)}
    return facts


@hub.on("GET HEAD", "/{id}/resolve/{rev}/{path}")
def resolve(state: State, request: Request) -> Response:
    """A small file itself; for a large one, where it lies on the other origin."""
    repository = state.downloadable(request)
    commit, file = repository.file(request.args["rev"], request.args["path"])
    headers = {"X-Repo-Commit": commit.oid}
    if file.sha256 is None:
        headers |= {"ETag": f'"{file.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        return ranged(request, file.content, headers)
    headers["Location"] = state.signed(f"/lfs/{file.sha256}", repository)
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if name := state.xet_hash(file):
        token_url = f"{state.hub_url}/api/models/{repository.id}/xet-read-token/{quote(commit.oid, safe='')}"
        headers |= {"X-Xet-Hash": name, "Link": f'<{token_url}>; rel="xet-auth"'}
    return Response(302, headers=headers)


@hub.on("GET", "/api/models/{id}/xet-read-token/{rev}")
def xet_read_token(state: State, request: Request) -> Response:
    repository = state.downloadable(request)
    repository.at(request.args["rev"])
    return xet_token(state, "read", repository)


@hub.on("GET", "/api/models/{id}/xet-write-token/{rev}")
def xet_write_token(state: State, request: Request) -> Response:
    repository, _ = state.committable(request)
    if not request.flag("create_pr"):  # then the revision is the word None
        repository.at(request.args["rev"])
    return xet_token(state, "write", repository)


def xet_token(state: State, scope: str, repository: Repository) -> Response:
    """A token for the other origin: hf_xet reads the body, huggingface_hub the headers."""
    if not state.xet:
        raise Refusal(404, "Not found")
    token, expires = state.xet_token(scope, repository)
    headers = {"X-Xet-Cas-Url": state.cdn_url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return answer({"casUrl": state.cdn_url, "accessToken": token, "exp": expires}, headers=headers)

"""The Hub origin: publishing. Which way a file goes, LFS's batch, and the commit."""

import json
from base64 import b64decode
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from tests.hub.api import hub
from tests.hub.repositories import Commit, Discussion, File, Repository, apply, is_large, large_file, small_file
from tests.hub.state import State
from tests.hub.wire import Refusal, Request, Response, answer


@hub.on("POST", "/api/models/{id}/preupload/{rev}")
def preupload(state: State, request: Request) -> Response:
    repository, _ = state.committable(request)
    commit, wanted = repository.at(request.args["rev"]), request.json()
    if len(wanted["files"]) > 256:
        raise Refusal(413, "Too many files")
    ignored = [line.strip() for line in wanted.get("gitIgnore", "").splitlines() if line.strip()]
    files = [plan(commit, file["path"], file["size"], ignored) for file in wanted["files"]]
    return answer({"files": files, "commitOid": commit.oid})


def plan(commit: Commit, path: str, size: int, ignored: Sequence[str]) -> dict[str, Any]:
    """How a file is to be uploaded, and the hash of what is there already."""
    mode = "lfs" if is_large(path, size) else "regular"
    ignore = any(fnmatchcase(path, pattern) for pattern in ignored)
    facts = {"path": path, "uploadMode": mode, "shouldIgnore": ignore}
    if path in commit.files:
        facts["oid"] = commit.files[path].sha256 or commit.files[path].oid
    return facts


@hub.on("POST", "/api/models/{id}/commit/{rev}")
def commit(state: State, request: Request) -> Response:
    """One commit, all or nothing; 412 where the branch is no longer at the parent that the client saw."""
    pull_request = request.flag("create_pr")
    repository, token = state.committable(request)
    header, *operations = (json.loads(line) for line in request.body.splitlines() if line)
    ref, parent = repository.ref(request.args["rev"]), header["value"].get("parentCommit")
    if ref is None or ref.startswith("refs/tags/"):
        raise Refusal(404, f"Invalid rev id: {request.args['rev']}", "RevisionNotFound")
    if parent and not pull_request and not repository.refs[ref].startswith(parent):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    base = repository.at(parent) if parent and pull_request else repository.commits[repository.refs[ref]]
    changed: dict[str, File | None] = {}
    for operation in operations:
        changed |= change(state, repository, base, operation["key"], operation["value"])
    title, text = header["value"]["summary"], header["value"].get("description", "")
    pull = open_pull(state, repository, title, text, token.user.name, ref, base) if pull_request else None
    made = repository.commit(
        f"refs/pr/{pull.num}" if pull else ref, apply(base.files, changed), title, text, token.user.name, state.tick()
    )
    told = {"success": True, "commitOid": made.oid, "commitUrl": f"{state.hub_url}/{repository.id}/commit/{made.oid}"}
    if pull:
        told["pullRequestUrl"] = f"{state.hub_url}/{repository.id}/discussions/{pull.num}"
    return answer(told)


def change(
    state: State, repository: Repository, base: Commit, key: str, value: dict[str, Any]
) -> dict[str, File | None]:
    """What one line of a commit does to the tree."""
    path = value["path"]
    if key == "file":
        return {path: small_file(b64decode(value["content"]))}
    if key == "lfsFile":
        content = state.objects.by_sha256[value["oid"]] if value["oid"] in repository.objects else None
        if content is None or value.get("size", content.size) != content.size:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        return {path: large_file(value["oid"], content)}
    folder = path.rstrip("/") + "/"
    gone = [name for name in base.files if (name == path if key == "deletedFile" else name.startswith(folder))]
    if not gone:
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    return dict.fromkeys(gone)


def open_pull(
    state: State, repository: Repository, title: str, text: str, author: str, ref: str, base: Commit, *,
    draft: bool = False,
) -> Discussion:  # fmt: skip
    """A new pull request, whose ref starts at `base`."""
    num = len(repository.discussions) + 1
    branch = ref.removeprefix("refs/heads/")
    pull = Discussion(num, title, text, author, state.tick(), "draft" if draft else "open", branch, base.oid)
    repository.discussions.append(pull)
    repository.refs[f"refs/pr/{num}"] = base.oid
    return pull


@hub.on("POST", "/{id}.git/info/lfs/objects/batch")
def lfs_batch(state: State, request: Request) -> Response:
    """Where to put each object that is not there yet: at once, or in parts where it is large."""
    repository, _ = state.writable(request, pull_request=True)
    objects = [upload_actions(state, repository, o["oid"], o["size"]) for o in request.json()["objects"]]
    multipart = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    return answer({"transfer": "multipart" if multipart else "basic", "objects": objects})


def upload_actions(state: State, repository: Repository, sha256: str, size: int) -> dict[str, Any]:
    """What a client is to do to upload an object; nothing where it is there."""
    if sha256 in repository.objects:
        return {"oid": sha256, "size": size}
    path = f"/lfs/{sha256}"
    upload: dict[str, Any] = {"href": state.signed(path, repository), "header": {}}
    if size > state.part_size:
        count = -(-size // state.part_size)
        parts = {f"{num:05d}": state.signed(f"{path}/parts/{num}", repository) for num in range(1, count + 1)}
        upload = {
            "href": state.signed(f"{path}/complete", repository),
            "header": {"chunk_size": str(state.part_size), **parts},
        }
    verify = {"href": f"{state.hub_url}/{repository.id}.git/info/lfs/objects/verify", "header": {}}
    return {"oid": sha256, "size": size, "actions": {"upload": upload, "verify": verify}}


@hub.on("POST", "/{id}.git/info/lfs/objects/verify")
def lfs_verify(state: State, request: Request) -> Response:
    repository, _ = state.writable(request, pull_request=True)
    wanted = request.json()
    content = state.objects.by_sha256.get(wanted["oid"])
    if content is None or wanted["oid"] not in repository.objects or content.size != wanted["size"]:
        raise Refusal(404, "The object was not uploaded")
    return answer({"message": "Object verified"})

"""The second origin: LFS objects behind signed URLs, and Xet's content-addressed store."""

import hashlib
import time

from tests.hub.repositories import Repository
from tests.hub.state import State
from tests.hub.wire import Refusal, Request, Response, Routes, answer, byte_range, ranged

cdn: Routes[State] = Routes()


def signed(state: State, request: Request) -> tuple[str, Repository]:
    """The sha256 of an LFS request whose signature is right, and the repository that it is for."""
    repo_id = request.first("repository")
    if repo_id not in state.repositories or request.first("signature") != state.signature(request.path, repo_id):
        raise Refusal(403, "SignatureDoesNotMatch")
    return request.args["sha256"], state.repositories[repo_id]


@cdn.on("GET HEAD", "/lfs/{sha256}")
def download(state: State, request: Request) -> Response:
    sha256, _ = signed(state, request)
    if sha256 not in state.objects.by_sha256:
        raise Refusal(404, "NoSuchKey")
    headers = {"ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}
    return ranged(request, state.objects.by_sha256[sha256], headers)


@cdn.on("PUT", "/lfs/{sha256}")
def upload(state: State, request: Request) -> Response:
    sha256, repository = signed(state, request)
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise Refusal(400, "BadDigest")
    repository.objects.add(state.objects.put(request.body))
    return Response(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@cdn.on("PUT", "/lfs/{sha256}/parts/{num}")
def upload_part(state: State, request: Request) -> Response:
    sha256, _ = signed(state, request)
    state.parts[sha256, int(request.args["num"])] = state.objects.keep(request.body)
    return Response(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@cdn.on("POST", "/lfs/{sha256}/complete")
def complete(state: State, request: Request) -> Response:
    (sha256, repository), body = signed(state, request), request.json()
    parts = [state.parts.pop((sha256, part["partNumber"]), None) for part in body["parts"]]
    data = b"".join(part.read(0, part.size) for part in parts if part)
    if None in parts or hashlib.sha256(data).hexdigest() != sha256 or body["oid"] != sha256:
        raise Refusal(400, "The parts do not make the object")
    repository.objects.add(state.objects.put(data))
    return answer({"success": True})


def allowed(state: State, request: Request, *scopes: str) -> Repository:
    """The repository of a Xet token of one of the scopes; 401 for another one, or where it has run out."""
    known = state.xet_tokens.get(request.bearer or "")
    if known is None or known[0] not in scopes or known[2] < time.time():
        raise Refusal(401, "The Xet token is missing, over, or for something else")
    return known[1]


@cdn.on("POST", "/v1/xorbs/{prefix}/{hash}")
def upload_xorb(state: State, request: Request) -> Response:
    allowed(state, request, "write")
    return answer({"was_inserted": state.xet_store.put_xorb(request.args["hash"], request.body)})


@cdn.on("POST", "/v1/shards")
def upload_shard(state: State, request: Request) -> Response:
    repository = allowed(state, request, "write")
    repository.objects.update(state.xet_store.put_shard(request.body, state.objects))
    return answer({"result": 1})


@cdn.on("GET", "/v1/reconstructions/{hash}")
def reconstruction(state: State, request: Request) -> Response:
    allowed(state, request, "read", "write")
    file_hash = request.args["hash"]
    if file_hash not in state.xet_store.files:
        raise Refusal(404, "File not found")
    wanted = byte_range(request, state.xet_store.files[file_hash].size)
    return answer(state.xet_store.reconstruction(file_hash, wanted, f"{state.cdn_url}/xorbs"))


@cdn.on("GET", "/xorbs/{hash}")
def download_xorb(state: State, request: Request) -> Response:
    if request.args["hash"] not in state.xet_store.served:
        raise Refusal(404, "NoSuchKey")
    return ranged(request, state.xet_store.served[request.args["hash"]], {"Content-Type": "application/octet-stream"})

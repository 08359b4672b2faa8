"""The Hub origin: who am I, repositories made, deleted and set, collections, what may be done."""

from functools import lru_cache
from typing import Any

import yaml

from tests.hub.api import hub
from tests.hub.state import State
from tests.hub.wire import Refusal, Request, Response, answer


@hub.on("GET", "/api/whoami-v2")
def whoami(state: State, request: Request) -> Response:
    token = state.token(request)
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    return answer(token.whoami())


@hub.on("POST", "/api/repos/create")
def create_repo(state: State, request: Request) -> Response:
    token, wanted = state.token(request), request.json()
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    namespace = wanted.get("organization") or token.user.name
    repo_id = f"{namespace}/{wanted['name']}"
    if not token.may_create(namespace, repo_id):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    told = {"url": f"{state.hub_url}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in state.repositories:
        raise Refusal(409, "You already created this model repo", more=told)
    state.create(repo_id, token.user.name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return answer(told)


@hub.on("DELETE", "/api/repos/delete")
def delete_repo(state: State, request: Request) -> Response:
    token, wanted = state.token(request), request.json()
    namespace = wanted.get("organization") or (token.user.name if token else "")
    named = Request(**{**vars(request), "args": {"id": f"{namespace}/{wanted['name']}"}})
    repository, _ = state.writable(named)
    del state.repositories[repository.id]
    return answer({})


@hub.on("PUT", "/api/models/{id}/settings")
def settings(state: State, request: Request) -> Response:
    repository, _ = state.writable(request)
    wanted = request.json()
    repository.gated = wanted.get("gated", repository.gated)
    if "visibility" in wanted or "private" in wanted:
        repository.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    return answer({"private": repository.private, "gated": repository.gated})


@hub.on("GET", "/api/models/{id}/auth-check")
def auth_check(state: State, request: Request) -> Response:
    state.downloadable(request)
    return answer({})


@hub.on("GET", "/api/models/{id}/auth-check/write")
def auth_check_write(state: State, request: Request) -> Response:
    state.writable(request)
    return answer({})


@hub.on("GET", "/api/collections/{slug}")
def collection(state: State, request: Request) -> Response:
    token, found = state.token(request), state.collections.get(request.args["slug"])
    if found is None or (found["private"] and not (token and token.belongs_to(found["owner"]["name"]))):
        raise Refusal(404, "Collection not found")
    return answer(found)


@hub.on("POST", "/api/validate-yaml")
def validate_yaml(state: State, request: Request) -> Response:
    """The Hub's judgement of a card: what it makes of the front matter."""
    state.token(request)
    text = request.json()["content"]
    if not text.startswith("---"):
        return answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    errors = [{"message": message} for message in card_errors(text)]
    return answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def card_errors(text: str) -> list[str]:
    """What is wrong with a card's metadata: not YAML, or a base model that is no repository id."""
    try:
        metadata = front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML parse error: {error}"]
    if not isinstance(metadata, dict):
        return ["The metadata is no mapping"]
    bases = metadata.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    return [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in bases
        if not isinstance(base, str) or base.startswith((".", "/")) or base.count("/") > 1
    ]


@lru_cache(maxsize=1024)
def front_matter(text: str) -> Any:
    """The YAML between the first two lines of `---`; nothing where there is none."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    return yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])) or {}

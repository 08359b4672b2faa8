"""The Hub origin: models listed and described."""

from hashlib import sha256
from typing import Any

from tests.hub.api import hub, page
from tests.hub.api_repos import front_matter
from tests.hub.repositories import Commit, File, Repository
from tests.hub.state import State, stamp
from tests.hub.wire import Request, Response, answer

BRIEF = ("likes", "trendingScore", "private", "downloads", "tags", "library_name", "pipeline_tag", "createdAt")
ALWAYS = ("_id", "id", "modelId")
SORTS = {"createdAt", "lastModified", "downloads", "likes", "trendingScore"}


@hub.on("GET", "/api/models")
def list_models(state: State, request: Request) -> Response:
    """The models that the asker may see, in no order unless one is asked for."""
    token = state.token(request)
    seen = [r for r in state.repositories.values() if (token.may_read(r) if token else not r.private)]
    author, search, tags = (
        request.first("author"),
        request.first("search").lower(),
        set(request.query.get("filter", [])),
    )
    found = [
        (repository, described(state, repository, repository.head))
        for repository in sorted(seen, key=lambda r: sha256(r.id.encode()).digest())
        if (not author or repository.namespace == author) and search in repository.id.lower()
    ]
    found = [(repository, facts) for repository, facts in found if tags <= set(facts["tags"])]
    if (sort := request.first("sort")) in SORTS:
        found.sort(key=lambda pair: pair[1][sort], reverse=True)
    size = min(int(request.first("limit") or state.page_size), state.page_size)
    shown, headers = page(state, request, found, size)
    return answer([chosen(request, facts, listed=True) for _, facts in shown], headers=headers)


@hub.on("GET", "/api/models/{id}/revision/{rev}")
@hub.on("GET", "/api/models/{id}")
def model_info(state: State, request: Request) -> Response:
    repository = state.readable(request)
    commit = repository.at(request.args.get("rev", "main"))
    facts = described(state, repository, commit)
    if request.flag("blobs"):
        facts["siblings"] = [sibling(path, file) for path, file in commit.files.items()]
    return answer(chosen(request, facts, listed=False))


def chosen(request: Request, facts: dict[str, Any], *, listed: bool) -> dict[str, Any]:
    """The facts that a request names with `expand`; else all of them, or few in a listing that is not `full`."""
    names = [name for value in request.query.get("expand", []) for name in value.split(",")]
    if not names and listed and not request.flag("full"):
        names = [*BRIEF, *(["cardData"] if request.flag("cardData") else [])]
    return {name: facts[name] for name in facts if name in (*ALWAYS, *names)} if names else facts


def described(state: State, repository: Repository, commit: Commit) -> dict[str, Any]:
    """Every fact about a model at a commit."""
    card = card_data(commit)
    return {
        "_id": sha256(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.namespace,
        "sha": commit.oid,
        "lastModified": stamp(commit.date),
        "createdAt": stamp(repository.created),
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "trendingScore": 0,
        "usedStorage": sum(file.size for file in commit.files.values()),
        "tags": tags_of(card),
        **({"library_name": card["library_name"]} if card.get("library_name") else {}),
        **({"pipeline_tag": card["pipeline_tag"]} if card.get("pipeline_tag") else {}),
        **({"baseModels": {"relation": card.get("base_model_relation", "finetune"), "models": bases(card)}}
           if bases(card) else {}),
        "cardData": card,
        "siblings": [{"rfilename": path} for path in commit.files],
    }  # fmt: skip


def card_data(commit: Commit) -> dict[str, Any]:
    """The metadata of a commit's card; nothing where there is no card, or a broken one."""
    if "README.md" not in commit.files:
        return {}
    content = commit.files["README.md"].content
    try:
        metadata = front_matter(content.read(0, content.size).decode(errors="replace"))
    except Exception:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def bases(card: dict[str, Any]) -> list[dict[str, str]]:
    """The base models that a card names."""
    named = card.get("base_model") or []
    return [{"id": name} for name in ([named] if isinstance(named, str) else named)]


def tags_of(card: dict[str, Any]) -> list[str]:
    """The tags that the Hub makes of a card: its own, and those of its library, licence and base model."""
    made = [str(tag) for tag in card.get("tags") or []]
    made += [str(card[name]) for name in ("library_name", "pipeline_tag") if card.get(name)]
    made += [f"license:{card['license']}"] if card.get("license") else []
    for base in bases(card):
        made += [f"base_model:{base['id']}"]
        made += [f"base_model:{card['base_model_relation']}:{base['id']}"] if card.get("base_model_relation") else []
    return list(dict.fromkeys(made))


def sibling(path: str, file: File) -> dict[str, Any]:
    """A file as `blobs=true` shows it."""
    facts: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
    if file.sha256:
        facts["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return facts

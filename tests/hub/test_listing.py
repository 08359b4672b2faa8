"""Listing and describing what is on the local Hub, with the real client."""

import subprocess
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub

IDS = "result = sorted(model.id for model in hf.HfApi(token=token).list_models(**how))"
CARD = "---\nlibrary_name: peft\ntags: [lora]\nbase_model: org/base\nbase_model_relation: adapter\n---\n"


def test_models_are_found_by_author_search_and_tag(hub: LocalHub, xet_client: Client) -> None:
    hub.create("org/client-1", {"README.md": CARD})
    hub.create("org/Client-2")
    hub.create("org/other")
    hub.create("elsewhere/client-3")
    found = [
        xet_client.run(IDS, token=False, how=how)
        for how in (
            {"author": "org"},
            {"author": "org", "search": "client-"},
            {"search": "client-"},
            {"filter": "lora"},
            {"filter": ["lora", "base_model:adapter:org/base"]},
            {"filter": ["lora", "base_model:org/another"]},
        )
    ]
    assert found == [
        ["org/Client-2", "org/client-1", "org/other"],
        ["org/Client-2", "org/client-1"],
        ["elsewhere/client-3", "org/Client-2", "org/client-1"],
        ["org/client-1"],
        ["org/client-1"],
        [],
    ]


def test_a_listing_comes_in_pages_and_stops_at_the_limit(hub: LocalHub, xet_client: Client) -> None:
    for number in range(7):
        hub.create(f"org/client-{number}")
    hub.state.page_size = 3
    how = {"author": "org", "expand": ["sha", "private"]}
    assert xet_client.run(IDS, token=False, how=how) == [f"org/client-{number}" for number in range(7)]
    calls = hub.calls("GET /api/models")
    assert len(calls) == 3
    assert all(parse_qs(call.query)["expand"] == ["sha", "private"] for call in calls)
    hub.clear_calls()
    assert len(xet_client.run(IDS, token=False, how={"author": "org", "limit": 2})) == 2
    assert len(hub.calls("GET /api/models")) == 1


def test_one_call_pins_every_client(hub: LocalHub, xet_client: Client) -> None:
    heads = {f"org/client-{number}": hub.create(f"org/client-{number}", {"x.txt": str(number)}) for number in range(3)}
    code = """
models = list(api.list_models(author='org', expand=['sha']))
result = {model.id: model.sha for model in models}, [model.last_modified for model in models]
"""
    assert xet_client.run(code) == [heads, [None, None, None]]
    assert len(hub.calls()) == 1


def test_a_listing_shows_private_models_to_their_owners_only(hub: LocalHub, xet_client: Client) -> None:
    member, stranger = hub.user("alice", orgs={"org": "read"}), hub.user("mallory")
    hub.create("org/open")
    hub.create("org/hidden", private=True)
    seen = [xet_client.run(IDS, token=token, how={"author": "org"}) for token in (member, stranger, False)]
    assert seen == [["org/hidden", "org/open"], ["org/open"], ["org/open"]]


def test_a_model_is_described_at_any_revision(hub: LocalHub, xet_client: Client) -> None:
    first = hub.create("org/a", {"README.md": CARD, "w.safetensors": b"weights"})
    second = hub.commit("org/a", {"x.txt": "2"})
    hub.tag("org/a", "v1", first)
    hub.branch("org/a", "feature/b", second)
    code = """
info = api.model_info('org/a', revision=revision, files_metadata=True)
facts = {f.rfilename: (f.size, f.lfs and f.lfs.sha256) for f in info.siblings}
result = info.sha, info.private, info.gated, info.card_data.to_dict(), info.tags, facts, str(info.created_at)
"""
    for revision, expected in (
        ("v1", first),
        (first, first),
        (first[:8], first),
        ("feature/b", second),
        (None, second),
    ):
        sha, private, gated, card, tags, facts, created = xet_client.run(code, revision=revision)
        assert (sha, private, gated, created) == (expected, False, False, "2026-01-01 00:00:01+00:00")
        assert card["base_model"] == "org/base"
        assert tags == ["lora", "peft", "base_model:org/base", "base_model:adapter:org/base"]
        assert facts["w.safetensors"][0] == 7
        assert len(facts["w.safetensors"][1]) == 64
        assert ("x.txt" in facts) == (expected == second)
    info = (
        "info = api.model_info('org/a', expand=['sha', 'cardData']); result = info.sha, info.created_at, info.siblings"
    )
    assert xet_client.run(info) == [second, None, None]


def test_what_is_not_there_is_named_by_its_kind(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token = hub.user("alice")
    hub.create("org/a", {"x.txt": "1"})
    for code, kind in (
        ("model_info('org/none')", "RepositoryNotFoundError"),
        ("model_info('org/a', revision='none')", "RevisionNotFoundError"),
        ("model_info('org/a', revision='0' * 40)", "RevisionNotFoundError"),
        ("hf_hub_download('org/a', 'none.txt', cache_dir=cache)", "RemoteEntryNotFoundError"),
        ("hf_hub_download('org/a', 'x.txt', revision='none', cache_dir=cache)", "RevisionNotFoundError"),
        ("hf_hub_download('org/none', 'x.txt', cache_dir=cache)", "RepositoryNotFoundError"),
        ("get_collection('org/none-0123456789abcdef01234567')", "HfHubHTTPError"),
        ("list_repo_commits('org/a', revision='none')", "RevisionNotFoundError"),
    ):
        with pytest.raises(ClientError, match="404") as caught:
            client.run(f"hf.HfApi(token=token).{code}", token=token, cache=tmp_path)
        assert caught.value.kinds[0] == kind
    with pytest.raises(ClientError, match="404") as caught:
        client.run("list(hf.HfApi(token=token).list_repo_tree('org/a', 'none'))", token=token)
    assert caught.value.kinds[0] == "RemoteEntryNotFoundError"
    assert client.run("result = api.file_exists('org/a', 'x.txt'), api.file_exists('org/a', 'y.txt')") == [True, False]
    assert client.run("result = api.repo_exists('org/a'), api.repo_exists('org/none')") == [True, False]


def test_a_tree_is_listed_by_folder_or_whole_in_pages(hub: LocalHub, xet_client: Client) -> None:
    hub.create("org/a", {"x.txt": "1", "folder/y.txt": "2", "folder/deep er/z.txt": "3"})
    code = "result = [e.path for e in api.list_repo_tree('org/a', path, recursive=recursive)]"
    assert xet_client.run(code, path=None, recursive=False) == [".gitattributes", "folder", "x.txt"]
    assert xet_client.run(code, path="folder", recursive=False) == ["folder/deep er", "folder/y.txt"]
    assert xet_client.run(code, path="folder/deep er", recursive=True) == ["folder/deep er/z.txt"]
    whole = [".gitattributes", "folder", "folder/deep er", "folder/deep er/z.txt", "folder/y.txt", "x.txt"]
    assert xet_client.run(code, path=None, recursive=True) == whole
    hub.state.page_size = 2
    hub.clear_calls()
    assert xet_client.run(code, path=None, recursive=True) == whole
    assert len(hub.calls("GET */tree/main")) == 3


def test_a_tree_tells_the_last_commit_of_each_path(hub: LocalHub, xet_client: Client) -> None:
    hub.create("org/a", {"x.txt": "1", "folder/y.txt": "2"}, message="First")
    hub.commit("org/a", {"folder/y.txt": "3"}, message="Second")
    code = """
entries = list(api.list_repo_tree('org/a', recursive=True, expand=True)) + api.get_paths_info('org/a', ['x.txt', 'no'])
result = [(entry.path, getattr(entry.last_commit, 'title', None)) for entry in entries]
"""
    assert xet_client.run(code) == [
        [".gitattributes", "initial commit"],
        ["folder", "Second"],
        ["folder/y.txt", "Second"],
        ["x.txt", "First"],
        ["x.txt", None],
    ]


def test_commits_are_listed_the_latest_first(hub: LocalHub, xet_client: Client) -> None:
    first = hub.create("org/a", {"x.txt": "1"}, message="First")
    second = hub.commit("org/a", {"x.txt": "2"}, message="Second", author="alice")
    hub.state.page_size = 2
    code = "result = [(c.commit_id, c.title, c.authors, c.created_at) for c in api.list_repo_commits('org/a')]"
    told = xet_client.run(code)
    assert told[:2] == [
        [second, "Second", ["alice"], "2026-01-01 00:00:03+00:00"],
        [first, "First", ["somebody"], "2026-01-01 00:00:02+00:00"],
    ]
    assert told[2][1] == "initial commit"
    assert len(hub.calls("GET */commits/main")) == 2


def test_a_collection_names_its_models_in_order(hub: LocalHub, xet_client: Client) -> None:
    slug = "org/clients-0123456789abcdef01234567"
    hub.collection(slug, ["org/b", "org/a"])
    code = "c = api.get_collection(slug); result = c.slug, [(item.item_id, item.item_type) for item in c.items]"
    assert xet_client.run(code, slug=slug) == [slug, [["org/b", "model"], ["org/a", "model"]]]
    hub.collection(slug, ["org/b"], private=True)
    with pytest.raises(ClientError, match="404"):
        xet_client.run(code, slug=slug)


def test_trees_and_files_have_the_ids_that_git_gives_them(hub: LocalHub, tmp_path: Path) -> None:
    files = {"a/b.txt": "1", "a/b/c.txt": "2", "a/b/d/e.txt": "3", "a/b-c/f.txt": "4", "a/b.d/g.txt": "5"}
    hub.create("org/a", files)
    commit = hub.history("org/a")[0]
    for path in commit.files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(hub.read("org/a", path))

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    tree = git("write-tree")
    listed = dict(line.split()[2:][::-1] for line in git("ls-tree", "-r", "-t", tree).splitlines())
    assert listed == {**{path: file.oid for path, file in commit.files.items()}, **commit.folders}


def test_a_history_is_the_same_in_every_run(hub: LocalHub) -> None:
    first = hub.create("org/a", {"x.txt": "1"})
    hub.reset()
    assert hub.create("org/a", {"x.txt": "1"}) == first

"""Publishing to the local Hub with the real client, over Xet and over LFS."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub

WEIGHTS = Random(1).randbytes(300_000)
CARD = "---\nlibrary_name: peft\nbase_model: org/base\n---\n# A card\n"
COMMIT = """
api = hf.HfApi(token=token)
add = hf.CommitOperationAdd
files = {path: text.encode() if isinstance(text, str) else open(text[0], 'rb').read() for path, text in files.items()}
made = api.create_commit(repo, [add(path, content) for path, content in files.items()], commit_message='Add', **how)
result = dict(oid=made.oid, pr_url=made.pr_url, pr_revision=made.pr_revision)
"""


def folder(path: Path) -> Path:
    """A client's folder: a card, a config, and weights."""
    path.mkdir()
    (path / "README.md").write_text(CARD)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return path


def test_a_folder_goes_up_and_comes_down_again_byte_for_byte(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token, source = hub.user("alice", orgs={"org": "write"}), folder(tmp_path / "source")
    code = """
api = hf.HfApi(token=token)
api.create_repo('org/client-1', private=True)
commit = api.upload_folder(repo_id='org/client-1', folder_path=source).oid
result = commit, api.snapshot_download('org/client-1', revision=commit, cache_dir=cache)
"""
    commit, copy = client.run(code, token=token, source=source, cache=tmp_path / "cache")
    assert commit == hub.head("org/client-1")
    assert hub.files("org/client-1") == sorted(path.name for path in source.iterdir())
    for path in source.iterdir():
        assert (Path(copy) / path.name).read_bytes() == path.read_bytes() == hub.read("org/client-1", path.name)
    assert not [call for call in hub.calls(origin="cdn") if call.user], "the Hub's token goes to the Hub only"
    assert hub.repository("org/client-1").private


def test_large_files_take_the_way_that_the_client_was_set_to(
    hub: LocalHub, xet_client: Client, lfs_client: Client, tmp_path: Path
) -> None:
    token, source = hub.user("alice"), folder(tmp_path / "source")
    code = """
api = hf.HfApi(token=token)
api.create_repo(repo)
api.upload_folder(repo_id=repo, folder_path=source)
"""
    xet_client.run(code, token=token, repo="alice/over-xet", source=source)
    assert hub.calls("POST /v1/shards")  # not its xorbs: a client remembers those that it has sent once
    assert not hub.calls("PUT /lfs/*")
    hub.clear_calls()
    lfs_client.run(code, token=token, repo="alice/over-lfs", source=source)
    assert hub.calls("PUT /lfs/*")
    assert not hub.calls("POST /v1/*")


def test_a_commit_on_a_parent_that_is_no_longer_the_head_is_refused_and_changes_nothing(
    hub: LocalHub, client: Client
) -> None:
    token = hub.user("org")
    first = hub.create("org/a", {"x.txt": "1"})
    second = hub.commit("org/a", {"x.txt": "2"})
    with pytest.raises(ClientError, match="412"):
        client.run(COMMIT, token=token, repo="org/a", files={"x.txt": "3"}, how={"parent_commit": first})
    assert hub.head("org/a") == second
    made = client.run(COMMIT, token=token, repo="org/a", files={"x.txt": "3"}, how={"parent_commit": second})
    assert hub.head("org/a") == made["oid"]
    assert [commit.title for commit in hub.history("org/a")] == ["Add", "Upload", "Upload", "initial commit"]


def test_files_that_are_there_already_make_no_commit(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token, source = hub.user("org"), folder(tmp_path / "source")
    head = hub.create("org/a", {path.name: path for path in source.iterdir()})
    made = client.run(
        "result = hf.HfApi(token=token).upload_folder(repo_id='org/a', folder_path=source).oid",
        token=token,
        source=source,
    )
    assert made == head == hub.head("org/a")
    assert not hub.calls("POST */commit/*")


def test_files_and_folders_are_deleted_and_copied(hub: LocalHub, client: Client) -> None:
    token = hub.user("org")
    hub.create("org/a", {"gone.txt": "1", "folder/b.txt": "2", "folder/c/d.txt": "3", "w.safetensors": WEIGHTS})
    code = """
operations = [hf.CommitOperationDelete('gone.txt'), hf.CommitOperationDelete('folder/'),
              hf.CommitOperationCopy('w.safetensors', 'copy.safetensors')]
hf.HfApi(token=token).create_commit('org/a', operations, commit_message='Tidy')
"""
    client.run(code, token=token)
    assert hub.files("org/a") == ["copy.safetensors", "w.safetensors"]
    assert hub.read("org/a", "copy.safetensors") == WEIGHTS
    with pytest.raises(ClientError, match="A file with this name doesn't exist"):
        client.run(code, token=token)


def test_a_large_file_that_was_never_uploaded_there_cannot_be_committed(hub: LocalHub, lfs_client: Client) -> None:
    token = hub.user("org")
    hub.create("org/a")
    hub.create("elsewhere/private", {"w.safetensors": b"never uploaded"}, private=True)
    code = """
operation = hf.CommitOperationAdd('w.safetensors', b'never uploaded')
operation._upload_mode, operation._is_uploaded = 'lfs', True
hf.HfApi(token=token).create_commit('org/a', [operation], commit_message='Add')
"""
    with pytest.raises(ClientError, match="LFS pointer pointed to a file that does not exist") as caught:
        lfs_client.run(code, token=token)
    assert "BadRequestError" in caught.value.kinds


def test_lfs_uploads_go_in_parts_where_they_are_large(hub: LocalHub, lfs_client: Client, tmp_path: Path) -> None:
    hub.state.part_size = 100_000
    token, source = hub.user("org"), folder(tmp_path / "source")
    hub.create("org/a")
    files = {"w.safetensors": [str(source / "adapter_model.safetensors")]}
    lfs_client.run(COMMIT, token=token, repo="org/a", files=files, how={})
    assert len(hub.calls("PUT /lfs/*/parts/*")) == 3
    assert hub.read("org/a", "w.safetensors") == WEIGHTS


def test_an_object_is_sent_once_to_a_repository_but_to_each(hub: LocalHub, lfs_client: Client, tmp_path: Path) -> None:
    token, source = hub.user("org"), folder(tmp_path / "source")
    hub.create("org/a", {"w.safetensors": WEIGHTS})
    hub.create("org/b")
    files = {"again.safetensors": [str(source / "adapter_model.safetensors")]}
    for repo, count in (("org/a", 0), ("org/b", 1)):
        lfs_client.run(COMMIT, token=token, repo=repo, files=files, how={})
        assert hub.read(repo, "again.safetensors") == WEIGHTS
        assert len(hub.calls("PUT *")) == count


def test_a_stranger_proposes_by_pull_request_and_the_owner_merges(hub: LocalHub, client: Client) -> None:
    owner, stranger = hub.user("org"), hub.user("mallory")
    head = hub.create("org/a", {"x.txt": "1"})
    with pytest.raises(ClientError, match="403"):
        client.run(COMMIT, token=stranger, repo="org/a", files={"x.txt": "2"}, how={})
    files = {"x.txt": "2", "w.safetensors": "some weights of the stranger"}
    made = client.run(COMMIT, token=stranger, repo="org/a", files=files, how={"create_pr": True})
    assert made["pr_url"] == f"{hub.url}/org/a/discussions/1"
    assert hub.head("org/a") == head
    assert hub.head("org/a", "refs/pr/1") == made["oid"]
    client.run(COMMIT, token=stranger, repo="org/a", files={"y.txt": "3"}, how={"revision": made["pr_revision"]})
    code = """
api = hf.HfApi(token=token)
before = api.get_discussion_details('org/a', 1)
listed = [pull.num for pull in api.get_repo_discussions('org/a', discussion_type='pull_request')]
api.merge_pull_request('org/a', 1)
after = api.get_discussion_details('org/a', 1)
result = before.status, before.author, before.target_branch, listed, after.status, after.merge_commit_oid
"""
    with pytest.raises(ClientError, match="403"):
        client.run(code, token=stranger)
    told = client.run(code, token=owner)
    assert told == ["open", "mallory", "refs/heads/main", [1], "merged", hub.head("org/a")]
    assert hub.read("org/a", "x.txt") == b"2"
    assert hub.files("org/a") == ["w.safetensors", "x.txt", "y.txt"]


def test_a_pull_request_opened_empty_is_a_draft_that_takes_commits_and_can_be_closed(
    hub: LocalHub, client: Client
) -> None:
    token = hub.user("alice")
    hub.create("org/a", {"x.txt": "1"})
    code = """
api = hf.HfApi(token=token)
pull = api.create_pull_request('org/a', title='A change')
api.create_commit('org/a', [hf.CommitOperationAdd('x.txt', b'2')], commit_message='Change', revision=pull.git_reference)
closed = api.change_discussion_status('org/a', pull.num, 'closed')
result = pull.status, closed.new_status
"""
    assert client.run(code, token=token) == ["draft", "closed"]
    assert hub.read("org/a", "x.txt", "refs/pr/1") == b"2"
    assert hub.read("org/a", "x.txt") == b"1"


def test_a_pull_request_that_conflicts_is_not_merged(hub: LocalHub, xet_client: Client) -> None:
    owner = hub.user("org")
    hub.create("org/a", {"x.txt": "1"})
    xet_client.run(COMMIT, token=owner, repo="org/a", files={"x.txt": "2"}, how={"create_pr": True})
    hub.commit("org/a", {"x.txt": "3"})
    with pytest.raises(ClientError, match=r"Conflicting files: x\.txt"):
        xet_client.run("hf.HfApi(token=token).merge_pull_request('org/a', 1)", token=owner)
    assert hub.read("org/a", "x.txt") == b"3"


def test_a_card_goes_up_and_comes_down_again(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token = hub.user("org")
    hub.create("org/a", {"x.txt": "1"})
    code = """
data = hf.ModelCardData(base_model='org/base', library_name='peft', tags=['lora'], base_model_relation='adapter')
card = hf.ModelCard(f'---\\n{data.to_yaml()}\\n---\\n\\n# Body\\n')
card.push_to_hub('org/a', token=token)
again = hf.ModelCard.load('org/a', token=token)
info = hf.HfApi(token=token).model_info('org/a')
result = again.data.to_dict() == data.to_dict(), again.text.strip(), info.library_name, info.tags
"""
    same, text, library, tags = client.run(code, token=token)
    assert (same, text, library) == (True, "# Body", "peft")
    assert {"lora", "peft", "base_model:org/base", "base_model:adapter:org/base"} <= set(tags)


@pytest.mark.parametrize(
    ("card", "complaint"),
    [("---\na: [\n---\n", "YAML parse error"), ("---\nbase_model: /home/me/base\n---\n", "is not valid")],
)
def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_sent(
    hub: LocalHub, xet_client: Client, card: str, complaint: str
) -> None:
    token = hub.user("org")
    hub.create("org/a")
    with pytest.raises(ClientError, match=complaint):
        xet_client.run(COMMIT, token=token, repo="org/a", files={"README.md": card}, how={})
    assert not hub.calls("POST */preupload/*")


def test_a_repository_is_made_once_and_deleted(hub: LocalHub, xet_client: Client) -> None:
    token = hub.user("alice", orgs={"org": "admin"})
    code = "result = hf.HfApi(token=token).create_repo('org/new', exist_ok=exist_ok)"
    assert xet_client.run(code, token=token, exist_ok=False) == f"{hub.url}/org/new"
    assert xet_client.run(code, token=token, exist_ok=True) == f"{hub.url}/org/new"
    with pytest.raises(ClientError, match="409"):
        xet_client.run(code, token=token, exist_ok=False)
    xet_client.run("hf.HfApi(token=token).delete_repo('org/new')", token=token)
    with pytest.raises(ClientError, match="404"):
        xet_client.run("hf.HfApi(token=token).delete_repo('org/new')", token=token)


def test_branches_and_tags_are_made_once_moved_never_and_deleted(hub: LocalHub, xet_client: Client) -> None:
    token = hub.user("org")
    head = hub.create("org/a", {"x.txt": "1"})
    code = """
api = hf.HfApi(token=token)
api.create_branch('org/a', branch='dev')
api.create_tag('org/a', tag='v1', revision='dev')
api.create_tag('org/a', tag='v1', exist_ok=True)
api.upload_file(repo_id='org/a', path_in_repo='x.txt', path_or_fileobj=b'2', revision='dev')
refs = api.list_repo_refs('org/a', include_pull_requests=True)
made = {ref.name: ref.target_commit for ref in refs.branches + refs.tags}
api.delete_branch('org/a', branch='dev')
api.delete_tag('org/a', tag='v1')
refs = api.list_repo_refs('org/a')
result = made, [ref.name for ref in refs.branches + refs.tags]
"""
    dev, left = xet_client.run(code, token=token)
    assert {"main": dev["main"], "v1": dev["v1"]} == {"main": head, "v1": head}
    assert dev["dev"] != head
    assert left == ["main"]
    hub.tag("org/a", "v1")
    hub.branch("org/a", "dev")
    for made in ("create_tag('org/a', tag='v1')", "create_branch('org/a', branch='dev')"):
        with pytest.raises(ClientError, match="409"):
            xet_client.run(f"hf.HfApi(token=token).{made}", token=token)
    for missing in ("delete_tag('org/a', tag='v2')", "delete_branch('org/a', branch='other')"):
        with pytest.raises(ClientError, match="404"):
            xet_client.run(f"hf.HfApi(token=token).{missing}", token=token)


def test_a_squashed_history_has_forgotten_its_commits(hub: LocalHub, xet_client: Client) -> None:
    token = hub.user("org")
    pinned = hub.create("org/a", {"x.txt": "1"})
    hub.commit("org/a", {"x.txt": "2"})
    xet_client.run("hf.HfApi(token=token).super_squash_history('org/a')", token=token)
    assert len(hub.history("org/a")) == 1
    assert hub.read("org/a", "x.txt") == b"2"
    with pytest.raises(ClientError) as caught:
        xet_client.run("hf.HfApi(token=token).model_info('org/a', revision=pinned)", token=token, pinned=pinned)
    assert caught.value.kinds[0] == "RevisionNotFoundError"


def test_of_publishers_that_saw_the_same_head_one_wins(hub: LocalHub, xet_client: Client, lfs_client: Client) -> None:
    token = hub.user("org")

    def publish(client: Client, name: str) -> str:
        given = {"token": token, "repo": "org/a", "files": {"x.txt": name}, "how": {"parent_commit": head}}
        try:
            client.run(COMMIT, **given)
        except ClientError as error:
            return "beaten" if "412" in error.text else error.text
        return name

    head = hub.create("org/a", {"x.txt": "0"})
    for _ in range(5):
        with ThreadPoolExecutor(2) as threads:
            told = set(threads.map(publish, (xet_client, lfs_client), "ab"))
        assert told == {hub.read("org/a", "x.txt").decode(), "beaten"}
        assert hub.history("org/a")[0].parent == head
        head = hub.commit("org/a", {"x.txt": "0"})


def test_the_hashes_of_the_tree_are_those_of_the_files(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token, source = hub.user("org"), folder(tmp_path / "source")
    code = """
api = hf.HfApi(token=token)
api.create_repo('org/a')
api.upload_folder(repo_id='org/a', folder_path=source)
result = {entry.path: (entry.blob_id, entry.lfs and entry.lfs.sha256) for entry in api.list_repo_tree('org/a')}
"""
    tree = client.run(code, token=token, source=source)
    assert tree["adapter_model.safetensors"][1] == hashlib.sha256(WEIGHTS).hexdigest()
    assert tree["adapter_config.json"] == [hashlib.sha1(b"blob 2\0{}").hexdigest(), None]

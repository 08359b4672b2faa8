"""Publishing to the local Hub: one commit, verified; nothing lost, nothing done twice, nothing forced."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_merge.hub import client
from lora_merge.publish import persistence
from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub
from tests.publish.conftest import SHORT, WAITS, client_folder

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lora_merge.json"]
COMMIT = "POST /api/models/org/a/commit/*"

PUSH = """
import dataclasses, os
from pathlib import Path
from lora_merge.publish.push import push
from lora_merge.publish.repository import Target
os.environ["HF_TOKEN"] = token
said = []
pushed = push(Path(folder), Target(repo, **target), max_wait=max_wait, tell=said.append)
result = {**dataclasses.asdict(pushed.published), "files": pushed.files, "said": said}
"""


class Pusher:
    """Publishes as alice, who may write to org."""

    def __init__(self, hub: LocalHub, publisher: Client) -> None:
        self.publisher = publisher
        self.alice = hub.user("alice", orgs={"org": "write"})

    def __call__(self, folder: Path, repo: str = "org/a", *, max_wait: float = 20, **target: Any) -> dict[str, Any]:
        published: dict[str, Any] = self.publisher.run(
            PUSH, folder=str(folder), repo=repo, token=self.alice, max_wait=max_wait, target=target
        )
        return published


@pytest.fixture
def push(hub: LocalHub, publisher: Client) -> Pusher:
    return Pusher(hub, publisher)


def kinds(error: pytest.ExceptionInfo[ClientError]) -> Sequence[str]:
    return error.value.kinds


def changes(hub: LocalHub, repo: str = "org/a") -> int:
    """How many commits there are beside the first, which makes the repository."""
    return len(hub.history(repo)) - 1


def test_a_push_is_one_commit_of_just_these_bytes(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    published = push(client_a)
    assert published["files"] == FILES
    assert sorted(hub.files("org/a")) == FILES
    assert (changes(hub), hub.head("org/a")) == (1, published["commit"])
    for name in FILES[1:]:
        assert hub.read("org/a", name) == (client_a / name).read_bytes()
    assert hub.errors == []


def test_a_new_repository_is_private_unless_asked(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    assert push(client_a)["private"]
    assert hub.repository("org/a").private
    assert not push(client_a, "org/open", private=False)["private"]
    assert not hub.repository("org/open").private


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_another_visibility_than_asked_for_is_left_alone(
    hub: LocalHub, push: Pusher, client_a: Path, private: bool
) -> None:
    head = hub.create("org/a", private=not private)
    with pytest.raises(ClientError, match="was asked for") as caught:
        push(client_a, private=private)
    assert "UsageError" in kinds(caught)
    assert hub.head("org/a") == head


def test_where_nothing_changed_there_is_no_commit(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    first = push(client_a)
    again = push(client_a)
    assert (again["commit"], again["changed"]) == (first["commit"], [])
    assert changes(hub) == 1


def test_only_what_changed_is_sent(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    push(client_a)
    (client_a / "README.md").write_text("---\n{}\n---\n# Other words\n")
    assert push(client_a)["changed"] == ["README.md"]
    assert changes(hub) == 2


def test_records_of_another_adapter_go_and_files_of_others_stay(
    hub: LocalHub, push: Pusher, merged: Path, client_a: Path
) -> None:
    push(merged)
    hub.commit("org/a", {"LICENSE": "theirs", "lora-merge.lock.sig": "an old signature"})
    published = push(client_a)
    assert set(published["removed"]) == {"aggregation.json", "lora-merge.lock", "lora-merge.lock.sig"}
    assert sorted(hub.files("org/a")) == ["LICENSE", *FILES]


def test_it_works_without_xet(hub_without_xet: LocalHub, tmp_path: Path, client_a: Path) -> None:
    token = hub_without_xet.user("alice", orgs={"org": "write"})
    with Client(hub_without_xet.env(cache=tmp_path / "cache", xet=False)) as publisher:
        publisher.run(PUSH, folder=str(client_a), repo="org/a", token=token, max_wait=5, target={})
    path = "adapter_model.safetensors"
    assert hub_without_xet.read("org/a", path) == (client_a / path).read_bytes()
    assert changes(hub_without_xet) == 1


@pytest.mark.parametrize("kind", ["lost", "reset", "status", "html"])
@pytest.mark.parametrize(
    "call",
    [
        COMMIT,
        "POST /api/repos/create",
        "POST /api/models/org/a/preupload/*",
        "POST /api/validate-yaml",
        "GET /api/models/org/a/tree/*",
        "GET /api/models/org/a/revision/*",
        "GET /api/whoami-v2",
    ],
)
def test_a_failure_of_any_call_is_outlived_and_nothing_happens_twice(
    hub: LocalHub, push: Pusher, client_a: Path, call: str, kind: Any
) -> None:
    fault = hub.fault(call, kind)
    try:
        published = push(client_a)
    except ClientError as error:  # then it says so, and the same command goes on
        if "NetworkError" not in error.kinds:
            raise
        published = push(client_a)
    assert fault.hits == 1
    assert (changes(hub), hub.head("org/a")) == (1, published["commit"])
    assert sorted(hub.files("org/a")) == FILES


def test_a_lost_answer_is_looked_for_and_not_sent_again(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    hub.fault(COMMIT, "lost")
    push(client_a)
    assert len(hub.calls(COMMIT)) == 1


@pytest.fixture
def waits_as_users_have_them(publisher: Client) -> Iterator[None]:
    publisher.run(WAITS, backoff=client.BACKOFF, first_wait=persistence.FIRST_WAIT)
    yield
    publisher.run(WAITS, **SHORT)


@pytest.mark.usefixtures("waits_as_users_have_them")
def test_a_hub_that_stays_broken_is_given_up_in_time(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    hub.create("org/a", private=True)
    hub.fault(COMMIT, "status", times=None)
    with pytest.raises(ClientError, match="503") as caught:
        push(client_a, max_wait=3)
    assert "NetworkError" in kinds(caught)
    assert len(hub.calls(COMMIT)) == 2  # at once and after 1 s; 2 s more would be too late
    assert changes(hub) == 0


def during_the_commit(hub: LocalHub, act: Any) -> threading.Thread:
    """Hold the commit's answer to preupload for a while, and do something in that time."""
    held = hub.fault("POST /api/models/org/a/preupload/*", "delay", seconds=1.0)

    def wait_and_act() -> None:
        while not held.hits:
            threading.Event().wait(0.01)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_somebody_elses_commit_in_the_meantime_is_a_conflict(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    hub.create("org/a", private=True)
    thread = during_the_commit(hub, lambda: hub.commit("org/a", {"README.md": "theirs"}))
    with pytest.raises(ClientError, match="somebody else") as caught:
        push(client_a)
    thread.join()
    assert "ConflictError" in kinds(caught)
    assert (changes(hub), hub.read("org/a", "README.md")) == (1, b"theirs")


def test_what_was_published_and_then_superseded_counts_as_published(
    hub: LocalHub, push: Pusher, client_a: Path
) -> None:
    hub.create("org/a", private=True)
    hub.fault(COMMIT, "lost")
    held = hub.fault("GET /api/models/org/a/revision/main", "delay", times=None, seconds=0.5)

    def supersede() -> None:
        while changes(hub) == 0:
            threading.Event().wait(0.01)
        hub.commit("org/a", {"README.md": "theirs"})

    thread = threading.Thread(target=supersede)
    thread.start()
    published = push(client_a)
    thread.join()
    assert held.hits
    assert published["superseded"] or published["commit"] == hub.history("org/a")[1].oid
    assert (changes(hub), hub.read("org/a", "README.md")) == (2, b"theirs")


def test_a_file_that_changes_while_it_is_sent_is_not_published(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    hub.create("org/a", private=True)
    other = client_folder(client_a.parent / "other", seed=7)
    weights = "adapter_model.safetensors"
    thread = during_the_commit(hub, lambda: (client_a / weights).write_bytes((other / weights).read_bytes()))
    with pytest.raises(ClientError, match=weights) as caught:
        push(client_a)
    thread.join()
    assert "StorageError" in kinds(caught)
    assert changes(hub) == 0


def test_a_pull_request_changes_nothing_but_itself(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    head = hub.create("other/a", {"README.md": "theirs"})
    published = push(client_a, "other/a", create_pr=True)
    assert published["pull_request"].endswith("/other/a/discussions/1")
    assert hub.head("other/a") == head
    assert sorted(hub.files("other/a", "refs/pr/1")) == FILES


@pytest.mark.parametrize("kind", ["lost", "reset"])
def test_a_pull_request_is_opened_once(hub: LocalHub, push: Pusher, client_a: Path, kind: Any) -> None:
    hub.create("other/a", {"README.md": "theirs"})
    hub.fault("POST /api/models/other/a/commit/*", kind)
    first = push(client_a, "other/a", create_pr=True)
    again = push(client_a, "other/a", create_pr=True)
    assert first["pull_request"] == again["pull_request"]
    assert len(hub.repository("other/a").discussions) == 1


def test_a_pull_request_whose_answer_was_lost_is_found_behind_newer_ones_of_others(
    hub: LocalHub, push: Pusher, publisher: Client, client_a: Path, tmp_path: Path
) -> None:
    hub.create("other/a", {"README.md": "theirs"})
    mine = push(client_a, "other/a", create_pr=True)
    push(client_folder(tmp_path / "client-c", seed=5), "other/a", create_pr=True)
    bob = hub.user("bob")
    given = {"folder": str(client_folder(tmp_path / "client-b", seed=4)), "repo": "other/a", "token": bob}
    publisher.run(PUSH, **given, max_wait=5, target={"create_pr": True})
    assert push(client_a, "other/a", create_pr=True)["pull_request"] == mine["pull_request"]
    assert len(hub.repository("other/a").discussions) == 3


def test_somebody_elses_equal_pull_request_is_not_ours(
    hub: LocalHub, push: Pusher, publisher: Client, client_a: Path
) -> None:
    hub.create("other/a", {"README.md": "theirs"})
    bob = hub.user("bob")
    publisher.run(PUSH, folder=str(client_a), repo="other/a", token=bob, max_wait=5, target={"create_pr": True})
    assert push(client_a, "other/a", create_pr=True)["pull_request"].endswith("/discussions/2")


def test_the_waits_of_a_push_are_bounded_together(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    for call in ("GET /api/whoami-v2", "GET /api/models/org/a/revision/*", "POST /api/repos/create"):
        hub.fault(call, "status", status=429, retry_after=1)
    with pytest.raises(ClientError, match="gave up after 2 s") as caught:
        push(client_a, max_wait=2.5)  # what a busy answer takes is waited as well
    assert "NetworkError" in kinds(caught)


def test_a_branch_may_be_named_and_must_be_there(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    head = hub.create("org/a")
    hub.branch("org/a", "trial")
    assert push(client_a, revision="trial")["commit"] == hub.head("org/a", "trial")
    assert hub.head("org/a") == head
    with pytest.raises(ClientError, match="no such revision"):
        push(client_a, revision="nowhere")


def test_an_adapter_has_no_business_in_a_federations_repository(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    head = hub.create("org/a", {"lora_start.json": "{}"})
    with pytest.raises(ClientError, match="another kind"):
        push(client_a)
    assert hub.head("org/a") == head


def test_private_inputs_are_counted_and_said(hub: LocalHub, push: Pusher, publisher: Client, tmp_path: Path) -> None:
    push(client_folder(tmp_path / "one"), "org/one", private=True)
    push(client_folder(tmp_path / "two", seed=1), "org/two", private=False)
    publisher.run("import lora_merge; lora_merge.aggregate(['org/one', 'org/two'], out)", out=str(tmp_path / "global"))
    push(tmp_path / "global", "org/global", private=False)
    assert b"In private repositories: 1 of the 2 adapters" in hub.read("org/global", "README.md")


def test_a_push_takes_few_calls(hub: LocalHub, push: Pusher, client_a: Path) -> None:
    push(client_a)
    hub.clear_calls()
    push(client_a)
    assert len(hub.calls("* /api/*")) == 3  # who am I, where is the branch, what does it hold

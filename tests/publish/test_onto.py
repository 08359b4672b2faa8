"""Folding onto a repository: one commit on top of what was read, or a conflict; the bytes are those of one merge."""

import json
import re
from pathlib import Path

import pytest

from tests.hub.client import ClientError
from tests.hub.server import LocalHub
from tests.publish.conftest import Run, client_folder
from tests.publish.test_push import Pusher, changes, kinds, push

__all__ = ["push"]  # a fixture
NAMES = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")
ONTO = ("--onto", "org/global", "--allow-dominant")


@pytest.fixture
def clients(tmp_path: Path, run: Run) -> list[Path]:
    """Three clients on the Hub; no folder of the name `org` is here."""
    folders = [client_folder(tmp_path / f"client-{name}", seed=seed) for seed, name in enumerate("abc")]
    for folder in folders:
        assert run("push", folder.name, f"org/{folder.name}")[0] == 0
    return folders


def test_arrivals_are_commits_and_end_in_the_bytes_of_one_merge(
    hub: LocalHub, run: Run, clients: list[Path], tmp_path: Path
) -> None:
    for name, count in (("c", 1), ("a", 2), ("b", 3)):
        code, out, err = run("aggregate", f"org/client-{name}", *ONTO, "--json")
        assert code == 0, err
        assert json.loads(out)["added"] == [f"org/client-{name}"]
        assert not re.search(r"\x1b|\r|Processing Files", err)  # the library's bars
        assert changes(hub, "org/global") == count
    assert run("aggregate", "org/client-*", "--output", "one")[0] == 0
    assert all(hub.read("org/global", name) == (tmp_path / "one" / name).read_bytes() for name in NAMES)
    parent = json.loads(hub.read("org/global", "aggregation.json"))["parent"]
    assert parent == f"org/global@{hub.history('org/global')[1].oid}"


def test_nothing_new_is_no_commit_a_new_commit_replaces_and_a_client_leaves(
    hub: LocalHub, run: Run, clients: list[Path], tmp_path: Path
) -> None:
    assert run("aggregate", "org/client-*", *ONTO)[0] == 0
    code, out, _ = run("aggregate", "org/*", *ONTO, "--json")
    assert (code, json.loads(out)["changed"]) == (0, False)
    assert changes(hub, "org/global") == 1
    client_folder(tmp_path / "again" / "client-b", seed=7)
    assert run("push", "again/client-b", "org/client-b")[0] == 0
    assert json.loads(run("aggregate", "org/client-*", *ONTO, "--json")[1])["replaced"] == ["org/client-b"]
    assert json.loads(run("aggregate", *ONTO, "--withdraw", "org/client-a", "--json")[1])["withdrawn"] == [
        "org/client-a"
    ]
    assert run("aggregate", "org/client-b", "org/client-c", "--output", "one")[0] == 0
    assert all(hub.read("org/global", name) == (tmp_path / "one" / name).read_bytes() for name in NAMES)


def test_an_svd_is_folded_onto_a_repository_by_its_core(hub: LocalHub, run: Run, clients: list[Path]) -> None:
    assert run("aggregate", "org/client-a", *ONTO, "--method", "svd", "--rank", "1")[0] == 0
    code, out, err = run("aggregate", "org/client-b", *ONTO, "--json")
    assert code == 0, err
    assert json.loads(out)["again"] is None
    assert "aggregation_core.safetensors" in hub.files("org/global")
    code, out, err = run("verify", "org/global")
    assert (code, "identical" in out) == (0, True), err


@pytest.mark.parametrize("parent", ["", "0" * 40])
def test_a_repository_that_is_not_what_was_read_is_a_conflict(
    parent: str, hub: LocalHub, push: Pusher, client_a: Path, tmp_path: Path
) -> None:
    push(client_a)
    before = hub.files("org/a")
    with pytest.raises(ClientError) as error:
        push(client_folder(tmp_path / "client-b", seed=1), parent=parent)
    assert "ConflictError" in kinds(error)
    assert hub.files("org/a") == before

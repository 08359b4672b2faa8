"""Strangers' adapters on a Hub: whose id is whose, who is allowed, and what inspect and check say of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.hub.server import LocalHub
from tests.publish.conftest import Run, hub, publisher, run, running_hub
from tests.sources.federation import adapter, publish

__all__ = ["hub", "publisher", "run", "running_hub"]  # fixtures

Told: TypeAlias = Callable[..., Any]


@pytest.fixture
def told(run: Run) -> Told:
    """`told("inspect", "org/*", code=3)`: what a command prints as JSON, in a folder of its own."""

    def call(*arguments: str, code: int = 0) -> Any:
        ended, out, err = run(*arguments, "--json")
        assert ended == code, err
        return json.loads(out)

    return call


def test_an_allow_list_goes_by_where_an_adapter_lies_and_not_by_what_it_states(
    hub: LocalHub, told: Told, tmp_path: Path
) -> None:
    publish(hub, 2)
    hub.create("evil/any", adapter("org/client-9", seed=9))
    (tmp_path / "allowed").write_text("org/client-*\n")
    arguments = ("aggregate", "org/client-*", "evil/any", "-o", "global", "--allow-list", "allowed")
    refused = told(*arguments, code=3)["error"]["problems"]
    assert refused == [{"client": "evil/any", "field": "allow-list", "reason": "is not on it"}]
    assert hub.calls("* /evil/any/*") == [], "nothing of an adapter that is not allowed is read"
    merged = told(*arguments, "--skip-rejected")
    assert [each["source"] for each in merged["contributions"]] == ["org/client-0", "org/client-1"]
    assert [each["source"] for each in merged["left_out"]] == ["evil/any"]
    assert told("verify", "global")["verdict"] == "identical"


def test_a_claimed_id_is_its_repositorys(hub: LocalHub, told: Told) -> None:
    publish(hub, 2)
    hub.create("evil/any", adapter("org/client-1", num_examples=9, seed=9))
    arguments = ("aggregate", "org/client-*", "evil/any", "-o", "global")
    error = told(*arguments, code=3)["error"]
    (problem,) = error["problems"]
    assert (problem["client"], problem["field"]) == ("evil/any", "client_id")
    assert "--exclude evil/any." in error["hint"]
    for way in (["--skip-rejected"], ["--exclude", "evil/any", "--force"]):
        merged = told(*arguments, *way)
        assert [each["source"] for each in merged["contributions"]] == ["org/client-0", "org/client-1"]


def test_a_fold_and_a_watch_say_whose_id_an_arrival_states_as_one_merge_does(hub: LocalHub, run: Run) -> None:
    publish(hub, 1)
    for number in (1, 2):
        hub.create(f"evil/any-{number}", adapter(f"bank/any-{number}", num_examples=10, seed=number))
    said = [f"warning: evil/any-{number} states the client id bank/any-{number}" for number in (1, 2)]
    for arguments in (
        ("aggregate", "org/client-0", "evil/any-1", "--output", "one"),
        ("aggregate", "org/client-0", "evil/any-1", "--onto", "./made"),
        ("aggregate", "org/client-0", "--onto", "./folded"),
        ("aggregate", "evil/any-1", "--onto", "./folded", "--dry-run"),
        ("aggregate", "evil/any-1", "--onto", "./folded"),
    ):
        code, _, err = run(*arguments)
        assert (code, said[0] in err) == (0, "evil/any-1" in arguments), err
    code, _, err = run("watch", "evil/any-*", "--onto", "./watched", "--until", "2", "--for", "60s")
    assert (code, [line in err for line in said]) == (0, [True, True]), err


def test_inspect_names_what_it_read_and_flags_a_borrowed_id(hub: LocalHub, told: Told) -> None:
    commits = publish(hub, 2)
    hub.create("evil/any", adapter("org/client-9", seed=9))
    found = told("inspect", "org/client-*", "evil/any")
    assert {each["source"]: each["commit"] for each in found["clients"][:2]} == commits
    assert found["clients"][2]["flags"] == ["comes from evil/any"]


def test_check_of_a_repository_says_what_is_wrong_with_it(hub: LocalHub, told: Told) -> None:
    publish(hub, 1)
    assert told("check", "org/client-0")["verdict"] == "accepted"
    files = adapter("org/leaky")
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "/home/me/llama"}
    hub.create("org/leaky", {**files, "adapter_config.json": json.dumps(config).encode()})
    found = told("check", "org/leaky", code=3)
    assert {by for each in found["refusals"] for by in each["by"]} == {"push"}
    assert found["commit"] == hub.head("org/leaky")
    hub.create("org/broken", {**files, "adapter_model.safetensors": b"no"})
    found = told("check", "org/broken", code=3)
    assert [each["by"] for each in found["refusals"]] == [["aggregate"]]
    assert "not downloaded" in found["warnings"][0]
    assert told("check", "org/none", code=4)["error"]["code"] == 4

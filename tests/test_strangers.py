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


@pytest.mark.parametrize("place", ["{}", "hf://{}", "hf://models/{}", "{url}/{}"])
@pytest.mark.parametrize("name", ["org/client-0", "org/*-0", "org/client-0@{head}"])
def test_lists_mean_a_repository_however_it_is_spelled(
    place: str, name: str, hub: LocalHub, told: Told, tmp_path: Path
) -> None:
    publish(hub, 2)
    in_browser = name.replace("@", "/tree/") if "{url}" in place else name
    entry = place.format(in_browser.format(head=hub.head("org/client-0")), url=hub.url)
    (tmp_path / "allowed").write_text(f"{entry}\n")
    for sources in (["org/client-*"], ["hf://org/client-0", "hf://org/client-1"]):
        excluding = told("aggregate", *sources, "--dry-run", "--exclude", entry)
        assert [each["source"] for each in excluding["clients"]] == ["org/client-1"]
        allowing = told("aggregate", *sources, "--dry-run", "--allow-list", "allowed", "--skip-rejected")
        assert [each["source"] for each in allowing["clients"]] == ["org/client-0"]
    told("aggregate", "org/client-0", "--onto", "./made")
    told("aggregate", "org/client-*", "--onto", "./made", "--exclude", entry.partition("@")[0].partition("/tree/")[0])
    seen = told("aggregate", "org/client-1", "--onto", "./new", "--allow-list", "allowed", code=3)["error"]["problems"]
    assert [each["client"] for each in seen] == ["org/client-1"]


def test_a_list_of_folders_is_none_of_repositories(hub: LocalHub, told: Told, tmp_path: Path) -> None:
    publish(hub, 1)
    for entry in ("./org/client-0", str(tmp_path / "org" / "client-0"), "*", "**", "client-0", "models/org/client-0"):
        (tmp_path / "allowed").write_text(f"{entry}\n")
        told("aggregate", "org/client-0", "--dry-run", "--allow-list", "allowed", code=3)


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

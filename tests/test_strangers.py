"""Strangers' adapters on a Hub: whose id is whose, who is allowed, and what inspect and check say of them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.hub.fixture import hub, running_hub
from tests.hub.server import LocalHub
from tests.sources.federation import adapter, publish

__all__ = ["hub", "running_hub"]

Run: TypeAlias = Callable[..., Any]


@pytest.fixture
def run(hub: LocalHub, tmp_path: Path) -> Run:
    """`run("inspect", "org/*", code=3)`: what a command prints as JSON, in a folder of its own."""

    def call(*arguments: str, code: int = 0) -> Any:
        env = hub.env(token=hub.user("me"), cache=tmp_path / "cache")
        command = (sys.executable, "-m", "lora_merge", *arguments, "--json")
        ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ran.returncode == code, ran.stderr
        return json.loads(ran.stdout)

    return call


def test_an_allow_list_goes_by_where_an_adapter_lies_and_not_by_what_it_states(
    hub: LocalHub, run: Run, tmp_path: Path
) -> None:
    publish(hub, 2)
    hub.create("evil/any", adapter("org/client-9", seed=9))
    (tmp_path / "allowed").write_text("org/client-*\n")
    arguments = ("aggregate", "org/client-*", "evil/any", "-o", "global", "--allow-list", "allowed")
    refused = run(*arguments, code=3)["error"]["problems"]
    assert refused == [{"client": "evil/any", "field": "allow-list", "reason": "is not on it"}]
    assert hub.calls("* /evil/any/*") == [], "nothing of an adapter that is not allowed is read"
    merged = run(*arguments, "--skip-rejected")
    assert [each["source"] for each in merged["contributions"]] == ["org/client-0", "org/client-1"]
    assert [each["source"] for each in merged["left_out"]] == ["evil/any"]
    assert run("verify", "global")["verdict"] == "identical"


def test_a_claimed_id_is_its_repositorys(hub: LocalHub, run: Run) -> None:
    publish(hub, 2)
    hub.create("evil/any", adapter("org/client-1", num_examples=9, seed=9))
    arguments = ("aggregate", "org/client-*", "evil/any", "-o", "global")
    (problem,) = run(*arguments, code=3)["error"]["problems"]
    assert (problem["client"], problem["field"]) == ("evil/any", "client_id")
    merged = run(*arguments, "--skip-rejected")
    assert [each["source"] for each in merged["contributions"]] == ["org/client-0", "org/client-1"]


def test_inspect_names_what_it_read_and_flags_a_borrowed_id(hub: LocalHub, run: Run) -> None:
    commits = publish(hub, 2)
    hub.create("evil/any", adapter("org/client-9", seed=9))
    found = run("inspect", "org/client-*", "evil/any")
    assert {each["source"]: each["commit"] for each in found["clients"][:2]} == commits
    assert found["clients"][2]["flags"] == ["comes from evil/any"]


def test_check_of_a_repository_says_what_is_wrong_with_it(hub: LocalHub, run: Run) -> None:
    publish(hub, 1)
    assert run("check", "org/client-0")["verdict"] == "accepted"
    files = adapter("org/leaky")
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "/home/me/llama"}
    hub.create("org/leaky", {**files, "adapter_config.json": json.dumps(config).encode()})
    found = run("check", "org/leaky", code=3)
    assert {by for each in found["refusals"] for by in each["by"]} == {"push"}
    assert found["commit"] == hub.head("org/leaky")
    hub.create("org/broken", {**files, "adapter_model.safetensors": b"no"})
    found = run("check", "org/broken", code=3)
    assert [each["by"] for each in found["refusals"]] == [["aggregate"]]
    assert "not downloaded" in found["warnings"][0]
    assert run("check", "org/none", code=4)["error"]["code"] == 4

"""`lora-merge push`, `train --push` and `aggregate --push`: exit codes, and what goes to stdout and stderr."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import LocalHub
from tests.publish.conftest import Run, client_a, client_folder, hub, merged, publisher, run, running_hub
from tests.training.conftest import MakeRecipe, base, make_recipe, rows

__all__ = ["base", "client_a", "hub", "make_recipe", "merged", "publisher", "rows", "run", "running_hub"]  # fixtures

SECRET = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dF3h"


@pytest.mark.usefixtures("client_a")
def test_the_commit_is_printed_and_the_talk_goes_to_stderr(run: Run, hub: LocalHub, client_a: Path) -> None:
    (client_a / "optimizer.pt").write_text("x")
    code, out, err = run("push", "client-a", "org/a")
    assert code == 0
    commit = hub.head("org/a")
    assert out.splitlines() == [
        "org/a (private): adapter_config.json, lora_merge.json, README.md, adapter_model.safetensors",
        f"commit {commit}",
        f"{hub.url}/org/a/commit/{commit}",
    ]
    assert err.splitlines() == ["Made the private repository org/a", "Left out: optimizer.pt"]


@pytest.mark.usefixtures("client_a")
def test_quiet_prints_just_the_commit(run: Run, hub: LocalHub) -> None:
    code, out, err = run("push", "client-a", "org/a", "-q")
    assert (code, out, err) == (0, f"{hub.head('org/a')}\n", "")


@pytest.mark.usefixtures("client_a")
def test_json_is_one_object(run: Run, hub: LocalHub) -> None:
    code, out, err = run("push", "client-a", "org/a", "--public", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert (record["repo"], record["commit"], record["private"]) == ("org/a", hub.head("org/a"), False)
    assert record["changed"] == ["adapter_config.json", "lora_merge.json", "README.md", "adapter_model.safetensors"]


@pytest.mark.usefixtures("client_a")
def test_nothing_to_change_is_said(run: Run, hub: LocalHub) -> None:
    run("push", "client-a", "org/a")
    code, out, _ = run("push", "client-a", "org/a")
    assert (code, out) == (
        0,
        f"org/a: nothing to change; all of it is there, at commit {hub.head('org/a')} (private)\n",
    )


@pytest.mark.usefixtures("client_a")
@pytest.mark.parametrize(
    ("account", "arguments", "said"),
    [
        ({"name": "bob", "role": "read", "orgs": {"org": "write"}}, (), "may only read"),
        ({"name": "bob", "role": "read", "orgs": {"org": "write"}}, ("--create-pr",), "may only read"),
        ({"name": "bob", "orgs": {"org": "read"}}, (), "bob may not write to org (role: read)"),
        ({"name": "bob"}, (), "bob may not write to org (role: not a member)"),
        ({"name": "bob", "role": "fineGrained", "orgs": {"org": "write"}}, (), "not given write access"),
    ],
)
def test_a_token_that_may_not_is_told_the_next_command(
    run: Run, hub: LocalHub, account: dict[str, Any], arguments: tuple[str, ...], said: str
) -> None:
    token = hub.user(**account)
    code, out, err = run("push", "client-a", "org/a", *arguments, token=token)
    assert (code, out) == (4, "")
    assert said in err
    assert len(err.splitlines()) == 2
    assert err.splitlines()[1].startswith("hint: ")
    assert hub.calls("POST *") == []


@pytest.mark.usefixtures("client_a")
@pytest.mark.parametrize(("token", "said"), [("", "needs a token"), ("hf_wrong", "does not know your token")])
def test_no_token_and_a_wrong_one_are_said(run: Run, token: str, said: str) -> None:
    code, _, err = run("push", "client-a", "org/a", token=token)
    assert code == 4
    assert said in err
    assert err.splitlines()[1] == "hint: hf auth login"


@pytest.mark.parametrize("repo", ["a", "org/a/b", "org/", "org/a b", "../a", "org/a--b", "org/a..b"])
def test_what_cannot_be_a_repository_is_a_usage_error(run: Run, hub: LocalHub, client_a: Path, repo: str) -> None:
    code, _, err = run("push", client_a.name, repo)
    assert code == 2
    assert "is not a repository's name" in err
    assert hub.calls() == []


def test_a_secret_is_exit_3_and_is_not_shown(run: Run, hub: LocalHub, client_a: Path) -> None:
    (client_a / "README.md").write_text(f"---\n{{}}\n---\n\nLog in with {SECRET}.\n")
    for more in ((), ("--json",), ("-q",), ("--debug",)):
        code, out, err = run("push", "client-a", "org/a", *more)
        assert code == 3
        assert "holds a Hugging Face token" in out + err
        assert SECRET not in out + err
    assert hub.calls("POST *") == []


def test_the_token_in_use_is_a_secret_whatever_its_form(run: Run, hub: LocalHub, client_a: Path) -> None:
    token = hub.user("alice", orgs={"org": "write"})
    (client_a / "README.md").write_text(f"---\n{{}}\n---\nx{token}y\n")
    code, _, err = run("push", "client-a", "org/a", token=token)
    assert code == 3
    assert "your Hub token" in err


def test_a_path_as_base_model_is_exit_3_with_the_field_and_the_fix(run: Run, tmp_path: Path) -> None:
    client_folder(tmp_path / "local", base="/srv/models/llama")
    code, _, err = run("push", "local", "org/a")
    assert code == 3
    assert "adapter_config.json, base_model_name_or_path: is a path on this machine" in err
    assert "hint: Write the base model's repository id there" in err


@pytest.mark.usefixtures("client_a")
def test_a_conflict_is_exit_6_and_a_broken_hub_exit_5(run: Run, hub: LocalHub) -> None:
    hub.create("org/a", private=True)
    hub.fault("POST /api/models/org/a/commit/*", "status", times=None)
    code, _, err = run("push", "client-a", "org/a", "--max-wait", "1")
    assert code == 5
    assert "hint: Run the same command again" in err


@pytest.mark.usefixtures("client_a")
def test_a_results_file_goes_into_the_card(run: Run, hub: LocalHub, tmp_path: Path) -> None:
    number = {"value": 2.5, "low": 2.4, "high": 2.6}
    row = {"name": "org/client-a", "kind": "local", "loss": number, "perplexity": number}
    (tmp_path / "evaluation.json").write_text(json.dumps({"data": "rows.jsonl", "rows": 9, "models": [row]}))
    assert run("push", "client-a", "org/a", "--evaluation", "evaluation.json")[0] == 0
    assert b"model-index:" in hub.read("org/a", "README.md")


@pytest.mark.usefixtures("merged")
def test_aggregate_publishes_what_it_made(run: Run, hub: LocalHub) -> None:
    code, out, _ = run("aggregate", "client-a", "client-b", "-o", "new", "--push", "org/new", "--public", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["published"]["commit"] == hub.head("org/new")
    assert b"lora-merge verify org/new" in hub.read("org/new", "README.md")


@pytest.mark.usefixtures("merged")
def test_aggregate_asks_for_access_before_it_merges(run: Run, tmp_path: Path) -> None:
    assert run("aggregate", "client-a", "client-b", "-o", "new", "--push", "other/new")[0] == 4
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize(
    ("files", "private", "arguments", "code"),
    [
        ({}, True, ("--public",), 2),
        ({"lora_start.json": "{}"}, True, (), 2),
        (None, True, ("--create-pr",), 4),
    ],
)
def test_a_repository_that_will_not_do_is_said_before_the_merge(
    run: Run, hub: LocalHub, tmp_path: Path, files: Any, private: bool, arguments: tuple[str, ...], code: int
) -> None:
    if files is not None:
        hub.create("org/new", files, private=private)
    assert run("aggregate", "client-a", "client-b", "-o", "new", "--push", "org/new", *arguments)[0] == code
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("merged")
def test_options_of_a_push_without_one_are_a_usage_error(run: Run) -> None:
    for option in ("--private", "--public", "--create-pr"):
        code, _, err = run("aggregate", "client-a", "client-b", "-o", "new", option)
        assert code == 2
        assert "Add --push ORG/NAME" in err


def train(run: Run, recipe: str, rows: Path, base: Path, *more: str, **options: str) -> tuple[int, str, str]:
    given = ("--data", str(rows), "--client-id", "org/a", "--output", "out", "--base", str(base), "--device", "cpu")
    return run("train", recipe, *given, *more, **options)


def test_train_publishes_the_adapter_that_it_made(
    run: Run, hub: LocalHub, make_recipe: MakeRecipe, rows: Path, base: Path, tmp_path: Path
) -> None:
    code, out, err = train(run, make_recipe(steps=1), rows, base, "--push", "org/a", "--json")
    assert code == 0, err
    assert json.loads(out)["published"]["commit"] == hub.head("org/a")
    name = "adapter_model.safetensors"
    assert hub.read("org/a", name) == (tmp_path / "out" / name).read_bytes()


def test_train_asks_for_access_before_it_trains(
    run: Run, hub: LocalHub, make_recipe: MakeRecipe, rows: Path, base: Path, tmp_path: Path
) -> None:
    reader = hub.user("bob", role="read", orgs={"org": "write"})
    code, _, err = train(run, make_recipe(steps=1), rows, base, "--push", "org/a", token=reader)
    assert code == 4
    assert "may only read" in err
    assert not (tmp_path / "out").exists()


def test_where_the_push_fails_the_adapter_stays_and_the_next_command_is_said(
    run: Run, hub: LocalHub, make_recipe: MakeRecipe, rows: Path, base: Path, tmp_path: Path
) -> None:
    hub.fault("POST /api/models/org/a/commit/*", "status", times=None)
    options = ("--push", "org/a", "--public", "--max-wait", "0")
    code, _, err = train(run, make_recipe(steps=1), rows, base, *options)
    assert code == 5
    assert "lora-merge push out org/a --public" in err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()

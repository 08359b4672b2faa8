"""What `lora_merge.hub.access` says of a token, before hours of training."""

from typing import Any

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub

ASK = """
import os
from lora_merge.hub import access
from lora_merge.hub.session import hub_session
os.environ.pop("HF_TOKEN", None)
if token:
    os.environ["HF_TOKEN"] = token
with hub_session() as hub_api:
    result = eval(asked, {"access": access, "api": hub_api})
"""
WRITE = "access.require_write(api, 'org/a').name"
COMMIT = "access.require_commit(api, 'org/a', 'main', create_pr=False)"
PROPOSE = "access.require_commit(api, 'org/a', 'main', create_pr=True)"


@pytest.fixture
def ask(hub: LocalHub, xet_client: Client) -> Any:
    """`ask(asked, token)`: its result, with `access` and `api`."""
    return lambda asked, token="": xet_client.run(ASK, asked=asked, token=token)


def refused(ask: Any, code: str, token: str = "") -> str:
    with pytest.raises(ClientError) as caught:
        ask(code, token)
    assert caught.value.kinds[0] == "NotFoundError"
    return caught.value.text


def test_an_account_is_its_name_its_roles_and_where_its_token_may_write(hub: LocalHub, ask: Any) -> None:
    scopes = {"org/a": ("repo.content.read", "repo.write"), "org/b": ("repo.content.read",)}
    token = hub.user("alice", role="fineGrained", orgs={"org": "write", "friends": "read"}, scopes=scopes)
    found = ask("(lambda a: [a.name, a.role, dict(a.orgs), sorted(a.writable)])(access.whoami(api))", token)
    assert found == ["alice", "fineGrained", {"org": "write", "friends": "read"}, ["org/a"]]


def test_no_token_and_a_wrong_one_are_told_apart(hub: LocalHub, ask: Any) -> None:
    assert "there is none here" in refused(ask, WRITE)
    assert "wrong or has expired" in refused(ask, WRITE, "hf_none")


@pytest.mark.parametrize("role", ["write", "admin", "contributor"])
def test_a_member_who_may_write_passes(hub: LocalHub, ask: Any, role: Any) -> None:
    assert ask(WRITE, hub.user("alice", orgs={"org": role})) == "alice"


def test_everybody_may_write_to_their_own(hub: LocalHub, ask: Any) -> None:
    assert ask("access.require_write(api, 'alice/a').name", hub.user("alice")) == "alice"


def test_readers_strangers_and_tokens_that_only_read_are_refused(hub: LocalHub, ask: Any) -> None:
    assert "may not write to org (role: read)" in refused(ask, WRITE, hub.user("alice", orgs={"org": "read"}))
    assert "may not write to org (role: not a member)" in refused(ask, WRITE, hub.user("bob"))
    reading = hub.user("carol", role="read", orgs={"org": "admin"})
    assert "The token of carol may only read" in refused(ask, WRITE, reading)


def test_a_fine_grained_token_may_write_where_it_says(hub: LocalHub, ask: Any) -> None:
    def token(**scopes: tuple[str, ...]) -> str:
        named = {name.replace("_", "/"): rights for name, rights in scopes.items()}
        return hub.user("alice", role="fineGrained", orgs={"org": "write"}, scopes=named)

    assert ask(WRITE, token(org=("repo.write",))) == "alice"
    assert ask(WRITE, token(org_a=("repo.write",))) == "alice"
    assert "is not given write access to org/a" in refused(ask, WRITE, token(org_b=("repo.write",)))
    assert "is not given write access to org/a" in refused(ask, WRITE, token(org_a=("repo.content.read",)))


def test_a_contributor_may_commit_to_what_it_made_and_nowhere_else(hub: LocalHub, ask: Any) -> None:
    head = hub.create("org/a", {"x.txt": "1"})
    bob = hub.user("bob", orgs={"org": "contributor"})
    assert "org/a: your token may not do this" in refused(ask, COMMIT, bob)
    assert ask(PROPOSE, bob) is None
    assert ask("api.create_repo('org/b') and None", bob) is None
    assert ask(COMMIT.replace("org/a", "org/b"), bob) is None
    assert ask(COMMIT, hub.user("alice", orgs={"org": "write"})) is None
    assert (hub.head("org/a"), len(hub.repository("org/a").discussions)) == (head, 0), "asking changes nothing"

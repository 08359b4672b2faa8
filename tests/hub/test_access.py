"""Who may do what on the local Hub, as the real client sees it."""

import re
from pathlib import Path

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub

COMMIT = """
add = [hf.CommitOperationAdd('x.txt', b'2')]
hf.HfApi(token=token).create_commit(repo, add, commit_message='Add')
"""


def kind_of_failure(client: Client, code: str, **given: object) -> str:
    """The exception that some code raises in the client, with the status that was behind it."""
    with pytest.raises(ClientError) as caught:
        client.run(code, **given)
    found = re.search(r"\b40[134]\b", caught.value.text)  # a port of the address may hold such digits too
    status = found[0] if found else ""
    return f"{caught.value.kinds[0]} {status}".strip()


def test_a_token_says_whose_it_is_and_what_it_may_do(hub: LocalHub, xet_client: Client) -> None:
    hub.user("alice", orgs={"org": "admin", "friends": "read"})
    reading = hub.user("alice", role="read")
    scoped = hub.user("alice", role="fineGrained", scopes={"org/a": ("repo.content.read", "repo.write")})
    code = "me = api.whoami(token); result = me['name'], [(o['name'], o['roleInOrg']) for o in me['orgs']], me['auth']"
    name, orgs, auth = xet_client.run(code, token=reading)
    assert (name, orgs) == ("alice", [["org", "admin"], ["friends", "read"]])
    assert auth["accessToken"]["role"] == "read"
    _, _, auth = xet_client.run(code, token=scoped)
    assert auth["accessToken"]["role"] == "fineGrained"
    assert auth["accessToken"]["fineGrained"]["scoped"][0]["permissions"] == ["repo.content.read", "repo.write"]


def test_a_token_that_is_nobodys_is_refused_everywhere(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    hub.create("org/a", {"x.txt": "1"})
    for code in (
        "api.whoami(token='hf_none')",
        "hf.HfApi(token='hf_none').model_info('org/a')",
        "list(hf.HfApi(token='hf_none').list_models(author='org'))",
    ):
        assert kind_of_failure(client, code) == "HfHubHTTPError 401" or "whoami" in code
    with pytest.raises(ClientError, match="Invalid user token"):
        client.run("api.whoami(token='hf_none')")


def test_a_private_repository_looks_as_if_it_were_not_there(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    owner, member = hub.user("org"), hub.user("alice", orgs={"org": "read"}, role="read")
    stranger = hub.user("mallory")
    hub.create("org/a", {"x.txt": "1", "w.safetensors": b"weights"}, private=True)
    code = """
path = hf.HfApi(token=token).snapshot_download('org/a', cache_dir=cache)
result = sorted(os.listdir(path))
"""
    for number, token in enumerate((owner, member)):
        seen = client.run("import os\n" + code, token=token, cache=tmp_path / str(number))
        assert seen == [".gitattributes", "w.safetensors", "x.txt"]
    for read in ("model_info('org/a')", "auth_check('org/a')", "hf_hub_download('org/a', 'x.txt', cache_dir=cache)"):
        code = f"hf.HfApi(token=token).{read}"
        assert kind_of_failure(client, code, token=stranger, cache=tmp_path / "s") == "RepositoryNotFoundError 404"
        assert kind_of_failure(client, code, token=False, cache=tmp_path / "s") == "RepositoryNotFoundError 401"


def test_the_files_of_a_gated_repository_need_a_grant(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    token, owner = hub.user("alice"), hub.user("org")
    hub.create("org/a", {"x.txt": "1", "w.safetensors": b"weights"}, gated="manual")
    assert client.run("result = hf.HfApi(token=token).model_info('org/a').gated", token=token) == "manual"
    for name in ("x.txt", "w.safetensors"):
        code = f"result = hf.HfApi(token=token).hf_hub_download('org/a', '{name}', cache_dir=cache)"
        assert kind_of_failure(client, code, token=token, cache=tmp_path / "a") == "GatedRepoError 403"
        assert kind_of_failure(client, code, token=False, cache=tmp_path / "b") == "GatedRepoError 401"
        assert client.run(code, token=owner, cache=tmp_path / "c").endswith(name)
    check = "hf.HfApi(token=token).auth_check('org/a')"
    assert kind_of_failure(client, check, token=token) == "GatedRepoError 403"
    hub.grant("org/a", "alice")
    client.run(check, token=token)
    assert client.run(code, token=token, cache=tmp_path / "a").endswith("w.safetensors")


def test_what_a_token_and_a_role_may_write(hub: LocalHub, xet_client: Client) -> None:
    hub.create("org/a", {"x.txt": "1"})
    hub.create("org/mine", {"x.txt": "1"}, creator="carol")
    allowed = {
        "admin": hub.user("admin", orgs={"org": "admin"}),
        "writer": hub.user("writer", orgs={"org": "write"}),
        "scoped": hub.user("writer", role="fineGrained", scopes={"org/a": ("repo.write",)}),
    }
    refused = {
        "reader": hub.user("reader", orgs={"org": "read"}),
        "contributor": hub.user("carol", orgs={"org": "contributor"}),
        "stranger": hub.user("mallory"),
        "read token": hub.user("writer", role="read"),
        "scoped elsewhere": hub.user("writer", role="fineGrained", scopes={"org/b": ("repo.write",)}),
        "scoped to read": hub.user("writer", role="fineGrained", scopes={"org/a": ("repo.content.read",)}),
    }
    check = "hf.HfApi(token=token).auth_check('org/a', write=True)"
    for token in allowed.values():
        hub.commit("org/a", {"x.txt": "1"})
        xet_client.run(check, token=token)
        xet_client.run(COMMIT, token=token, repo="org/a")
        assert hub.read("org/a", "x.txt") == b"2"
    for who, token in refused.items():
        for code in (COMMIT, check, "hf.HfApi(token=token).create_tag('org/a', tag='v1')"):
            assert kind_of_failure(xet_client, code, token=token, repo="org/a") == "HfHubHTTPError 403", who
    xet_client.run(COMMIT, token=refused["contributor"], repo="org/mine")
    assert kind_of_failure(xet_client, COMMIT, token=False, repo="org/a") == "RepositoryNotFoundError 401"


def test_who_may_make_a_repository(hub: LocalHub, xet_client: Client) -> None:
    member, stranger = hub.user("alice", orgs={"org": "contributor"}), hub.user("mallory")
    reading = hub.user("alice", role="read")
    create = "hf.HfApi(token=token).create_repo('org/new', private=True)"
    for token in (stranger, reading):
        assert kind_of_failure(xet_client, create, token=token) == "HfHubHTTPError 403"
    xet_client.run(create, token=member)
    assert hub.repository("org/new").creator == "alice"
    xet_client.run("hf.HfApi(token=token).update_repo_settings('org/new', gated='auto', private=False)", token=member)
    assert (hub.repository("org/new").private, hub.repository("org/new").gated) == (False, "auto")


def test_a_token_goes_to_the_hub_and_never_to_where_it_sends_the_client(
    hub: LocalHub, client: Client, tmp_path: Path
) -> None:
    token = hub.user("org")
    hub.create("org/a", {"w.safetensors": b"weights"}, private=True)
    code = "hf.HfApi(token=token).hf_hub_download('org/a', 'w.safetensors', cache_dir=cache)"
    client.run(code, token=token, cache=tmp_path)
    assert {call.user for call in hub.calls(origin="hub")} == {"org"}
    assert {call.user for call in hub.calls(origin="cdn")} == {None}

"""What may not be read, or is refused: all of it at once, before anything is downloaded, with the next command."""

import json
import struct

import pytest

from tests.hub.server import LocalHub
from tests.sources.federation import CONFIG, Puller, adapter, publish


def test_nothing_matched_is_exit_4_with_near_misses(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    ran = pull_once("org/clients-*", "-o", "global")
    assert ran.code == 4
    assert ran.err.splitlines()[0] == "error: No repository matches org/clients-*."
    assert "Did you mean org/client-" in ran.err
    assert pull_once("nobody/client-*", "-o", "global").code == 4


def test_a_private_or_missing_repository_is_exit_4_with_the_next_command(hub: LocalHub, pull_once: Puller) -> None:
    hub.create("org/secret", adapter("org/secret"), private=True)
    for repo in ("org/secret", "org/none"):
        ran = pull_once(repo, "-o", "global")
        assert ran.code == 4
        assert ran.err == (
            f"error: There is no {repo} on the Hub, or it is private and you may not read it.\nhint: hf auth login\n"
        )
    ran = pull_once("org/secret", "-o", "global", token=hub.user("stranger"))
    assert (ran.code, ran.err.splitlines()[1]) == (4, "hint: hf auth whoami  (whose token is used?)")
    assert pull_once("org/secret", "--dry-run", token=hub.user("member", orgs={"org": "read"}, role="read")).code == 0


def test_a_gated_repository_is_exit_4_and_names_the_page_to_ask_on(hub: LocalHub, pull_once: Puller) -> None:
    hub.create("org/gated", adapter("org/gated"), gated="auto")
    token = hub.user("reader", role="read")
    ran = pull_once("org/gated", "-o", "global", token=token)
    assert (ran.code, ran.err.splitlines()) == (
        4,
        [
            "error: org/gated is gated, and you have not been given access to it.",
            f"hint: Ask for access at {hub.url}/org/gated, then: hf auth login",
        ],
    )
    hub.grant("org/gated", "reader")
    assert pull_once("org/gated", "-o", "global", token=token).code == 0


def test_a_wrong_token_is_exit_4(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 1)
    ran = pull_once("org/client-0", "-o", "global", token="hf_wrong")
    assert (ran.code, ran.err.splitlines()[-1]) == (4, "hint: hf auth login")
    assert "does not know your token" in ran.err


def test_no_such_revision_is_exit_4(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 1)
    ran = pull_once("org/client-0@nope", "-o", "global")
    assert ran.code == 4
    assert "org/client-0 has no such revision." in ran.err


def test_all_that_may_not_be_read_is_named_at_once(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 4)
    hub.repository("org/client-1").gated = hub.repository("org/client-3").gated = "manual"
    ran = pull_once("org/client-*", "-o", "global")
    assert ran.code == 4
    assert "org/client-1 is gated" in ran.err
    assert "org/client-3 is gated" in ran.err


def bad_header(length: int) -> bytes:
    return struct.pack("<Q", length) + b" " * 100


def test_every_problem_of_every_client_is_told_before_anything_is_downloaded(hub: LocalHub, pull_once: Puller) -> None:
    files = adapter("org/client")
    weights = files["adapter_model.safetensors"]
    spoiled = {
        "a": files | {"adapter_config.json": json.dumps(CONFIG | {"r": 10_000}).encode()},
        "b": files | {"adapter_model.safetensors": weights + b"\0"},
        "c": files | {"adapter_model.safetensors": bad_header(1 << 40)},
        "d": files | {"adapter_config.json": b" " * (2 << 20)},
        "e": {name: content for name, content in files.items() if name != "adapter_config.json"},
        "f": files | {"lora_merge.json": b"{}"},
        "g": {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": weights},
        "h": {"README.md": b"nothing"},
    }
    for name, contents in spoiled.items():
        hub.create(f"org/client-{name}", contents)
    ran = pull_once("org/client-*", "-o", "global", "--json")
    assert ran.code == 3
    problems = {problem["client"]: problem for problem in ran.json["error"]["problems"]}
    assert sorted(problems) == [f"org/client-{name}" for name in "abcdefgh"]
    assert problems["org/client-b"]["reason"].startswith(f"has {len(weights) + 1} bytes where its header needs")
    assert problems["org/client-d"]["reason"].endswith("bytes; at most 1048576 are accepted")
    assert "pickle" in problems["org/client-g"]["reason"]
    assert not pull_once.cached
    assert not hub.calls("HEAD *")


def test_clients_that_do_not_fit_together_are_refused_before_the_download(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    hub.create("org/client-2", adapter("org/client-2", width=32))
    ran = pull_once("org/client-*", "-o", "global")
    assert ran.code == 3
    assert "org/client-2: layer: is linear 32x32, where 2 of 3 clients have linear 64x64" in ran.err
    assert not pull_once.cached


def test_a_missing_weight_is_told_before_the_download(hub: LocalHub, pull_once: Puller) -> None:
    files = adapter("org/client-0")
    del files["lora_merge.json"]
    hub.create("org/client-0", files)
    ran = pull_once("org/client-0", "-o", "global")
    assert ran.code == 2
    assert not pull_once.cached


@pytest.mark.parametrize(
    "source", ["org/a/b/c@x y", "org/na me@main", "hf://datasets/org/data", "hf://org", "s3x://b/c"]
)
def test_what_has_the_form_of_no_source_is_a_usage_error(pull_once: Puller, source: str) -> None:
    ran = pull_once(source, "-o", "global")
    assert ran.code in (2, 4)
    assert "Traceback" not in ran.err
    assert ran.err.startswith("error: ")

"""HF_HUB_OFFLINE: what is pinned and wholly in the cache is read, hashes checked; the rest is refused in a sentence."""

from collections.abc import Iterator

import pytest

from tests.conftest import digests
from tests.hub.server import LocalHub
from tests.sources.federation import Puller, adapter, publish

READ = """
import os
from pathlib import Path
from lora_merge.folding.global_adapter import clients_in
from lora_merge.intake import Reading, accepted
os.chdir(folder)
with accepted([source], "uniform", Reading()) as inputs:
    result = clients_in(inputs.clients["org/global"].folder, source)
"""
SWITCH = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = on"


@pytest.fixture
def commits(hub: LocalHub, pull: Puller) -> Iterator[dict[str, str]]:
    """Two clients that were merged once under a lock; then nothing is asked of the Hub any more."""
    commits = publish(hub, 2)
    assert pull("org/client-*", "-o", "online", "--lock", "the.lock").code == 0
    pull.client.run(SWITCH, on=True)
    hub.clear_calls()
    yield commits
    pull.client.run(SWITCH, on=False)
    assert hub.calls() == []


def merged(pull: Puller, *arguments: str) -> dict[str, str]:
    ran = pull(*arguments, "-o", "offline")
    assert ran.code == 0, ran.err
    return digests(pull.folder / "offline")


def test_commits_in_the_cache_are_merged(commits: dict[str, str], pull: Puller) -> None:
    sources = [f"{repo}@{commit}" for repo, commit in commits.items()]
    assert merged(pull, *sources) == digests(pull.folder / "online")


@pytest.mark.parametrize("sources", [("org/client-*",), ("org/client-0", "hf://org/client-1")])
def test_a_lock_stands_for_the_listing(commits: dict[str, str], pull: Puller, sources: tuple[str, ...]) -> None:
    found = merged(pull, *sources, "--lock", "the.lock", "--locked")
    assert found == digests(pull.folder / "online")


@pytest.mark.parametrize("source", ["org/client-*", "org/client-0", "org/client-0@main"])
def test_what_must_be_looked_up_is_refused(commits: dict[str, str], pull: Puller, source: str) -> None:
    ran = pull(source, "-o", "global")
    assert (ran.code, ran.err.splitlines()[0]) == (
        5,
        f"error: There is no folder {source} here, and the Hub cannot be asked: "
        f"{source} has to be looked up on the Hub, and HF_HUB_OFFLINE is set.",
    )


def test_a_damaged_file_in_the_cache_is_not_believed(commits: dict[str, str], pull: Puller) -> None:
    path = next(pull.home.glob("hub/models--org--client-0/snapshots/*/adapter_model.safetensors")).resolve()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ran = pull(f"org/client-0@{commits['org/client-0']}", "-o", "global")
    assert ran.code == 5
    assert "adapter_model.safetensors in the cache does not have the hash that is listed, and HF_HUB_OFFLINE" in ran.err
    assert not (pull.folder / "global").exists()


def test_a_merged_adapter_in_the_cache_is_read_without_a_statement(hub: LocalHub, pull: Puller) -> None:
    publish(hub, 2)
    assert pull("org/client-*", "-o", "global").code == 0
    commit = hub.create("org/global", {path.name: path.read_bytes() for path in (pull.folder / "global").iterdir()})
    assert pull.client.run(READ, source="org/global", folder=pull.folder) == 2
    pull.client.run(SWITCH, on=True)
    try:
        assert pull.client.run(READ, source=f"org/global@{commit}", folder=pull.folder) == 2
    finally:
        pull.client.run(SWITCH, on=False)


def test_a_cache_that_may_lack_the_statement_is_not_believed(commits: dict[str, str], pull: Puller) -> None:
    next(pull.home.glob("hub/models--org--client-0/snapshots/*/lora_merge.json")).unlink()
    ran = pull(f"org/client-0@{commits['org/client-0']}", "-o", "global", "--weights", "uniform")
    assert ran.code == 5
    assert "is not wholly in the cache (lora_merge.json), and HF_HUB_OFFLINE is set" in ran.err
    assert set(adapter("org/client-0")) == {"adapter_config.json", "adapter_model.safetensors", "lora_merge.json"}

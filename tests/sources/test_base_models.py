"""Base models from the Hub: one commit, listed hashes, and what is done where the Hub is away."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_merge.errors import NetworkError
from lora_merge.sources.base_models import find_model
from tests.hub.client import ClientError
from tests.hub.server import LocalHub
from tests.sources.federation import Puller

FIND = """
import httpx2
from pathlib import Path
from huggingface_hub import constants
from lora_merge.hub import client
from lora_merge.sources.base_models import model_of
client.BACKOFF, client.TIMEOUT, client.CALL_SECONDS = (0.01, 0.02), httpx2.Timeout(1), 1
constants.HF_HUB_OFFLINE = offline
said = []
try:
    found = model_of("org/base", revision, said.append, max_wait=1)
    result = [found.repo, found.commit, {p.name: p.read_text() for p in found.folder.iterdir()}, said]
finally:
    constants.HF_HUB_OFFLINE = False
"""
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
WANTED = {
    "config.json": "{}",
    "tokenizer.json": "{ }",
    "model.safetensors.index.json": json.dumps(INDEX),
    "model-1.safetensors": "one",
    "model-2.safetensors": "two",
}
OTHERS = {
    "README.md": "words",
    "consolidated.safetensors": "all again",
    "pytorch_model.bin": "x",
    "onnx/config.json": "",
}


@pytest.fixture
def commit(hub: LocalHub) -> str:
    return hub.create("org/base", {**WANTED, **OTHERS})


@pytest.fixture
def find(pull_once: Puller) -> Any:
    pull_once.forget()

    def call(revision: str | None = None, *, offline: bool = False) -> list[Any]:
        found: list[Any] = pull_once.client.run(FIND, revision=revision, offline=offline)
        return found

    return call


def test_a_branch_is_read_at_the_commit_that_it_is_at_and_only_what_is_needed(
    hub: LocalHub, find: Any, commit: str
) -> None:
    repo, found, files, said = find()
    assert (repo, found, files) == ("org/base", commit, WANTED)
    assert said == [f"Base model org/base at {commit}, 0.0 MB"]
    asked = {call.path.split("/")[4] for call in hub.calls("* /org/base/resolve/*")}
    assert asked == {commit}
    assert not any(name in call.path for call in hub.calls() for name in OTHERS)


def test_a_branch_that_moved_is_read_anew(hub: LocalHub, find: Any, commit: str) -> None:
    find()
    later = hub.commit("org/base", {"model-1.safetensors": "three"})
    assert find()[1:3] == [later, {**WANTED, "model-1.safetensors": "three"}]
    assert find(commit)[1:3] == [commit, WANTED]


def test_a_flipped_bit_is_fetched_again_once_and_then_refused(hub: LocalHub, find: Any, commit: str) -> None:
    fault = hub.fault("GET /lfs/*", "flip")
    assert find()[2] == WANTED
    assert fault.hits
    hub.commit("org/base", {"model-1.safetensors": "four"})
    hub.fault("GET /lfs/*", "flip", times=None)
    with pytest.raises(ClientError, match=r"org/base, model-1\.safetensors") as caught:
        find()
    assert caught.value.kinds[0] == "RefusedError"


def test_a_hub_that_is_away_is_no_reason_to_take_an_older_branch(hub: LocalHub, find: Any, commit: str) -> None:
    find()
    hub.fault("GET /api/models/org/base/*", "status", times=None)
    with pytest.raises(ClientError, match="503") as caught:
        find("main")
    assert caught.value.kinds[0] == "NetworkError"
    assert find(commit)[1:3] == [commit, WANTED], "a commit is a commit"


def test_a_hub_that_stalls_is_given_up_in_time(hub: LocalHub, find: Any, commit: str) -> None:
    hub.fault("GET /api/models/org/base*", "stall", times=None)
    with pytest.raises(ClientError, match="does not answer") as caught:
        find()
    assert caught.value.kinds[0] == "NetworkError"


def test_offline_the_cache_is_read_and_hashed(hub: LocalHub, find: Any, commit: str, pull_once: Puller) -> None:
    with pytest.raises(ClientError, match="org/base is not in the local cache, and HF_HUB_OFFLINE is set"):
        find(offline=True)
    find()
    hub.clear_calls()
    assert find(commit, offline=True)[1:3] == [commit, WANTED]
    assert hub.calls() == []
    path = next(Path(pull_once.home).glob("hub/models--org--base/snapshots/*/model-2.safetensors")).resolve()
    path.write_text("twO")
    with pytest.raises(ClientError, match="does not have the hash"):
        find(commit, offline=True)


def test_what_is_not_there_or_no_model_is_said(hub: LocalHub, find: Any) -> None:
    with pytest.raises(ClientError, match="Base model: There is no org/base"):
        find()
    hub.create("org/base", {"config.json": "{}", "pytorch_model.bin": "x"})
    with pytest.raises(ClientError, match=r"lack model\.safetensors; only safetensors are read"):
        find()


def test_a_name_that_is_no_folder_either_is_said_to_be_none() -> None:
    with pytest.raises(
        NetworkError, match="There is no folder nobase here, and the Hub cannot be asked: nobase is not"
    ):
        find_model("nobase", print)

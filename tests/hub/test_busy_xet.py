"""A server of Xet that is busy for longer than Xet itself tries: waited for within --max-wait, and said."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.server import LocalHub
from tests.publish.conftest import COMMAND, SHORT, WAITS, client_folder
from tests.sources.federation import publish

# Xet tries twice and no more; it reads this from the environment when a process first uses it.
BRIEF = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
TIMES = 7  # so it fails thrice at least


@pytest.fixture(scope="module")
def process(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process in which Xet soon gives up, and whose own waits are short."""
    with Client({**running_hub.env(cache=tmp_path_factory.mktemp("brief")), **BRIEF}) as process:
        process.run(WAITS, **SHORT)
        yield process


def run(process: Client, folder: Path, *arguments: str, token: str = "") -> tuple[int, str]:
    """Exit code and stderr of a command."""
    code, _, err = process.run(COMMAND, folder=folder, arguments=arguments, token=token)
    return code, err


@pytest.mark.parametrize("busy", ["GET /v1/reconstructions/*", "GET /xorbs/*"])
def test_a_download_waits_for_it(hub: LocalHub, process: Client, tmp_path: Path, busy: str) -> None:
    publish(hub, 1, layers=1 + len(busy))  # other bytes each time: what is in the cache is not asked for
    token = hub.user("alice")
    fault = hub.fault(busy, "status", status=429, times=TIMES)
    code, err = run(process, tmp_path, "aggregate", "org/client-*", "-o", "global", token=token)
    assert (code, fault.hits) == (0, TIMES), err
    assert "127.0.0.1 answers 429; trying again in 0 s." in err


@pytest.mark.parametrize(("busy", "seed"), [("POST /v1/xorbs/*", 11), ("POST /v1/shards", 12)])
def test_an_upload_waits_for_it(hub: LocalHub, process: Client, tmp_path: Path, busy: str, seed: int) -> None:
    client_folder(tmp_path / "client-a", seed=seed)
    token = hub.user("alice", orgs={"org": "write"})
    fault = hub.fault(busy, "status", status=503, times=TIMES)
    code, err = run(process, tmp_path, "push", "client-a", "org/a", token=token)
    assert (code, fault.hits) == (0, TIMES), err
    assert "127.0.0.1 answers 503; trying again in 0 s." in err


def test_it_waits_no_longer_than_was_said_and_what_xet_waited_counts(
    hub: LocalHub, process: Client, tmp_path: Path
) -> None:
    publish(hub, 1, layers=3)
    token = hub.user("alice")
    hub.fault("GET /v1/reconstructions/*", "status", status=429, times=None)
    code, err = run(process, tmp_path, "aggregate", "org/client-*", "-o", "global", "--max-wait", "1", token=token)
    assert code == 5
    assert err.splitlines()[-2].startswith("error: 127.0.0.1 answers 429; gave up after ")


@pytest.mark.parametrize("silent", ["GET /v1/reconstructions/*", "GET /xorbs/*"])
def test_one_that_stalls_is_not_waited_for_much_longer_than_was_said(
    hub: LocalHub, running_hub: LocalHub, tmp_path: Path, silent: str
) -> None:
    publish(hub, 1, layers=4)
    token = hub.user("alice")
    hub.fault(silent, "stall", times=None)
    with Client({**running_hub.env(cache=tmp_path / "cache"), **BRIEF}) as process:
        began = time.monotonic()
        code, err = run(process, tmp_path, "aggregate", "org/client-*", "-o", "global", "--max-wait", "1", token=token)
    assert time.monotonic() - began < 20  # one try of Xet is 30 s
    assert (code, "127.0.0.1 does not answer; gave up after " in err) == (5, True), err

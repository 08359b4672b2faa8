"""The local Hub as a thing: quick to start, cheap to fill, gone when closed."""

import hashlib
import http.client
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub.client import Client
from tests.hub.server import LocalHub


def open_files() -> set[str]:
    """The files and sockets that this process holds open."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("only where the system shows a process its open files")
    return {f"{path.name} {os.readlink(path)}" for path in folder.iterdir() if path.is_symlink()}


def test_it_starts_and_stops_quickly_and_leaves_nothing() -> None:
    def life() -> float:
        start = time.perf_counter()
        hub = LocalHub()
        started = time.perf_counter() - start
        hub.create("org/a", {"w.safetensors": os.urandom(500_000)})
        with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc)) as raw:
            for _ in range(2):
                raw.request("GET", "/api/models/org/a")
                assert raw.getresponse().read()
            hub.fault("*", "stall")
            raw.request("GET", "/api/models/org/a")
            while len(hub.calls()) < 3:
                time.sleep(0.01)
            home = Path(hub.home.name)
            folder = hub.state.objects.keep(b"\0" * 500_000)
            hub.close()
        assert not home.exists()
        assert not folder.path.exists()  # type: ignore[attr-defined]
        return started

    life()
    threads, files = threading.active_count(), open_files()
    assert min(life() for _ in range(3)) < 0.1
    assert threading.active_count() == threads
    assert open_files() == files


def test_two_hundred_repositories_are_cheap_to_make_and_to_list(hub: LocalHub, xet_client: Client) -> None:
    card = "---\nlibrary_name: peft\nbase_model: org/base\ntags: [lora]\n---\n"
    start = time.perf_counter()
    for number in range(200):
        hub.create(f"org/client-{number}", {"README.md": card, "w.safetensors": str(number), "config.json": "{}"})
    assert time.perf_counter() - start < 3
    code = "result = [(m.id, m.sha) for m in api.list_models(author='org', search='client-', expand=['sha'])]"
    start = time.perf_counter()
    listed = dict(xet_client.run(code))
    assert time.perf_counter() - start < 3
    assert listed == {f"org/client-{number}": hub.head(f"org/client-{number}") for number in range(200)}
    assert len(hub.calls()) == 1


def test_files_may_stay_where_they_lie(hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"weights")
    hub.create("org/a", {"w.safetensors": path})
    assert hub.read("org/a", "w.safetensors") == b"weights"
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert hub.state.objects.by_sha256[sha256].path == path  # type: ignore[attr-defined]


def test_the_environment_of_a_client_is_the_hubs_and_not_the_developers(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_developer")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("http_proxy", "http://proxy.example")
    env = hub.env(cache=tmp_path, xet=False)
    assert {name for name in env if "hf_" in name.lower() or "proxy" in name.lower()} == {
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_UPDATE_CHECK",
        "HF_HUB_DISABLE_XET",
        "HF_XET_XORB_COMPRESSION_POLICY",
    }
    assert (env["HF_ENDPOINT"], env["HF_HOME"]) == (hub.url, str(tmp_path))
    assert hub.env(token="hf_mine")["HF_TOKEN"] == "hf_mine"


def test_an_error_of_the_hub_itself_is_kept_for_the_test_to_fail_on(hub: LocalHub) -> None:
    with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc)) as raw:
        raw.request("POST", "/api/repos/create", "[]", {"Authorization": f"Bearer {hub.user('alice')}"})
        assert raw.getresponse().status == 500
    assert "Traceback" in hub.errors.pop()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PUT", "/api/whoami-v2", 405), ("GET", "/api/agent-harnesses", 404)],
)
def test_what_the_hub_does_not_know_it_says(hub: LocalHub, method: str, path: str, status: int) -> None:
    with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc)) as raw:
        raw.request(method, path)
        assert raw.getresponse().status == status

"""Every fault of the plan, seen from a plain connection and from the real client."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.faults import Kind
from tests.hub.server import LocalHub

WEIGHTS = Random(3).randbytes(150_000)
TEXT = "0123456789"
TARGET = "/org/a/resolve/main/x.txt"


@pytest.fixture
def raw(hub: LocalHub) -> Iterator[http.client.HTTPConnection]:
    """A connection to the Hub's origin, where the file TARGET holds TEXT."""
    hub.create("org/a", {"x.txt": TEXT})
    with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)) as connection:
        yield connection


def get(raw: http.client.HTTPConnection, method: str = "GET", target: str = TARGET) -> tuple[int, bytes]:
    """Status and body of one request."""
    raw.request(method, target)
    response = raw.getresponse()
    return response.status, response.read()


def test_a_status_is_answered_as_often_as_planned(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    fault = hub.fault("GET */resolve/*", "status", times=2)
    assert [get(raw)[0] for _ in range(3)] == [503, 503, 200]
    assert fault.hits == 2
    assert [call.fault for call in hub.calls()] == ["status", "status", None]


def test_a_fault_may_be_for_ever_or_for_a_while_and_can_be_cleared(
    hub: LocalHub, raw: http.client.HTTPConnection
) -> None:
    hub.fault("GET *", "status", times=None)
    assert [get(raw)[0] for _ in range(10)] == [503] * 10
    hub.clear_faults()
    assert get(raw)[0] == 200
    fault = hub.fault("GET *", "status", times=None, lasting=60)
    assert get(raw)[0] == 503
    fault.since -= 60
    assert get(raw)[0] == 200


def test_a_fault_strikes_its_own_method_path_and_origin_only(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    for pattern, more in (("PUT *", {}), ("GET /api/*", {}), ("GET *", {"origin": "cdn"})):
        hub.fault(pattern, "status", times=None, **more)
    assert get(raw)[0] == 200


def test_a_route_names_what_its_pattern_could_not(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    assert {"GET /api/models/{id}", "GET /api/models/{id}/tree/{rev}"} < set(hub.routes("hub"))
    assert "GET /lfs/{sha256}" in hub.routes("cdn")
    fault = hub.fault("GET /api/models/{id}", "status", times=None)
    assert get(raw, target="/api/models/org/a/tree/main")[0] == 200
    assert get(raw, target="/api/models/org/a/refs")[0] == 200
    assert get(raw, target="/api/models/org/a")[0] == 503
    assert fault.hits == len(hub.calls("GET /api/models/{id}")) == 1


def test_too_many_requests_say_when_to_come_again(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    hub.fault("*", "status", status=429, retry_after=7, headers={"X-More": "1"})
    raw.request("GET", TARGET)
    response = raw.getresponse()
    response.read()
    assert (response.status, response.headers["Retry-After"], response.headers["X-More"]) == (429, "7", "1")


def test_html_comes_with_status_200(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    hub.fault("*", "html")
    status, body = get(raw, target="/api/models/org/a")
    assert (status, body[:15]) == (200, b"<!DOCTYPE html>")


@pytest.mark.parametrize(("kind", "error"), [("reset", ConnectionResetError), ("stall", TimeoutError)])
def test_a_connection_is_reset_or_never_answers(
    hub: LocalHub, raw: http.client.HTTPConnection, kind: Kind, error: type[Exception]
) -> None:
    fault, raw.timeout = hub.fault("*", kind), 0.3
    with pytest.raises(error):
        get(raw)
    assert fault.hits == 1
    assert hub.calls()[0].status is None


def test_a_delay_is_as_long_as_planned_and_then_all_is_well(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    hub.fault("*", "delay", seconds=0.2)
    start = time.perf_counter()
    assert get(raw) == (200, TEXT.encode())
    assert time.perf_counter() - start >= 0.2


def test_a_body_is_cut_short_flipped_or_dripped(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    hub.fault("GET *", "truncate")
    with pytest.raises(http.client.IncompleteRead):
        get(raw)
    raw.close()
    hub.fault("GET *", "short")
    assert get(raw) == (200, b"01234")
    hub.fault("GET *", "flip")
    assert get(raw) == (200, b"0123446789")
    hub.fault("GET *", "flip", offset=-1)
    assert get(raw) == (200, b"0123456788")
    hub.fault("GET *", "drip", seconds=0.02)
    start = time.perf_counter()
    assert get(raw) == (200, TEXT.encode())
    assert time.perf_counter() - start >= 0.02 * (len(TEXT) - 1)


def test_a_fault_of_the_body_waits_for_a_body(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    fault = hub.fault("*", "flip")
    assert get(raw, "HEAD") == (200, b"")
    assert fault.hits == 0
    assert get(raw)[1] != TEXT.encode()


def test_an_unknown_fault_is_refused(hub: LocalHub) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        hub.fault("*", "nothing")  # type: ignore[arg-type]


def test_faults_are_planned_and_calls_read_over_http_too(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    raw.request("POST", "/__faults", json.dumps({"on": "GET *", "kind": "status", "status": 500, "times": None}))
    assert raw.getresponse().read()
    assert get(raw)[0] == 500
    raw.request("DELETE", "/__faults")
    assert raw.getresponse().read() == b"{}"
    assert get(raw)[0] == 200
    assert [call["status"] for call in json.loads(get(raw, target="/__calls")[1])] == [500, 200]


def test_after_a_reset_the_hub_is_empty_and_its_stalled_connections_are_closed(
    hub: LocalHub, raw: http.client.HTTPConnection
) -> None:
    hub.fault("*", "stall", times=None)
    with socket.create_connection(("127.0.0.1", raw.port), timeout=5) as stalled:
        stalled.sendall(f"GET {TARGET} HTTP/1.1\r\n\r\n".encode())
        while not hub.calls():
            time.sleep(0.01)
        hub.reset()
        with suppress(ConnectionResetError):
            assert stalled.recv(1) == b""
    assert get(raw)[0] == 401
    assert [call.status for call in hub.calls()] == [401]


def test_the_client_tries_a_listing_again_but_not_a_description(hub: LocalHub, xet_client: Client) -> None:
    hub.create("org/a")
    hub.fault("GET /api/models", "status")
    assert xet_client.run("result = [m.id for m in api.list_models(author='org')]") == ["org/a"]
    hub.fault("GET /api/models/org/a", "status")
    with pytest.raises(ClientError, match="503"):
        xet_client.run("api.model_info('org/a')")


def test_a_commit_whose_answer_is_lost_has_happened(hub: LocalHub, xet_client: Client) -> None:
    token, head = hub.user("org"), hub.create("org/a", {"x.txt": "1"})
    code = "hf.HfApi(token=token).upload_file(repo_id='org/a', path_in_repo='x.txt', path_or_fileobj=text.encode())"
    hub.fault("POST */commit/*", "lost")
    with pytest.raises(ClientError) as caught:
        xet_client.run(code, token=token, text="2")
    assert "TransportError" in caught.value.kinds
    assert hub.read("org/a", "x.txt") == b"2"
    hub.fault("POST */commit/*", "lost", status=504)
    with pytest.raises(ClientError, match="504"):
        xet_client.run(code, token=token, text="3")
    assert hub.read("org/a", "x.txt") == b"3"
    hub.fault("POST */commit/*", "status")
    with pytest.raises(ClientError, match="503"):
        xet_client.run(code, token=token, text="4")
    assert hub.read("org/a", "x.txt") == b"3"
    assert hub.history("org/a")[2].oid == head


def test_the_client_takes_a_flipped_bit_over_both_transports(
    hub: LocalHub, xet_client: Client, lfs_client: Client, tmp_path: Path
) -> None:
    code = "result = api.hf_hub_download('org/a', 'w.safetensors', cache_dir=cache)"
    hub.create("org/a", {"w.safetensors": WEIGHTS})
    for client, pattern in ((xet_client, "GET /xorbs/*"), (lfs_client, "GET /lfs/*")):
        fault = hub.fault(pattern, "flip")
        got = Path(client.run(code, cache=tmp_path / pattern[5:9])).read_bytes()
        assert fault.hits == 1
        assert len(got) == len(WEIGHTS)
        assert sum(bin(one ^ other).count("1") for one, other in zip(got, WEIGHTS, strict=True)) == 1


def test_the_client_asks_for_all_of_a_download_again_that_was_cut(
    hub: LocalHub, lfs_client: Client, tmp_path: Path
) -> None:
    hub.create("org/a", {"w.safetensors": WEIGHTS})
    hub.fault("GET /lfs/*", "truncate")
    code = "result = api.hf_hub_download('org/a', 'w.safetensors', cache_dir=cache)"
    assert Path(lfs_client.run(code, cache=tmp_path)).read_bytes() == WEIGHTS
    assert [call.sent for call in hub.calls("GET /lfs/*")] == [75_000, 150_000]  # it resumes in steps of 10 MiB only

"""Files off the local Hub: whole and in ranges, over both origins, with the real client and without one."""

import http.client
import json
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

from tests.hub.client import Client, ClientError
from tests.hub.server import LocalHub

DOWNLOAD = "result = hf.HfApi(token=False).hf_hub_download('org/a', name, revision=revision, cache_dir=cache)"
WEIGHTS = Random(2).randbytes(200_000)


def safetensors(tensors: dict[str, bytes]) -> bytes:
    """A file of 8-bit tensors."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


@pytest.fixture
def raw(hub: LocalHub) -> Iterator[http.client.HTTPConnection]:
    """A connection to the Hub's origin, without a client."""
    with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)) as connection:
        yield connection


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 1_048_576, 3_000_001])
def test_files_of_any_size_come_whole(hub: LocalHub, client: Client, tmp_path: Path, size: int) -> None:
    content = Random(size).randbytes(size)
    head = hub.create("org/a", {"w.safetensors": content})
    path = client.run(DOWNLOAD, name="w.safetensors", revision=head, cache=tmp_path)
    assert Path(path).read_bytes() == content


def test_empty_files_and_names_of_every_kind_come_whole(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    files = {"empty.safetensors": "", "empty.txt": "", "a b/c#d?é.txt": "1", "e%20f.bin": "2", "g+h.safetensors": "3"}
    head = hub.create("org/a", files)
    for name, content in files.items():
        path = client.run(DOWNLOAD, name=name, revision=head, cache=tmp_path)
        assert Path(path).read_text() == content


def test_files_are_served_as_they_were_at_any_revision(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    first = hub.create("org/a", {"x.txt": "1", "w.safetensors": b"one"})
    hub.commit("org/a", {"x.txt": "2", "w.safetensors": b"two"})
    hub.tag("org/a", "v1", first)
    for revision in (first, "v1"):
        for name, content in (("x.txt", b"1"), ("w.safetensors", b"one")):
            path = client.run(DOWNLOAD, name=name, revision=revision, cache=tmp_path)
            assert Path(path).read_bytes() == content
            assert first in path


def test_a_header_is_read_without_the_weights(hub: LocalHub, client: Client) -> None:
    content = safetensors({"a": b"\0" * 400_000, "b": b"\1" * 7})
    hub.create("org/a", {"adapter_model.safetensors": content})
    code = """
found = api.parse_safetensors_file_metadata('org/a', 'adapter_model.safetensors')
result = {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()}
"""
    assert client.run(code) == {"a": ["U8", [400_000]], "b": ["U8", [7]]}
    assert [(call.origin, call.status, call.sent) for call in hub.calls()] == [("hub", 302, 0), ("cdn", 206, 100_001)]


def test_a_long_header_is_read_by_a_second_range(hub: LocalHub, client: Client) -> None:
    content = safetensors({f"a.tensor.with.a.long.name.{number}": b"" for number in range(2000)})
    hub.create("org/a", {"adapter_model.safetensors": content})
    code = "result = len(api.parse_safetensors_file_metadata('org/a', 'adapter_model.safetensors').tensors)"
    assert client.run(code) == 2000
    assert sum(call.sent for call in hub.calls(origin="cdn")) == 100_001 + len(content) - 8


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [
        ("bytes=0-2", 206, b"012"),
        ("bytes=7-", 206, b"789"),
        ("bytes=7-100", 206, b"789"),
        ("bytes=-4", 206, b"6789"),
        ("bytes=10-", 416, None),
        ("", 200, b"0123456789"),
    ],
)
def test_ranges(
    hub: LocalHub, raw: http.client.HTTPConnection, wanted: str, status: int, content: bytes | None
) -> None:
    head = hub.create("org/a", {"x.txt": "0123456789"})
    raw.request("GET", "/org/a/resolve/main/x.txt", headers={"Range": wanted} if wanted else {})
    response = raw.getresponse()
    body = response.read()
    assert response.status == status
    if content is not None:
        assert (body, response.headers["X-Repo-Commit"]) == (content, head)


def test_a_large_file_is_redirected_with_what_the_client_must_know(
    hub: LocalHub, raw: http.client.HTTPConnection
) -> None:
    head = hub.create("org/a", {"w.safetensors": WEIGHTS})
    for method in ("HEAD", "GET"):
        raw.request(method, "/org/a/resolve/main/w.safetensors")
        response = raw.getresponse()
        assert response.read() == b""
        assert response.status == 302
        assert response.headers["Location"].startswith(f"{hub.cdn_url}/lfs/")
        assert response.headers["X-Repo-Commit"] == head
        assert response.headers["X-Linked-Size"] == str(len(WEIGHTS))
        assert response.headers["X-Xet-Hash"]
        assert response.headers["Link"] == f'<{hub.url}/api/models/org/a/xet-read-token/{head}>; rel="xet-auth"'


def test_a_url_of_the_cdn_needs_its_signature(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    hub.create("org/a", {"w.safetensors": WEIGHTS})
    raw.request("HEAD", "/org/a/resolve/main/w.safetensors")
    response = raw.getresponse()
    response.read()
    where = urlsplit(response.headers["Location"])
    with closing(http.client.HTTPConnection(where.netloc, timeout=10)) as cdn:
        for target, status in ((f"?{where.query}", 200), (f"?{where.query}0", 403), ("", 403)):
            cdn.request("HEAD", where.path + target)
            response = cdn.getresponse()
            response.read()
            assert response.status == status


def test_xet_needs_a_token_of_its_own_that_has_not_run_out(hub: LocalHub, raw: http.client.HTTPConnection) -> None:
    head = hub.create("org/a", {"w.safetensors": WEIGHTS})
    name = hub.state.xet_hash(hub.repository("org/a").head.files["w.safetensors"])
    with closing(http.client.HTTPConnection(urlsplit(hub.cdn_url).netloc, timeout=10)) as cdn:
        for seconds, status in ((100, 200), (-1, 401)):
            hub.state.token_seconds = seconds
            raw.request("GET", f"/api/models/org/a/xet-read-token/{head}")
            response = raw.getresponse()
            told = json.loads(response.read())
            assert told["accessToken"] == response.headers["X-Xet-Access-Token"]
            cdn.request(
                "GET", f"/v1/reconstructions/{name}", headers={"Authorization": f"Bearer {told['accessToken']}"}
            )
            answer = cdn.getresponse()
            answer.read()
            assert answer.status == status
            cdn.request("POST", "/v1/xorbs/default/0", headers={"Authorization": f"Bearer {told['accessToken']}"})
            answer = cdn.getresponse()
            answer.read()
            assert answer.status == 401


def test_a_snapshot_by_commit_costs_one_call_for_the_tree_and_one_for_xet(
    hub: LocalHub, xet_client: Client, tmp_path: Path
) -> None:
    head = hub.create("org/a", {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[:-1], "adapter_config.json": "{}"})
    code = (
        "api.snapshot_download('org/a', revision=head, cache_dir=cache, allow_patterns=['adapter*', '*.safetensors'])"
    )
    xet_client.run(code, head=head, cache=tmp_path)
    assert [str(call) for call in hub.calls("* /api/*")] == [
        f"GET /api/models/org/a/tree/{head}",
        f"GET /api/models/org/a/xet-read-token/{head}",
    ]


def test_a_hub_without_xet_serves_and_takes_plain_lfs(
    hub_without_xet: LocalHub, client: Client, tmp_path: Path
) -> None:
    hub, token = hub_without_xet, hub_without_xet.user("org")
    head = hub.create("org/a", {"w.safetensors": WEIGHTS})
    path = client.run(DOWNLOAD, name="w.safetensors", revision=head, cache=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert client.run("result = list(api.list_repo_tree('org/a'))[1].xet_hash") is None
    assert not hub.calls("* *xet*")
    assert not hub.calls("GET /v1/*")
    upload = "hf.HfApi(token=token).upload_file(repo_id='org/a', path_in_repo='v.bin', path_or_fileobj=b'new weights')"
    if client.run("result = hf.constants.HF_HUB_DISABLE_XET"):
        client.run(upload, token=token)
        assert hub.read("org/a", "v.bin") == b"new weights"
    else:
        with pytest.raises(ClientError) as caught:
            client.run(upload, token=token)
        assert "ConnectionError" in caught.value.kinds

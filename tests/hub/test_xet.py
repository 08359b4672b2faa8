"""The formats of Xet: what a client sends is read, and what is served can be put together from any range."""

import struct
from pathlib import Path
from random import Random

import pytest

from tests.hub import lz4, xet
from tests.hub.client import Client
from tests.hub.objects import Objects, sha256_of
from tests.hub.server import LocalHub
from tests.hub.wire import Bytes, Refusal

XORB_HASH, FILE_HASH = "1" * 64, "2" * 64


def chunk(data: bytes, scheme: int = 0, size: int | None = None) -> bytes:
    """One chunk of a xorb."""
    plain = len(data) if size is None else size
    return b"\0" + len(data).to_bytes(3, "little") + bytes([scheme]) + plain.to_bytes(3, "little") + data


def raw(hexadecimal: str) -> bytes:
    """The 32 bytes that are written as a hash."""
    return struct.pack("<4Q", *(int(hexadecimal[at : at + 16], 16) for at in range(0, 64, 16)))


def shard(sha256: str, segments: list[tuple[int, int, int]], *, verified: bool) -> bytes:
    """A shard of one file, whose segments (size, start, stop) are of one xorb."""
    flags = xet.HAS_SHA256 | (xet.VERIFIED if verified else 0)
    records = [raw(FILE_HASH) + struct.pack("<4I", flags, len(segments), 0, 0)]
    records += [raw(XORB_HASH) + struct.pack("<4I", 0, *segment) for segment in segments]
    records += [b"\7" * 48] * (len(segments) if verified else 0)
    return b"\0" * 48 + b"".join([*records, raw(sha256) + b"\0" * 16, b"\xff" * 48])


@pytest.mark.parametrize("verified", [False, True])
def test_a_file_is_put_together_from_the_segments_of_its_shard(verified: bool) -> None:
    store, objects = xet.XetStore(), Objects()
    store.put_xorb(XORB_HASH, chunk(b"one ") + chunk(b"two ") + chunk(b"three") + b"XETBLOB and a footer")
    sha256 = sha256_of(Bytes(b"two threeone "))
    assert list(store.put_shard(shard(sha256, [(9, 1, 3), (4, 0, 1)], verified=verified), objects)) == [sha256]
    assert objects.by_sha256[sha256].read(0, 100) == b"two threeone "
    assert store.hash_of(sha256, objects.by_sha256[sha256]) == FILE_HASH


def test_a_shard_that_does_not_fit_its_xorbs_is_refused() -> None:
    store, right = xet.XetStore(), sha256_of(Bytes(b"one "))
    with pytest.raises(Refusal, match="never sent"):
        list(store.put_shard(shard(right, [(4, 0, 1)], verified=True), Objects()))
    store.put_xorb(XORB_HASH, chunk(b"one "))
    for sha256, segment, complaint in (
        (right, (5, 0, 1), "not as long"),
        ("3" * 64, (4, 0, 1), "not what its sha256 says"),
    ):
        with pytest.raises(Refusal, match=complaint):
            list(store.put_shard(shard(sha256, [segment], verified=True), Objects()))
    with pytest.raises(Refusal, match="ends within"):
        list(store.put_shard(shard(right, [(4, 0, 1)], verified=True)[:-48], Objects()))


def test_compressed_chunks_are_read() -> None:
    # One literal run "abc", a match of 4 + 5 bytes 3 back, and the last literals "xyz".
    block = bytes([0x35]) + b"abc" + b"\x03\x00" + bytes([0x30]) + b"xyz"
    frame = b"\x04\x22\x4d\x18\x40\x40\x00" + struct.pack("<I", len(block)) + block + b"\0\0\0\0"
    assert lz4.frame(frame) == b"abcabcabcabcxyz"
    stored = b"\x04\x22\x4d\x18\x40\x40\x00" + struct.pack("<I", 10 | 1 << 31) + b"0246135713" + b"\0\0\0\0"
    assert xet.unpacked(stored, 1) == b"0246135713"
    # Grouped by place: the bytes at 0, 4, 8, then those at 1, 5, 9, then 2, 6, then 3, 7.
    assert xet.unpacked(stored, 2) == bytes(b"0246135713"[at] for at in (0, 3, 6, 8, 1, 4, 7, 9, 2, 5))
    assert xet.chunks(chunk(frame, 1, 15)) == [b"abcabcabcabcxyz"]


@pytest.mark.parametrize("size", [1, xet.CHUNK, xet.XORB, xet.XORB + 1, 2 * xet.XORB + 3 * xet.CHUNK + 5])
def test_any_range_of_a_file_is_served_by_its_chunks(size: int) -> None:
    random = Random(size)
    content = random.randbytes(size)
    store = xet.XetStore()
    name = store.hash_of(sha256_of(Bytes(content)), Bytes(content))
    whole: list[tuple[int, int] | None] = [None]
    for wanted in whole + [(a, random.randint(a + 1, size)) for a in (random.randrange(size) for _ in range(20))]:
        told = store.reconstruction(name, wanted, "http://cdn")
        got = b""
        for term in told["terms"]:
            (part,) = told["fetch_info"][term["hash"]]
            xorb = store.served[part["url"].rpartition("/")[2]]
            pieces = xet.chunks(xorb.read(part["url_range"]["start"], part["url_range"]["end"] + 1))
            assert len(pieces) == term["range"]["end"] - term["range"]["start"]
            assert sum(map(len, pieces)) == term["unpacked_length"]
            got += b"".join(pieces)
        start, stop = wanted or (0, size)
        offset = told["offset_into_first_range"]
        assert got[offset : offset + stop - start] == content[start:stop]


@pytest.mark.parametrize(("policy", "scheme"), [("lz4", 1), ("bg4", 2)])
def test_an_upload_that_is_compressed_is_understood(hub: LocalHub, tmp_path: Path, policy: str, scheme: int) -> None:
    token = hub.user("org")
    hub.create("org/a")
    numbers = struct.pack("<50000I", *(number // 7 for number in range(50_000))) + policy.encode()
    known = set(hub.state.xet_store.xorbs)
    env = {**hub.env(token=token, cache=tmp_path), "HF_XET_XORB_COMPRESSION_POLICY": policy}
    with Client(env) as client:
        code = "api.upload_file(repo_id='org/a', path_in_repo='w.safetensors', path_or_fileobj=bytes.fromhex(data))"
        client.run(code, data=numbers.hex())
    assert hub.read("org/a", "w.safetensors") == numbers
    (sent,) = (xorb for name, xorb in hub.state.xet_store.xorbs.items() if name not in known)
    assert sent.read(4, 5)[0] == scheme

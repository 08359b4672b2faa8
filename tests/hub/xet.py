"""Xet: reading the shards and xorbs that a client uploads, and making those that a client downloads.

Hashes are opaque here: an upload's come from its shard, a seeded file's is made from its sha256. That suffices
because hf_xet does not check what it downloads against them.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.hub import lz4
from tests.hub.objects import Objects
from tests.hub.wire import Readable, Refusal

RECORD = 48
VERIFIED, HAS_SHA256 = 1 << 31, 1 << 30
CHUNK = 64 * 1024  # how large the chunks are that we serve
CHUNKS_PER_XORB = 16
XORB = CHUNK * CHUNKS_PER_XORB


@dataclass(frozen=True)
class Segment:
    """A run of chunks of one xorb."""

    xorb: str
    size: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    hash: str
    sha256: str | None
    segments: tuple[Segment, ...]


def hash_hex(raw: bytes) -> str:
    """A hash as text: four little-endian numbers of 64 bits."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[ShardFile]:
    """The files of a shard: records of 48 bytes after a header of 48, up to one that starts with 32 x 0xFF."""
    at = RECORD
    while shard[at : at + 32] != b"\xff" * 32:
        if at + RECORD > len(shard):
            raise Refusal(400, "The shard ends within its files")
        file_hash = hash_hex(shard[at : at + 32])
        flags, count = struct.unpack_from("<2I", shard, at + 32)
        at += RECORD
        segments = tuple(segment(shard, at + RECORD * index) for index in range(count))
        at += RECORD * count * (2 if flags & VERIFIED else 1)
        sha256 = hash_hex(shard[at : at + 32]) if flags & HAS_SHA256 else None
        at += RECORD if flags & HAS_SHA256 else 0
        yield ShardFile(file_hash, sha256, segments)


def segment(shard: bytes, at: int) -> Segment:
    """The segment that one record describes."""
    _, size, start, stop = struct.unpack_from("<4I", shard, at + 32)
    return Segment(hash_hex(shard[at : at + 32]), size, start, stop)


def chunks(xorb: bytes) -> list[bytes]:
    """The contents of each chunk of a xorb; what follows the last (a footer) is no chunk."""
    found, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed, scheme, size = (int.from_bytes(xorb[at + a : at + b], "little") for a, b in ((1, 4), (4, 5), (5, 8)))
        data = unpacked(xorb[at + 8 : at + 8 + packed], scheme)
        if len(data) != size:
            raise Refusal(400, "A chunk of the xorb is not as long as it says")
        found.append(data)
        at += 8 + packed
    return found


def unpacked(data: bytes, scheme: int) -> bytes:
    """A chunk's contents: 0 plain, 1 LZ4, 2 LZ4 of the bytes grouped by their place in a number of four."""
    if scheme == 0:
        return data
    plain = lz4.frame(data)
    if scheme == 1:
        return plain
    out, at = bytearray(len(plain)), 0
    for place in range(4):
        count = len(out[place::4])
        out[place::4] = plain[at : at + count]
        at += count
    return bytes(out)


@dataclass(frozen=True)
class ServedXorb:
    """A `Readable`: a part of a file as a xorb of plain chunks, made while it is read."""

    content: Readable
    start: int
    stop: int

    @property
    def count(self) -> int:
        return -(-(self.stop - self.start) // CHUNK)

    @property
    def size(self) -> int:
        return self.stop - self.start + 8 * self.count

    def read(self, start: int, stop: int) -> bytes:
        first, last = start // (CHUNK + 8), min(-(-stop // (CHUNK + 8)), self.count)
        data = b"".join(self.chunk(index) for index in range(first, last))
        return data[start - first * (CHUNK + 8) : stop - first * (CHUNK + 8)]

    def chunk(self, index: int) -> bytes:
        """A chunk with its header."""
        start = self.start + index * CHUNK
        data = self.content.read(start, min(start + CHUNK, self.stop))
        size = len(data).to_bytes(3, "little")
        return b"\0" + size + b"\0" + size + data


class XetStore:
    """The content-addressed store: uploaded xorbs, and which file each hash is."""

    def __init__(self) -> None:
        self.objects = Objects()
        self.xorbs: dict[str, Readable] = {}
        self.files: dict[str, Readable] = {}
        self.hashes: dict[str, str] = {}
        self.served: dict[str, ServedXorb] = {}

    def forget_files(self) -> None:
        """Forgets the files. The xorbs stay: a client's own cache of shards remembers what it has sent."""
        self.files.clear()
        self.hashes.clear()
        self.served.clear()

    def put_xorb(self, xorb_hash: str, data: bytes) -> bool:
        """Stores a xorb; whether it is new."""
        new = xorb_hash not in self.xorbs
        self.xorbs[xorb_hash] = self.objects.keep(data)
        return new

    def put_shard(self, shard: bytes, objects: Objects) -> Iterator[str]:
        """Puts each file of a shard together, checks it against its sha256 and makes an LFS object of it."""
        for file in shard_files(shard):
            data = b"".join(self.segment(part) for part in file.segments)
            sha256 = objects.put(data)
            if file.sha256 not in (None, sha256):
                raise Refusal(400, f"The file {file.hash} is not what its sha256 says")
            self.files[file.hash] = objects.by_sha256[sha256]
            self.hashes[sha256] = file.hash
            yield sha256

    def segment(self, part: Segment) -> bytes:
        """The contents of a segment."""
        if part.xorb not in self.xorbs:
            raise Refusal(400, f"The shard names a xorb that was never sent: {part.xorb}")
        xorb = self.xorbs[part.xorb]
        data = b"".join(chunks(xorb.read(0, xorb.size))[part.start : part.stop])
        if len(data) != part.size:
            raise Refusal(400, "A segment is not as long as the shard says")
        return data

    def hash_of(self, sha256: str, content: Readable) -> str:
        """The Xet hash of a file, made up where it was not uploaded over Xet."""
        name = self.hashes.setdefault(sha256, hashlib.sha256(f"xet {sha256}".encode()).hexdigest())
        self.files[name] = content
        return name

    def reconstruction(self, file_hash: str, wanted: tuple[int, int] | None, url: str) -> Mapping[str, Any]:
        """How the bytes `wanted` of a file (or all) are put together from parts that lie below `url`."""
        content = self.files[file_hash]
        first, last = wanted or (0, content.size)
        terms, fetch = [], {}
        for at in range(first // XORB * XORB, last, XORB):
            name = hashlib.sha256(f"{file_hash} {at}".encode()).hexdigest()
            xorb = self.served[name] = ServedXorb(content, at, min(at + XORB, content.size))
            start, stop = max(first - at, 0) // CHUNK, min(-(-(last - at) // CHUNK), xorb.count)
            size = min(stop * CHUNK, xorb.stop - at) - start * CHUNK
            chunk_range = {"start": start, "end": stop}
            terms.append({"hash": name, "unpacked_length": size, "range": chunk_range})
            byte_range = {"start": start * (CHUNK + 8), "end": start * (CHUNK + 8) + size + 8 * (stop - start) - 1}
            fetch[name] = [{"range": chunk_range, "url": f"{url}/{name}", "url_range": byte_range}]
        offset = first - first // CHUNK * CHUNK
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}

"""A safetensors file, read strictly and without memory mapping.

The header is checked by our own rules (safetensors itself accepts duplicate keys, gaps, and headers of 95 MB); tensors
are read with `pread`, so a file that shrinks under us is an error and not a SIGBUS, and the pages of a thousand
clients do not count as our memory.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.errors import Malformed

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 8
MAX_DEPTH = 20  # of JSON; ours nests 6 deep, and a recipe's settings less
LFS_POINTER = "is a pointer of git-lfs and not the file itself: run `git lfs pull` where it was cloned"
PIECE_BYTES = 1 << 24  # that are read at once where a tensor is only looked at
MAX_DIGITS = 300  # of a whole number: all of these are finite as floats too
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LFS = b"version https://git-lfs"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")


class FileRefused(Malformed):
    """A file breaks our rules. ``field`` is the tensor or the part of the file, ``reason`` says why."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: float type, shape, absolute offset and bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file and its checked header. Close it when done."""

    path: Path
    descriptor: int
    size: int
    mtime_ns: int
    entries: Mapping[str, TensorEntry]

    def read(self, name: str) -> "Tensor":
        """The tensor `name` as fp32, on the CPU.

        Raises:
            FileRefused: the file is shorter than its header says, or the tensor holds NaN or infinity.
        """
        entry = self.entries[name]
        return self._read(name, 0, entry.nbytes).reshape(entry.shape)

    def pieces(self) -> Iterator[tuple[str, int]]:
        """Every tensor in pieces of little memory, whatever its size: its name, and where the piece begins in it."""
        return ((name, start) for name, entry in self.entries.items() for start in range(0, entry.nbytes, PIECE_BYTES))

    def require_finite(self, name: str, start: int) -> None:
        """Raise `FileRefused` where the piece of the tensor `name` that begins at `start` holds NaN or infinity."""
        self._read(name, start, min(PIECE_BYTES, self.entries[name].nbytes - start))

    def _read(self, name: str, start: int, nbytes: int) -> "Tensor":
        """So many bytes of the tensor `name` from `start`, as fp32, flat."""
        import torch

        entry = self.entries[name]
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
        tensor = torch.empty(nbytes // ITEM_BYTES[entry.dtype], dtype=kind)
        buffer: Any = tensor.view(torch.uint8).numpy()
        _read_into(self.descriptor, memoryview(buffer), entry.offset + start, name)
        tensor = tensor.float()
        if not is_finite(tensor):
            raise FileRefused(name, "holds NaN or infinity")
        return tensor

    def sha256(self) -> str:
        """The sha256 of the whole file, in hex, read through the open descriptor."""
        digest, buffer, done = hashlib.sha256(), bytearray(1 << 20), 0
        while count := os.preadv(self.descriptor, [buffer], done):
            digest.update(memoryview(buffer)[:count])
            done += count
        return digest.hexdigest()

    def unchanged(self) -> bool:
        """Whether the file is still the one that was opened."""
        now = os.fstat(self.descriptor)
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)

    def close(self) -> None:
        os.close(self.descriptor)


def is_finite(tensor: "Tensor") -> bool:
    """Whether an fp32 tensor holds neither NaN nor infinity."""
    import torch

    # A finite sum proves that every entry is finite, at a tenth of the cost of looking at each; an infinite one may be
    # an honest overflow, so then look.
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open `path` and check its header: bounds, types, names, and byte counts that add up.

    Raises:
        FileRefused: naming what is wrong.
        OSError: the file cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to must not hang.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused("file", "is not a regular file")
        entries = _entries(descriptor, status.st_size)
        return SafetensorsFile(path, descriptor, status.st_size, status.st_mtime_ns, entries)
    except BaseException:
        os.close(descriptor)
        raise


def _entries(descriptor: int, size: int) -> Mapping[str, TensorEntry]:
    header = bytearray(header_bytes(os.pread(descriptor, 8, 0)))
    _read_into(descriptor, memoryview(header), 0, "header")
    return read_header(bytes(header), size)


def header_bytes(lead: bytes) -> int:
    """The header's size, its length field included, from the file's first 8 bytes; raises `FileRefused`."""
    if len(lead) < 8:
        raise FileRefused("header", "the file is shorter than a safetensors header")
    if _LFS.startswith(lead[:8]):
        raise FileRefused("file", LFS_POINTER)
    (length,) = struct.unpack("<Q", lead[:8])
    if length > MAX_HEADER_BYTES:
        raise FileRefused("header", f"{length} bytes; at most {MAX_HEADER_BYTES} are accepted")
    return 8 + int(length)


@lru_cache(maxsize=8)  # the clients of a federation mostly have the same header, which then is in memory once
def read_header(text: bytes, size: int) -> Mapping[str, TensorEntry]:
    """The tensors of a file of `size` bytes that begins with `text`; raises `FileRefused`."""
    start = header_bytes(text)
    if len(text) < start:
        raise FileRefused("header", "the file ends before it")
    header = parse_json(text[8:start], "header")
    header.pop("__metadata__", None)
    if not header:
        raise FileRefused("header", "names no tensor")
    entries = {name: _entry(name, value, start) for name, value in header.items()}
    _check_cover(entries, start, size)
    return entries


def parse_json(text: bytes, field: str, endless: list[FileRefused] | None = None) -> dict[str, Any]:
    """A JSON object, with duplicate keys, numbers that are no finite floats, and deep nesting refused.

    Args:
        endless: takes the refusal of the first number that is no finite float, and the text is read on, with NaN in the
            place of each, so that what else is wrong with it shows.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(items)) < len(items):
            raise FileRefused(field, "names an entry twice")
        return found

    def constant(value: str) -> float:
        problem = FileRefused(field, f"holds the number {value[:20]}")
        if endless is None:
            raise problem
        if not endless:
            endless.append(problem)
        return math.nan

    def real(value: str) -> float:
        return number if math.isfinite(number := float(value)) else constant(value)

    def whole(value: str) -> float:
        return int(value) if len(value) <= MAX_DIGITS else constant(value)

    if text.startswith(_LFS):
        raise FileRefused(field, LFS_POINTER)
    try:
        data = json.loads(
            text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_float=real, parse_int=whole
        )
    except FileRefused:
        raise
    except (ValueError, RecursionError) as error:
        raise FileRefused(field, "is not valid JSON") from error
    if not isinstance(data, dict):
        raise FileRefused(field, "is not a JSON object")
    if _is_deep(data):
        raise FileRefused(field, f"is nested more than {MAX_DEPTH} deep")
    return data


def _is_deep(data: object) -> bool:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        values = [value.values() if type(value) is dict else value for value in level]
        level = [item for item in chain.from_iterable(values) if type(item) is dict or type(item) is list]
    return bool(level)


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    if not _NAME.fullmatch(name) or ".." in name:
        raise FileRefused("header", f"the tensor name {name[:80]!r} is not accepted")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileRefused(name, "must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FileRefused(name, f"has the type {str(dtype)[:20]}; F32, F16 and BF16 are accepted")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise FileRefused(name, "has no proper shape")
    if 0 in shape:
        raise FileRefused(name, f"has the shape {shape} and holds nothing, as where ZeRO-3 had it in parts elsewhere")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise FileRefused(name, "has no proper data_offsets")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise FileRefused(name, f"spans {offsets[1] - offsets[0]} bytes where its shape needs {nbytes}")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _check_cover(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must fill the file from the header's end to its own end, without gap or overlap."""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != start:
            raise FileRefused(name, "overlaps another tensor or leaves a gap")
        start += entry.nbytes
    if start != size:
        raise FileRefused("file", f"has {size} bytes where its header needs {start}")


def _read_into(descriptor: int, buffer: memoryview, offset: int, field: str) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise FileRefused(field, "the file ends before it")
        done += count

"""Mutants of a safetensors file: of its header alone, of its tensors, and of both so that they still fit."""

import copy
import json
import struct
from random import Random
from typing import Any

from tests.fuzz.documents import bytes_mutant
from tests.fuzz.values import NUMBERS, TEXTS, Raw, Twin, hostile, text_of

Header = dict[str, Any]
SPECIAL = {
    "F32": (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000),
    "F16": (0x7E00, 0x7C00, 0xFC00, 0x7BFF, 0x0001, 0x8000),
    "BF16": (0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0x0001, 0x8000),
}


def mutant(random: Random, data: bytes) -> bytes:
    """A mutant of the file `data`."""
    if random.random() < 0.15:
        return bytes_mutant(random, data)
    header, body = parts(data)
    for _ in range(random.choice([1, 1, 1, 2])):
        # A mutant of a mutant may have lost what the next change looks for.
        try:
            header, body = random.choice(CHANGES)(random, header, body)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError):
            continue
    text = text_of(header).encode("utf-8", "surrogatepass")
    length = len(text)
    if random.random() < 0.04:
        length = random.choice([0, max(0, length - 1), length + 1, 2**20, 2**20 + 1, 2**63, 2**64 - 1])
    if random.random() < 0.04:
        text += b" " * random.choice([1, 8, 2**20])
        length = len(text)
    return struct.pack("<Q", length) + text + body


def parts(data: bytes) -> tuple[Header, bytes]:
    """The header of a sound file, and what comes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _tensors(header: Header, body: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (entry["dtype"], list(entry["shape"]), body[entry["data_offsets"][0] : entry["data_offsets"][1]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _packed(tensors: dict[str, tuple[str, list[int], bytes]]) -> tuple[Header, bytes]:
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def _one(random: Random, header: Header) -> str:
    return random.choice([name for name in header if name != "__metadata__"])


def _entry(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """An entry's field becomes anything."""
    header = copy.deepcopy(header)
    entry = header[_one(random, header)]
    field = random.choice(["dtype", "shape", "data_offsets"])
    values: dict[str, list[Any]] = {
        "dtype": ["F64", "I8", "BOOL", "F8_E4M3", "f32", "F16", "BF16", "", None, ["F32"], random.choice(TEXTS)],
        "shape": [[], [0], [1], [-1, 4], [2**40, 2**40], [2**47] * 8, [1] * 9, [4.0, 4], [True], None, "4x4", 4],
        "data_offsets": [[], [0], [0, 2**60], [-4, 4], [8, 0], [0.0, 4.0], None, [0, 4, 8], {"a": 1}],
    }
    choice = random.randrange(4)
    if choice == 0:
        entry[field] = hostile(random, list(header))
    elif choice == 1:
        entry[field] = random.choice(values[field])
    elif choice == 2 and isinstance(entry[field], list) and entry[field]:
        spot = random.randrange(len(entry[field]))
        entry[field][spot] = random.choice(
            [entry[field][spot] + random.choice([-1, 1, 4, 2**32]), Raw(random.choice(NUMBERS))]
        )
    else:
        entry[random.choice(["code", "dtype ", "shape"])] = random.choice([1, "import os", None])
    return header, body


def _keys(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """A name becomes another, comes twice, goes, or a new one comes."""
    header = copy.deepcopy(header)
    name, other = _one(random, header), _one(random, header)
    choice = random.randrange(7)
    if choice == 0:
        header[Twin(name)] = header[name]
    elif choice == 1:
        del header[name]
    elif choice == 2:
        header[name] = header[other]
    elif choice == 3:
        header["__metadata__"] = hostile(random, [name])
    elif choice == 4:
        header[random.choice([name + "\u202e", *TEXTS])] = header.pop(name)
    elif choice == 5:
        header[name] = hostile(random, [name])
    else:
        return Raw(random.choice(["{}", "[]", "null", "[" * 100_000, '"x"', "{'a': 1}", ""])), body  # type: ignore[return-value]
    return header, body


def _renamed(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """Tensors keep their bytes, and get names that mean something else."""
    tensors = _tensors(header, body)
    old, new = random.choice(
        [
            ("core_A", "core_B"),
            ("dropped", "core_A"),
            ("lora_A", "lora_B"),
            ("lora_A.weight", "lora_embedding_A"),
            ("lora_B.weight", "lora_embedding_B"),
            (".weight", ".bias"),
            ("lora_A", "lora_A.default"),
            ("base_model.model.", ""),
            ("lora_A.weight", "lora_magnitude_vector"),
            ("lora_B.weight", "token_adapter.trainable_tokens_delta"),
            ("lora_A.weight", "base_layer.weight"),
            ("lora_A.weight", "modules_to_save.weight"),
            ("self_attn", "base_layer.self_attn"),
            ("layers.0", "layers.1"),
            ("layers", "x..y"),
            ("proj.", "proj.base_layer."),
            ("_proj", "-proj"),
        ]
    )
    some = random.random() < 0.5 and _one(random, header)
    names = {name: name.replace(old, new) if some in (False, name) else name for name in tensors}
    return _packed({names[name]: tensor for name, tensor in tensors.items()})


def _dropped(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """Whole modules, or a half of one, are not there."""
    tensors = _tensors(header, body)
    name = _one(random, header)
    stem = name.partition(".lora_")[0] if random.random() < 0.7 else name
    return _packed({key: tensor for key, tensor in tensors.items() if not key.startswith(stem)})


def _shuffled(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """The same tensors in another order, as another writer would have them."""
    tensors = list(_tensors(header, body).items())
    random.shuffle(tensors)
    packed, body = _packed(dict(tensors))
    entries = list(packed.items())
    random.shuffle(entries)
    return dict(entries), body


def _reshaped(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """Shapes that hold as many numbers as before, in one tensor or in all of them."""
    tensors = _tensors(header, body)
    chosen = [_one(random, header)] if random.random() < 0.7 else list(tensors)
    for name in chosen:
        dtype, shape, data = tensors[name]
        count = len(data) // (4 if dtype == "F32" else 2)
        shapes = [shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1], [1, count], [2, count // 2], [1] * 9]
        tensors[name] = (dtype, random.choice(shapes), data)
    return _packed(tensors)


def _resized(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """A dimension grows or shrinks, and the numbers with it; by name, so that both factors may still fit."""
    tensors = _tensors(header, body)
    role = random.choice(["lora_A", "lora_B", "lora_", _one(random, header)])
    axis, size = random.randrange(2), random.choice([1, 2, 3, 5, 8, 31])
    for name, (dtype, shape, data) in tensors.items():
        if role in name and len(shape) > axis:
            item = 4 if dtype == "F32" else 2
            shape = [*shape[:axis], size, *shape[axis + 1 :]]
            count = item
            for length in shape:
                count *= length
            tensors[name] = (dtype, shape, (data * (count // len(data) + 1))[:count])
    return _packed(tensors)


def _retyped(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """The bytes are said to be another type's, and the shape follows."""
    tensors = _tensors(header, body)
    for name in [_one(random, header)] if random.random() < 0.5 else list(tensors):
        _, shape, data = tensors[name]
        dtype = random.choice(["F16", "BF16", "F32"])
        shape = [*shape[:-1], shape[-1] * 2] if dtype != "F32" and random.random() < 0.4 else shape
        count = 4 if dtype == "F32" else 2
        for length in shape:
            count *= length
        tensors[name] = (dtype, shape, data[:count].ljust(count, b"\1"))
    return _packed(tensors)


def _valued(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """NaN, infinity, the largest and the smallest number, or noise, somewhere in the numbers."""
    tensors = _tensors(header, body)
    name = _one(random, header)
    dtype, shape, data = tensors[name]
    item, out = (4 if dtype == "F32" else 2), bytearray(data)
    for _ in range(random.choice([1, 1, 3, 50])):
        at = random.randrange(len(out) // item) * item
        out[at : at + item] = random.choice(SPECIAL[dtype]).to_bytes(item, "little")
    if random.random() < 0.15:
        out = bytearray(random.choice([bytes(len(out)), random.randbytes(len(out)), bytes(out) * 2]))
    tensors[name] = (dtype, shape, bytes(out))
    return _packed(tensors)


def _gapped(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """Bytes that no tensor has: before, between, after; or too few."""
    cut = random.choice([1, 4, len(body) // 2, len(body)])
    return header, random.choice([body + b"\0" * cut, body[:-cut], b"\0" * 4 + body, b"", body * 2])


def _widened(random: Random, header: Header, body: bytes) -> tuple[Header, bytes]:
    """Modules of a kind that others have too, thousands of small ones or a few wide ones."""
    tensors = _tensors(header, body)
    stem = random.choice([name.rpartition(".lora_")[0] or name for name in tensors])
    count = random.choice([1, 3, 50, 5000])
    for number in range(count):
        suffixes = random.choice(
            [("lora_A.weight", "lora_B.weight"), ("bias",), ("token_adapter.trainable_tokens_delta",)]
        )
        wide = random.choice([1, 1, 4, 20_000]) if count < 50 else 1
        for suffix in suffixes:
            shape = [8, wide] if suffix == "lora_A.weight" else [wide, 8]
            tensors[f"{stem}{number}.{suffix}"] = ("F16", shape, b"\0\1" * (8 * wide))
    return _packed(tensors)


CHANGES = (
    *(_entry, _entry, _entry, _keys, _keys, _renamed, _renamed, _dropped, _dropped, _shuffled, _shuffled, _reshaped),
    *(_resized, _resized, _retyped, _retyped, _valued, _valued, _valued, _gapped, _widened),
)

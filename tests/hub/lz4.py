"""Decoding an LZ4 frame, slowly and without a dependency: a client that compresses its Xet uploads is understood."""


def frame(data: bytes) -> bytes:
    """The contents of one LZ4 frame; checksums are skipped."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("not an LZ4 frame")
    flags = data[4]
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        block = data[at : at + (size & 0x7FFFFFFF)]
        at += len(block) + 4 * bool(flags & 16)
        if size >> 31:
            out += block
        else:
            _block(block, out)
    return bytes(out)


def _block(data: bytes, out: bytearray) -> None:
    """Appends the contents of one compressed block."""
    at = 0
    while at < len(data):
        token = data[at]
        count, at = _length(data, at + 1, token >> 4)
        out += data[at : at + count]
        at += count
        if at >= len(data):
            return
        start = len(out) - int.from_bytes(data[at : at + 2], "little")
        count, at = _length(data, at + 2, token & 15)
        count += 4
        while count > 0:  # a match may overlap what it writes
            piece = out[start : start + count]
            out += piece
            start += len(piece)
            count -= len(piece)


def _length(data: bytes, at: int, length: int) -> tuple[int, int]:
    """A length that goes on in further bytes where its four bits are full."""
    if length == 15:
        while True:
            length += data[at]
            at += 1
            if data[at - 1] != 255:
                break
    return length, at

"""HTTP/1.1 over asyncio: reads requests from a connection, lets the fault plan act, sends the answers."""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import NoReturn
from urllib.parse import parse_qs, urlsplit

from tests.hub.calls import Call
from tests.hub.faults import BEFORE_THE_EFFECT, ON_THE_BODY, Fault
from tests.hub.wire import Request, Response

PIECE = 256 * 1024


class Gone(Exception):
    """The connection is to be closed without a further word."""


class Connection:
    """One connection of a client to one origin.

    find: the fault that strikes a request (method, path), if any. answer: what to answer. note: notes a call.
    """

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        find: Callable[[str, str], Fault | None],
        answer: Callable[[Request], Response],
        note: Callable[[Request, str], Call],
    ) -> None:
        self.reader, self.writer = streams
        self.find, self.answer, self.note = find, answer, note

    async def serve(self) -> None:
        """Answers one request after the other until either side has had enough."""
        try:
            with suppress(Gone, ConnectionError, asyncio.IncompleteReadError):
                while await self.exchange():
                    pass
        finally:
            self.writer.close()

    async def hang_up(self) -> None:
        """Ends the connection now."""
        self.writer.transport.abort()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def exchange(self) -> bool:
        """One request and its answer; whether the connection stays open."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").rstrip().split("\r\n")
        method, target, _ = line.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        path, query = urlsplit(target).path, urlsplit(target).query
        body = await self.body(headers)
        request = Request(method, path, parse_qs(query, keep_blank_values=True), headers, body)
        await self.respond(request, query)
        return headers.get("connection", "").lower() != "close"

    async def body(self, headers: dict[str, str]) -> bytes:
        """The request's body, by its length or in chunks."""
        if headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self.reader.readexactly(int(headers.get("content-length", 0)))
        pieces = []
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readuntil(b"\r\n")
        return b"".join(pieces)

    async def respond(self, request: Request, query: str) -> None:
        """Notes the call, and answers as the fault plan would have it."""
        call, fault = self.note(request, query), self.find(request.method, request.path)
        if fault and fault.kind in BEFORE_THE_EFFECT:
            call.fault = fault.strike()
            response = await self.instead(fault)
        else:
            if fault and fault.kind == "delay":
                call.fault = fault.strike()
                await asyncio.sleep(fault.seconds)
            response = self.answer(request)
        if fault and fault.kind == "lost":
            call.fault = fault.strike()
            response = self.reset() if fault.status is None else fault.answer()
        spoiling = fault if fault and fault.kind in ON_THE_BODY and response.body.size else None
        if spoiling:
            call.fault = spoiling.strike()
        call.status = response.status
        await self.send(call, response, spoiling)

    async def instead(self, fault: Fault) -> Response:
        """What a fault does instead of what was asked."""
        if fault.kind == "reset":
            self.reset()
        if fault.kind == "stall":
            await self.reader.read()  # until the client has gone
            raise Gone
        return fault.answer()

    def reset(self) -> NoReturn:
        """Ends the connection with a TCP reset."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise Gone

    async def send(self, call: Call, response: Response, fault: Fault | None) -> None:
        """Sends an answer, its body spoiled where a fault says so."""
        body = fault.spoil(response.body) if fault else response.body
        headers = {"Content-Length": str(body.size), **response.headers}
        head = f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.writer.write(head.encode("latin-1") + b"\r\n")
        stop = 0 if call.method == "HEAD" else body.size // 2 if fault and fault.kind == "truncate" else body.size
        step, pause = (1, fault.seconds) if fault and fault.kind == "drip" else (PIECE, 0.0)
        call.sent = stop
        for start in range(0, stop, step):
            self.writer.write(body.read(start, min(start + step, stop)))
            await self.writer.drain()
            if pause:
                await asyncio.sleep(pause)
        await self.writer.drain()
        if fault and fault.kind == "truncate":
            raise Gone

"""What is to go wrong: a plan of faults, each for the requests that its pattern names."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tests.hub.calls import named
from tests.hub.wire import Bytes, Readable, Response

Kind = Literal["status", "html", "reset", "stall", "delay", "lost", "truncate", "short", "flip", "drip"]
Origin = Literal["hub", "cdn"]
BEFORE_THE_EFFECT = {"status", "html", "reset", "stall"}
ON_THE_BODY = {"truncate", "short", "flip", "drip"}
HTML = b"<!DOCTYPE html><html><body><h1>Sign in to this network</h1></body></html>"


@dataclass
class Fault:
    """One thing that goes wrong.

    on: what it strikes: `POST /api/models/{id}/commit/{rev}`, `GET */tree/*`; see `calls.named`.
    kind: status   answers `status` (503) instead of doing anything; `retry_after` sets the header
          html     answers 200 and a page of HTML instead of doing anything
          reset    resets the connection instead of doing anything
          stall    reads the request and never answers
          delay    answers after `seconds`
          lost     does what was asked, then resets; with `status`, answers that instead
          truncate announces the whole body, sends the half of it and closes
          short    sends the half of the body as if it were all
          flip     flips a bit of the body: bit 0 of byte `offset`, or of the middle one
          drip     sends the body byte by byte, one in `seconds`
    times: how often; for ever where None. lasting: and for how many seconds from now on, where given.
    origin: strikes on this origin only.
    hits: how often it struck.
    """

    on: str
    kind: Kind
    times: int | None = 1
    origin: Origin | None = None
    status: int | None = None
    retry_after: int | None = None
    seconds: float = 0.2
    offset: int | None = None
    lasting: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = 0
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no such fault: {self.kind}")

    def strikes(self, origin: str, method: str, path: str, route: str) -> bool:
        """Whether it is this request's turn."""
        spent = self.times is not None and self.hits >= self.times
        over = self.lasting is not None and time.monotonic() > self.since + self.lasting
        here = self.origin in (None, origin)
        return here and not spent and not over and named(self.on, method, path, route)

    def strike(self) -> str:
        """Counts a hit; its name for the log."""
        self.hits += 1
        return self.kind

    def answer(self) -> Response:
        """What is sent instead of the real answer."""
        if self.kind == "html":
            return Response(200, Bytes(HTML), {"Content-Type": "text/html; charset=utf-8"})
        after = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        body = Bytes(f"fault: {self.status or 503}".encode())
        return Response(self.status or 503, body, {"Content-Type": "text/plain", **after, **self.headers})

    def spoil(self, body: Readable) -> Readable:
        """The body as it is sent; only `flip` and `short` change it."""
        if self.kind == "short":
            return Bytes(body.read(0, body.size // 2))
        if self.kind == "flip":
            return Flipped(body, (body.size // 2 if self.offset is None else self.offset) % body.size)
        return body


@dataclass(frozen=True)
class Flipped:
    """A `Readable` with bit 0 of one byte flipped."""

    whole: Readable
    offset: int

    @property
    def size(self) -> int:
        return self.whole.size

    def read(self, start: int, stop: int) -> bytes:
        piece = bytearray(self.whole.read(start, stop))
        if start <= self.offset < start + len(piece):
            piece[self.offset - start] ^= 1
        return bytes(piece)


class FaultPlan:
    """The faults in the order in which they were planned; the first that fits strikes."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def plan(self, on: str, kind: Kind, **options: Any) -> Fault:
        """Adds a fault; see `Fault`."""
        fault = Fault(on, kind, **options)
        self.faults.append(fault)
        return fault

    def find(self, origin: str, method: str, path: str, route: str) -> Fault | None:
        """The fault that strikes this request. A HEAD has no body to spoil."""
        fitting = (fault for fault in self.faults if fault.strikes(origin, method, path, route))
        return next((f for f in fitting if not (method == "HEAD" and f.kind in ON_THE_BODY)), None)

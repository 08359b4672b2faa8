"""What travels: requests, answers, refusals; the routes that join them to functions; byte ranges."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import unquote


class Readable(Protocol):
    """Bytes of a known size that are read piece by piece."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    """A `Readable` over bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


@dataclass(frozen=True)
class Slice:
    """The bytes `start` to `stop` of another `Readable`."""

    whole: Readable
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> bytes:
        return self.whole.read(self.start + start, min(self.start + stop, self.stop))


@dataclass(frozen=True)
class Request:
    """One request. `path` is as it was sent; `args` are the route's parts of it, unquoted; header names are lower."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    args: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The body as JSON; an empty body is an empty object."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise Refusal(400, "Invalid JSON") from None

    def first(self, name: str, default: str = "") -> str:
        """The first value of a query parameter."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.first(name).lower() in {"1", "true"}

    @property
    def bearer(self) -> str | None:
        """The token of the Authorization header, if there is one."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None


@dataclass(frozen=True)
class Response:
    """One answer."""

    status: int = 200
    body: Readable = Bytes(b"")
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as a JSON answer."""
    body = Bytes(json.dumps(value).encode())
    return Response(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class Refusal(Exception):
    """An answer that is an error, with the Hub's `X-Error-*` headers; `more` joins the JSON body."""

    def __init__(self, status: int, message: str, code: str = "", more: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more or {}
        self.headers: dict[str, str] = {}

    def response(self) -> Response:
        """The answer that the client gets."""
        headers = {"X-Error-Message": self.message, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return answer({"error": self.message, **self.more}, self.status, headers)


Context = TypeVar("Context")
PARTS = {"id": r"[^/]+(?:/[^/]+)?", "path": r".+", "slug": r".+"}


class Routes(Generic[Context]):
    """The functions of one origin by method and path: `{id}` is a repository, `{path}` may hold slashes."""

    def __init__(self) -> None:
        self.routes: list[tuple[str, str, re.Pattern[str], Callable[[Context, Request], Response]]] = []

    def on(self, methods: str, template: str) -> Callable[..., Callable[[Context, Request], Response]]:
        """Registers a function for `methods` (separated by spaces) and a path."""

        def register(handler: Callable[[Context, Request], Response]) -> Callable[[Context, Request], Response]:
            pattern = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{PARTS.get(m[1], '[^/]+')})", re.escape(template))
            self.routes += [(method, template, re.compile(pattern), handler) for method in methods.split()]
            # The longer template first: `/api/models/gpt2/refs` is the refs of gpt2, not a repository called refs.
            self.routes.sort(key=lambda route: -len(route[1]))
            return handler

        return register

    def route(self, method: str, path: str) -> str:
        """The template of the route that answers a request; empty where none does."""
        found = (t for m, t, pattern, _ in self.routes if m == method and pattern.fullmatch(path))
        return next(found, "")

    def __call__(self, context: Context, request: Request) -> Response:
        """The answer to a request; 404 where no route fits, 405 where only the method is wrong."""
        known_path = False
        for method, _, pattern, handler in self.routes:
            if found := pattern.fullmatch(request.path):
                known_path = True
                if method == request.method:
                    args = {name: unquote(value) for name, value in found.groupdict().items()}
                    return handler(context, Request(**{**vars(request), "args": args}))
        raise Refusal(405, "Method not allowed") if known_path else Refusal(404, "Not found")


def ranged(request: Request, content: Readable, headers: Mapping[str, str]) -> Response:
    """`content`, or the part that the Range header asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    wanted = byte_range(request, content.size)
    if wanted is None:
        return Response(200, content, headers)
    start, stop = wanted
    return Response(
        206,
        Slice(content, start, stop),
        {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{content.size}"},
    )


def byte_range(request: Request, size: int) -> tuple[int, int] | None:
    """Start and stop of the Range header within `size` bytes, or nothing; 416 where none of it is there."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "").replace(" ", ""))
    if not found or found.group(0) == "bytes=-":
        return None
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        refusal = Refusal(416, "Range not satisfiable")
        refusal.headers["Content-Range"] = f"bytes */{size}"
        raise refusal
    return start, stop

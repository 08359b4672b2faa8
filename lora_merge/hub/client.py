"""The client behind every call to the Hub: no call without a deadline, no waits beyond --max-wait.

huggingface_hub passes `timeout=None` to most of its calls and sleeps as long as a server says. It takes its HTTP
client from a factory, so ours is one that times out, waits and gives up by our own rules, and says so.
"""

import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import httpx2
from huggingface_hub.utils import _http as library  # its event hook has no public name

from lora_merge.errors import NetworkError
from lora_merge.hub.waiting import Patience

BACKOFF = (1.0, 2.0, 4.0, 8.0)  # seconds between tries where the server names none
UNMET = 2  # tries again of a server that nothing in this command has reached: it is mistyped, or we are offline
TIMEOUT = httpx2.Timeout(30, connect=10, pool=None)
LEAST_SECONDS = 3.0  # to answer in, however little may be waited: a server that takes them is not yet a busy one
CALL_SECONDS = 60.0
SLOWEST_BYTES_A_SECOND = 10_000
BUSY = (408, 429, 500, 502, 503, 504)
_UNREACHED = (httpx2.ConnectError, httpx2.ConnectTimeout)
_BROKEN = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.DecodingError)
# These only ask, whatever their method; asking twice does no harm.
_ASKING = re.compile(r"/(preupload/|paths-info/|info/lfs/objects/batch$)|/api/validate-yaml$")


class HubClient(httpx2.Client):
    """An HTTP client that tries again where that is safe, within its patience, and never waits without a limit."""

    def __init__(self, patience: Patience) -> None:
        hooks = {"request": [library.hf_request_event_hook]}
        super().__init__(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)
        self.patience = patience
        self._connections: WeakSet[Any] = WeakSet()

    def build_request(self, *args: Any, timeout: Any = None, **options: Any) -> httpx2.Request:
        chosen = timeout if isinstance(timeout, (int, float, httpx2.Timeout)) else TIMEOUT
        return super().build_request(*args, timeout=chosen, **options)

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        if request.url.path.endswith("/api/agent-harnesses"):
            return httpx2.Response(404, request=request)  # the library's own statistics; not worth a call or a wait
        request.extensions["trace"] = self._remember
        for attempt in range(1_000_000):
            tries, began = len(BACKOFF), time.monotonic()
            try:
                response = self._send_once(request, stream, **options)
                self.patience.budget.reached.add(request.url.netloc)
                if _worth_another_try(request, response):
                    seconds, why = _asked_wait(response), f"{request.url.host} answers {response.status_code}"
                elif attempt < len(BACKOFF) and _is_no_answer(request, response, read=not stream):
                    seconds, why = None, f"{request.url.host} sends what is not an answer"
                else:
                    return _believable(request, response)
                response.close()
            except _BROKEN as error:
                if not _is_safe_to_repeat(request) and not isinstance(error, _UNREACHED):
                    raise
                seconds, why = None, f"{request.url.host} {_failing(error)}"
                if isinstance(error, _UNREACHED) and request.url.netloc not in self.patience.budget.reached:
                    tries = UNMET
            if seconds is None and attempt >= tries:
                raise NetworkError(f"{why}, {attempt + 1} times.", hint="Try again later.")
            pause = BACKOFF[min(attempt, len(BACKOFF) - 1)] if seconds is None else seconds
            took = time.monotonic() - began  # to fail: a server that stalls is waited for as well
            self.patience.wait(pause, why, asked=seconds is not None, already=took)
        raise AssertionError("unreachable")

    def _send_once(self, request: httpx2.Request, stream: bool, **options: Any) -> httpx2.Response:
        self.patience.require_going_on()
        longest = max(self.patience.budget.left, LEAST_SECONDS)
        if _is_safe_to_repeat(request):  # what changes something is not broken off: it may well be done
            limits = request.extensions["timeout"]
            request.extensions["timeout"] = {of: limit and min(limit, longest) for of, limit in limits.items()}
        response = super().send(request, stream=True, **options)
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else 0
        assert isinstance(response.stream, httpx2.SyncByteStream)
        call = CALL_SECONDS if stream else min(CALL_SECONDS, longest)
        response.stream = _Deadline(response.stream, call + size / SLOWEST_BYTES_A_SECOND, self.patience)
        if not stream:
            try:
                response.read()
            finally:
                response.close()
        return response

    def _remember(self, event: str, facts: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._connections.add(facts["return_value"])

    def hang_up(self) -> None:
        """End the session, and every read under way: a thread that waits for a stalled server hears of nothing else."""
        self.patience.end()
        for connection in list(self._connections):
            with suppress(OSError):  # closed already
                socket.socket.shutdown(connection.get_extra_info("socket"), socket.SHUT_RDWR)


class _Deadline(httpx2.SyncByteStream):
    """A body that must arrive in time: a server that sends a byte now and then never trips a read timeout."""

    def __init__(self, body: httpx2.SyncByteStream, seconds: float, patience: Patience) -> None:
        self._body, self._patience = body, patience
        self._until = time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        last = time.monotonic()
        try:
            for chunk in self._body:
                self._patience.require_going_on()
                if time.monotonic() > self._until:
                    raise NetworkError("The Hub answers too slowly.", hint="Try again later.")
                yield chunk
                last = time.monotonic()
        except httpx2.TimeoutException:  # the library asks for the rest again, as often as it likes
            self._patience.budget.book(0, "The Hub stops in the middle of a file", already=time.monotonic() - last)
            raise

    def close(self) -> None:
        self._body.close()


def _worth_another_try(request: httpx2.Request, response: httpx2.Response) -> bool:
    """Whether the server was busy, and asking again cannot do a thing twice: a limit is checked before all else."""
    return response.status_code == 429 or (response.status_code in BUSY and _is_safe_to_repeat(request))


def _is_safe_to_repeat(request: httpx2.Request) -> bool:
    return request.method in ("GET", "HEAD") or bool(_ASKING.search(request.url.path))


def _is_no_answer(request: httpx2.Request, response: httpx2.Response, *, read: bool) -> bool:
    """Whether a success is none: JSON that is a page of HTML or half of itself, or facts about a file without any.

    A proxy or a page of sign-in in between answers so. Only what may be asked again is judged.
    """
    path = request.url.path
    if response.status_code != 200 or not _is_safe_to_repeat(request):
        return False
    if request.method == "HEAD":
        return "/resolve/" in path and "X-Repo-Commit" not in response.headers
    if not read or "/api/resolve-cache/" in path or not ("/api/" in path or path.endswith("/objects/batch")):
        return False
    try:
        json.loads(response.content)
    except ValueError:
        return True
    return False


def _believable(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
    """The answer; raises `NetworkError` where a store "accepts" a file by a page of HTML."""
    if request.method == "PUT" and response.headers.get("Content-Type", "").startswith("text/html"):
        raise NetworkError(f"{request.url.host} sends what is not an answer.", hint="Try again later.")
    return response


def _asked_wait(response: httpx2.Response) -> float | None:
    """The seconds that a busy server asks to wait, by its `RateLimit` header or `Retry-After`."""
    limit = library.parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = response.headers.get("Retry-After", "").strip()
    # A wait of nothing is none: asked again at once, without end, a busy server would only be busier.
    return float(asked[:9]) or None if asked.isascii() and asked.isdigit() else None


def _failing(error: Exception) -> str:
    if isinstance(error, _UNREACHED):
        return "cannot be reached"
    return "does not answer" if isinstance(error, httpx2.TimeoutException) else "breaks the connection"

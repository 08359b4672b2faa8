"""The routes of the Hub origin; the api_* files fill them. And a listing's pages."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import urlencode

from tests.hub.state import State
from tests.hub.wire import Refusal, Request, Routes

hub: Routes[State] = Routes()
Item = TypeVar("Item")


def page(state: State, request: Request, items: Sequence[Item], size: int) -> tuple[Sequence[Item], dict[str, str]]:
    """The part of a listing that a request asks for, and the Link header to the next part."""
    try:
        start = int(urlsafe_b64decode(request.first("cursor") or b"MA=="))
    except ValueError:
        raise Refusal(400, "Invalid cursor") from None
    stop = start + size
    if stop >= len(items):
        return items[start:stop], {}
    cursor = urlsafe_b64encode(str(stop).encode()).decode()
    query = urlencode({**request.query, "cursor": [cursor]}, doseq=True)
    return items[start:stop], {"Link": f'<{state.hub_url}{request.path}?{query}>; rel="next"'}

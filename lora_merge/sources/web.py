"""What web servers are read with: pages of links taken for no more than those, and none that is large, slow or endless.

fsspec lists a folder by whatever looks like an address in its page, read whole, by expressions that a page can stall.
"""

import re
from collections.abc import Iterator
from html import unescape
from typing import Any
from urllib.parse import unquote, urljoin

import aiohttp

from lora_merge.errors import NetworkError
from lora_merge.sources.deadline import STALLED, Deadline

MOST_BYTES = 1 << 25  # of what is read in one piece: a page, or a block of an archive; files come as streams
MOST_LINKS = 10_000
_LINK = re.compile(r"<a\s[^<>]*?href\s*=\s*[\"']?([^\"'<>\s]+)", re.IGNORECASE)  # no tag is searched twice


class Answer(aiohttp.ClientResponse):
    """An answer of bounded size that comes in time, whose text is the links to what lies in its folder."""

    async def read(self) -> bytes:
        if self._body is None:
            body, deadline = bytearray(), Deadline(str(self.url.host))
            async for chunk in self.content.iter_any():
                body += chunk
                deadline.require(len(body))
                if len(body) > MOST_BYTES:
                    raise NetworkError(f"{self.url.host} sends more than {MOST_BYTES} bytes at once.")
            self._body = bytes(body)
        return self._body

    async def text(self, *arguments: Any, **options: Any) -> str:
        page = (await self.read()).decode("utf-8", "replace")
        names = dict.fromkeys(_names_in(page, str(self.url.with_query(None).with_fragment(None))))
        if len(names) > MOST_LINKS:
            raise NetworkError(f"{self.url.host} lists more than {MOST_LINKS} names in a folder.")
        return "".join(f'<a href="{name}">' for name in names)


def options() -> dict[str, Any]:
    """What fsspec opens a web server with: however long a file takes, as long as something comes."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
    return {"client_kwargs": {"timeout": timeout, "response_class": Answer}}


def _names_in(page: str, url: str) -> Iterator[str]:
    """What the page of the folder at `url` links to directly in it: no way up, no way to sort it, no other host."""
    folder = url.rstrip("/") + "/"
    for link in _LINK.findall(page):
        whole = urljoin(folder, unescape(link))
        name = whole.removeprefix(folder)
        inner = unquote(name.removesuffix("/"))
        if name != whole and inner not in ("", ".", "..") and not re.search(r"[/\\?#\"<>]", inner):
            yield name

"""Parts of files on the Hub, read into memory: the cache is not touched."""

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import _headers, _http  # public functions, which mypy finds only where they are written

from lora_merge import __version__
from lora_merge.errors import NetworkError
from lora_merge.hub.client import BACKOFF
from lora_merge.hub.failures import asking
from lora_merge.hub.session import patience


def read_range(repo: str, name: str, commit: str, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of a file at a commit; fewer where the file ends before.

    Raises:
        NotFoundError: the file may not be read.
        NetworkError: the Hub cannot be reached, or breaks off again and again.
    """
    for pause in (*BACKOFF, None):
        try:
            with asking(repo):
                return _read(repo, name, commit, start, stop)
        except NetworkError as error:
            # The client itself tries again until there is an answer; only a body that breaks off comes here.
            if pause is None or not isinstance(error.__cause__, httpx2.TransportError):
                raise
            patience().wait(pause, f"{repo}: {error.__cause__}")
    raise AssertionError("unreachable")


def _read(repo: str, name: str, commit: str, start: int, stop: int) -> bytes:
    headers = _headers.build_hf_headers(library_name="lora-merge", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _http.get_session().stream("GET", hf_hub_url(repo, name, revision=commit), headers=headers) as response:
        _http.hf_raise_for_status(response)
        skip = start if response.status_code == 200 else 0  # a server may send the whole file instead
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + stop - start:
                break
        return bytes(data[skip : skip + stop - start])

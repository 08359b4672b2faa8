"""A session at the Hub: the library's calls, and Xet's, go by our own deadlines and waits while it is open."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import _http as library  # the present factory has no public name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from huggingface_hub.utils._xet import abort_xet_session

from lora_merge import __version__
from lora_merge.hub.client import LEAST_SECONDS, HubClient
from lora_merge.hub.waiting import MAX_WAIT, Patience, Tell, waiting_at_most

# Xet has a client of its own, which would wait five minutes for a byte, and hold 1.5 GB of them; whatever a server asks
# it to wait, it tries by its own times. It reads these from the environment when its first transfer begins; what the
# user has set there stays.
XET_READ = "HF_XET_CLIENT_READ_TIMEOUT"
XET_TRIES = "HF_XET_CLIENT_RETRY_MAX_DURATION"
XET_READS = 6  # so often it waits for an answer that does not come
XET_OVERRUNS = 3  # it looks at that time before its pauses, which grow, and not during them
XET_SETTINGS = {
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "10s",
    XET_READ: "30s",
    XET_TRIES: "60s",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "256mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "256mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "64mb",
}


@contextmanager
def hub_session(max_wait: float = MAX_WAIT, tell: Tell = lambda line: None) -> Iterator[HfApi]:
    """The Hub's API (at HF_ENDPOINT, with the user's token), whose every call has a deadline.

    Args:
        max_wait: the seconds that the session may wait for a busy Hub, the waits of all its calls together; within
            `waiting_at_most`, what is left of that.
        tell: called with a line when a wait begins.
    """
    with (
        waiting_at_most(max_wait) as budget,
        _waiting_with(Patience(budget, tell)),
        _xet_settings(budget.left),
        _bars_on_a_terminal_only(),
    ):
        yield HfApi(library_name="lora-merge", library_version=__version__)


@contextmanager
def _waiting_with(patience: Patience) -> Iterator[None]:
    """The library's calls go through clients with this patience; what it would warn of, they tell."""
    before = library._GLOBAL_CLIENT_FACTORY
    set_client_factory(lambda: HubClient(patience))
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR if level == logging.WARNING else level)
    try:
        yield
    finally:
        patience.end()
        set_client_factory(before)
        log.setLevel(level)


@contextmanager
def _xet_settings(seconds: float) -> Iterator[None]:
    """Xet's settings in the environment; its own tries are shorter where less time than they take may be waited."""
    tries = {XET_TRIES: f"{max(seconds / XET_OVERRUNS, 1):.0f}s"} if seconds < seconds_of_xet_tries() else {}
    if seconds < XET_READS * _seconds(XET_READ):
        tries[XET_READ] = f"{max(seconds / XET_READS, LEAST_SECONDS):.0f}s"
    added = {name: value for name, value in {**XET_SETTINGS, **tries}.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def seconds_of_xet_tries() -> float:
    """How long Xet tries by itself where a server is busy, which it does not tell; at most."""
    return XET_OVERRUNS * _seconds(XET_TRIES)


def _seconds(setting: str) -> float:
    return float(XET_SETTINGS[setting].removesuffix("s"))


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """The library's bars of uploads go to any stderr, a log file too, unless they are told not to."""
    chosen = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    unwanted = not (chosen or sys.stderr.isatty())
    if unwanted:
        disable_progress_bars()
    try:
        yield
    finally:
        if unwanted:
            enable_progress_bars()


def patience() -> Patience:
    """That of the open session."""
    client = library.get_session()
    assert isinstance(client, HubClient), "no hub_session is open"
    return client.patience


def interrupt() -> None:
    """End the open session's waits, and its downloads over Xet: for Ctrl-C, and where going on is useless."""
    client = library.get_session()
    if isinstance(client, HubClient):
        client.hang_up()
    abort_xet_session()  # type: ignore[no-untyped-call]


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or https://huggingface.co."""
    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the user has said, by HF_HUB_OFFLINE, that nothing is to be asked of the Hub."""
    return bool(constants.HF_HUB_OFFLINE)

"""The budget of waits: one for a whole command, spent once by those who wait together."""

import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest

from lora_merge.errors import NetworkError, UsageError
from lora_merge.hub import client
from lora_merge.hub.waiting import Budget, Patience, waiting_at_most


def test_a_block_within_another_has_what_that_one_has_left() -> None:
    with waiting_at_most(5) as command:
        command.book(2, "busy")
        with waiting_at_most(300) as session:
            assert session is command
            assert session.left == 3
    with waiting_at_most(300) as later:
        assert later.left == 300


def test_what_is_waited_at_one_time_counts_once() -> None:
    budget = Budget(10)
    assert budget.book(4, "busy") == 4
    assert budget.book(4, "busy") < 0.1
    assert budget.book(6, "busy") == pytest.approx(2, abs=0.1)
    assert budget.left == pytest.approx(4, abs=0.1)


def test_a_wait_that_is_too_long_is_refused_at_once_and_so_are_all_after_it() -> None:
    budget = Budget(10)
    for seconds in (11, 1):
        with pytest.raises(NetworkError, match=r"^busy; gave up after 0 s\."):
            budget.book(seconds, "busy")
    assert budget.left == 10


def test_time_that_was_waited_already_is_spent_and_counts_once_too() -> None:
    budget = Budget(10)
    assert budget.book(1, "busy", already=4) == pytest.approx(1, abs=0.1)
    assert budget.book(1, "busy", already=4) < 0.1
    assert budget.left == pytest.approx(5, abs=0.1)
    with pytest.raises(NetworkError, match=r"gave up after 8 s"):
        Budget(8.5).book(1, "busy", already=8)


def test_threads_that_wait_for_one_limit_say_it_once() -> None:
    said: list[str] = []
    patience = Patience(Budget(1), said.append)
    threads = [threading.Thread(target=patience.wait, args=(0.6, "busy")) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began > 0.5
    assert said == ["busy; trying again in 1 s."]


def test_no_budget_is_negative() -> None:
    with pytest.raises(UsageError, match="--max-wait must be a number of seconds from 0 up"), waiting_at_most(-1):
        pass


def test_a_try_that_may_wait_for_longer_than_what_is_left_is_not_begun() -> None:
    budget = Budget(10)
    assert budget.book(1, "busy", already=4, ahead=4) == pytest.approx(1, abs=0.1)
    with pytest.raises(NetworkError, match=r"^busy; gave up"):
        budget.book(1, "busy", ahead=5)


def test_a_server_that_was_reached_before_is_tried_for_longer_than_one_that_never_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one restarts; the other is mistyped, or nothing can be reached from here."""
    monkeypatch.setattr(client, "BACKOFF", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    url, budget = f"http://127.0.0.1:{server.server_port}/", Budget(60)
    threading.Thread(target=server.handle_request).start()
    assert client.HubClient(Patience(budget, print)).head(url).status_code == 200
    server.server_close()
    for reached, tries in ((budget, 5), (Budget(60), 3)):  # the budget is a command's, and a session is a part of it
        with pytest.raises(NetworkError, match=f"127.0.0.1 cannot be reached, {tries} times"):
            client.HubClient(Patience(reached, print)).head(url)

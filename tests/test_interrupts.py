"""Ctrl-C reaches the main thread whatever is being moved: no other thread may be handed it."""

import signal
import threading

from lora_merge.hub.client import hub_session
from lora_merge.hub.transfer import within
from lora_merge.interrupts import leave_to_main
from lora_merge.sources.parallel import for_each


def blocked() -> bool:
    """Whether the calling thread, or one that it starts, could not be handed a Ctrl-C."""
    seen: list[bool] = []

    def look() -> None:
        seen.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

    look()
    child = threading.Thread(target=look)
    child.start()
    child.join()
    assert len(set(seen)) == 1
    return seen[0]


def test_threads_that_move_files_and_those_that_they_start_are_not_handed_an_interrupt() -> None:
    with hub_session():
        assert within(5, blocked)
    assert for_each(lambda item: blocked(), [1, 2, 3], str, interrupt=lambda: None) == [True, True, True]
    assert not blocked()


def test_the_main_thread_takes_it() -> None:
    leave_to_main()
    assert not blocked()

"""The pool that works through modules."""

import threading
import time

import pytest

from lora_merge.aggregation.schedule import over, pool


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_when_it_raises_no_task_is_running(error: type[BaseException]) -> None:
    """A task that runs on would write into a file that is closed, or into another that has its descriptor now."""
    running, both = set(), threading.Barrier(2)

    def work(task: int) -> None:
        running.add(task)
        if task < 2:
            both.wait(10)
        if task == 0:
            running.discard(task)
            raise error
        time.sleep(0.2)
        running.discard(task)

    with pool(2) as threads:
        with pytest.raises(error):
            over(threads, work, range(10))
        assert not running


def test_results_come_in_the_order_of_the_tasks() -> None:
    advanced: list[int] = []

    def work(task: int) -> int:
        time.sleep(0.001 * (10 - task))
        return task

    with pool(4) as threads:
        assert over(threads, work, range(10), advanced.append) == list(range(10))
    assert advanced == [1] * 10

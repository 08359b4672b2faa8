"""Ctrl-C is the main thread's: Python acts on it there, and nowhere else."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def leave_to_main() -> None:
    """Block SIGINT in the calling thread, and so in those that it starts (Xet's too), unless it is the main one.

    The system hands a process's signal to any thread that has not blocked it. Where that is not the main one, which
    sleeps until its transfers are done, it stays asleep: now and then a Ctrl-C during a stalled download was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """KeyboardInterrupt for whatever an interrupt ends in: inside a lock's wait Python makes a RuntimeError of it.

    Inside an import it may be lost, since numpy and torch drop what is raised in the middle of theirs: so it waits for
    the end of that.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if _is_importing(frame):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
        else:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    alarm = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, before)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

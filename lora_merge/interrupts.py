"""Ctrl-C is the main thread's: Python acts on it there, and only where that breaks nothing."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TypeVar

SECONDS_BETWEEN_LOOKS = 0.02
PRESSES, SECONDS_TO_END = 3, 1.0  # that many end the process whatever it is in; but a key held down is not many
# What is left to end, however deep inside it the main thread stands: broken there, a pool would keep the lock that its
# threads wait for, an import of numpy or torch would drop the interrupt, and whoever calls a finalizer does.
WHOLE = {"importlib._bootstrap", "_frozen_importlib", "weakref", "_weakrefset", "logging", "concurrent.futures.thread"}
WHOLE_FUNCTIONS = {("threading", "start"), ("shutil", "rmtree")}
F = TypeVar("F", bound=Callable[..., object])


def in_one_piece(function: F) -> F:
    """A function whose end Ctrl-C waits for: what it makes or takes has no owner before it returns."""
    WHOLE_FUNCTIONS.add((function.__module__, function.__name__))
    return function


def leave_to_main() -> None:
    """Block Ctrl-C in the calling thread, and so in those that it starts (Xet's too), unless it is the main one.

    The system hands a process's signal to any thread that has not blocked it. Where that is not the main one, which
    sleeps until its transfers are done, it stays asleep: now and then a Ctrl-C during a stalled download was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """KeyboardInterrupt for whatever an interrupt ends in, once it can be raised; it is not lost.

    Where it cannot be raised, a timer looks again until it can; and where whoever it was raised in has dropped it, as
    bare excepts and finalizers do, it is raised again. From the third on, a Ctrl-C ends the process.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    over = False
    presses: list[float] = []

    def look(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            presses.append(time.monotonic())
            if len(presses) >= PRESSES and presses[-1] - presses[0] > SECONDS_TO_END:
                _end_at_once()
            if not over:
                signal.setitimer(signal.ITIMER_REAL, SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS)
        elif _is_on_its_way():
            return  # a clean-up is broken by another Ctrl-C only
        if not over and _may_break(frame):
            raise KeyboardInterrupt

    def dropped(failure: "sys.UnraisableHookArgs") -> None:
        if not isinstance(failure.exc_value, KeyboardInterrupt):
            hook(failure)

    before, alarm, hook = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook
    try:
        sys.unraisablehook = dropped
        signal.signal(signal.SIGALRM, look)
        signal.signal(signal.SIGINT, look)
        yield
    except Exception as error:  # a lock's wait may make a RuntimeError of it
        if presses:
            raise KeyboardInterrupt from error
        raise
    finally:
        over = True  # first: nothing is raised any more while all is put back
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
    if presses:
        raise KeyboardInterrupt


def _may_break(frame: FrameType | None) -> bool:
    """Whether KeyboardInterrupt may be raised in `frame`: no lock is kept by that, and nobody will drop it."""
    innermost = frame
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module in WHOLE or (module, name) in WHOLE_FUNCTIONS or name == "__del__":
            return False
        if frame is innermost and (module == "contextlib" or name in ("__enter__", "__exit__")):
            return False  # a lock is taken, and no with has noted yet that it must be given back
        frame = frame.f_back
    return True


def _is_on_its_way() -> bool:
    """Whether a KeyboardInterrupt is being handled: what it was raised in has not dropped it."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _end_at_once() -> NoReturn:
    """End where two interrupts did not help: a thread hangs, or takes long to end."""
    with suppress(OSError):
        show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which a progress bar has hidden
        os.write(2, show_cursor + b"error: Ended at once; what is half-written is removed by the next run.\n")
    os._exit(130)

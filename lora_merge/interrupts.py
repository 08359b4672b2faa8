"""Ctrl-C is the main thread's: Python acts on it there, and nowhere else."""

import signal
import threading


def leave_to_main() -> None:
    """Block SIGINT in the calling thread, and so in those that it starts (Xet's too), unless it is the main one.

    The system hands a process's signal to any thread that has not blocked it. Where that is not the main one, which
    sleeps until its transfers are done, it stays asleep: now and then a Ctrl-C during a stalled download was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

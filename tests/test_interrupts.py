"""Ctrl-C reaches the main thread whatever is being moved; there it is never lost, and breaks no lock or clean-up."""

import functools
import logging
import operator
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from lora_merge.hub.session import hub_session
from lora_merge.hub.transfer import within
from lora_merge.interrupts import in_one_piece, keyboard_interrupts, leave_to_main
from lora_merge.sources.parallel import for_each

ROOT = Path(lora_merge.__file__).parents[1]


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


def press(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def press_soon() -> None:
    """From another thread, by when the caller stands still."""
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()


@contextmanager
def ends_soon() -> Iterator[None]:
    """What is inside ends in KeyboardInterrupt at once, and all that was set for it is as before."""
    before, began = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)), time.monotonic()
    with pytest.raises(KeyboardInterrupt), keyboard_interrupts():
        yield
    assert time.monotonic() - began < 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


class Finalized:
    def __del__(self) -> None:
        press()


def in_a_finalizer() -> None:
    Finalized()


def in_a_finalizer_of_another_name() -> None:
    weakref.finalize(type("Followed", (), {})(), press)


def in_a_callback_that_looks_like_any_function() -> None:
    held = [type("Followed", (), {})()]
    watched = weakref.ref(held[0], press)
    held.clear()
    assert watched() is None


def in_a_bare_except() -> None:
    try:
        press()
        time.sleep(0.2)
    except BaseException:
        pass


def in_the_beginning_of_a_with() -> None:
    with type("Entered", (), {"__enter__": press, "__exit__": lambda *_: None})():
        pass


def in_a_line_of_the_log() -> None:
    log = logging.Logger("one of its own")
    handler = logging.Handler()
    handler.emit = press  # type: ignore[method-assign]
    log.addHandler(handler)
    log.error("a line")


DROPPING = [
    *(in_a_finalizer, in_a_finalizer_of_another_name, in_a_callback_that_looks_like_any_function),
    *(in_a_bare_except, in_the_beginning_of_a_with, in_a_line_of_the_log),
]


@pytest.mark.parametrize("pressed", DROPPING)
def test_a_ctrl_c_is_not_lost_where_it_would_be_dropped(
    pressed: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with ends_soon():
        pressed()
        time.sleep(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("pressed", DROPPING)
def test_nor_where_nothing_comes_after_it(pressed: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    with ends_soon():
        pressed()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "stand",
    [
        lambda: time.sleep(5),
        lambda: threading.Event().wait(5),
        lambda: Future().result(5),
        lambda: wait([Future()], 5),
        lambda: queue.Queue().get(timeout=5),
        lambda: queue.SimpleQueue().get(timeout=5),
        lambda: for_each(lambda seconds: time.sleep(seconds), [0.5], str, interrupt=lambda: None),
    ],
)
def test_a_ctrl_c_ends_a_wait_at_once(stand: Callable[[], Any]) -> None:
    with ends_soon():
        press_soon()
        stand()


def test_a_ctrl_c_ends_the_wait_for_a_thread_at_once() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(5,))
    thread.start()
    with ends_soon():
        press_soon()
        thread.join()
    end.set()


class JustTaken:
    """A lock; Ctrl-C comes when it is taken, before whoever took it has noted that it must be given back."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        pressed = functools.partial(signal.raise_signal, signal.SIGINT)  # not of Python: the lock's frame is innermost
        self.__enter__ = functools.partial(all, map(operator.call, [self.lock.acquire, pressed]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)


def test_a_lock_that_was_just_taken_is_given_back() -> None:
    condition, free = threading.Condition(JustTaken()), []  # type: ignore[arg-type]
    with ends_soon(), condition:
        time.sleep(5)
    thread = threading.Thread(target=lambda: free.append(condition.acquire(timeout=1)))
    thread.start()
    thread.join()
    assert free == [True]


def test_who_starts_a_thread_knows_that_it_runs() -> None:
    thread, known = threading.Thread(target=lambda: None), []
    thread._started.wait = functools.partial(signal.raise_signal, signal.SIGINT)  # type: ignore[attr-defined]
    with ends_soon():
        thread.start()
        known.append(thread)
        time.sleep(5)
    assert known == [thread]
    thread.join()


def test_what_a_stack_was_just_given_is_left_too() -> None:
    left = []

    class Entered:
        __enter__ = operator.methodcaller("pressed")  # not of Python: the stack's frame is innermost
        pressed = staticmethod(functools.partial(signal.raise_signal, signal.SIGINT))

        def __exit__(self, *_: object) -> None:
            left.append(self)

    with ends_soon(), ExitStack() as stack:
        stack.enter_context(Entered())
        time.sleep(5)
    assert len(left) == 1


@pytest.mark.parametrize("pressed", [in_a_finalizer, in_a_finalizer_of_another_name, in_a_line_of_the_log])
def test_what_nobody_does_again_is_done_to_its_end(
    pressed: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = press, []

    def press_and_work(*_: object) -> None:
        real()
        time.sleep(0.1)
        done.append(True)

    monkeypatch.setitem(globals(), "press", press_and_work)
    with ends_soon():
        pressed()
    assert done == [True]


def test_a_clean_up_is_not_broken_by_looking_again() -> None:
    cleaned = []
    with ends_soon():
        try:
            press()
        finally:
            try:
                raise OSError
            except OSError:
                time.sleep(0.2)
                cleaned.append("inside another error's")
            time.sleep(0.2)
            cleaned.append("all")
    assert cleaned == ["inside another error's", "all"]


def test_another_ctrl_c_breaks_a_clean_up_that_takes_long() -> None:
    with ends_soon():
        try:
            press()
        finally:
            press_soon()
            time.sleep(5)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_being_removed_is_removed(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda *args, **more: press() or remove(*args, **more))
    with ends_soon():
        try:
            if again:
                press()
        finally:
            shutil.rmtree(tmp_path / "folder", ignore_errors=True)
            time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_in_one_piece_is_known_to_whoever_removes_it(tmp_path: Path) -> None:
    @in_one_piece
    def made() -> Path:
        (tmp_path / "work").mkdir()
        press()
        time.sleep(0.1)
        return tmp_path / "work"

    with ends_soon():
        work = made()
        try:
            time.sleep(5)
        finally:
            work.rmdir()
    assert list(tmp_path.iterdir()) == []


BEGUN = """
import os, signal, sys, threading, time, typer
from concurrent.futures import ThreadPoolExecutor
from lora_merge.cli.output import Output
from lora_merge.sources.parallel import for_each
try:
    with Output().reporting():
        {}
except typer.Exit as end:
    print("ended")
    raise SystemExit(end.exit_code)
"""


def ran(*lines: str) -> "subprocess.CompletedProcess[str]":
    """A command that does these lines, where it might hang."""
    command = [sys.executable, "-c", BEGUN.format("\n        ".join(lines))]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("inside", ["__enter__", "__exit__"])
def test_a_pool_that_is_given_work_is_not_left_with_its_lock_taken(inside: str, nth: int) -> None:
    """Its threads would wait for that for ever, and we for them."""
    end = ran(
        f"real, left, here = threading.Condition.{inside}, [{nth}], threading.main_thread()",
        "def pressed(self, *error):",
        "    done = real(self, *error)",
        "    if sys._getframe(2).f_code.co_name == '_adjust_thread_count' and threading.current_thread() is here:",
        "        left[0] -= 1",
        "        left[0] or os.kill(os.getpid(), signal.SIGINT)",
        "    return done",
        f"threading.Condition.{inside} = pressed",
        "for_each(time.sleep, [0.05] * 20, str, interrupt=lambda: None)",
    )
    assert (end.returncode, end.stdout) == (130, "ended\n"), end.stderr
    assert end.stderr == "error: Interrupted; nothing half-written was left.\n"


def test_a_key_that_is_held_down_leaves_time_for_the_clean_up() -> None:
    cleaned = []
    with ends_soon():
        try:
            press()
        finally:
            for _ in range(20):
                with suppress(KeyboardInterrupt):
                    press()
            cleaned.append(True)
    assert cleaned == [True]


def test_the_third_ctrl_c_ends_what_hangs() -> None:
    end = ran(
        "def pressing():",
        "    for _ in range(3): time.sleep(0.6); os.kill(os.getpid(), signal.SIGINT)",
        "threading.Thread(target=pressing).start()",
        "for_each(time.sleep, [25], str, interrupt=lambda: None)",
    )
    assert (end.returncode, end.stdout) == (130, "")
    assert end.stderr == "error: Ended at once; what is half-written is removed by the next run.\n"


def test_a_ctrl_c_that_an_import_swallows_is_not_lost(tmp_path: Path) -> None:
    """As numpy and torch do: their C code drops what is raised in the middle of their imports."""
    (tmp_path / "swallowing.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.3)\nexcept BaseException:\n    pass\n"
    )
    code = (
        "import time\nfrom lora_merge.cli.output import Output\n"
        "with Output().reporting():\n    import swallowing\n    time.sleep(20)\nprint('went on')"
    )
    run = "import typer\ntry:\n    exec(CODE)\nexcept typer.Exit as end:\n    raise SystemExit(end.exit_code)"
    ran = subprocess.run(
        [sys.executable, "-c", run.replace("CODE", repr(code))], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr.startswith("error: Interrupted")


PRESSED = """
import atexit, os, signal, sys
def press(name, *_):
    if name == {moment!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, type("Finder", (), dict(find_spec=staticmethod(press))))
atexit.register(press, "the end")
from lora_merge.__main__ import main
main()
"""


def test_little_is_imported_before_ctrl_c_is_seen_to() -> None:
    """Until then Python prints a traceback."""
    code = (
        "import sys, lora_merge.__main__; print(*{'re', 'typing', 'contextlib', 'importlib.util'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("\n", "")


@pytest.mark.parametrize("moment", ["lora_merge.cli.main", "typer", "lora_merge.cli.settings_file", "the end"])
def test_a_ctrl_c_before_a_command_begins_or_after_it_has_ended_is_quiet(moment: str) -> None:
    command = [sys.executable, "-c", PRESSED.format(moment=moment), "--version"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (130, "")


def test_a_second_ctrl_c_after_the_first_was_told_is_quiet(tmp_path: Path) -> None:
    """As it ends, an interpreter waits for its threads."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, threading, time\n"
        "def again():\n    time.sleep(1)\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(20)\n"
        "threading.Thread(target=again).start()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-m", "lora_merge", "aggregate", "a", "--output", "b"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=15)
    assert ran.returncode == 130
    assert ran.stderr.startswith("error: Interrupted")
    assert "Traceback" not in ran.stderr

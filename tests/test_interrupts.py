"""Ctrl-C reaches the main thread whatever is being moved: no other thread may be handed it."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_merge.hub.session import hub_session
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

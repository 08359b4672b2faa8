"""Steps run a few at a time; their lines are passed on and kept; and none is left behind, however it ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_merge.demo import crew as crew_module
from lora_merge.demo.crew import Crew, StepFailedError
from lora_merge.demo.steps import Step

WAIT = "import time; print('began', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {WAIT}"


@dataclass(frozen=True)
class Program(Step):
    """A step that runs a piece of Python instead of lora-merge."""

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-c", *self.arguments]


def program(name: str, text: str, **more: bool) -> Step:
    return Program(name, (text,), Path(name), **more)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def crew(tmp_path: Path, lines: list[str]) -> Crew:
    return Crew(tmp_path, lines.append)


def interrupt_when(condition: Callable[[], bool]) -> None:
    """Ctrl-C at this process as soon as `condition` holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def children(crew: Crew) -> list[int | None]:
    """The exit codes; None is one that is still alive."""
    return [child.poll() for child in crew._children]


def test_what_a_step_prints_is_told_under_its_name_and_kept(crew: Crew, lines: list[str], tmp_path: Path) -> None:
    seconds = crew.run([program("greet", "import sys; print('hello'); print('you', file=sys.stderr)")], 1)
    assert sorted(lines) == ["  greet: hello", "  greet: you"]
    assert sorted((tmp_path / "greet.log").read_text().split()) == ["hello", "you"]
    assert 0 < seconds["greet"] < 30


def test_a_result_that_is_not_to_be_shown_goes_to_the_log_alone(crew: Crew, lines: list[str], tmp_path: Path) -> None:
    text = "import sys; print('table', flush=True); print('talk', file=sys.stderr)"
    crew.run([program("judge", text, result_is_shown=False)], 1)
    assert lines == ["  judge: talk"]
    assert sorted((tmp_path / "judge.log").read_text().split()) == ["table", "talk"]


def test_no_more_run_at_once_than_allowed(crew: Crew, lines: list[str]) -> None:
    text = "import time; print('in', flush=True); time.sleep(0.3); print('out', flush=True)"
    crew.run([program(name, text) for name in "abcd"], 2)
    inside = [1 if line.endswith("in") else -1 for line in lines]
    assert max(sum(inside[: index + 1]) for index in range(len(inside))) == 2
    assert sum(inside) == 0


def test_a_failure_has_the_exit_code_of_the_step_and_ends_the_others(crew: Crew, lines: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(StepFailedError, match=r"^broken: it ended with 3") as caught:
        crew.run([program("slow", WAIT), program("broken", "import time; time.sleep(0.5); raise SystemExit(3)")], 2)
    assert caught.value.exit_code == 3
    assert "broken.log" in caught.value.hint
    assert sorted(code or 0 for code in children(crew)) == [-signal.SIGINT, 3]
    assert time.monotonic() - start < 30


def test_a_failure_says_what_the_step_said(crew: Crew) -> None:
    text = "import sys; print('error: no model', file=sys.stderr); print('hint: get one', file=sys.stderr); sys.exit(4)"
    with pytest.raises(StepFailedError) as caught:
        crew.run([program("model", text)], 1)
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("model: no model", "get one", 4)


def test_ctrl_c_ends_every_step_and_starts_no_more(crew: Crew, lines: list[str]) -> None:
    interrupt_when(lambda: len(lines) == 2)
    with pytest.raises(KeyboardInterrupt):
        crew.run([program(name, WAIT) for name in "abc"], 2)
    assert children(crew) == [-signal.SIGINT, -signal.SIGINT]


def test_a_step_that_does_not_listen_is_killed(crew: Crew, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "SECONDS_TO_FINISH", 0.2)
    interrupt_when(lambda: len(lines) == 1)
    with pytest.raises(KeyboardInterrupt):
        crew.run([program("deaf", STUBBORN)], 1)
    assert children(crew) == [-signal.SIGKILL]


def test_a_step_that_is_killed_from_outside_says_so(crew: Crew) -> None:
    with pytest.raises(StepFailedError, match="signal 9") as caught:
        crew.run([program("victim", "import os; os.kill(os.getpid(), 9)")], 1)
    assert caught.value.exit_code == 1

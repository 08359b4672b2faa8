"""Runs steps as child processes, a few at a time: their lines are passed on, and none outlives us."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import IO

from lora_merge.demo.steps import Step
from lora_merge.errors import LoraMergeError

SECONDS_TO_FINISH = 30.0  # after Ctrl-C a training run ends the step that it is in, and saves it
_QUIET = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}


class StepFailedError(LoraMergeError):
    """A command of the demo failed; it has that command's exit code, error and hint."""

    def __init__(self, step: Step, code: int, log: Path) -> None:
        said = log.read_text(encoding="utf-8").splitlines()
        error = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), "")
        hint = next((line.removeprefix("hint: ") for line in said if line.startswith("hint: ")), "")
        if code < 0:
            error = f"it was killed by signal {-code} (9 is often a lack of memory)"
        reason = error or f"it ended with {code}"
        super().__init__(f"{step.name}: {reason}", hint=hint or f"All that it said is in {log}.")
        self.exit_code = code if code > 0 else 1


@dataclass
class Crew:
    """Child processes and their logs.

    Attributes:
        logs: the folder of the log files, one a step.
        tell: takes each line of each child.
    """

    logs: Path
    tell: Callable[[str], None]
    _children: "list[subprocess.Popen[str]]" = field(default_factory=list)
    _stopped: Event = field(default_factory=Event)
    _lock: Lock = field(default_factory=Lock)

    def run(self, steps: Sequence[Step], at_once: int) -> Mapping[str, float]:
        """Run `steps`, at most `at_once` at a time; returns the seconds that each took, by name.

        Raises:
            StepFailedError: one failed; the others were ended.
            KeyboardInterrupt: all were ended.
        """
        with ThreadPoolExecutor(at_once) as pool:
            try:
                futures = {pool.submit(self._run_one, step): step for step in steps}
                return {futures[future].name: future.result() for future in as_completed(futures)}
            except BaseException:
                self._stop()
                raise

    def _run_one(self, step: Step) -> float:
        start = time.monotonic()
        log = self.logs / f"{step.name}.log"
        with log.open("w", encoding="utf-8") as record:
            with self._lock:
                if self._stopped.is_set():
                    return 0.0
                child = _start(step, record)
                self._children.append(child)
            with child:
                for line in child.stderr or child.stdout or ():
                    print(line, end="", file=record, flush=True)
                    self.tell(f"  {step.name}: {line.rstrip()}")
        code = child.returncode
        if code and not self._stopped.is_set():
            raise StepFailedError(step, code, log)
        return time.monotonic() - start

    def _stop(self) -> None:
        """End every child: ask as Ctrl-C does, wait, then insist. A second Ctrl-C insists at once."""
        with self._lock:
            self._stopped.set()
        alive = [child for child in self._children if child.poll() is None]
        for child in alive:
            child.send_signal(signal.SIGINT)
        try:
            deadline = time.monotonic() + SECONDS_TO_FINISH
            for child in alive:
                child.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for child in alive:
                child.kill()


def _start(step: Step, log: IO[str]) -> "subprocess.Popen[str]":
    """Start a step in a session of its own, so that a terminal's Ctrl-C reaches it through us alone, and once."""
    return subprocess.Popen(
        step.argv,
        env={**os.environ, **_QUIET, **step.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if step.result_is_shown else log,
        stderr=subprocess.STDOUT if step.result_is_shown else subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )

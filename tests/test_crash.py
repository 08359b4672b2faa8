"""kill -9 at every stage, and Ctrl-C: the output is whole or absent, and the next run clears what was left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import digests
from tests.large import write_clients


class Merger:
    """A process that merges in children which may be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_clients(root / "in")
        command = [sys.executable, "-m", "tests.large", str(root / "in")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def run(self, output: Path, method: str = "exact", **death: float) -> int:
        """Merge; 0, an error's 1, or minus the signal that ended it."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"output": str(output), "method": method, **death}), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merger]:
    merger = Merger(tmp_path_factory.mktemp("crash"))
    yield merger
    merger.close()


@pytest.fixture(scope="module")
def whole(merger: Merger) -> dict[str, dict[str, str]]:
    """What an undisturbed run writes, by method."""
    results = {}
    for method in ("exact", "svd"):
        assert merger.run(merger.root / "whole" / method / "global", method) == 0
        results[method] = digests(merger.root / "whole" / method / "global")
    return results


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def absent_or(wanted: dict[str, str], output: Path) -> bool:
    """Whether `output` is whole; where it is not, it must be absent."""
    if output.exists():
        assert digests(output) == wanted
        return True
    return False


def run_again(merger: Merger, output: Path, method: str, wanted: dict[str, str]) -> None:
    """After a kill, the next run gives the same bytes and leaves nothing else beside them."""
    if not absent_or(wanted, output):
        assert merger.run(output, method) == 0
        assert digests(output) == wanted
        assert [path.name for path in output.parent.iterdir()] == ["global"]


def test_a_kill_at_any_file_it_touches_leaves_all_or_nothing(
    merger: Merger, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    killed, at = 0, 1
    while True:
        output = merger.root / "stages" / str(at) / "global"
        status = merger.run(output, die_at=at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        run_again(merger, output, "exact", whole["exact"])
        at += 1 + at // 12  # every stage of the beginning, and then more thinly
    assert killed > 10


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_kill_at_any_moment_leaves_all_or_nothing(
    method: str, merger: Merger, whole: dict[str, dict[str, str]]
) -> None:
    output = merger.root / f"timed-{method}" / "global"
    began = time.monotonic()
    assert merger.run(output, method) == 0
    span = time.monotonic() - began
    moments = random.Random(11)
    statuses = []
    for i in range(10):
        output = merger.root / f"timed-{method}" / str(i) / "global"
        statuses.append(merger.run(output, method, after=moments.uniform(0, span)))
        run_again(merger, output, method, whole[method])
    assert statuses.count(-signal.SIGKILL) >= 4


def test_ctrl_c_exits_with_130_and_leaves_nothing(merger: Merger, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lora-merge")), "aggregate", str(merger.root / "in" / "client-*")]
    output = tmp_path / "out" / "global"
    process = subprocess.Popen(
        [*command, "--output", str(output), "--method", "svd", "--rank", "16"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while process.poll() is None and not (output.parent.exists() and any(output.parent.iterdir())):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    assert list(output.parent.iterdir()) == []
    assert "Traceback" not in talk

"""kill -9 at every stage, and Ctrl-C: the output is whole or absent, and the next run clears what was left."""

import json
import os
import random
import shutil
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

    def __init__(self, root: Path, **size: int) -> None:
        self.root = root
        write_clients(root / "in", **size)
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

    def whole(self, method: str = "exact") -> dict[str, str]:
        """What an undisturbed run writes."""
        output = self.root / "whole" / method / "global"
        assert output.exists() or self.run(output, method) == 0
        return digests(output)


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merger]:
    """Of adapters that take a while."""
    merger = Merger(tmp_path_factory.mktemp("crash"))
    yield merger
    merger.close()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merger]:
    """Of small adapters, to be killed at many stages."""
    merger = Merger(tmp_path_factory.mktemp("quick"), modules=2, width=64)
    yield merger
    merger.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merger]:
    """Of modules wide enough that four clients are still a stack."""
    merger = Merger(tmp_path_factory.mktemp("wide"), modules=2, width=96)
    yield merger
    merger.close()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_again(merger: Merger, output: Path, method: str) -> None:
    """After a kill the output is whole or absent; the next run gives the same bytes and leaves nothing beside them."""
    if not output.exists():
        assert merger.run(output, method) == 0
        assert [path.name for path in output.parent.iterdir()] == ["global"]
    assert digests(output) == merger.whole(method)


def later(at: int) -> int:
    """The next moment to die at: thinly while it reads its inputs, at every file that it writes, flushes or renames."""
    return at + (3 if at < 24 else 1)


def test_a_kill_at_any_file_it_touches_leaves_all_or_nothing(quick: Merger) -> None:
    killed, at = 0, 1
    while (status := quick.run(output := quick.root / "stages" / str(at) / "global", die_at=at)) != 0:
        assert status == -signal.SIGKILL
        run_again(quick, output, "exact")
        killed, at = killed + 1, later(at)
    assert killed > 10


def test_a_kill_while_an_old_result_is_replaced_leaves_the_old_or_the_new_one(quick: Merger) -> None:
    old, new = quick.whole("svd"), quick.whole("exact")
    output = quick.root / "replaced" / "global"
    killed, at = 0, 1
    while True:
        shutil.rmtree(output.parent, ignore_errors=True)
        shutil.copytree(quick.root / "whole" / "svd" / "global", output)
        if quick.run(output, die_at=at, force=True) == 0:
            break
        assert digests(output) in (old, new)
        assert quick.run(output, force=True) == 0
        assert digests(output) == new
        assert [path.name for path in output.parent.iterdir()] == ["global"]
        killed, at = killed + 1, later(at)
    assert killed > 10


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_kill_while_a_client_is_folded_in_leaves_the_old_or_the_new_global(method: str, wide: Merger) -> None:
    old, new, output = (wide.root / f"fold-{method}" / name / "global" for name in ("old", "new", "killed"))
    assert wide.run(old, method, fold=3) == 0
    shutil.copytree(old, new)
    assert wide.run(new, method, fold=4) == 0
    assert digests(old) != digests(new)
    killed, at = 0, 1
    while True:
        shutil.rmtree(output.parent, ignore_errors=True)
        shutil.copytree(old, output)
        if wide.run(output, method, fold=4, die_at=at) == 0:
            break
        assert digests(output) in (digests(old), digests(new))
        assert wide.run(output, method, fold=4) == 0
        assert digests(output) == digests(new)
        assert [path.name for path in output.parent.iterdir()] == ["global"]
        killed, at = killed + 1, later(at)
    assert killed > 10


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_kill_at_any_moment_leaves_all_or_nothing(method: str, merger: Merger) -> None:
    moments = random.Random(11)
    span = min(seconds(merger, merger.root / f"timed-{method}" / f"alone-{i}" / "global", method) for i in range(3))
    statuses = []
    for i in range(10):
        output = merger.root / f"timed-{method}" / str(i) / "global"
        statuses.append(merger.run(output, method, after=moments.uniform(0, span)))
        run_again(merger, output, method)
    assert statuses.count(-signal.SIGKILL) >= 3


def seconds(merger: Merger, output: Path, method: str) -> float:
    """How long an undisturbed run takes."""
    began = time.monotonic()
    assert merger.run(output, method) == 0
    return time.monotonic() - began


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
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in talk

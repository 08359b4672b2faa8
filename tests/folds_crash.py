"""kill -9 around every call of a fold that writes, makes durable or names: the old global adapter or the new is there.

The same command again ends in the bytes of an undisturbed run and leaves nothing: by blocks, by a mean,
replacement, withdrawal, all files again, first merge; and onto a repository also before and after each request.
All of it: `python -m tests.folds_crash`, which prints its counts. Needs strace, but for the requests.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

from tests.conftest import digests
from tests.folds import write_client
from tests.hub.client import Client
from tests.hub.kills import CALLS, KILL, can_trace
from tests.hub.server import LocalHub
from tests.publish.crash import MOMENTS, NthFault

FOLD = """
import os, torch, huggingface_hub.utils
import lora_merge.folding.onto, lora_merge.publish.push, lora_merge.publish.onto, lora_merge.sources.hub
from lora_merge.errors import LoraMergeError, NotFoundError
from lora_merge.folding.onto import fold
huggingface_hub.utils.disable_progress_bars()

def act():
    torch.set_num_threads(1)
    os.environ.update(variables)
    os.chdir(folder)
    try:
        fold([os.path.abspath(each) for each in sources], onto, withdraw=withdraw, workers=1, max_wait=20, **options)
    except NotFoundError as error:
        os._exit(4 if withdraw and " is not in " in error.message else 1)
    os._exit(0)
"""

# The whole process ends where any of its threads comes to its n-th call, or where the main thread does.
THREADS = {"of any thread": KILL, "of the main thread": KILL.replace('"-f", ', "")}

# Without strace: `result` is how the process ended, which `pids` names.
RUN = """
import pathlib
pid = os.fork()
if pid == 0:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        act()
    finally:
        os._exit(1)
pathlib.Path(pids).write_text(str(pid))
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@dataclass(frozen=True)
class Case:
    """A fold: what is in before it, in which commands; what arrives and who leaves."""

    name: str
    before: Sequence[Sequence[str]]
    arrives: Sequence[str] = ()
    leaves: Sequence[str] = ()
    method: str = "exact"


CASES = (
    Case("the first merge", (), ("now/a", "now/b")),
    Case("by blocks", (("now/a", "now/b"),), ("now/c",)),
    Case("by a mean", (("now/a",), ("now/b",)), ("now/c",), method="svd"),
    Case("a replacement", (("now/a", "former/b", "now/c"),), ("now/b",)),
    Case("a withdrawal", (("now/a", "now/b", "now/c"),), leaves=("org/b",)),
    Case("out of a mean, by all files", (("now/a", "now/b", "now/c"),), ("now/a", "now/c"), ("org/b",), "svd"),
)


@dataclass(frozen=True)
class Bench:
    """A process that forks folds, and the folder of their clients."""

    client: Client
    root: Path

    @property
    def scratch(self) -> Path:
        return self.root / "temporary"

    def given(self, case: Case, onto: str, step: Sequence[str], leaves: Sequence[str], token: str) -> dict[str, Any]:
        variables = {"TMPDIR": str(self.scratch), "HF_TOKEN": token} if token else {"TMPDIR": str(self.scratch)}
        options = {"method": "svd", "rank": 2} if case.method == "svd" else {}
        return {
            "folder": str(self.root),
            "sources": step,
            "onto": onto,
            "withdraw": leaves,
            "options": options,
            "variables": variables,
        }

    def fold(self, case: Case, onto: str, step: Sequence[str], leaves: Sequence[str] = (), token: str = "") -> int:
        """How an undisturbed fold ends."""
        given = self.given(case, onto, step, leaves, token)
        return int(self.client.run(FOLD + RUN, **given, pids=str(self.root / "pid")))

    def killed(self, case: Case, onto: str, calls: str, at: int, kill: str, token: str = "") -> bool:
        """Fold, killed at the `at`-th of some system calls; False where there are fewer."""
        given = self.given(case, onto, case.arrives, case.leaves, token)
        code = self.client.run(FOLD + kill, **given, calls=CALLS[calls], at=at, log=os.devnull)
        assert code in (0, -signal.SIGKILL), f"{case.name}: exit {code}"
        return bool(code)

    def again(self, case: Case, onto: str, done: bool, token: str = "") -> None:
        """The same command once more: there is nothing to do, or it is done; who has left is not there to leave."""
        code = self.fold(case, onto, case.arrives, case.leaves, token)
        assert code == (4 if done and case.leaves else 0), f"{case.name}: then exit {code}"
        assert list(self.scratch.iterdir()) == [], f"{case.name}: left {list(self.scratch.iterdir())}"


@contextmanager
def bench(environment: dict[str, str]) -> Iterator[Bench]:
    """A bench of its own."""
    with tempfile.TemporaryDirectory() as name, Client(environment | {"OMP_NUM_THREADS": "1"}) as client:
        root = Path(name)
        for at, (when, who) in enumerate(product(("now", "former"), "abc")):
            write_client(root / when / who, at, 24, 2)
        (root / "temporary").mkdir()
        yield Bench(client, root)


def folder_before(made: Bench, case: Case) -> tuple[dict[str, str], dict[str, str]]:
    """Make the global adapter that a case begins with, at `before`; its files and those of an undisturbed end."""
    shutil.rmtree(made.root / "whole", ignore_errors=True)
    shutil.rmtree(made.root / "before", ignore_errors=True)
    whole = made.root / "whole" / "global"
    (made.root / "before").mkdir()
    whole.parent.mkdir()
    for step in case.before:
        assert made.fold(case, "./whole/global", step) == 0
    if case.before:
        shutil.copytree(whole, made.root / "before" / "global")
    old = digests(whole) if case.before else {}
    assert made.fold(case, "./whole/global", case.arrives, case.leaves) == 0
    return old, digests(whole)


def folder_kills(made: Bench, case: Case) -> Iterator[str]:
    """Kill a fold onto a folder at every call; a line for each kill."""
    old, new = folder_before(made, case)
    assert old != new
    onto = made.root / "onto" / "global"
    for calls, threads in product(("write", "fsync", "rename"), THREADS):
        for at in count(1):
            shutil.rmtree(onto.parent, ignore_errors=True)
            shutil.copytree(made.root / "before", onto.parent)
            if not made.killed(case, "./onto/global", calls, at, THREADS[threads]):
                break
            left = digests(onto) if onto.exists() else {}
            assert left in (old, new), f"{case.name}: half a global adapter at {calls} {at} {threads}"
            made.again(case, "./onto/global", left == new)
            assert digests(onto) == new, f"{case.name}: then other bytes, at {calls} {at} {threads}"
            assert [path.name for path in onto.parent.iterdir()] == ["global"], f"{case.name}: litter beside it"
            yield f"{case.name}: killed at {calls}, the {'new' if left == new else 'old'} one was there"


@dataclass(frozen=True)
class Repository:
    """A repository that is folded onto."""

    hub: LocalHub
    made: Bench
    case: Case

    def prepare(self) -> str:
        """The Hub as the case begins with it; the token of who may write there."""
        self.hub.reset()
        # Each killed upload leaves shards that every later one goes through: the writes to kill at would never end.
        shutil.rmtree(Path(self.made.client.run("result = hf.constants.HF_HOME")) / "xet", ignore_errors=True)
        token = self.hub.user("alice", orgs={"org": "write"})
        for step in self.case.before:
            assert self.made.fold(self.case, "org/global", step, token=token) == 0
        return token

    def commits(self) -> int:
        return len(self.hub.history("org/global")) if "org/global" in self.hub.state.repositories else 0

    def files(self) -> str:
        """One hash over what is published, but for the commits that it names and what was made from them."""
        found = hashlib.sha256()
        for name in sorted(self.hub.files("org/global")):
            if name not in ("README.md", "aggregation.json", ".gitattributes"):
                found.update(name.encode() + self.hub.read("org/global", name))
        ledger = json.loads(self.hub.read("org/global", "aggregation.json"))
        found.update(json.dumps(ledger | {"parent": None}).encode())
        return found.hexdigest()

    def expected(self) -> tuple[int, str, str, int]:
        """Commits before, the files before and after an undisturbed fold, and how many requests that sends."""
        token = self.prepare()
        before, old = self.commits(), self.files()
        self.hub.clear_calls()
        assert self.made.fold(self.case, "org/global", self.case.arrives, self.case.leaves, token) == 0
        return before, old, self.files(), len(self.hub.calls())

    def kill_at_request(self, moment: str, number: int, token: str) -> bool:
        """Kill a fold before the Hub acts on its n-th request, or before it has the answer."""
        ended: list[int] = []
        pid = self.made.root / "pid"
        pid.unlink(missing_ok=True)
        arguments = (self.case, "org/global", self.case.arrives, self.case.leaves, token)
        thread = threading.Thread(target=lambda: ended.append(self.made.fold(*arguments)))
        fault = NthFault("*", MOMENTS[moment], seconds=60.0, skip=number)
        self.hub.plan.faults.append(fault)
        thread.start()
        while thread.is_alive() and not fault.hits:
            time.sleep(0.01)
        if fault.hits:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        thread.join()
        self.hub.clear_faults()
        return ended == [-signal.SIGKILL]

    def kills(self) -> Iterator[str]:
        """Kill at every request and at every call; a line for each kill."""
        before, old, new, requests = self.expected()
        for moment, number in product(MOMENTS, range(requests)):
            token = self.prepare()
            if self.kill_at_request(moment, number, token):  # else it sent fewer than the first, which filled the cache
                yield self.judged(f"{moment} a request", token, before, old, new)
        for calls in CALLS if can_trace() else ():
            for at in count(1):
                token = self.prepare()
                if not self.made.killed(self.case, "org/global", calls, at, KILL, token):
                    break
                yield self.judged(f"at {calls}", token, before, old, new)

    def judged(self, moment: str, token: str, before: int, old: str, new: str) -> str:
        """What a killed fold has left is whole, and the same command again publishes once in all."""
        left, files = self.commits() - before, self.files()
        assert (left, files) in ((0, old), (1, new)), f"{self.case.name}, {moment}: {left} commits"
        self.made.again(self.case, "org/global", left == 1, token)
        assert self.commits() == before + 1, f"{self.case.name}, {moment}: {self.commits() - before} commits"
        assert self.files() == new, f"{self.case.name}, {moment}: then other bytes"
        return f"{self.case.name}, repository: killed {moment}, the {'new' if left else 'old'} one was there"


def main() -> None:
    ended: Counter[str] = Counter()
    if can_trace():
        with bench(dict(os.environ)) as made:
            for case in CASES:
                ended.update(folder_kills(made, case))
                print(json.dumps({how: n for how, n in ended.items() if how.startswith(case.name)}), flush=True)
    with LocalHub() as hub, tempfile.TemporaryDirectory() as home, bench(hub.env(cache=Path(home))) as made:
        for case in CASES[1:]:
            ended.update(Repository(hub, made, case).kills())
            name = f"{case.name}, repository"
            print(json.dumps({how: n for how, n in ended.items() if how.startswith(name)}), flush=True)
    print(f"{ended.total()} kills of folds, each made good by the same command")
    sys.exit(not ended)


if __name__ == "__main__":
    main()

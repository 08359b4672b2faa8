"""kill -9 before and after each request of a push: what is published is whole, and the same push again ends it, once.

And, by strace, at every system call that writes, makes durable, names or sends, of Xet's own threads too. All of it:
`python -m tests.publish.crash`, which prints its count. The test takes a sample.
"""

import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

from tests.hub.client import Client
from tests.hub.faults import Fault, Kind
from tests.hub.kills import CALLS, KILL, can_trace
from tests.hub.server import LocalHub
from tests.publish.conftest import client_folder
from tests.publish.forks import publish_at_once

REPO = {False: "org/a", True: "other/a"}  # of a push, and of a proposal
# A stall keeps the request from having any effect; a body that drips comes after it.
MOMENTS: Mapping[str, Kind] = {"before": "stall", "after": "drip"}


@dataclass
class NthFault(Fault):
    """A fault that lets `skip` requests pass first."""

    skip: int = 0

    def strikes(self, origin: str, method: str, path: str, route: str) -> bool:
        if not super().strikes(origin, method, path, route):
            return False
        self.skip -= 1
        return self.skip < 0


# What `tests.hub.kills` runs.
PUSH = """
def act():
    from pathlib import Path
    from huggingface_hub.utils import disable_progress_bars
    from lora_merge.publish.push import push
    from lora_merge.publish.repository import Target
    disable_progress_bars()
    os.environ["HF_TOKEN"] = token
    push(Path(folder), Target(repo), max_wait=20, tell=lambda line: None)
    os._exit(0)
"""


@dataclass(frozen=True)
class Case:
    """The moment of the kill: before or after the effect of the n-th request; or at the n-th of some system calls."""

    number: int
    moment: str
    create_pr: bool
    xet: bool

    def __str__(self) -> str:
        what, how = "proposal" if self.create_pr else "push", "Xet" if self.xet else "LFS"
        return f"{what}, {how}, {self.moment} {'request ' if self.moment in MOMENTS else ''}{self.number}"


@dataclass(frozen=True)
class Bench:
    """A Hub, the processes that fork publishers (with Xet and without), the adapter that they publish."""

    hub: LocalHub
    clients: Mapping[bool, Client]
    folder: Path

    def prepare(self, xet: bool) -> str:
        self.hub.reset(xet=xet)
        self.hub.create("other/a", {"README.md": "theirs"})
        return self.hub.user("alice", orgs={"org": "write"})

    def requests(self, *, create_pr: bool, xet: bool) -> int:
        """How many a push sends."""
        token = self.prepare(xet)
        assert self.push(token, create_pr, xet)["code"] == 0
        return len(self.hub.calls())

    def run(self, case: Case) -> str:
        """Kill the push at its moment, then push again; raises `AssertionError` where that is not enough."""
        token = self.prepare(case.xet)
        killed = self.killed_at_request(case, token) if case.moment in MOMENTS else self.killed_at_call(case, token)
        left = self.published(case.create_pr)
        assert left <= 1, f"{case}: {left} published by a push that was killed"
        again = self.push(token, case.create_pr, case.xet)
        assert again["code"] == 0, f"{case}: then {again}"
        assert self.published(case.create_pr) == 1, f"{case}: {self.published(case.create_pr)} published"
        self.require_whole(case)
        return f"{'killed' if killed else 'ended'}, {'' if left else 'nothing '}published before"

    def killed_at_request(self, case: Case, token: str) -> bool:
        self.pids.unlink(missing_ok=True)
        ended: list[object] = []
        thread = threading.Thread(target=lambda: ended.append(self.push(token, case.create_pr, case.xet)["code"]))
        fault = NthFault("*", MOMENTS[case.moment], seconds=60.0, skip=case.number)
        self.hub.plan.faults.append(fault)
        thread.start()
        while thread.is_alive() and not fault.hits:
            time.sleep(0.01)
        if fault.hits:
            os.kill(int(self.pids.read_text()), signal.SIGKILL)
        thread.join()
        self.hub.clear_faults()
        return ended == ["killed"]

    def killed_at_call(self, case: Case, token: str) -> bool:
        given = {"folder": str(self.folder), "repo": REPO[case.create_pr], "token": token, "log": os.devnull}
        code = self.clients[case.xet].run(PUSH + KILL, **given, calls=CALLS[case.moment], at=case.number)
        assert code in (0, -9), f"{case}: exit {code}"
        return bool(code)

    @property
    def pids(self) -> Path:
        return self.folder.parent / "pids"

    def push(self, token: str, create_pr: bool, xet: bool) -> dict[str, Any]:
        [ended] = publish_at_once(
            self.clients[xet], [self.folder], repo=REPO[create_pr], token=token, pids=self.pids, create_pr=create_pr
        )
        return ended

    def published(self, create_pr: bool) -> int:
        """Commits beside the one that made the repository; or proposals."""
        if create_pr:
            return len(self.hub.repository("other/a").discussions)
        return len(self.hub.history("org/a")) - 1 if "org/a" in self.hub.state.repositories else 0

    def require_whole(self, case: Case) -> None:
        revision = "refs/pr/1" if case.create_pr else "main"
        for path in self.folder.iterdir():
            assert self.hub.read(REPO[case.create_pr], path.name, revision) == path.read_bytes(), f"{case}: {path.name}"


def cases(made: Bench) -> Iterator[Case]:
    """Every request of a push, and of a proposal, with Xet and without."""
    for create_pr, xet in product((False, True), (True, False)):
        for request in range(made.requests(create_pr=create_pr, xet=xet)):
            yield from (Case(request, moment, create_pr, xet) for moment in MOMENTS)


def calls_struck(made: Bench, xet: bool, calls: str) -> Iterator[str]:
    """How a push ended that was killed at each of some system calls, until there are no more of them."""
    for at in count(1):
        how = made.run(Case(at, calls, False, xet))
        if not how.startswith("killed"):
            return
        yield f"at a call, {how}"


def bench() -> Iterator[Bench]:
    """A bench of its own, for the full run."""
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub:
        homes = {xet: hub.env(cache=Path(name, f"home-{xet}"), xet=xet) for xet in (True, False)}
        with Client(homes[True]) as with_xet, Client(homes[False]) as without:
            yield Bench(hub, {True: with_xet, False: without}, client_folder(Path(name, "adapter")))


def main() -> None:
    ended: Counter[str] = Counter()
    for made in bench():
        for case in cases(made):
            how = made.run(case)
            ended[how] += 1
            print(f"{case}: {how}", flush=True)
        for xet, calls in product((True, False), CALLS if can_trace() else ()):
            ended.update(calls_struck(made, xet, calls))
            print(f"{'Xet' if xet else 'LFS'}, {calls}: {dict(ended)}", flush=True)
    print(f"{ended.total()} kills, none left half a publication or two: {dict(ended)}")


if __name__ == "__main__":
    main()

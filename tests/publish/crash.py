"""kill -9 before and after each request of a push: what is published is whole, and the same push again ends it, once.

All of it: `python -m tests.publish.crash`, which prints its count. The test takes a sample.
"""

import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub.client import Client
from tests.hub.faults import Fault, Kind
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


@dataclass(frozen=True)
class Case:
    """The moment of the kill: before or after the effect of the n-th request."""

    request: int
    moment: str
    create_pr: bool

    def __str__(self) -> str:
        return f"{'proposal' if self.create_pr else 'push'}, {self.moment} request {self.request}"


@dataclass(frozen=True)
class Bench:
    """A Hub, the process that forks publishers, the adapter that they publish."""

    hub: LocalHub
    client: Client
    folder: Path

    def prepare(self) -> str:
        self.hub.reset()
        self.hub.create("other/a", {"README.md": "theirs"})
        return self.hub.user("alice", orgs={"org": "write"})

    def requests(self, *, create_pr: bool) -> int:
        """How many a push sends."""
        token = self.prepare()
        assert self.push(token, create_pr)["code"] == 0
        return len(self.hub.calls())

    def run(self, case: Case) -> str:
        """Kill the push at its moment, then push again; raises `AssertionError` where that is not enough."""
        token = self.prepare()
        self.pids.unlink(missing_ok=True)
        ended: list[object] = []
        thread = threading.Thread(target=lambda: ended.append(self.push(token, case.create_pr)["code"]))
        fault = NthFault("*", MOMENTS[case.moment], seconds=60.0, skip=case.request)
        self.hub.plan.faults.append(fault)
        thread.start()
        while thread.is_alive() and not fault.hits:
            time.sleep(0.01)
        if fault.hits:
            os.kill(int(self.pids.read_text()), signal.SIGKILL)
        thread.join()
        self.hub.clear_faults()
        left = self.published(case.create_pr)
        assert left <= 1, f"{case}: {left} published by a push that was killed"
        again = self.push(token, case.create_pr)
        assert again["code"] == 0, f"{case}: then {again}"
        assert self.published(case.create_pr) == 1, f"{case}: {self.published(case.create_pr)} published"
        self.require_whole(case)
        return f"{'killed' if ended == ['killed'] else 'ended'}, {'' if left else 'nothing '}published before"

    @property
    def pids(self) -> Path:
        return self.folder.parent / "pids"

    def push(self, token: str, create_pr: bool) -> dict[str, Any]:
        [ended] = publish_at_once(
            self.client, [self.folder], repo=REPO[create_pr], token=token, pids=self.pids, create_pr=create_pr
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
    """Every moment of a push, and of a proposal."""
    for create_pr in (False, True):
        for request in range(made.requests(create_pr=create_pr)):
            yield from (Case(request, moment, create_pr) for moment in MOMENTS)


def bench() -> Iterator[Bench]:
    """A bench of its own, for the full run."""
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub, Client(hub.env(cache=Path(name, "home"))) as client:
        yield Bench(hub, client, client_folder(Path(name, "adapter")))


def main() -> None:
    ended: Counter[str] = Counter()
    for made in bench():
        for case in cases(made):
            how = made.run(case)
            ended[how] += 1
            print(f"{case}: {how}", flush=True)
    print(f"{ended.total()} kills, none left half a publication or two: {dict(ended)}")


if __name__ == "__main__":
    main()

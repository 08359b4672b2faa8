"""Each request of a push x each fault: published whole by one commit, or a documented exit code; and then again, whole.

All of it: `python -m tests.publish.matrix`, which prints its count. The test takes a sample.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.hub.client import Client
from tests.hub.matrix import FAULTS, Case, cases_of, run_all
from tests.hub.server import LocalHub
from tests.publish.conftest import client_folder
from tests.sources.federation import impatient

# In seconds, of a read, of all waits of a call, and of the command: a sixtieth of the real ones.
TIMEOUT, MAX_WAIT, DEADLINE = 1.0, 5.0, 40.0

REQUESTS = {
    "who am I": "GET /api/whoami-v2",
    "branch": "GET /api/models/org/a/revision/*",
    "new repository": "POST /api/repos/create",
    "tree": "GET /api/models/org/a/tree/*",
    "preupload": "POST /api/models/org/a/preupload/*",
    "card": "POST /api/validate-yaml",
    "xet token": "GET */xet-write-token/*",
    "xet bytes": "POST /v1/xorbs/*",
    "xet shard": "POST /v1/shards",
    "lfs batch": "POST */info/lfs/objects/batch",
    "lfs bytes": "PUT /lfs/*",
    "commit": "POST /api/models/org/a/commit/*",
}
# What goes away by itself must be survived; a refusal or an hour's wait need not be.
SURVIVED_ONCE = {"503", "500", "429, wait 1 s", "HTML", "reset", "stall", "delay", "lost", "truncate", "short"}
CODES = {4, 5}
SEEDS = count()

PUSH = """
import contextlib, io, os, sys
import httpx2
from huggingface_hub.utils import _xet
from lora_merge.cli.main import main
from lora_merge.hub import client, session
from lora_merge.publish import persistence
_xet.XET_CONNECTION_INFO_CACHE.clear()
client.TIMEOUT, client.CALL_SECONDS = httpx2.Timeout(timeout), timeout
session.XET_SETTINGS |= {
    "HF_XET_CLIENT_READ_TIMEOUT": f"{timeout}s", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": f"{3 * timeout}s",
}
client.BACKOFF, persistence.FIRST_WAIT = (0.01, 0.02, 0.05, 0.1), 0.1
os.environ["HF_TOKEN"] = token
sys.argv = ["lora-merge", "push", folder, "org/a", "--max-wait", str(max_wait)]
code, out, err = 0, io.StringIO(), io.StringIO()
try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main()
except SystemExit as end:
    code = end.code or 0
result = [code, err.getvalue()]
"""


@dataclass(frozen=True)
class Bench:
    """A Hub, a process that pushes with Xet and one without, and the adapter that they push."""

    hub: LocalHub
    pushers: Mapping[bool, Client]
    folder: Path

    def run(self, case: Case) -> str:
        """How the case ended; raises `AssertionError` where it must not end so."""
        self.hub.reset(xet=case.xet)
        self.renew()
        token = self.hub.user("alice", orgs={"org": "write"})
        kind, options = FAULTS[case.fault]
        fault = self.hub.fault(REQUESTS[case.request], kind, times=case.times, **options)  # type: ignore[arg-type]
        began = time.monotonic()
        code, err = self.push(case.xet, token)
        took = time.monotonic() - began
        self.hub.clear_faults()
        assert took < DEADLINE, f"{case}: {took:.0f} s"
        if not fault.hits:
            return "not asked for"
        errors = "\n".join(line for line in err.splitlines() if line.startswith(("error: ", "hint: ", "Traceback")))
        assert "Traceback" not in errors, f"{case}: {err}"
        assert self.commits() <= 1, f"{case}: {self.commits()} commits"
        if self.commits():
            self.require_whole(case)
        if code == 0:
            assert self.commits() == 1, f"{case}: nothing was published: {err}"
            return "published"
        assert code in CODES, f"{case}: exit {code}: {err}"
        assert errors.startswith("error: "), f"{case}: {err}"
        assert not (case.times and case.fault in SURVIVED_ONCE), f"{case}: exit {code}: {err}"
        again, err = self.push(case.xet, token)
        assert (again, self.commits()) == (0, 1), f"{case}: then exit {again}, {self.commits()} commits: {err}"
        self.require_whole(case)
        return f"exit {code}, then published"

    def renew(self) -> None:
        """Other weights: a process remembers what it has sent over Xet, and would not send it again."""
        shutil.rmtree(self.folder)
        client_folder(self.folder, seed=next(SEEDS))

    def push(self, xet: bool, token: str) -> tuple[int, str]:
        given = {"folder": str(self.folder), "token": token, "timeout": TIMEOUT, "max_wait": MAX_WAIT}
        code, err = self.pushers[xet].run(PUSH, **given)
        return code, err

    def commits(self) -> int:
        """How many there are beside the first, which makes the repository."""
        there = "org/a" in self.hub.state.repositories
        return len(self.hub.history("org/a")) - 1 if there else 0

    def require_whole(self, case: Case) -> None:
        assert sorted(self.hub.files("org/a")) == sorted(["README.md", *(path.name for path in self.folder.iterdir())])
        for path in self.folder.iterdir():
            assert self.hub.read("org/a", path.name) == path.read_bytes(), f"{case}: {path.name}"


def cases() -> list[Case]:
    """The whole matrix."""
    return cases_of(REQUESTS)


def bench() -> Iterator[Bench]:
    """A bench of its own, for the full run."""
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        homes = {xet: impatient(hub.env(cache=Path(folder, f"home-{xet}"), xet=xet)) for xet in (True, False)}
        with Client(homes[True]) as with_xet, Client(homes[False]) as without:
            yield Bench(hub, {True: with_xet, False: without}, client_folder(Path(folder, "adapter")))


def main() -> None:
    sys.exit(not all(run_all(made, cases()) for made in bench()))


if __name__ == "__main__":
    main()

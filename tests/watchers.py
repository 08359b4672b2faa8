"""Several watchers of one global adapter on the local Hub, killed at random while clients arrive and are replaced.

At the end each client is in once, at its last commit, with the bytes of one merge; and no state in between has lost or
doubled anybody. All of it: `python -m tests.watchers [ROUNDS]`, which prints its counts. The test takes a small round.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.hub.client import Client
from tests.hub.server import LocalHub
from tests.sources.federation import adapter

ROUNDS = 10
GLOBAL = "org/global"
SAME = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")
PATIENCE = 120.0  # seconds for all to be in

# In a process that has imported everything: `job` in a fork of it; `result` is the fork's id.
FORK = """
import ctypes, os, signal, traceback
import lora_merge.watching.watch
import lora_merge.pipeline
import lora_merge.publish.push
import lora_merge.sources.hub
import huggingface_hub.utils
pid = os.fork()
if pid == 0:
    code = 1
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with whoever forked it
    try:
        huggingface_hub.utils.disable_progress_bars()
        os.environ["HF_TOKEN"] = token
        exec(job, {"log": log})
        code = 0
    except BaseException:
        with open(log, "a") as file:
            file.write(traceback.format_exc())
    os._exit(code)
result = pid
"""

ENDED = """
import os
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

WATCH = """
import json
from lora_merge.hub import client
from lora_merge.intake import Reading
from lora_merge.publish import persistence
from lora_merge.watching import pace
from lora_merge.watching.watch import watch
client.BACKOFF, persistence.FIRST_WAIT, pace.LONGEST, pace.CONFLICT = (0.02, 0.05, 0.1), 0.05, 0.3, 0.05
with open(log, "a") as file:
    def note(kind):
        print(json.dumps(kind), file=file, flush=True)
    for event in watch(["org/client-*"], "org/global", interval=0.05, reading=Reading(20, note)):
        note([type(event).__name__, getattr(event, "reason", None)])
"""

MERGE = """
from lora_merge import aggregate
aggregate(["org/client-*"], FOLDER, screening=None)
"""


@dataclass
class Bench:
    """A Hub, a process that forks watchers, and those that run now."""

    hub: LocalHub
    client: Client
    folder: Path
    token: str = ""
    running: dict[int, Path] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def fork(self, job: str, log: Path) -> int:
        pid: int = self.client.run(FORK, job=job, log=str(log), token=self.token)
        return pid

    def ended(self, pid: int) -> int:
        """How a fork ends."""
        code: int = self.client.run(ENDED, pid=pid)
        return code

    def start(self) -> None:
        """One more watcher."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        self.running[self.fork(WATCH, log)] = log

    def kill(self, pid: int) -> None:
        """kill -9 of a watcher, which must have been alive."""
        del self.running[pid]
        os.kill(pid, signal.SIGKILL)  # of a fork that has ended by itself too: it is nobody else's until it is reaped
        assert self.ended(pid) == -signal.SIGKILL, self.talk()

    def talk(self) -> str:
        """The logs of all watchers."""
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(self.folder.glob("log-*")))

    def round(self, seed: int, *, clients: int, newer: int, kills: int, watchers: int, faults: int) -> None:
        """Clients arrive and are replaced, watchers are killed; raises `AssertionError` where anything is wrong."""
        chance = random.Random(seed)
        self.hub.reset()
        self.token = self.hub.user("alice", orgs={"org": "write"})
        for log in self.folder.glob("log-*"):
            log.unlink()
        for _ in range(watchers):
            self.start()
        for deed in _deeds(chance, clients, newer, kills, faults):
            time.sleep(chance.uniform(0, 0.3))
            self.do(deed, chance)
        self.wait_until_all_are_in()
        for pid in list(self.running):
            self.kill(pid)
        self.count()
        self.require_one_merge()
        self.require_sound_history()

    def do(self, deed: str, chance: random.Random) -> None:
        kind, _, repo = deed.partition(" ")
        if kind == "kill":
            self.kill(chance.choice(list(self.running)))
            self.start()
            self.counts["kills"] += 1
        elif kind == "fault":
            fault: Any = chance.choice(["lost", "status", "reset"])
            self.hub.fault("POST /api/models/{id}/commit/{rev}", fault)
        else:
            files = adapter(repo, num_examples=chance.randint(5, 15), layers=2, seed=chance.randrange(1 << 30))
            (self.hub.commit if kind == "replace" else self.hub.create)(repo, files)
            self.counts[kind] += 1

    def heads(self) -> dict[str, str]:
        return {repo: self.hub.head(repo) for repo in self.hub.state.repositories if "client-" in repo}

    def ledger(self, commit: str = "main") -> dict[str, Any]:
        ledger: dict[str, Any] = json.loads(self.hub.read(GLOBAL, "aggregation.json", commit))
        return ledger

    def wait_until_all_are_in(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.all_are_in():
            assert time.monotonic() < until, f"not all came in: {self.talk()}"
            time.sleep(0.05)

    def all_are_in(self) -> bool:
        if GLOBAL not in self.hub.state.repositories or "aggregation.json" not in self.hub.files(GLOBAL):
            return False
        return {each["source"]: each["commit"] for each in self.ledger()["contributions"]} == self.heads()

    def count(self) -> None:
        """What the watchers noted."""
        for log in self.folder.glob("log-*"):
            for line in log.read_text().splitlines():
                assert line.startswith(("[", '"')), self.talk()
                if line.startswith("["):
                    kind, reason = json.loads(line)
                    assert kind != "Refusal", reason
                    self.counts["conflicts"] += kind == "Conflict"

    def require_one_merge(self) -> None:
        """The bytes are those of one merge of the clients as they are now."""
        output = self.folder / "one"
        log = self.folder / "log-one"
        code = self.ended(self.fork(MERGE.replace("FOLDER", repr(str(output))), log))
        assert code == 0, log.read_text()
        for name in SAME:
            assert self.hub.read(GLOBAL, name) == (output / name).read_bytes(), f"{name} is not that of one merge"
        for path in (*output.iterdir(),):
            path.unlink()
        output.rmdir()

    def require_sound_history(self) -> None:
        """No commit lost or doubled anybody, and none did nothing."""
        commits = [commit.oid for commit in self.hub.history(GLOBAL)][::-1]
        states = [self.ledger(oid)["contributions"] for oid in commits if self.has_ledger(oid)]
        for state in states:
            sources = Counter(each["source"] for each in state)
            self.counts["doubled"] += sum(number - 1 for number in sources.values())
        for before, after in pairwise(states):
            was, now = ({each["source"]: each["commit"] for each in state} for state in (before, after))
            self.counts["lost"] += len(was.keys() - now.keys())
            self.counts["doubled"] += was == now
        self.counts["commits"] += len(states)
        assert not self.counts["lost"] + self.counts["doubled"], dict(self.counts)

    def has_ledger(self, commit: str) -> bool:
        return "aggregation.json" in self.hub.files(GLOBAL, commit)


def _deeds(chance: random.Random, clients: int, newer: int, kills: int, faults: int) -> list[str]:
    """What happens, in an order: a client is there before it is replaced."""
    repos = [f"org/client-{number}" for number in range(clients)]
    deeds = [*(f"arrive {repo}" for repo in repos), *["kill"] * kills, *["fault"] * faults]
    chance.shuffle(deeds)
    for _ in range(newer):
        repo = chance.choice(repos)
        deeds.insert(chance.randint(deeds.index(f"arrive {repo}") + 1, len(deeds)), f"replace {repo}")
    return deeds


@contextmanager
def bench(hub: LocalHub, folder: Path) -> Iterator[Bench]:
    """Watchers share a cache, as on one machine. Whoever still runs at the end is killed."""
    with Client(hub.env(cache=folder / "home")) as client:
        made = Bench(hub, client, folder)
        try:
            yield made
        finally:
            for pid in made.running:
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub, bench(hub, Path(name)) as made:
        for seed in range(rounds):
            made.round(seed, clients=8, newer=5, kills=8, watchers=3, faults=2)
            print(f"round {seed + 1}: {_said(made.counts)}", flush=True)
    print(f"{rounds} rounds of 3 watchers, all ended with the bytes of one merge: {_said(made.counts)}")


def _said(counts: Counter[str]) -> str:
    names = {"kills": "kills", "arrive": "arrivals", "replace": "replacements", "commits": "commits"}
    told = [f"{counts[name]} {word}" for name, word in names.items()]
    return ", ".join([*told, *(f"{counts[name]} {name}" for name in ("conflicts", "lost", "doubled"))])


if __name__ == "__main__":
    main()

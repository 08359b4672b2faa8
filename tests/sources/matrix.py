"""Each request of a pull x each fault: the right bytes, or a documented exit code in a sentence, and in time.

All of it: `python -m tests.sources.matrix`, which prints its count. The test takes a sample.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import digests
from tests.hub.client import Client
from tests.hub.matrix import FAULTS, Case, cases_of, run_all
from tests.hub.server import LocalHub
from tests.sources.federation import Puller, impatient, publish

CLIENTS = 2
TIMEOUT, MAX_WAIT, DEADLINE = 1.0, 2.0, 40.0  # seconds: of a read, of all waits of a call, of the command

REQUESTS = {
    "listing": "GET /api/models",
    "info": "GET /api/models/org/client-1/revision/*",
    "config": "GET /org/client-1/resolve/*/adapter_config.json",
    "statement": "GET /org/client-1/resolve/*/lora_merge.json",
    "weights": "GET /org/client-1/resolve/*/adapter_model.safetensors",
    "metadata": "HEAD /org/client-1/resolve/*",
    "bytes": "GET /lfs/*",
    "xet token": "GET */xet-read-token/*",
    "xet reconstruction": "GET /v1/reconstructions/*",
    "xet bytes": "GET /xorbs/*",
}
# What goes away by itself must be survived; a refusal or an hour's wait need not be.
SURVIVED_ONCE = {"503", "500", "429, wait 1 s", "HTML", "reset", "stall", "delay", "lost", "truncate", "short", "flip"}
# Two parts of an answer have no hash and no length that is known: they are believed, or refused.
BELIEVED = {("listing", "flip"), ("info", "flip")}
CODES = {3, 4, 5}


@dataclass
class Bench:
    """A Hub with two clients, a process with Xet and one without, and what they make when nothing goes wrong."""

    hub: LocalHub
    pullers: Mapping[bool, Puller]
    expected: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        self.hub.reset()
        publish(self.hub, CLIENTS)
        self.expected = {}

    def run(self, case: Case) -> str:
        """How the case ended; raises `AssertionError` where it must not end so."""
        puller = self.pullers[case.xet]
        if not self.expected:
            self.expect(puller)
        kind, options = FAULTS[case.fault]
        self.hub.clear_faults()
        fault = self.hub.fault(REQUESTS[case.request], kind, times=case.times, **options)  # type: ignore[arg-type]
        began = time.monotonic()
        code, err = self.pull(puller)
        took = time.monotonic() - began
        self.hub.clear_faults()
        assert took < DEADLINE, f"{case}: {took:.0f} s"
        if not fault.hits:
            return "not asked for"
        assert "Traceback" not in err, f"{case}: {err}"
        assert not [path for path in puller.cached if path.name.endswith(".incomplete")], case
        if code == 0:
            assert digests(puller.folder / "global") == self.expected, f"{case}: other bytes"
            return "the right bytes"
        assert code in CODES, f"{case}: exit {code}: {err}"
        assert err.startswith("error: "), f"{case}: {err}"
        assert not (puller.folder / "global").exists(), case
        survived = case.times and case.fault in SURVIVED_ONCE and (case.request, case.fault) not in BELIEVED
        assert not survived, f"{case}: exit {code}: {err}"
        return f"exit {code}"

    def expect(self, puller: Puller) -> None:
        """Note what is made when nothing goes wrong."""
        code, err = self.pull(puller)
        assert code == 0, err
        self.expected = digests(puller.folder / "global")

    def clear(self, puller: Puller) -> None:
        """No cache, no output."""
        puller.forget()
        shutil.rmtree(puller.folder / "global", ignore_errors=True)

    def pull(self, puller: Puller) -> tuple[int, str]:
        """Merge with an empty cache: the exit code, and what was said on stderr beside waits and warnings."""
        self.clear(puller)
        ran = puller("org/client-*", "-o", "global", "--max-wait", str(MAX_WAIT), timeout=TIMEOUT)
        errors = [line for line in ran.err.splitlines() if not line.startswith("warning: ")]
        return ran.code, "\n".join(line for line in errors if "trying again" not in line)


def cases() -> list[Case]:
    """The whole matrix."""
    return cases_of(REQUESTS)


def bench() -> Iterator[Bench]:
    """A bench of its own, for the full run."""
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        pullers = {}
        for xet in (True, False):
            home, work = Path(folder, f"home-{xet}"), Path(folder, f"work-{xet}")
            work.mkdir()
            pullers[xet] = Puller(Client(impatient(hub.env(cache=home, xet=xet))), home, work)
        made = Bench(hub, pullers)
        made.prepare()
        yield made
        for puller in pullers.values():
            puller.client.close()


def main() -> None:
    sys.exit(not all(run_all(made, cases()) for made in bench()))


if __name__ == "__main__":
    main()

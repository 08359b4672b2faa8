"""kill -9 at each step of a pull and its merge; then the same command again gives the same bytes and leaves no litter.

A step is a file opened for writing, a rename, a link, a removal, a lock, and before and after each fsync and request;
and, by strace, every system call that writes, makes durable, names or sends, of Xet's own threads too. All of them:
`python -m tests.sources.crash`, which prints its counts. The test takes a sample.
"""

import os
import random
import sys
from collections import Counter
from itertools import product

from tests.conftest import digests
from tests.hub.kills import CALLS, KILL, can_trace
from tests.sources.federation import Puller
from tests.sources.matrix import Bench, bench

DIE = """
import os, sys
pid = os.fork()
if pid == 0:
    from lora_merge.cli.main import main
    from lora_merge.hub.client import HubClient
    steps = 0
    def step():
        global steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), 9)
    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.symlink", "os.link", "os.remove", "os.mkdir", "fcntl.flock"):
            step()
    honest = HubClient._send_once
    def send(self, *arguments, **options):
        step()
        answer = honest(self, *arguments, **options)
        step()
        return answer
    HubClient._send_once = send
    durable = os.fsync
    def fsync(descriptor):
        step()
        durable(descriptor)
        step()
    os.fsync = fsync
    os.chdir(folder)
    sys.argv = ["lora-merge", "aggregate", "org/client-*", "-o", "global", "-q", "--workers", "1"]
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.addaudithook(hook)
    try:
        main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(1)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


# What `tests.hub.kills` runs: the same, without the hooks.
PULL = """
def act():
    import sys
    from lora_merge.cli.main import main
    os.chdir(folder)
    sys.argv = ["lora-merge", "aggregate", "org/client-*", "-o", "global", "-q", "--workers", "1"]
    main()
"""


def die(made: Bench, xet: bool, at: int, calls: str = "") -> bool:
    """Pull and merge with an empty cache, killed at a step; then again. False where there are fewer steps.

    Args:
        at: the number of the step.
        calls: a step is one of these system calls, by its name in `CALLS`; else one of Python.
    """
    puller, where = made.pullers[xet], f"{'Xet' if xet else 'LFS'}, {calls or 'step'} {at}"
    made.clear(puller)
    given = {"folder": puller.folder, "at": at}
    if calls:
        code = puller.client.run(PULL + KILL, **given, calls=CALLS[calls], log=os.devnull)
    else:
        code = puller.client.run(DIE, **given)
    assert code in (0, -9), f"{where}: exit {code}"
    if (puller.folder / "global").exists():
        assert digests(puller.folder / "global") == made.expected, f"{where}: half an output"
    ran = puller("org/client-*", "-o", "global", "--force")
    assert ran.code == 0, f"{where}: then {ran.err}"
    assert digests(puller.folder / "global") == made.expected, f"{where}: then other bytes"
    assert litter(puller) == [], where
    return bool(code)


def litter(puller: Puller) -> list[str]:
    """What a killed run could have left."""
    left = [*puller.home.glob("hub/models--*/blobs/*.incomplete"), *puller.home.glob("hub/models--*/blobs/tmp_*")]
    return [str(path) for path in [*left, *puller.folder.glob(".global*")]]


def main() -> None:
    ended: Counter[str] = Counter()
    for made in bench():
        made.expect(made.pullers[False])
        for xet, calls in product((True, False), ("", *(CALLS if can_trace() else ()))):
            at = 1
            while die(made, xet, at, calls):
                ended[f"{'Xet' if xet else 'LFS'} {calls or 'step'}"] += 1
                at += 1
            print(dict(ended), flush=True)
    print(f"{ended.total()} kills, each made good by the same command: {dict(ended)}")
    sys.exit(not ended)


def sample(made: Bench, count: int, seed: int) -> int:
    """`count` kills at random steps; how many struck."""
    made.expect(made.pullers[False])
    draw = random.Random(seed)
    struck = sum(die(made, draw.random() < 0.5, draw.randrange(1, 120)) for _ in range(count))
    if can_trace():
        struck += die(made, False, draw.randrange(1, 8), "write") + die(made, False, draw.randrange(1, 7), "fsync")
    return struck


if __name__ == "__main__":
    main()

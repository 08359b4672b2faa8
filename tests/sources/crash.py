"""kill -9 at each step of a pull and its merge; then the same command again gives the same bytes and leaves no litter.

A step is a file opened for writing, a rename, a link, a removal, a lock, or a request, before it and after its answer.
All of them: `python -m tests.sources.crash`, which prints its count. The test takes a sample.
"""

import random
import sys
from collections import Counter

from tests.conftest import digests
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


def die(made: Bench, xet: bool, at: int) -> bool:
    """Pull and merge with an empty cache, killed at step `at`; then again. False where there are fewer steps."""
    puller = made.pullers[xet]
    made.clear(puller)
    code = puller.client.run(DIE, folder=puller.folder, at=at)
    assert code in (0, -9), f"{'Xet' if xet else 'LFS'}, step {at}: exit {code}"
    if (puller.folder / "global").exists():
        assert digests(puller.folder / "global") == made.expected, f"step {at}: half an output"
    ran = puller("org/client-*", "-o", "global", "--force")
    assert ran.code == 0, f"step {at}: then {ran.err}"
    assert digests(puller.folder / "global") == made.expected, f"step {at}: then other bytes"
    assert litter(puller) == [], f"step {at}"
    return bool(code)


def litter(puller: Puller) -> list[str]:
    """What a killed run could have left."""
    left = [*puller.home.glob("hub/models--*/blobs/*.incomplete"), *puller.home.glob("hub/models--*/blobs/tmp_*")]
    return [str(path) for path in [*left, *puller.folder.glob(".global*")]]


def main() -> None:
    ended: Counter[str] = Counter()
    for made in bench():
        made.expect(made.pullers[False])
        for xet in (True, False):
            at = 1
            while die(made, xet, at):
                ended["Xet" if xet else "LFS"] += 1
                at += 1
    print(f"{ended.total()} kills, each made good by the same command: {dict(ended)}")
    sys.exit(not ended)


def sample(made: Bench, count: int, seed: int) -> int:
    """`count` kills at random steps; how many struck."""
    made.expect(made.pullers[False])
    draw = random.Random(seed)
    return sum(die(made, draw.random() < 0.5, draw.randrange(1, 120)) for _ in range(count))


if __name__ == "__main__":
    main()

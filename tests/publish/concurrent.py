"""Eight publishers at once into one repository, many rounds: each is in the history once, or was told of a conflict.

All of it: `python -m tests.publish.concurrent [ROUNDS]`, which prints its counts. The test takes a few.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.hub.client import Client
from tests.hub.server import LocalHub
from tests.publish.conftest import client_folder
from tests.publish.forks import publish_at_once

PUBLISHERS, ROUNDS = 8, 50
WEIGHTS = "adapter_model.safetensors"


def one_round(hub: LocalHub, client: Client, folders: Sequence[Path], pids: Path) -> Counter[str]:
    """All publish at once into a repository that may not be there yet; raises `AssertionError` where one is lost."""
    token = hub.user("alice", orgs={"org": "write"})
    ended = publish_at_once(client, folders, repo="org/a", token=token, pids=pids)
    unexpected = [each for each in ended if each["code"] not in (0, 6)]
    assert not unexpected, unexpected
    published = {each["commit"]: folder for each, folder in zip(ended, folders, strict=True) if each["code"] == 0}
    history = [commit.oid for commit in hub.history("org/a")][:-1]  # the last one made the repository
    assert sorted(published) == sorted(history), f"{len(published)} say that they published, {len(history)} commits"
    assert published, "nobody has published"
    for commit, folder in published.items():
        require_whole(hub, commit, folder)
    return Counter("published" if each["code"] == 0 else "conflict" for each in ended)


def require_whole(hub: LocalHub, commit: str, folder: Path) -> None:
    """Nobody's file lies in somebody else's commit."""
    for path in folder.iterdir():
        assert hub.read("org/a", path.name, commit) == path.read_bytes(), f"{commit}: {path.name}"


def adapters(folder: Path, count: int = PUBLISHERS) -> list[Path]:
    """The adapters of as many clients, all different."""
    return [client_folder(folder / f"client-{number}", seed=number) for number in range(count)]


def environment(hub: LocalHub, folder: Path, *, xet: bool) -> Mapping[str, str]:
    """Of the process that forks; the publishers share a cache, as on one machine."""
    return hub.env(cache=folder / f"home-{xet}", xet=xet)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub:
        folder = Path(name)
        folders = adapters(folder)
        for xet in (True, False):
            with Client(environment(hub, folder, xet=xet)) as client:
                for _ in range(rounds // 2):
                    hub.reset(xet=xet)
                    ended += one_round(hub, client, folders, folder / "pids")
    print(f"{rounds // 2 * 2} rounds of {PUBLISHERS}: {dict(ended)}; none lost, none twice")


if __name__ == "__main__":
    main()
